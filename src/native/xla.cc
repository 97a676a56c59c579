// Handlers of XLA's foreign-function interface: arrays where they lie, row-major, and no Python.
//
// Optional arguments are those whose bits are set in the attribute `given`, in the order of the bits. All is
// checked here again: a call may come from an exported program.

#include "xla.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core.h"
#include "values.h"
#include "xla_abi.h"

namespace bn::xla {

namespace {

std::atomic<const Kernels*> kernels{nullptr};
std::atomic<int> most_threads{1};

enum Given { WEIGHTS = 1, GAMMA = 2, BETA = 4, LOW = 8, RESIDUAL = 16, Y = 32, GRADIENT = 64 };

struct Invalid {
    std::string message;
};

// The threads of XLA, on one of which a handler may itself run: tasks that have not begun are never waited
// for. What is left of a call by then lives until the last of its tasks has looked at it.
class XlaThreads final : public Threads {
public:
    explicit XlaThreads(const Call& call) : api_(*call.api), context_(call.context) {}

    // How many there are; 0 where the context has none.
    int count() const {
        int64_t n = 0;
        ThreadCountArguments a = {sizeof a, nullptr, context_, &n};
        return succeeded(api_.thread_count(&a)) ? (int)n : 0;
    }

    void run(int count, void (*task)(void*, int), void* context) override {
        auto* shared = new Shared{task, context, count};
        for (int k = 1; k < count; ++k) {
            ScheduleArguments a = {sizeof a, nullptr, context_, &begin, shared};
            if (!succeeded(api_.schedule(&a))) shared->leave();  // of the task that will not come
        }
        task(context, 0);
        // No task begins any more; those that have begun are at their last tiles.
        uint32_t state = shared->state.fetch_or(CLOSED) | CLOSED;
        for (int i = 0; state != CLOSED; ++i) {
            if (i < SPINS) std::this_thread::yield();
            else shared->state.wait(state);
            state = shared->state.load(std::memory_order_acquire);
        }
        shared->leave();
    }

private:
    static constexpr uint32_t CLOSED = 1, RUNNING = 2;  // a bit, and a count of tasks that run
    static constexpr int SPINS = 64;

    struct Shared {
        void (*task)(void*, int);
        void* context;
        std::atomic<int> owners;  // the caller, and tasks that are to come or run
        std::atomic<int> next{1};
        std::atomic<uint32_t> state{0};

        Shared(void (*task)(void*, int), void* context, int owners)
            : task(task), context(context), owners(owners) {}
        void leave() {
            if (owners.fetch_sub(1) == 1) delete this;
        }
    };

    static void begin(void* data) {
        auto* shared = (Shared*)data;
        if (!(shared->state.fetch_add(RUNNING) & CLOSED))
            shared->task(shared->context, shared->next.fetch_add(1));
        shared->state.fetch_sub(RUNNING);
        shared->state.notify_all();
        shared->leave();
    }

    bool succeeded(Error* error) const {
        if (!error) return true;
        DestroyArguments a = {sizeof a, nullptr, error};
        api_.destroy_error(&a);
        return false;
    }

    const Api& api_;
    Context* context_;
};

DType dtype_of(const Buffer& b) {
    switch (b.type) {
        case PRED: return MASK;
        case F16: return HALF;
        case BF16: return BFLOAT16;
        case F32: return SINGLE;
        case F64: return DOUBLE;
        default: return NONE;
    }
}

// XLA takes the memory of large results anew from the system in each run. To get it in pages of 4 KB may take
// longer than a pass (45 ms for 100 MB where a write of it takes 10). As NumPy does, ask for pages of 2 MB.
void ask_for_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t size) {
#ifdef __linux__
    constexpr int64_t PAGE = 4096, LARGE = 1 << 22;
    if (size < LARGE) return;
    int64_t before = -(uintptr_t)data & (PAGE - 1);
    madvise(data + before, size - before, MADV_HUGEPAGE);  // a wish: nothing depends on its success
#endif
}

// What XLA gives: arguments and results one after another, and attributes by their names.
class Reader {
public:
    explicit Reader(const Call& call) : call_(call) {}

    const Buffer& argument() { return next(call_.arguments, arguments_, "argument"); }
    const Buffer& result() { return next(call_.results, results_, "result"); }
    void end() const {
        if (arguments_ != call_.arguments.count || results_ != call_.results.count)
            throw Invalid{"more arguments or results than the handler takes"};
    }

    int64_t integer(const char* name) const { return *(const int64_t*)attribute(name, S64); }
    double number(const char* name) const { return *(const double*)attribute(name, F64); }

private:
    static const Buffer& next(const Buffers& of, int64_t& i, const char* what) {
        if (i >= of.count || of.kinds[i] != BUFFER)
            throw Invalid{std::string("no array as ") + what + " " + std::to_string(i)};
        return *(const Buffer*)of.items[i++];
    }
    const void* attribute(const char* name, Type type) const {
        const Attributes& a = call_.attributes;
        for (int64_t i = 0; i < a.count; ++i) {
            if (std::string(a.names[i]->data, a.names[i]->size) != name || a.kinds[i] != SCALAR) continue;
            auto* scalar = (const Scalar*)a.items[i];
            if (scalar->type == type) return scalar->value;
        }
        throw Invalid{std::string("no attribute ") + name + " of the expected type"};
    }

    const Call& call_;
    int64_t arguments_ = 0, results_ = 0;
};

// One call: what is common to all passes, read from attributes and from the first array.
class Pass {
public:
    explicit Pass(const xla::Call& call) : reader_(call), threads_(call) {}

    bn::Call call = {};
    int64_t channels = 1;

    bool given(Given bit) const { return given_ & bit; }

    // The first array, by which all others are judged.
    Operand first() {
        const Buffer& x = reader_.argument();
        given_ = reader_.integer("given");
        uint64_t axes = (uint64_t)reader_.integer("axes");
        dtype_ = dtype_of(x);
        if (x.rank > MAX_AXES || dtype_ == NONE || dtype_ == MASK || (x.rank < 64 && axes >> x.rank))
            throw Invalid{"axes or a dtype that cannot be normalized"};
        call.ndim = (int)x.rank;
        call.shape = x.shape;
        call.channel_axes = axes;
        int64_t step = ITEMSIZES[dtype_];
        for (int i = call.ndim - 1; i >= 0; step *= x.shape[i--]) {
            strides_[i] = step;
            if (axes >> i & 1) channels *= x.shape[i];
        }
        call.kernels = kernels.load();
        call.thread_count = most_threads.load();
        if (int n = threads_.count()) {
            call.threads = &threads_;
            call.thread_count = std::min(call.thread_count, n);
        } else {
            call.threads = &own_threads();
        }
        return {(char*)x.data, dtype_, strides_};
    }
    Operand big() { return like_first(reader_.argument()); }
    Operand big_result() {
        Operand y = like_first(reader_.result());
        int64_t size = ITEMSIZES[dtype_];
        for (int i = 0; i < call.ndim; ++i) size *= call.shape[i];
        ask_for_huge_pages(y.data, size);
        return y;
    }

    void settings() {
        call.eps = reader_.number("eps");
        if (!(call.eps >= 0)) throw Invalid{"eps: expected at least 0"};
        int64_t activation = reader_.integer("activation");
        if (activation < 0 || activation > SILU) throw Invalid{"an unknown activation"};
        call.activation = (int)activation;
        call.slope = reader_.number("slope");
    }

    // Weights with as many axes as x, of which those of length 1 are repeated.
    void weights() {
        if (!given(WEIGHTS)) return;
        const Buffer& w = reader_.argument();
        DType dtype = dtype_of(w);
        int64_t step = ITEMSIZES[dtype];
        if (w.rank != call.ndim || dtype == NONE) throw Invalid{"weights: other axes or dtype"};
        for (int i = call.ndim - 1; i >= 0; step *= w.shape[i--]) {
            if (w.shape[i] != 1 && w.shape[i] != call.shape[i]) throw Invalid{"weights: another shape"};
            weight_strides_[i] = w.shape[i] == 1 ? 0 : step;
        }
        call.weights = {(char*)w.data, dtype, weight_strides_};
    }

    // A vector as doubles: where it lies, or copied.
    const double* vector(DType* dtype = nullptr) {
        const Buffer& v = reader_.argument();
        DType own = checked(v);
        if (dtype) *dtype = own;
        if (own == DOUBLE) return (const double*)v.data;
        double* to = room();
        for (int64_t c = 0; c < channels; ++c)
            to[c] = read_value(own, (const char*)v.data + c * ITEMSIZES[own]);
        return to;
    }
    const double* vector_where(Given bit, DType* dtype = nullptr) { return given(bit) ? vector(dtype) : nullptr; }
    double* room() { return rooms_.emplace_back(new double[channels + 1]).get(); }

    // Where a vector is to be written, which `write` does.
    const Buffer& vector_result() {
        const Buffer& v = reader_.result();
        checked(v);
        return v;
    }
    void write(const Buffer& to, const double* from) const {
        write_values(dtype_of(to), (char*)to.data, from, channels);
    }

    // The statistics of a forward pass, which `write_statistics` rounds to the dtype of their results. The low
    // part of the mean is what is left of that.
    void statistics() {
        for (const Buffer*& to : statistics_) to = &vector_result();
        call.count = room();
        call.mean = room();
        call.var = room();
        call.low = room();
    }
    void write_statistics() {
        if (dtype_of(*statistics_[1]) != DOUBLE)
            for (int64_t c = 0; c < channels; ++c) {
                double mean = call.mean[c];
                call.mean[c] = (float)mean;
                if (std::isfinite(call.mean[c])) call.low[c] += mean - call.mean[c];
            }
        const double* from[] = {call.count, call.mean, call.var, call.low};
        for (int k = 0; k < 4; ++k) write(*statistics_[k], from[k]);
    }

    void end() const { reader_.end(); }

private:
    Operand like_first(const Buffer& b) const {
        bool same = b.rank == call.ndim && dtype_of(b) == dtype_;
        for (int i = 0; same && i < call.ndim; ++i) same = b.shape[i] == call.shape[i];
        if (!same) throw Invalid{"big arrays of different shapes or dtypes"};
        return {(char*)b.data, dtype_, strides_};
    }
    DType checked(const Buffer& v) const {
        int64_t n = 1;
        for (int64_t i = 0; i < v.rank; ++i) n *= v.shape[i];
        DType dtype = dtype_of(v);
        if (n != channels || dtype == NONE || dtype == MASK)
            throw Invalid{"a vector of " + std::to_string(n) + " numbers, expected "
                          + std::to_string(channels) + " in floating point"};
        return dtype;
    }

    Reader reader_;
    XlaThreads threads_;
    DType dtype_ = NONE;
    int64_t given_ = 0, strides_[MAX_AXES], weight_strides_[MAX_AXES];
    std::vector<std::unique_ptr<double[]>> rooms_;
    const Buffer* statistics_[4] = {};
};

// x, w, gamma, beta, z -> y, count, mean, var, low
void forward(Pass& p) {
    Operand x = p.first();
    p.settings();
    p.weights();
    p.call.gamma = p.vector_where(GAMMA);
    p.call.beta = p.vector_where(BETA);
    if (p.given(RESIDUAL)) p.call.residual = p.big();
    Operand y = p.big_result();
    p.statistics();
    p.end();
    bn::forward(p.call, x, y, Wanted::ALL, 0);
    p.write_statistics();
}

// x, w -> count, mean, var, low
void moments(Pass& p) {
    Operand x = p.first();
    p.weights();
    p.statistics();
    p.end();
    p.call.exact = true;
    bn::forward(p.call, x, x, Wanted::STATISTICS, 0);
    p.write_statistics();
}

// x, mean, var, gamma, beta, low, z -> y
void inference(Pass& p) {
    Operand x = p.first();
    p.settings();
    p.call.mean = (double*)p.vector();
    p.call.var = (double*)p.vector();
    p.call.gamma = p.vector_where(GAMMA);
    p.call.beta = p.vector_where(BETA);
    p.call.low = (double*)p.vector_where(LOW);
    if (p.given(RESIDUAL)) p.call.residual = p.big();
    Operand y = p.big_result();
    p.end();
    bn::inference(p.call, x, y);
}

// dy, x, count, mean, var, w, gamma, beta, low, z or y -> dx, dgamma, dbeta, and with GRADIENT dz
void backward(Pass& p) {
    Operand dy = p.first(), x = p.big();
    p.settings();
    p.call.count = (double*)p.vector();
    p.call.mean = (double*)p.vector();
    p.call.var = (double*)p.vector();
    p.weights();
    DType dtype = NONE;
    p.call.gamma = p.vector_where(GAMMA, &dtype);
    p.call.beta = p.vector_where(BETA);
    p.call.low = (double*)p.vector_where(LOW);
    p.call.from_y = p.given(Y);
    if (p.given(RESIDUAL) || p.given(Y)) p.call.residual = p.big();
    Operand dx = p.big_result();
    const Buffer &dgamma = p.vector_result(), &dbeta = p.vector_result();
    if (p.given(GRADIENT)) p.call.g = p.big_result();
    p.end();
    p.call.exact = dtype == DOUBLE;
    double *sums = p.room(), *sums_d = p.room();
    bn::backward(p.call, dy, x, dx, sums, sums_d);
    p.write(dgamma, sums);
    p.write(dbeta, sums_d);
}

Error* error(const Call& call, int code, const std::string& message) {
    std::string whole = "batchnorm: " + message;
    ErrorArguments a = {sizeof a, nullptr, whole.c_str(), code};
    return call.api->create_error(&a);
}

template <void (*run)(Pass&)> Error* handle(Call* call) {
    if (call->extensions && call->extensions->kind == METADATA) {
        Metadata& to = *((MetadataExtension*)call->extensions)->metadata;
        to.version = {sizeof(Version), nullptr, 0, 1};
        to.traits = 0;
        return nullptr;
    }
    try {
        Pass pass(*call);
        run(pass);
    } catch (const Invalid& invalid) {
        return error(*call, INVALID_ARGUMENT, invalid.message);
    } catch (const std::bad_alloc&) {
        return error(*call, RESOURCE_EXHAUSTED, "no memory left");
    } catch (const std::exception& other) {
        return error(*call, INTERNAL, other.what());
    }
    return nullptr;
}

}  // namespace

const Handler HANDLERS[] = {
    {"forward", (void*)handle<forward>},
    {"moments", (void*)handle<moments>},
    {"inference", (void*)handle<inference>},
    {"backward", (void*)handle<backward>},
    {nullptr, nullptr},
};

void use(const Kernels* chosen) { kernels.store(chosen); }
void set_thread_count(int count) { most_threads.store(count); }

}  // namespace bn::xla
