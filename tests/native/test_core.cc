// The core against formulas of the test's own. Arguments: an instruction set, and the groups of cases to
// run (all, where none is named). Without arguments, it lists the instruction sets.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <set>
#include <thread>

#include "arrays.h"

namespace test {

using bn::BFLOAT16, bn::DOUBLE, bn::HALF, bn::MASK, bn::NONE, bn::SINGLE;

const bn::Kernels* kernels;
std::set<std::string> reached;  // traversals

const DType DATA[] = {HALF, BFLOAT16, SINGLE, DOUBLE};
// Whether the kernels are compiled for a dtype: some programs have only those that their cases need.
bool has(DType dtype) { return kernels->tile[dtype]; }
const char* const NAMES[] = {"none", "float16", "bfloat16", "float32", "float64", "mask"};

// Logical values of everything that the passes of a call write, and their names.
struct Results {
    std::vector<std::pair<const char*, std::vector<double>>> all;
    const std::vector<double>& operator[](const std::string& name) const {
        for (auto& [key, v] : all)
            if (name == key) return v;
        std::abort();
    }
};

void check_same_bits(const Results& a, const Results& b, const std::string& what) {
    for (auto& [name, v] : b.all)
        if (std::memcmp(a[name].data(), v.data(), v.size() * sizeof(double)))
            fail("%s has other bits: %s", name, what.c_str());
}

struct Problem {
    DType dtype = SINGLE;
    Shape shape;
    uint64_t axes = 2;
    Layout x_layout = PLAIN, y_layout = PLAIN, dy_layout = PLAIN, dx_layout = PLAIN;
    DType weights = NONE;
    Layout w_layout = PLAIN;
    bool nan_under_zero = false, affine = true;
    int offset = 0;  // elements that outputs are displaced by
    double mean = 3, std = 2, size_of_dy = 1, eps = 1e-5;
    uint64_t seed = 1;

    std::unique_ptr<Array> x, dy, w;
    std::unique_ptr<Reference> reference;
    std::vector<double> gamma, beta, given_mean, given_var;
    std::vector<char> vectors[4];  // m, a, b, c in the type of the arithmetic

    DType arithmetic() const { return dtype == DOUBLE ? DOUBLE : SINGLE; }
    double vector(int k, int64_t c) const { return get(arithmetic(), &vectors[k][c * SIZE[arithmetic()]]); }

    void make() {
        Random random(seed);
        x = std::make_unique<Array>(dtype, shape, x_layout);
        dy = std::make_unique<Array>(dtype, shape, dy_layout);
        for (int64_t i = 0; i < x->size(); ++i) {
            x->set(i, mean + std * random.normal());
            dy->set(i, size_of_dy * random.normal());
        }
        if (weights != NONE) {
            w = std::make_unique<Array>(weights, shape, w_layout);
            const double some[] = {0, 0.5, 1.25, 3};
            for (int64_t i = 0; i < w->size(); ++i) w->set(i, some[(int)(random.uniform() * 4)]);
            if (nan_under_zero)
                for (int64_t i = 0; i < w->size(); ++i)
                    if ((*w)[i] == 0) x->set(i, NAN), dy->set(i, 0);
        }
        finish();
    }
    void finish() {  // once x has its values
        Random random(seed + 99);
        reference = std::make_unique<Reference>(*x, axes);
        reference->moments(*x, w.get());
        int64_t channels = reference->channels;
        for (auto* v : {&gamma, &beta, &given_mean, &given_var}) v->resize(channels);
        for (auto& v : vectors) v.resize(channels * SIZE[arithmetic()]);
        for (int64_t c = 0; c < channels; ++c) {
            gamma[c] = 0.5 + random.uniform(), beta[c] = random.normal();
            given_mean[c] = mean + 0.1 * std * random.normal();
            given_var[c] = std * std * (0.5 + random.uniform());
            const double v[] = {given_mean[c], gamma[c] / std, beta[c], 0.1 * random.normal()};
            for (int k = 0; k < 4; ++k) put(arithmetic(), &vectors[k][c * SIZE[arithmetic()]], v[k]);
        }
    }

    bn::Call call(bn::Threads& threads, int count) const {
        bn::Call call = {};
        call.ndim = (int)shape.size(), call.shape = shape.data(), call.channel_axes = axes;
        if (w) call.weights = w->operand();
        if (affine) call.gamma = gamma.data(), call.beta = beta.data();
        call.eps = eps, call.kernels = kernels, call.threads = &threads, call.thread_count = count;
        return call;
    }

    enum Place { OWN, IN_FIRST, IN_SECOND };  // y in x's memory; dx in dy's, or in x's
    Results run(bn::Threads& threads, int count, Place place = OWN, bool exact = false) const {
        Results r;
        int64_t channels = reference->channels;
        std::vector<double> stats[4], sums[2];
        for (auto& v : stats) v.resize(channels);
        for (auto& v : sums) v.resize(channels);
        auto with_room = [&](bn::Call c) {
            c.count = stats[0].data(), c.mean = stats[1].data(), c.var = stats[2].data();
            c.low = stats[3].data(), c.exact = exact;
            return c;
        };
        auto keep = [&](const char* name, const std::vector<double>& v) { r.all.emplace_back(name, v); };
        bn::Call c = with_room(call(threads, count)), plain = c;
        plain.weights = {};
        const void* m_a_b_c[4];
        for (int k = 0; k < 4; ++k) m_a_b_c[k] = vectors[k].data();
        // Hand dy, x and an output, or a copy of one of them that is written, to `pass`.
        auto to_output = [&](const char* name, Layout layout, auto pass) {
            Array out(dtype, shape, layout, offset);
            bool over_x = place == IN_SECOND || (place == IN_FIRST && name[0] == 'y');
            if (place != OWN) out.assign(over_x ? *x : *dy);
            pass((place != OWN && !over_x ? out : *dy).operand(), (over_x ? out : *x).operand(), out.operand());
            out.check_guards(name);
            keep(name, out.values());
        };

        bn::forward(c, x->operand(), {}, bn::Wanted::STATISTICS, 0);
        keep("count of moments", stats[0]), keep("mean of moments", stats[1]);
        keep("var of moments", stats[2]), keep("low of moments", stats[3]);
        to_output("y", y_layout, [&](bn::Operand, bn::Operand x, bn::Operand y) {
            if (!bn::forward(c, x, y, bn::Wanted::ALL, 0)) fail("forward: false");
        });
        keep("count", stats[0]), keep("mean", stats[1]), keep("var", stats[2]), keep("low", stats[3]);
        to_output("dx", dx_layout, [&](bn::Operand dy, bn::Operand x, bn::Operand dx) {
            bn::backward(c, dy, x, dx, sums[0].data(), sums[1].data());
        });
        keep("dgamma", sums[0]), keep("dbeta", sums[1]);
        to_output("y of inference", y_layout, [&](bn::Operand, bn::Operand x, bn::Operand y) {
            bn::Call given = plain;
            given.mean = (double*)given_mean.data(), given.var = (double*)given_var.data();
            given.low = nullptr;
            bn::inference(given, x, y);
        });
        to_output("y of scale_shift", y_layout, [&](bn::Operand, bn::Operand x, bn::Operand y) {
            bn::scale_shift(plain, x, m_a_b_c, y);
        });
        bn::grad_sums(c, dy->operand(), x->operand(), m_a_b_c[0], sums[0].data(), sums[1].data());
        keep("sum_dy", sums[0]), keep("sum_dy_d", sums[1]);
        to_output("dx of grad_input", dx_layout, [&](bn::Operand dy, bn::Operand x, bn::Operand dx) {
            bn::grad_input(c, dy, x, m_a_b_c, dx);
        });
        keep("x", x->values()), keep("dy", dy->values());  // as they were, as any comparison sees
        x->check_guards("x"), dy->check_guards("dy");
        return r;
    }

    void check_moments(const Results& r, const std::string& of) const {
        const Reference& f = *reference;
        const auto &count = r["count" + of], &mean = r["mean" + of];
        const auto &var = r["var" + of], &low = r["low" + of];
        for (int64_t c = 0; c < f.channels; ++c) {
            Real eps = EPS[arithmetic()], std = std::sqrt(f.var[c]), size = std::fabs(f.first[c]) + std;
            close(("count" + of).c_str(), c, count[c], f.n[c], 0x1p-50L * f.n[c]);
            // A double rounds the mean; `low` has the rest.
            Real most = (dtype == DOUBLE ? 4 : 1) * eps * std;
            close(("mean" + of).c_str(), c, mean[c], f.first[c] + f.s[c], most + 0x1p-52L * size);
            Real both = (Real)mean[c] - f.first[c] + low[c];
            close(("mean and low" + of).c_str(), c, both, f.s[c], most + 0x1p-100L * size);
            most = (dtype == DOUBLE ? 16 : 2) * eps * f.var[c];
            close(("var" + of).c_str(), c, var[c], f.var[c], most);
        }
    }

    void check(const Results& r) const {
        const Reference& f = *reference;
        int64_t channels = f.channels;
        auto g = [&](int64_t c) { return affine ? (Real)gamma[c] : 1; };
        auto b = [&](int64_t c) { return affine ? (Real)beta[c] : 0; };
        check_moments(r, "");
        check_moments(r, " of moments");
        std::vector<Real> rstd(channels), sum_dy(channels), sum_hat(channels), sum_d(channels);
        std::vector<Real> size_dy(channels), size_hat(channels), size_d(channels);
        const auto &y = r["y"], &of_inference = r["y of inference"], &of_scale_shift = r["y of scale_shift"];
        const auto &dx = r["dx"], &of_grad_input = r["dx of grad_input"];
        Real scale = 0, largest = 0;
        for (int64_t c = 0; c < channels; ++c) {
            rstd[c] = 1 / std::sqrt(f.var[c] + eps);
            scale = std::max(scale, g(c) * rstd[c]);
        }
        for (int64_t i = 0; i < x->size(); ++i) {
            int c = f.channel[i];
            Real v = (*x)[i], dv = (*dy)[i], hat = f.difference(v, c) * rstd[c];
            Real plain = g(c) * hat + b(c), size = std::max(1.0L, std::fabs(plain - b(c)) + std::fabs(b(c)));
            close("y", i, y[i], plain, tolerance(dtype, plain, size, 4));
            Real other = (v - given_mean[c]) * g(c) / std::sqrt((Real)given_var[c] + eps);
            size = std::max(1.0L, std::fabs(other) + std::fabs(b(c)));
            close("y of inference", i, of_inference[i], other + b(c),
                  tolerance(dtype, other + b(c), size, 4));
            Real d = v - vector(0, c), scaled = vector(1, c) * d;
            size = std::max(1.0L, std::fabs(scaled) + std::fabs((Real)vector(2, c)));
            close("y of scale_shift", i, of_scale_shift[i], scaled + vector(2, c),
                  tolerance(dtype, scaled + vector(2, c), size, 4));
            sum_dy[c] += dv, size_dy[c] += std::fabs(dv);
            largest = std::max(largest, std::fabs(dv));
            if (dv == 0) continue;
            sum_hat[c] += dv * hat, size_hat[c] += std::fabs(dv * hat);
            sum_d[c] += dv * d, size_d[c] += std::fabs(dv * d);
        }
        for (int64_t c = 0; c < channels; ++c) {
            Real most = 16 * EPS[arithmetic()];
            close("dgamma", c, r["dgamma"][c], sum_hat[c], most * size_hat[c]);
            close("dbeta", c, r["dbeta"][c], sum_dy[c], most * size_dy[c]);
            close("sum_dy", c, r["sum_dy"][c], sum_dy[c], most * size_dy[c]);
            close("sum_dy_d", c, r["sum_dy_d"][c], sum_d[c], most * size_d[c]);
        }
        for (int64_t i = 0; i < x->size(); ++i) {
            int c = f.channel[i];
            Real weight = w ? (Real)(*w)[i] : 1, dv = (*dy)[i], n = f.n[c] ? f.n[c] : 1;
            Real hat = f.difference((*x)[i], c) * rstd[c], of_dx = scale * largest;
            Real rest = weight > 0 ? weight / n * (sum_dy[c] + hat * sum_hat[c]) : 0;
            if (w && weight > 0)  // x_hat has no bound where weights are 0, and so these terms have none
                of_dx = std::max(
                    of_dx, g(c) * rstd[c] * weight / n * (size_dy[c] + std::fabs(hat) * size_hat[c]));
            Real want = g(c) * rstd[c] * (dv - rest);
            close("dx", i, dx[i], want, tolerance(dtype, want, of_dx, 16));
            Real bd = vector(2, c) * ((*x)[i] - (Real)vector(0, c)), cc = vector(3, c), a = vector(1, c);
            Real more = weight > 0 ? weight * (bd + cc) : 0;
            Real size = a * (std::fabs(dv) + (weight > 0 ? weight * (std::fabs(bd) + std::fabs(cc)) : 0));
            close("dx of grad_input", i, of_grad_input[i], a * (dv + more),
                  tolerance(dtype, a * (dv + more), size, 16));
        }
    }

    void name(const char* group) const {
        now = std::string(group) + " " + kernels->name + " " + NAMES[dtype] + " (";
        for (int64_t n : shape) now += std::to_string(n) + ",";
        now += ") axes " + std::to_string(axes);
        for (Layout l : {x_layout, y_layout, dy_layout, dx_layout}) now += std::string(" ") + LAYOUTS[l];
        if (weights != NONE) now += std::string(", weights ") + NAMES[weights] + " " + LAYOUTS[w_layout];
        now += ", offset " + std::to_string(offset);
    }
    // Note which traversals a forward pass takes, so that a case for each is known to be there.
    void note() const {
        Array y(dtype, shape, y_layout);
        bn::Shapes s = {(int)shape.size(), shape.data(), axes, 2, w ? 3 : 2, {}, SIZE[dtype]};
        s.strides[0] = x->strides.data(), s.strides[1] = y.strides.data();
        if (w) s.strides[2] = w->strides.data();
        bn::Plan plan;
        bn::make_plan(s, plan);
        std::string kind = !plan.grid.rows ? "spans" : plan.length > 1 ? "runs" : "rows";
        if (plan.grid.rows && plan.copies > 1) kind = "copies";
        if (plan.has_whole && !w) reached.insert(kind + " whole");
        else reached.insert(kind + (plan.grid.blocks() > 1 ? " blocks" : " two passes"));
        if (plan.grid.rows && !plan.sweep.rows) reached.insert("sweep instead of rows");
        if (plan.grid.channels > plan.grid.across) reached.insert(kind + " beside each other");
        if (plan.grid.streaming) reached.insert(kind + " streaming");
    }
};

// Threads in strange ways: all tasks are allowed to be missing but the caller's.
class Strange final : public bn::Threads {
public:
    explicit Strange(int way) : way_(way) {}
    void run(int count, void (*task)(void*, int), void* context) override {
        if (way_ == 1)  // the last first, one after another
            for (int i = count - 1; i > 0; --i) task(context, i);
        if (way_ == 2)  // some
            for (int i = 1; i < count; i += 2) task(context, i);
        std::vector<std::thread> others;
        if (way_ == 3)
            for (int i = count - 1; i > 0; --i) others.emplace_back(task, context, i);
        task(context, 0);
        for (std::thread& t : others) t.join();
        if (way_ == 4)  // too late to find anything left
            for (int i = 1; i < count; ++i) task(context, i);
    }

private:
    int way_;
};

void check_any_threads(const Problem& p, const Results& expected) {
    for (int count : {1, 2, 7}) {
        if (RACES && count != 7) continue;
        check_same_bits(expected, p.run(bn::own_threads(), count), std::to_string(count) + " threads");
    }
    for (int way = 0; way < 5; ++way) {
        if (RACES ? way != 3 : way % 2 != p.seed % 2) continue;  // 3 is the only way that has threads
        Strange strange(way);
        check_same_bits(expected, p.run(strange, 5), "threads of kind " + std::to_string(way));
    }
}

void small_arrays() {
    std::vector<std::pair<Shape, uint64_t>> shapes = {
        {{4, 3, 50}, 2}, {{2, 5, 7, 9}, 2}, {{6, 5, 7, 9}, 2}, {{5, 20, 300}, 2}, {{33, 17}, 2},
        {{640, 3}, 2}, {{1300, 16}, 2}, {{3, 40}, 1}, {{9, 40}, 1}, {{4, 3, 5, 6}, 10}, {{7, 4, 5}, 6},
        {{4, 5, 11}, 3}, {{37, 41}, 0}, {{5, 6}, 3}, {{1, 1}, 2}, {{}, 0}, {{9, 2, 3, 4}, 8},
        {{70, 40, 2}, 2}, {{19, 1100}, 2}, {{3, 2, 1, 5}, 2}};
    for (int64_t n : {1, 2, 15, 16, 17, 31, 33, 240, 255, 256, 257, 1023, 1024, 1025, 1040, 2047, 2049})
        shapes.push_back({{2, 3, n}, 2});
    const Layout layouts[][4] = {
        {PLAIN, PLAIN, PLAIN, PLAIN}, {LAST, LAST, LAST, LAST}, {REVERSED, REVERSED, REVERSED, REVERSED},
        {HALVES, HALVES, HALVES, HALVES}, {PADDED, PADDED, PADDED, PADDED}, {MIXED, MIXED, MIXED, MIXED},
        {PLAIN, LAST, REVERSED, MIXED}, {BROADCAST, PLAIN, PLAIN, PADDED}, {HALVES, PLAIN, PADDED, REVERSED}};
    const DType weights[] = {MASK, HALF, BFLOAT16, SINGLE, DOUBLE};
    uint64_t seed = 0, number = 0;
    for (auto& [shape, axes] : shapes) {
        ++number;
        for (auto& l : layouts)
            for (DType dtype : DATA) {
                ++seed;
                if (!has(dtype)) continue;
                Problem p;
                p.dtype = dtype, p.shape = shape, p.axes = axes, p.seed = seed;
                p.x_layout = l[0], p.y_layout = l[1], p.dy_layout = l[2], p.dx_layout = l[3];
                if (shape.empty() && l[0] != PLAIN) continue;
                p.offset = (int)(seed / 3 % 3), p.affine = seed % 5 != 0;
                if ((number + seed + seed / 4) % 2) {
                    p.weights = weights[seed / 2 % 5];
                    p.w_layout = (Layout)(seed / 7 % 7);
                    p.nan_under_zero = seed % 3 == 0 && l[0] != BROADCAST && p.w_layout != BROADCAST;
                }
                p.name("small");
                p.make();
                p.note();
                Results r = p.run(bn::own_threads(), 2);
                p.check(r);
                if (l[0] != l[1] || l[0] != l[2] || l[0] != l[3] || seed % 3) continue;
                check_same_bits(r, p.run(bn::own_threads(), 2, Problem::IN_FIRST), "in place");
                check_same_bits(r, p.run(bn::own_threads(), 2, Problem::IN_SECOND), "dx in x's memory");
                p.check(p.run(bn::own_threads(), 2, Problem::OWN, true));
            }
    }
}

// Arrays of several tiles: two passes, any number of threads.
void tiles() {
    struct Tiled { Shape shape; uint64_t axes; Layout layout; DType dtype, weights; };
    const Tiled all[] = {
        {{2, 2, 35001}, 2, PLAIN, SINGLE, NONE}, {{2, 2, 35001}, 2, PLAIN, DOUBLE, NONE},
        {{3, 2, 23000}, 2, REVERSED, HALF, MASK}, {{700, 3, 200}, 2, PLAIN, SINGLE, NONE},
        {{90, 16, 101}, 2, PLAIN, SINGLE, NONE}, {{700, 3, 99}, 2, PLAIN, DOUBLE, MASK},
        {{1100, 130}, 2, PLAIN, SINGLE, NONE}, {{70, 2500}, 2, PLAIN, SINGLE, NONE},
        {{1100, 130}, 2, PLAIN, DOUBLE, HALF}, {{1100, 130}, 2, PADDED, BFLOAT16, NONE},
        {{1100, 130}, 2, MIXED, SINGLE, NONE}, {{29000, 6}, 2, PLAIN, SINGLE, NONE},
        {{29000, 6}, 2, PLAIN, DOUBLE, NONE}, {{10, 17, 1031}, 2, PLAIN, SINGLE, NONE},
        {{10, 17, 1031}, 2, LAST, HALF, NONE}, {{10, 17, 1031}, 2, HALVES, DOUBLE, SINGLE},
        {{140001}, 0, PLAIN, SINGLE, NONE}, {{200, 3, 4, 61}, 10, PLAIN, SINGLE, NONE}};
    uint64_t seed = 7;
    for (const Tiled& t : all) {
        ++seed;
        if (!has(t.dtype)) continue;
        Problem p;
        p.shape = t.shape, p.axes = t.axes, p.dtype = t.dtype, p.weights = t.weights, p.seed = seed;
        p.x_layout = p.y_layout = p.dy_layout = p.dx_layout = t.layout;
        p.name("tiles");
        p.make();
        p.note();
        Results r = p.run(bn::own_threads(), 3);
        if (!RACES) p.check(r);
        check_any_threads(p, r);
    }
}

const std::pair<Shape, uint64_t> SOME[] = {
    {{6, 3, 500}, 2}, {{600, 20}, 2}, {{900, 5}, 2}, {{40, 5, 60}, 2}, {{1100, 150}, 2}, {{2, 2, 40000}, 2}};

// Large means, numbers at the ends of float32's range, first values that are far from the mean.
void accuracy() {
    struct Values { DType dtype; double mean, std, size_of_dy, eps; };
    const Values all[] = {
        {SINGLE, 1e4, 1, 1, 1e-5}, {SINGLE, 1e6, 1, 1, 1e-5}, {SINGLE, -1e6, 1, 1e-12, 1e-5},
        {DOUBLE, 1e8, 1, 1, 1e-5}, {SINGLE, 0, 1e30, 1, 1e-5}, {SINGLE, 3e30, 1e30, 1e12, 1e-5},
        {BFLOAT16, 0, 1e30, 1, 1e-5}, {SINGLE, 0, 1e-25, 1, 1e-60}, {SINGLE, 0, 1e-25, 1e-25, 1e-60},
        {BFLOAT16, 1e-25, 1e-25, 1e-20, 1e-60}, {DOUBLE, 0, 1e140, 1, 1e-5}, {SINGLE, 1, 1, 1e-33, 1e-5},
        {SINGLE, 1, 1, 1e35, 1e-5}};
    uint64_t seed = 3;
    for (const Values& v : all)
        for (auto& [shape, axes] : SOME) {
            Problem p;
            p.shape = shape, p.axes = axes, p.seed = ++seed, p.dtype = v.dtype;
            p.mean = v.mean, p.std = v.std, p.size_of_dy = v.size_of_dy, p.eps = v.eps;
            p.name("accuracy");
            now += ", mean " + std::to_string(v.mean) + " std " + std::to_string(v.std * 1e25) + "e-25";
            p.make();
            p.check(p.run(bn::own_threads(), 2));
        }
    for (DType dtype : {SINGLE, DOUBLE})
        for (auto& [shape, axes] : SOME) {
            Problem p;
            p.shape = shape, p.axes = axes, p.seed = ++seed, p.dtype = dtype;
            p.name("bad pivot");
            p.make();
            int64_t row = p.x->size() / shape[0];
            for (int64_t i = 0; i < p.x->size(); ++i)
                if (i / row < std::max<int64_t>(1, shape[0] / 50)  // in some rows, and there at the beginning
                    && i % (shape.size() == 3 ? shape[2] : row) < (shape.size() == 3 ? 64 : row))
                    p.x->set(i, -1e5);
            p.finish();
            p.check(p.run(bn::own_threads(), 2));
        }
}

// NaN and Inf stay in their channel.
void poison() {
    for (DType dtype : DATA)
        for (auto& [shape, axes] : SOME)
            for (double bad : {(double)NAN, (double)INFINITY, -(double)INFINITY}) {
                Problem p;
                p.shape = shape, p.axes = axes, p.dtype = dtype;
                p.name("poison");
                now += " by " + std::to_string(bad);
                p.make();
                Results clean = p.run(bn::own_threads(), 2);
                std::vector<int>& channel = p.reference->channel;
                int64_t last = p.x->size() - 1;
                while (channel[last] != 1) --last;
                p.x->set(last, bad);
                Results r = p.run(bn::own_threads(), 2);
                if (std::isfinite(r["mean"][1])) fail("mean is finite");
                for (const char* name : {"y", "dx"}) {
                    const auto &got = r[name], &want = clean[name];
                    for (int64_t i = 0; i < p.x->size(); ++i) {
                        // Another reading, which one channel may ask for, may round otherwise.
                        bool poisoned = channel[i] == 1;
                        Real most = 2 * tolerance(dtype, want[i], 4, 16);
                        close(name, i, got[i], poisoned ? NAN : (Real)want[i], most);
                    }
                }
            }
}

// A mask under which a channel has too few values: nothing is written.
void too_few() {
    for (auto& [shape, axes] : SOME) {
        Problem p;
        p.shape = shape, p.axes = axes, p.weights = MASK;
        p.name("too few");
        p.make();
        for (int64_t i = 0, seen = 0; i < p.w->size(); ++i)
            if (p.reference->channel[i] == 1) p.w->set(i, seen++ == 5);
        Array y(p.dtype, shape, PLAIN);
        std::vector<double> room[4];
        for (auto& v : room) v.resize(p.reference->channels);
        bn::Call c = p.call(bn::own_threads(), 2);
        c.count = room[0].data(), c.mean = room[1].data(), c.var = room[2].data(), c.low = room[3].data();
        if (bn::forward(c, p.x->operand(), y.operand(), bn::Wanted::ALL, 2)) fail("one value is enough");
        if (!y.untouched()) fail("y was written");
        if (!bn::forward(c, p.x->operand(), y.operand(), bn::Wanted::ALL, 1)) fail("one value is not enough");
    }
}

// Outputs of 8 MiB and more are stored past the caches. Only what writes is looked at, to be quick.
void streams() {
    struct Streamed { Shape shape; Layout layout; DType dtype; };
    const Streamed all[] = {
        {{2, 3, 351001}, PLAIN, SINGLE}, {{2, 3, 176001}, PLAIN, DOUBLE}, {{2, 3, 701001}, PLAIN, HALF},
        {{2, 3, 701001}, PLAIN, BFLOAT16}, {{21000, 100}, PLAIN, SINGLE}, {{3500, 608}, PLAIN, SINGLE},
        {{9500, 112}, PLAIN, DOUBLE}, {{37700, 112}, PLAIN, HALF}, {{22000, 8, 12}, PADDED, SINGLE}};
    for (const Streamed& s : all)
        for (int offset : {0, 1}) {
            if ((!offset && s.dtype != SINGLE) || !has(s.dtype)) continue;
            Problem p;
            p.shape = s.shape, p.dtype = s.dtype, p.offset = offset;
            p.x_layout = p.y_layout = p.dy_layout = p.dx_layout = s.layout;
            p.name("streams");
            p.mean = 1, p.std = 1;
            p.make();
            p.note();
            std::vector<Real> rstd;
            for (Real var : p.reference->var) rstd.push_back(1 / std::sqrt(var + p.eps));
            Array y(p.dtype, p.shape, s.layout, offset), dx(p.dtype, p.shape, s.layout, offset);
            std::vector<double> stats[4], sums[2];
            for (auto& v : stats) v.resize(p.reference->channels);
            for (auto& v : sums) v.resize(p.reference->channels);
            bn::Call c = p.call(bn::own_threads(), 2);
            c.count = stats[0].data(), c.mean = stats[1].data(), c.var = stats[2].data();
            c.low = stats[3].data();
            const void* vectors[4];
            for (int k = 0; k < 4; ++k) vectors[k] = p.vectors[k].data();
            auto check = [&](Array& out, bool forward, const Reference* f) {
                out.check_guards("output");
                for (int64_t i = 0; i < out.size(); ++i) {
                    int k = p.reference->channel[i];
                    Real v = (*p.x)[i], d = v - p.vector(0, k), want, size;
                    Real a = p.vector(1, k), b = p.vector(2, k);
                    if (f) {
                        d = f->difference(v, k) * rstd[k], b = p.beta[k];
                        want = p.gamma[k] * d + b, size = std::max(1.0L, std::fabs(want - b) + std::fabs(b));
                    } else if (forward) {
                        want = a * d + b, size = std::max(1.0L, std::fabs(a * d) + std::fabs(b));
                    } else {
                        Real g = (*p.dy)[i], e = p.vector(3, k);
                        want = a * (g + b * d + e);
                        size = 4 * a * (std::fabs(g) + std::fabs(b * d) + std::fabs(e));
                    }
                    close(forward ? "y" : "dx", i, out[i], want, tolerance(p.dtype, want, size, 4));
                }
            };
            if (offset) {
                bn::forward(c, p.x->operand(), y.operand(), bn::Wanted::ALL, 0);
                check(y, true, p.reference.get());
            } else {
                bn::scale_shift(c, p.x->operand(), vectors, y.operand());
                check(y, true, nullptr);
            }
            bn::grad_input(c, p.dy->operand(), p.x->operand(), vectors, dx.operand());
            check(dx, false, nullptr);
        }
}

#include "epilogue.h"

// Many callers of the same pool.
void callers() {
    now = "callers";  // the only name: threads do not set it
    std::vector<std::thread> all;
    std::atomic<int> wrong{0};
    for (int k = 0; k < 6; ++k)
        all.emplace_back([k, &wrong] {
            Problem p;
            p.shape = SOME[4 + k % 2].first, p.seed = k;
            p.make();
            Strange alone(0);
            Results expected = p.run(alone, 1);
            for (int i = 0; i < 4; ++i)
                for (auto& [name, v] : p.run(bn::own_threads(), 2 + (k + i) % 4).all)
                    wrong += std::memcmp(expected[name].data(), v.data(), v.size() * 8) != 0;
        });
    for (std::thread& t : all) t.join();
    if (wrong) fail("%d results have other bits", wrong.load());
}

// Small tasks, very often: what waits for what. A run has ended when each task that began has.
void pool() {
    now = "pool";
    std::vector<std::thread> all;
    for (int k = 0; k < 3; ++k)
        all.emplace_back([] {
            for (int i = 0; i < 3000; ++i) {
                int plain[5] = {}, sum = 0;  // no atomics: a race would be seen
                auto task = [](void* context, int index) { ((int*)context)[index] += 1 + index; };
                bn::own_threads().run(5, task, plain);
                for (int j = 0; j < 5; ++j) sum += plain[j] ? plain[j] - 1 - j : 0;
                if (plain[0] != 1 || sum) fail("a task ran twice, or not at all");
                if (i % 500 == 0) usleep(1000);  // workers go to sleep
            }
        });
    for (std::thread& t : all) t.join();
}

// Children begin with no workers, while a thread of the parent keeps them busy.
void forks() {
    now = "forks";
    Problem p, other;
    p.shape = other.shape = {1100, 150};
    p.make(), other.make();
    Results expected = p.run(bn::own_threads(), 3);
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        std::vector<double> a(150), b(150);
        const void* m = other.vectors[0].data();
        bn::Call c = other.call(bn::own_threads(), 3);
        while (!stop) bn::grad_sums(c, other.dy->operand(), other.x->operand(), m, a.data(), b.data());
    });
    for (int i = 0; i < 10; ++i) {
        pid_t child = fork();
        if (!child) {
            alarm(60);  // a child that waits for its parent's workers would wait forever
            int before = failures;
            check_same_bits(expected, p.run(bn::own_threads(), 3), "in a forked child");
            _exit(failures > before);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (status) fail("a forked child ended with status %d", status);
    }
    stop = true;
    busy.join();
}

void check_reached() {
    now = "coverage";
    for (DType dtype : DATA)
        if (!has(dtype)) fail("no kernels for %s", NAMES[dtype]);
    for (const char* name : {
             "spans whole", "rows whole", "runs whole", "copies whole", "spans two passes", "rows two passes",
             "spans blocks", "rows blocks", "runs blocks", "copies blocks", "sweep instead of rows",
             "rows beside each other", "spans beside each other", "runs beside each other", "spans streaming",
             "rows streaming"})
        if (!reached.count(name)) fail("no case reaches: %s", name);
}

struct Group { const char* name; void (*run)(); };
const Group GROUPS[] = {
    {"small", small_arrays}, {"tiles", tiles}, {"accuracy", accuracy}, {"poison", poison}, {"too-few", too_few},
    {"streams", streams}, {"epilogues", epilogues}, {"callers", callers}, {"pool", pool}, {"forks", forks}};

}  // namespace test

int main(int argc, char** argv) {
    using namespace test;
    if (argc == 1) {
        for (const char* const* name = bn::instruction_sets(); *name; ++name) std::printf("%s\n", *name);
        return 0;
    }
    kernels = bn::kernels_for(argv[1]);
    if (!kernels) return std::printf("no such instruction set\n"), 2;
    for (const Group& group : GROUPS) {
        bool wanted = argc == 2;
        for (int i = 2; i < argc; ++i) wanted |= !std::strcmp(argv[i], group.name);
        if (!wanted) continue;
        int before = failures;
        timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        group.run();
        clock_gettime(CLOCK_MONOTONIC, &end);
        std::printf("%s: %s, %.2f s\n", group.name, failures == before ? "passed" : "failed",
                    double(end.tv_sec - begin.tv_sec) + 1e-9 * double(end.tv_nsec - begin.tv_nsec));
        std::fflush(stdout);
    }
    if (argc == 2) check_reached();
    std::printf("%s: %d failures\n", kernels->name, failures);
    return failures > 0;
}
