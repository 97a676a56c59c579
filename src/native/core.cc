#include "core.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__)
#define BN_X86
#include <cpuid.h>
#endif

namespace bn {

namespace {

// Memory of the calling thread, which grows to what a pass needs, and shrinks where that is much.
class Arena {
public:
    char* take(int64_t size) {
        if (size > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset((char*)std::malloc(size + 64));
            if (!memory_) throw std::bad_alloc();
            size_ = size;
        }
        return memory_.get() + (-(uintptr_t)memory_.get() & 63);
    }
    void trim() {
        if (size_ > MOST_KEPT) memory_.reset(), size_ = 0;
    }

private:
    static constexpr int64_t MOST_KEPT = 1 << 20;
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    int64_t size_ = 0;
};
thread_local Arena arena;

// Values of a channel, at least, for sums in float32.
constexpr int64_t FEW = 256;

struct alignas(64) Taken {
    std::atomic<int64_t> tiles{0};
};

// One call: its plan, its job and its memory.
class Passes {
public:
    // The last of `data` is what is written; the first is read, and maybe others between.
    Passes(const Call& call, std::initializer_list<const Operand*> data, int part_rows)
        : call_(call) {
        Shapes shapes = {call.ndim, call.shape, call.channel_axes, 0, 0, {}, 0};
        auto add = [&](const Operand& o) {
            job.operand[shapes.operands] = o.data;
            shapes.strides[shapes.operands] = o.strides;
            return shapes.operands++;
        };
        for (const Operand* o : data) add(*o);
        job.residual = call.residual.data ? add(call.residual) : 0;
        job.g = call.g.data ? add(call.g) : 0;
        shapes.data = shapes.operands;
        job.weights = call.weights.data ? add(call.weights) : 0;
        job.weight_dtype = call.weights.data ? call.weights.dtype : NONE;
        job.dtype = (*data.begin())->dtype;
        job.activation = call.activation;
        job.slope = call.slope;
        job.from_y = call.from_y;
        shapes.itemsize = ITEMSIZES[job.dtype];
        make_plan(shapes, plan);
        const char* target = job.operand[data.size() - 1];
        in_place_ = false;
        for (int k = 0; k < shapes.data; ++k)
            in_place_ |= k != (int)data.size() - 1 && job.operand[k] == target;

        job.plan = &plan;
        job.eps = call.eps;
        job.gamma = call.gamma;
        job.beta = call.beta;
        job.running_mean = call.running_mean;
        job.running_var = call.running_var;
        job.r_max = call.r_max;
        job.d_max = call.d_max;
        job.count = call.count;
        job.mean = call.mean;
        job.var = call.var;
        job.low = call.low;
        // Of few values, roundings do not average out.
        job.fast = !call.exact && job.dtype != DOUBLE && !call.weights.data && plan.values >= FEW;
        job.pivots_given = false;
        job.row = (plan.channel_count + 31) / 16 * 16;
        threads_ = plan.alone ? 1 : std::max(1, call.thread_count);
        int64_t blocks = std::max(plan.grid.blocks(), int64_t(1));
        int64_t parts = blocks * part_rows * job.row * 8, vectors = VECTORS * job.row * 8;
        int64_t shares = threads_ * sizeof(Taken);
        scratch_bytes_ =
            (std::max((11 + VECTORS) * plan.padded, MAX_OPERANDS * SEGMENT) * 8 + 63) / 64 * 64;
        char* memory = arena.take(parts + vectors + shares + threads_ * scratch_bytes_);
        job.parts = (double*)memory;
        job.vectors = memory + parts;
        taken_ = (Taken*)(memory + parts + vectors);
        scratch_ = memory + parts + vectors + shares;
    }
    ~Passes() { arena.trim(); }

    void run(Pass pass, const Grid& grid) {
        job.pass = pass;
        job.grid = &grid;
        bool writes = pass != MOMENTS && pass != GRAD_SUMS;
        job.streaming = writes && grid.streaming && !in_place_;
        backwards_ = pass == OUTPUT || pass == GRAD_INPUT;  // what a pass before it left in the cache
        tiles_ = grid.tiles();
        if (!grid.channels) return;
        int count = (int)std::min<int64_t>(threads_, tiles_);
        shares_ = count;
        for (int i = 0; i < count; ++i) new (taken_ + i) Taken;
        auto task = [](void* context, int index) { ((Passes*)context)->work(index); };
        if (count > 1) call_.threads->run(count, task, this);
        else work(0);
    }

    Plan plan;
    Job job;

private:
    // Take tiles: of one's own share, then of others'. A share is the same from pass to pass and from call
    // to call, so that a thread finds in its cache what it left there: a second pass goes backwards.
    void work(int me) {
        for (int j = 0; j < shares_; ++j) {
            int share = (me + j) % shares_;
            int64_t first = share * tiles_ / shares_, end = (share + 1) * tiles_ / shares_;
            for (;;) {
                if (taken_[share].tiles.load(std::memory_order_relaxed) >= end - first) break;
                int64_t i = taken_[share].tiles.fetch_add(1, std::memory_order_relaxed);
                if (i >= end - first) break;
                int64_t tile = backwards_ ? end - 1 - i : first + i;
                call_.kernels->tile[job.dtype](job, tile, scratch_ + me * scratch_bytes_);
            }
        }
    }

    const Call& call_;
    int threads_, shares_ = 1;
    int64_t tiles_ = 0, scratch_bytes_;
    bool backwards_ = false, in_place_;
    Taken* taken_;
    char* scratch_;
};

void moments(const Call& call, Passes& p) {
    p.run(MOMENTS, p.plan.grid);
    if (call.kernels->join_moments(p.job)) {  // with better pivots, and in float64
        p.job.pivots_given = true;
        p.job.fast = false;
        p.run(MOMENTS, p.plan.grid);
        call.kernels->join_moments(p.job);
    }
}

void gradient_sums(const Call& call, Passes& p) {
    p.run(GRAD_SUMS, p.plan.grid);
    if (call.kernels->join_sums(p.job)) {  // in float64
        p.job.fast = false;
        p.run(GRAD_SUMS, p.plan.grid);
        call.kernels->join_sums(p.job);
    }
}

// The two rows of sums, which are 0 where there are no values.
void copy_sums(const Passes& p, double* first, double* second) {
    double* to[2] = {first, second};
    for (int k = 0; k < 2; ++k)
        if (p.plan.values) std::copy_n(p.job.part(0, 2, k), p.plan.channel_count, to[k]);
        else std::fill_n(to[k], p.plan.channel_count, 0.0);
}

}  // namespace

bool forward(const Call& call, const Operand& x, const Operand& y, Wanted wanted, double fewest) {
    // With y = x the plan is a forward pass's, and so are the results.
    Passes p(call, {&x, wanted == Wanted::ALL ? &y : &x}, 4);
    if (!p.plan.values) {
        for (double* v : {call.count, call.mean, call.var, call.low})
            std::fill_n(v, p.plan.channel_count, 0.0);
        return true;
    }
    if (wanted == Wanted::ALL && p.plan.has_whole && !call.weights.data) {
        p.run(FORWARD, p.plan.whole);
        return true;
    }
    moments(call, p);
    if (wanted == Wanted::STATISTICS) return true;
    if (call.weights.data)  // looked at before y is written
        for (int64_t c = 0; c < p.plan.channel_count; ++c)
            if (!(call.count[c] >= fewest)) return false;
    call.kernels->join_forward(p.job);
    p.run(OUTPUT, p.plan.grid);
    return true;
}

void inference(const Call& call, const Operand& x, const Operand& y) {
    Passes p(call, {&x, &y}, 0);
    if (!p.plan.values) return;
    call.kernels->join_forward(p.job);
    p.run(OUTPUT, p.plan.sweep);
}

void backward(
    const Call& call, const Operand& dy, const Operand& x, const Operand& dx, double* dgamma,
    double* dbeta) {
    Passes p(call, {&dy, &x, &dx}, 2);
    if (p.plan.values && p.plan.has_whole) {
        p.run(BACKWARD, p.plan.whole);
    } else if (p.plan.values) {
        call.kernels->join_given(p.job);
        gradient_sums(call, p);
        call.kernels->join_backward(p.job);
        p.run(GRAD_INPUT, p.plan.grid);
    }
    copy_sums(p, dgamma, dbeta);
}

namespace {

void set_vectors(Passes& p, const void* const* vectors, int count) {
    int64_t size = p.job.dtype == DOUBLE ? 8 : 4;
    for (int k = 0; k < count; ++k)
        std::memcpy((char*)p.job.vectors + k * p.job.row * size, vectors[k], p.plan.channel_count * size);
}

}  // namespace

void scale_shift(const Call& call, const Operand& x, const void* const* m_a_b, const Operand& y) {
    Passes p(call, {&x, &y}, 0);
    if (!p.plan.values) return;
    set_vectors(p, m_a_b, 3);
    p.run(OUTPUT, p.plan.sweep);
}

void activation_gradient(
    const Call& call, const Operand& dy, const Operand& x, const void* const* m_a_b, const Operand& g) {
    Passes p(call, {&dy, &x, &g}, 0);
    if (!p.plan.values) return;
    set_vectors(p, m_a_b, 3);
    p.run(ACTIVATION_GRADIENT, p.plan.sweep);
}

void grad_sums(
    const Call& call, const Operand& dy, const Operand& x, const void* m, double* sum_dy, double* sum_dy_d) {
    // With dx = x, as in a backward pass.
    Passes p(call, {&dy, &x, &x}, 2);
    if (p.plan.values) {
        set_vectors(p, &m, 1);
        gradient_sums(call, p);
    }
    copy_sums(p, sum_dy, sum_dy_d);
}

void grad_input(
    const Call& call, const Operand& dy, const Operand& x, const void* const* m_a_b_c,
    const Operand& dx) {
    Passes p(call, {&dy, &x, &dx}, 0);
    if (!p.plan.values) return;
    set_vectors(p, m_a_b_c, 4);
    p.run(GRAD_INPUT, p.plan.sweep);
}

// Instruction sets.

namespace baseline { extern const Kernels KERNELS; }
#ifdef BN_X86
namespace avx2 { extern const Kernels KERNELS; }
namespace avx512 { extern const Kernels KERNELS; }
#endif

namespace {

#ifdef BN_X86
struct Processor {
    bool avx2 = false, avx512 = false;
};

// By cpuid: __builtin_cpu_supports is of a library that Clang does not link on Windows.
Processor processor() {
    Processor found;
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
    bool has = (c & bit_AVX) && (c & bit_FMA) && (c & bit_F16C);
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));  // registers that the system saves
    if (!has || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    found.avx2 = (saved & 0x06) == 0x06 && (b & bit_AVX2);
    found.avx512 = (saved & 0xe6) == 0xe6 && (b & bit_AVX512F) && (b & bit_AVX512BW)
        && (b & bit_AVX512VL) && (b & bit_AVX512DQ);
    return found;
}
#endif

struct Isa {
    const Kernels* kernels;
    bool (*present)();
};

const Isa ISAS[] = {
    {&baseline::KERNELS, [] { return true; }},
#ifdef BN_X86
    {&avx2::KERNELS, [] { return processor().avx2; }},
    {&avx512::KERNELS, [] { return processor().avx512; }},
#endif
};

}  // namespace

const char* const* instruction_sets() {
    static const char* names[4];
    static const int count = [] {
        int n = 0;
        for (const Isa& isa : ISAS)
            if (isa.present()) names[n++] = isa.kernels->name;
        return n;
    }();
    (void)count;
    return names;
}

const Kernels* kernels_for(const char* name) {
    const Kernels* found = nullptr;
    for (const Isa& isa : ISAS)
        if (isa.present() && (!name || !std::strcmp(name, isa.kernels->name))) found = isa.kernels;
    return found;
}

}  // namespace bn
