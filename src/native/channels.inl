// What tiles have in common: bounds, weights, and from sums of channels to vectors.

// Values that lie a step apart, as neighbours: where they are, or copied to `room`.
template <class T> INLINE const T* neighbours(const char* at, int64_t step, int64_t n, T* room) {
    if (step == (int64_t)sizeof(T)) return (const T*)at;
    for (int64_t i = 0; i < n; ++i) room[i] = *(const T*)(at + i * step);
    return room;
}

template <class C, class W> void copy_weights(const char* at, int64_t step, int64_t n, C* room) {
    for (int64_t i = 0; i < n; ++i) room[i] = (C)value(*(const W*)(at + i * step));
}
// Weights in C; those of a mask are 1 and 0.
template <class C>
const C* weights_as(DType dtype, const char* at, int64_t step, int64_t n, C* room) {
    switch (dtype) {
        case MASK:
            for (int64_t i = 0; i < n; ++i) room[i] = at[i * step] ? C(1) : C(0);
            break;
        case HALF: copy_weights<C, Half>(at, step, n, room); break;
        case BFLOAT16: copy_weights<C, BFloat16>(at, step, n, room); break;
        case SINGLE: copy_weights<C, float>(at, step, n, room); break;
        default: copy_weights<C, double>(at, step, n, room); break;
    }
    return room;
}

struct Bounds {
    int64_t block, r0, r1, c0, c1;
};
INLINE Bounds bounds_of(const Grid& grid, int64_t tile) {
    int64_t across = (grid.channels + grid.across - 1) / grid.across, block = tile / across;
    int64_t c0 = (tile - block * across) * grid.across, r0 = block * grid.block;
    int64_t r1 = r0 + grid.block, c1 = c0 + grid.across;
    return {block, r0, r1 < grid.reduced ? r1 : grid.reduced, c0, c1 < grid.channels ? c1 : grid.channels};
}

// Whether sums in float32 may have left its range.
INLINE bool out_of_range(double n, double s, double q) {
    double high = n * 0x1p100, low = n * 0x1p-90;
    bool tiny = __builtin_fabs(q) < low && !(q == 0 && (s == 0 || __builtin_fabs(s) > n * 0x1p-60));
    return !(__builtin_fabs(q) <= high) || !(__builtin_fabs(s) <= high) || tiny;
}

INLINE double finite_or_zero(double v) { return __builtin_fabs(v) <= __DBL_MAX__ ? v : 0.0; }

// From sums to vectors, of the channels from c0 to c1.

// Moments from the rows n, s, q and pivot of `sums`; better pivots, and true, where another reading is needed.
template <class C> bool finish_moments(const Job& job, double* const* sums, int64_t c0, int64_t c1) {
    int again = 0;
    const double *n = sums[0], *s = sums[1], *q = sums[2];
    for (int64_t c = c0; c < c1; ++c) {
        again |= far_pivot(n[c], s[c], q[c]);
        if (job.fast) again |= out_of_range(n[c], s[c], q[c]) && q[c] == q[c];
    }
    for (int64_t c = c0; c < c1; ++c) {
        ChannelMoments m = channel_moments(n[c], s[c], q[c], sums[3][c]);
        job.count[c] = m.count;
        job.mean[c] = m.mean;
        job.var[c] = m.var;
        job.low[c] = m.low;
    }
    if (again)
        for (int64_t c = c0; c < c1; ++c) sums[3][c] = finite_or_zero((double)(C)job.mean[c]);
    return again;
}

template <class C> void renormalized_vectors(const Job& job, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
        double gamma = job.gamma ? job.gamma[c] : 1.0, beta = job.beta ? job.beta[c] : 0.0, r, d;
        double mean = job.mean[c], low = job.low[c], var = job.var[c];
        renorm_corrections(
            mean, low, var, job.running_mean[c], job.running_var[c], job.eps, job.r_max, job.d_max, r, d);
        forward_coefficients(
            mean, low, var, gamma * r, beta + gamma * d, job.eps, job.vector<C>(0)[c], job.vector<C>(1)[c],
            job.vector<C>(2)[c]);
    }
}

template <class C> void forward_vectors(const Job& job, int64_t c0, int64_t c1) {
    C *m = job.vector<C>(0), *a = job.vector<C>(1), *b = job.vector<C>(2);
    const double *mean = job.mean, *var = job.var, *low = job.low, *gamma = job.gamma, *beta = job.beta;
    double eps = job.eps;
    if (job.running_mean) return renormalized_vectors<C>(job, c0, c1);
    for (int64_t c = c0; c < c1; ++c)
        forward_coefficients(
            mean[c], low ? low[c] : 0.0, var[c], gamma ? gamma[c] : 1.0, beta ? beta[c] : 0.0, eps, m[c],
            a[c], b[c]);
}

// What the sums of a backward pass need: m, and where an activation is gone back through, a and b of h.
template <class C> void given_vectors(const Job& job, int64_t c0, int64_t c1) {
    if (job.activation) return forward_vectors<C>(job, c0, c1);
    for (int64_t c = c0; c < c1; ++c) job.vector<C>(0)[c] = (C)job.mean[c];
}

// The coefficients of dx; `sums` become dgamma and dbeta.
template <class C> void backward_vectors(const Job& job, double* const* sums, int64_t c0, int64_t c1) {
    int first = job.through_activation() ? 3 : 2;  // after m and a, and b of h
    C *m = job.vector<C>(0), *a = job.vector<C>(1), *b = job.vector<C>(first), *s = job.vector<C>(first + 1);
    for (int64_t c = c0; c < c1; ++c) {
        double sum_dy = sums[0][c], dgamma;
        backward_coefficients(
            job.count[c], job.mean[c], job.low ? job.low[c] : 0.0, job.var[c],
            job.gamma ? job.gamma[c] : 1.0, job.eps, sum_dy, sums[1][c], dgamma, m[c], a[c], b[c], s[c]);
        sums[0][c] = dgamma;
        sums[1][c] = sum_dy;
    }
}

bool gradients_out_of_range(const Job& job, double* const* sums, int64_t c0, int64_t c1) {
    int again = 0;
    if (job.fast)
        for (int64_t c = c0; c < c1; ++c)
            again |= out_of_range((double)job.plan->values, sums[0][c], sums[1][c]);
    return again;
}

// A tile of some dtype.
template <class T> struct Tile {
    typedef Compute<T> C;
    const Job& job;
    const Plan& plan;
    char* scratch;
    bool fast;  // as in a job; a second reading is not

    Tile(const Job& job, char* scratch) : job(job), plan(*job.plan), scratch(scratch), fast(job.fast) {}

    bool weighted() const { return job.weight_dtype != NONE; }
    template <class X> Epilogue<T, X> epilogue(X residual) const {
        return {residual, job.activation, (C)job.slope, job.from_y};
    }
};

// A choice at run time between two kinds of kernels: call `f` with a constant.
template <bool VALUE> struct Constant {
    static constexpr bool value = VALUE;
};
template <class F> INLINE auto choose(bool condition, F f) {
    return condition ? f(Constant<true>()) : f(Constant<false>());
}
