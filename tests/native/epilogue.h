// Residuals and activations, forward and backward, against the formulas.

#pragma once

struct Epilogue {
    int activation;
    double slope;
    bool residual, from_y;

    Real value(Real h) const {
        switch (activation) {
            case bn::RELU: return h > 0 ? h : 0;
            case bn::RELU6: return h > 0 ? std::min(h, 6.0L) : 0;
            case bn::LEAKY_RELU: return h > 0 ? h : slope * h;
            case bn::SILU: return h / (1 + std::exp(-h));
            default: return h;
        }
    }
    Real derivative(Real h) const {
        switch (activation) {
            case bn::RELU: return h > 0;
            case bn::RELU6: return h > 0 && h < 6;
            case bn::LEAKY_RELU: return h > 0 ? 1 : slope;
            case bn::SILU: {
                Real s = 1 / (1 + std::exp(-h));
                return s + h * s * (1 - s);
            }
            default: return 1;
        }
    }
    bool near_a_kink(Real h, Real size, DType dtype) const {
        Real most = 64 * EPS[dtype == DOUBLE ? DOUBLE : SINGLE] * size;
        if (activation == bn::IDENTITY || activation == bn::SILU) return false;
        return std::fabs(h) <= most || (activation == bn::RELU6 && std::fabs(h - 6) <= most);
    }
};

// Everything that a call with an epilogue writes.
Results run_epilogue(
    const Problem& p, const Epilogue& e, const Array& z, const Array& dy, bn::Threads& threads, int count,
    bool in_place) {
    Results r;
    std::vector<double> stats[4], sums[2];
    for (auto& v : stats) v.resize(p.reference->channels);
    for (auto& v : sums) v.resize(p.reference->channels);
    bn::Call c = p.call(threads, count);
    c.count = stats[0].data(), c.mean = stats[1].data(), c.var = stats[2].data(), c.low = stats[3].data();
    c.activation = e.activation, c.slope = e.slope;
    auto keep = [&](const char* name, Array& a) {
        a.check_guards(name);
        r.all.emplace_back(name, a.values());
    };
    Array y(p.dtype, p.shape, p.y_layout, p.offset), again(p.dtype, p.shape, p.y_layout, p.offset);
    for (Array* target : {&y, &again}) {
        bool over_z = in_place && e.residual;
        if (over_z) target->assign(z);
        if (e.residual) c.residual = (over_z ? *target : z).operand();
        if (target == &y) bn::forward(c, p.x->operand(), y.operand(), bn::Wanted::ALL, 0);
        else {
            bn::Call given = c;
            given.weights = {};
            bn::inference(given, p.x->operand(), again.operand());
        }
    }
    keep("y", y), keep("y of inference", again);
    Array dx(p.dtype, p.shape, p.dx_layout, p.offset), g(p.dtype, p.shape, p.y_layout, p.offset);
    if (in_place) dx.assign(dy);
    if (e.residual) c.residual = z.operand();
    if (e.from_y) c.residual = y.operand();
    c.from_y = e.from_y;
    if (e.residual) c.g = g.operand();
    if (e.activation) {
        const Array& from = in_place ? dx : dy;
        bn::backward(c, from.operand(), p.x->operand(), dx.operand(), sums[0].data(), sums[1].data());
        keep("dx", dx);
        if (e.residual) keep("g", g);
        r.all.emplace_back("dgamma", sums[0]), r.all.emplace_back("dbeta", sums[1]);
        if (p.dtype == SINGLE || p.dtype == DOUBLE) {
            Array alone(p.dtype, p.shape, p.dx_layout, p.offset);
            const void* vectors[3] = {p.vectors[0].data(), p.vectors[1].data(), p.vectors[2].data()};
            c.g = {}, c.weights = {};
            bn::activation_gradient(c, dy.operand(), p.x->operand(), vectors, alone.operand());
            keep("g of activation_gradient", alone);
        }
    }
    return r;
}

void check_epilogue(const Problem& p, const Epilogue& e, const Array& z, const Array& dy, const Results& r) {
    const Reference& f = *p.reference;
    int64_t size = p.x->size();
    std::vector<Real> hat(size), g(size), reach(size), sums[4];
    for (auto& v : sums) v.resize(f.channels);
    Real scale = 0, largest = 0;
    const auto &y = r["y"], &again = r["y of inference"];
    for (int64_t i = 0; i < size; ++i) {
        int c = f.channel[i];
        Real rstd = 1 / std::sqrt(f.var[c] + p.eps), gamma = p.affine ? p.gamma[c] : 1;
        Real beta = p.affine ? p.beta[c] : 0, added = e.residual ? z[i] : 0;
        hat[i] = f.difference((*p.x)[i], c) * rstd;
        Real h = gamma * hat[i] + beta + added;
        Real terms = std::max(1.0L, std::fabs(gamma * hat[i]) + std::fabs(beta) + std::fabs(added));
        Real want = e.value(h);
        close("y", i, y[i], want, tolerance(p.dtype, want, terms, 4));
        close("y of inference", i, again[i], want, tolerance(p.dtype, want, terms, 5));
        Real at = e.from_y ? (Real)y[i] : h;
        g[i] = dy[i] == 0 ? 0 : e.derivative(at) * dy[i];
        reach[i] = std::fabs((Real)dy[i]) * (e.activation == bn::SILU ? terms : 1);
        scale = std::max(scale, std::fabs(gamma) * rstd);
        largest = std::max(largest, reach[i]);
        if (dy[i] == 0) continue;
        sums[0][c] += g[i], sums[1][c] += g[i] * hat[i];
        sums[2][c] += reach[i], sums[3][c] += reach[i] * std::fabs(hat[i]);
    }
    if (!e.activation) return;
    Real most = 16 * EPS[p.arithmetic()];
    for (int64_t c = 0; c < f.channels; ++c) {
        close("dbeta", c, r["dbeta"][c], sums[0][c], most * sums[2][c]);
        close("dgamma", c, r["dgamma"][c], sums[1][c], most * sums[3][c]);
    }
    const auto& dx = r["dx"];
    for (int64_t i = 0; i < size; ++i) {
        int c = f.channel[i];
        Real weight = p.w ? (Real)(*p.w)[i] : 1, n = f.n[c] ? f.n[c] : 1;
        Real factor = (p.affine ? p.gamma[c] : 1) / std::sqrt(f.var[c] + p.eps), of_dx = scale * largest;
        Real rest = weight > 0 ? weight / n * (sums[0][c] + hat[i] * sums[1][c]) : 0;
        if (p.w && weight > 0)
            of_dx = std::max(of_dx, factor * weight / n * (sums[2][c] + std::fabs(hat[i]) * sums[3][c]));
        close("dx", i, dx[i], factor * (g[i] - rest), tolerance(p.dtype, factor * (g[i] - rest), of_dx, 16));
        if (e.residual) close("g", i, r["g"][i], g[i], tolerance(p.dtype, g[i], reach[i], 16));
    }
    if (p.dtype != SINGLE && p.dtype != DOUBLE) return;
    const auto& alone = r["g of activation_gradient"];
    for (int64_t i = 0; i < size; ++i) {
        int c = f.channel[i];
        Real added = e.residual ? z[i] : 0, scaled = p.vector(1, c) * ((*p.x)[i] - (Real)p.vector(0, c));
        Real h = scaled + p.vector(2, c) + added;
        Real terms = std::max(1.0L, std::fabs(scaled) + std::fabs((Real)p.vector(2, c)) + std::fabs(added));
        Real want = dy[i] == 0 ? 0 : e.derivative(e.from_y ? (Real)y[i] : h) * dy[i];
        if (!e.from_y && e.near_a_kink(h, terms, p.dtype)) continue;
        close("g of activation_gradient", i, alone[i], want, most * std::fabs((Real)dy[i]) * terms);
    }
}

// Arrays of every traversal, and every way to give what a derivative is taken at.
void epilogues() {
    struct Lying { Shape shape; uint64_t axes; Layout layout, z_layout; };
    const Lying all[] = {
        {{6, 3, 500}, 2, PLAIN, PLAIN}, {{4, 3, 1030}, 2, HALVES, PLAIN}, {{4, 3, 1030}, 2, PLAIN, HALVES},
        {{6, 5, 7, 9}, 2, PLAIN, PLAIN}, {{6, 5, 7, 9}, 2, LAST, LAST}, {{6, 5, 7, 9}, 2, LAST, PLAIN},
        {{600, 20}, 2, PLAIN, PADDED}, {{900, 5}, 2, PLAIN, PLAIN}, {{33, 17}, 2, REVERSED, MIXED},
        {{40, 5, 60}, 2, PLAIN, PLAIN}, {{5, 6}, 3, PLAIN, PLAIN}, {{37, 41}, 0, PLAIN, PLAIN},
        {{1100, 150}, 2, PLAIN, PLAIN}, {{2, 2, 40000}, 2, PLAIN, PLAIN}, {{700, 3, 99}, 2, PLAIN, PLAIN}};
    const int kinds[] = {bn::IDENTITY, bn::RELU, bn::RELU6, bn::LEAKY_RELU, bn::SILU};
    uint64_t seed = 0;
    for (const Lying& l : all)
        for (int activation : kinds)
            for (int way = 0; way < 4; ++way) {  // nothing, z, y alone, z and y
                Epilogue e = {activation, 0.25, way % 2 == 1, way > 1};
                if (e.from_y && (activation == bn::IDENTITY || activation == bn::SILU)) continue;
                Problem p;
                p.seed = ++seed, p.dtype = DATA[seed % 4], p.shape = l.shape, p.axes = l.axes;
                if (RACES && p.seed % 7) continue;
                if (RACES) p.dtype = seed % 2 ? HALF : SINGLE;  // bfloat16 and float64 are shared alike
                if (!has(p.dtype)) continue;
                p.x_layout = p.dy_layout = p.y_layout = p.dx_layout = l.layout;
                p.offset = (int)(seed / 4 % 2), p.affine = seed % 5 != 0;
                if (seed % 3 == 0) p.weights = seed % 2 ? MASK : SINGLE;
                p.name("epilogue");
                now += ", activation " + std::to_string(activation) + ", way " + std::to_string(way);
                p.make();
                Array z(p.dtype, p.shape, l.z_layout);
                Random random(seed + 5);
                const Reference& f = *p.reference;
                for (int64_t i = 0; i < z.size(); ++i) {
                    z.set(i, 3 * random.normal());
                    int c = f.channel[i];
                    Real gamma = p.affine ? p.gamma[c] : 1, beta = p.affine ? p.beta[c] : 0;
                    Real scaled = gamma * f.difference((*p.x)[i], c) / std::sqrt(f.var[c] + p.eps);
                    Real added = e.residual ? z[i] : 0;
                    Real terms = std::max(1.0L, std::fabs(scaled) + std::fabs(beta) + std::fabs(added));
                    if (e.near_a_kink(scaled + beta + added, terms, p.dtype)) p.dy->set(i, 0);
                }
                Results r = run_epilogue(p, e, z, *p.dy, bn::own_threads(), 3, false);
                z.check_guards("z");
                if (!RACES) check_epilogue(p, e, z, *p.dy, r);
                check_same_bits(r, run_epilogue(p, e, z, *p.dy, bn::own_threads(), 1, false), "1 thread");
                if (l.layout == l.z_layout)  // a plan may depend on where z lies
                    check_same_bits(r, run_epilogue(p, e, z, *p.dy, bn::own_threads(), 2, true), "in place");
            }
}
