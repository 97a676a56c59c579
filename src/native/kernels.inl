// The four kernels, and forward and backward passes of tiles of whole channels. Compiled once for each
// instruction set, in a namespace of its own.
//
// Two traversals: spans, where a channel lies in long runs, and rows across channels (channels last, or
// short runs of channels second), with a sum for each column. Either one adds up what `Terms` gives for
// sixteen values, and writes what `Result` gives.

// Sources of sixteen values: the i-th after one another along a span, or in the i-th of rows that lie a step
// (in bytes) apart.

template <class T> struct Along {
    const T* first;
    INLINE const T* at(int64_t i, int64_t t) const { return first + t + i * LANES; }
};
template <class T> struct Down {
    const T* first;
    int64_t step;
    INLINE const T* at(int64_t i, int64_t t) const {
        return (const T*)((const char*)first + i * step) + t;
    }
};

// Sixteen values, or the first n of them, in C.
template <class C, class T> INLINE Vec<C> load_as(const T* at, int n) {
    Vec<Compute<T>> v = n == LANES ? load(at) : load(at, n);
    if constexpr (sizeof(C) == sizeof(Compute<T>)) return v;
    else return wide(v);
}

INLINE Vec<float> first_lanes(float, int n) {
    alignas(64) static const float ones[2 * LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return load(ones + LANES - n);
}
INLINE Vec<double> first_lanes(double, int n) {
    alignas(64) static const double ones[2 * LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return load(ones + LANES - n);
}

// Terms of sums. `k` is the pivot, or the mean.

template <class Number, class X> struct MomentTerms {
    typedef Number C;
    static constexpr bool WEIGHTED = false;
    static constexpr int SUMS = 2, OPERANDS = 1;
    X x;
    INLINE void operator()(int64_t i, int64_t t, int n, const Vec<C>& k, Vec<C> (&sum)[2]) const {
        Vec<C> d = load_as<C>(x.at(i, t), n) - k;
        if (n < LANES) d = d * first_lanes(C(), n);
        sum[0] = d;
        sum[1] = d * d;
    }
};
template <class X, class W> struct WeightedMomentTerms {
    typedef double C;
    static constexpr bool WEIGHTED = true;
    static constexpr int SUMS = 3, OPERANDS = 1;
    X x;
    W w;
    INLINE void operator()(int64_t i, int64_t t, int n, const Vec<C>& k, Vec<C> (&sum)[3]) const {
        Vec<C> v = load_as<C>(w.at(i, t), n), d = where_positive(v, load_as<C>(x.at(i, t), n) - k);
        sum[0] = v * d;
        sum[1] = sum[0] * d;
        sum[2] = v;
    }
};
template <class Number, class X> struct GradTerms {
    typedef Number C;
    static constexpr bool WEIGHTED = false;
    static constexpr int SUMS = 2, OPERANDS = 2;
    X dy, x;
    INLINE void operator()(int64_t i, int64_t t, int n, const Vec<C>& k, Vec<C> (&sum)[2]) const {
        Vec<C> g = load_as<C>(dy.at(i, t), n), d = load_as<C>(x.at(i, t), n) - k;
        if (n < LANES) d = d * first_lanes(C(), n);
        sum[0] = g;
        sum[1] = g * d;
    }
};
template <class X, class W> struct WeightedGradTerms {
    typedef double C;
    static constexpr bool WEIGHTED = true;
    static constexpr int SUMS = 2, OPERANDS = 2;
    X dy, x;
    W w;
    INLINE void operator()(int64_t i, int64_t t, int n, const Vec<C>& k, Vec<C> (&sum)[2]) const {
        Vec<C> g = load_as<C>(dy.at(i, t), n), d = load_as<C>(x.at(i, t), n) - k;
        d = where_used(load_as<C>(w.at(i, t), n), g, d);
        sum[0] = g;
        sum[1] = g * d;
    }
};

// The sums of the terms of N times sixteen values, as a tree.
template <int N, class Terms>
INLINE void tree(
    const Terms& terms, int64_t i, int64_t t, int n, const Vec<typename Terms::C>& k,
    Vec<typename Terms::C> (&sum)[Terms::SUMS]) {
    if constexpr (N == 1) {
        terms(i, t, n, k, sum);
    } else {
        Vec<typename Terms::C> other[Terms::SUMS];
        tree<N / 2>(terms, i, t, n, k, sum);
        tree<N / 2>(terms, i + N / 2, t, n, k, other);
        for (int j = 0; j < Terms::SUMS; ++j) sum[j] = sum[j] + other[j];
    }
}

// How many terms are added before their sum joins a float64 sum.
template <class Terms> constexpr int GROUP = sizeof(typename Terms::C) == 4 ? 16 : 2;
template <class Terms> constexpr int GROUP_ROWS =
    sizeof(typename Terms::C) == 8 ? (Terms::WEIGHTED ? 1 : 4) : Terms::OPERANDS == 1 ? 16 : 8;

// The sums of a span, lane by lane.
template <class Terms>
INLINE void span_sums(
    const Terms& terms, int64_t size, typename Terms::C pivot, Vec<double> (&sum)[Terms::SUMS]) {
    typedef typename Terms::C C;
    constexpr int N = GROUP<Terms>;
    Vec<C> k = splat(pivot), term[Terms::SUMS];
    for (int j = 0; j < Terms::SUMS; ++j) sum[j] = splat(0.0);
    int64_t t = 0;
    for (; t + N * LANES <= size; t += N * LANES) {
        tree<N>(terms, 0, t, LANES, k, term);
        for (int j = 0; j < Terms::SUMS; ++j) sum[j] = sum[j] + wide(term[j]);
    }
    for (; t + LANES <= size; t += LANES) {
        terms(0, t, LANES, k, term);
        for (int j = 0; j < Terms::SUMS; ++j) sum[j] = sum[j] + wide(term[j]);
    }
    if (t < size) {
        terms(0, t, int(size - t), k, term);
        for (int j = 0; j < Terms::SUMS; ++j) sum[j] = sum[j] + wide(term[j]);
    }
}

// Add the sums of `count` rows to those of their columns, from i on, N rows at a time; the first row that
// is left over. The columns after `size` are of padding.
template <int N, class Terms>
INLINE int64_t add_groups(
    const Terms& terms, int64_t i, int64_t count, int64_t t, int n, const Vec<typename Terms::C>& k,
    Vec<double> (&sum)[Terms::SUMS]) {
    Vec<typename Terms::C> term[Terms::SUMS];
    for (; i + N <= count; i += N) {
        tree<N>(terms, i, t, n, k, term);
        for (int j = 0; j < Terms::SUMS; ++j) sum[j] = sum[j] + wide(term[j]);
    }
    return i;
}

template <int N, class Terms>
INLINE void add_columns(
    const Terms& terms, int64_t first, int64_t count, int64_t t, int n, const typename Terms::C* k,
    double* const* sums) {
    Vec<typename Terms::C> pivot = load(k + t);
    Vec<double> sum[Terms::SUMS];
    for (int j = 0; j < Terms::SUMS; ++j) sum[j] = load(sums[j] + t);
    int64_t i = add_groups<N>(terms, first, count, t, n, pivot, sum);
    if constexpr (N > 4) i = add_groups<4>(terms, i, count, t, n, pivot, sum);
    add_groups<1>(terms, i, count, t, n, pivot, sum);
    for (int j = 0; j < Terms::SUMS; ++j) store(sums[j] + t, sum[j]);
}

// Rows that are in the first-level cache are read column by column, with the sums in registers; others
// group by group, as they lie in memory.
constexpr int64_t NEAR_BYTES = 1 << 15;

template <class Terms>
void rows_sums(
    const Terms& terms, int64_t count, int64_t size, int64_t row_bytes, const typename Terms::C* k,
    double* const* sums) {
    constexpr int N = GROUP_ROWS<Terms>;
    int64_t most = count * row_bytes <= NEAR_BYTES ? count : N;
    for (int64_t i = 0; i < count; i += most) {
        int64_t last = i + most < count ? i + most : count, t = 0;
        for (; t + LANES <= size; t += LANES) add_columns<N>(terms, i, last, t, LANES, k, sums);
        if (t < size) add_columns<N>(terms, i, last, t, int(size - t), k, sums);
    }
}

// Results. `Coefficients` of a span are the same for all of it; those of rows are a column's.

template <class C, int N> struct Coefficients {
    Vec<C> v[N];
    static INLINE Coefficients of(const C* const* vectors, int64_t c) {
        Coefficients k;
        for (int j = 0; j < N; ++j) k.v[j] = splat(vectors[j][c]);
        return k;
    }
    static INLINE Coefficients load_at(const C* const* vectors, int64_t t) {
        Coefficients k;
        for (int j = 0; j < N; ++j) k.v[j] = load(vectors[j] + t);
        return k;
    }
};

template <class T, class X> struct Output {
    typedef Compute<T> C;
    typedef Coefficients<C, 3> K;  // m, a, b
    X x;
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        return k.v[1] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[2];
    }
};
template <class T, class X> struct GradInput {
    typedef Compute<T> C;
    typedef Coefficients<C, 4> K;  // m, a, b, c
    X dy, x;
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        Vec<C> d = k.v[2] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[3];
        return k.v[1] * (load_as<C>(dy.at(i, t), n) + d);
    }
};
template <class T, class X, class W> struct WeightedGradInput {
    typedef Compute<T> C;
    typedef Coefficients<C, 4> K;
    X dy, x;
    W w;  // in C
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        Vec<C> v = load_as<C>(w.at(i, t), n);
        Vec<C> d = k.v[2] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[3];
        return k.v[1] * (load_as<C>(dy.at(i, t), n) + where_positive(v, v * d));
    }
};

// Values before the first that streaming stores can begin at.
template <class T> INLINE int64_t until_aligned(const T* y, int64_t size) {
    int64_t n = -(uintptr_t)y % stream_bytes<T>() / sizeof(T);
    return n < size ? n : size;
}

// Shorter lines are not worth a beginning of their own.
constexpr int64_t ALIGNED_LINE = 16 * LANES;

// The i-th line of a result, a span or a row; `at(t)` are the coefficients of its values from t on. Stores
// are aligned, past the caches or into them: one that is not touches two cache lines.
template <class T, class Result, class At>
INLINE void write_line(const Result& result, int64_t i, T* y, int64_t size, At at, bool streaming) {
    int64_t t = 0;
    if (streaming || size >= ALIGNED_LINE) {
        t = until_aligned(y, size);
        if (t) store(y, result(i, 0, int(t), at(0)), int(t));
    }
    // Some results, then some stores: a load that follows a store to the same place in another page, as in
    // arrays that were allocated one after the other, waits for it.
    constexpr int N = REGISTER / 16;
    for (; t + N * LANES <= size; t += N * LANES) {
        Vec<typename Result::C> v[N];
        for (int k = 0; k < N; ++k) v[k] = result(i, t + k * LANES, LANES, at(t + k * LANES));
        if (streaming)
            for (int k = 0; k < N; ++k) stream(y + t + k * LANES, v[k]);
        else
            for (int k = 0; k < N; ++k) store(y + t + k * LANES, v[k]);
    }
    for (; t + LANES <= size; t += LANES) store(y + t, result(i, t, LANES, at(t)));
    if (t < size) store(y + t, result(i, t, int(size - t), at(t)), int(size - t));
}

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

template <class C> void forward_vectors(const Job& job, int64_t c0, int64_t c1) {
    C *m = job.vector<C>(0), *a = job.vector<C>(1), *b = job.vector<C>(2);
    const double *mean = job.mean, *var = job.var, *low = job.low, *gamma = job.gamma, *beta = job.beta;
    double eps = job.eps;
    for (int64_t c = c0; c < c1; ++c)
        forward_coefficients(
            mean[c], low ? low[c] : 0.0, var[c], gamma ? gamma[c] : 1.0, beta ? beta[c] : 0.0, eps, m[c],
            a[c], b[c]);
}

template <class C> void means(const Job& job, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) job.vector<C>(0)[c] = (C)job.mean[c];
}

// The coefficients of dx; `sums` become dgamma and dbeta.
template <class C> void backward_vectors(const Job& job, double* const* sums, int64_t c0, int64_t c1) {
    C *m = job.vector<C>(0), *a = job.vector<C>(1), *b = job.vector<C>(2), *s = job.vector<C>(3);
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
template <class T> struct Kernel {
    typedef Compute<T> C;
    const Job& job;
    const Plan& plan;
    char* scratch;
    bool fast;  // as in a job; a second reading is not

    Kernel(const Job& job, char* scratch)
        : job(job), plan(*job.plan), scratch(scratch), fast(job.fast) {}

    bool weighted() const { return job.weight_dtype != NONE; }

    // Spans.

    int64_t segments() const { return (plan.reduced.inner().length + SEGMENT - 1) / SEGMENT; }

    template <class V> V* room(int k) const { return (V*)(scratch + k * SEGMENT * 8); }

    struct Place {
        const char* at;
        int64_t step;
    };
    Place place(int operand, int64_t c, int64_t row, int64_t start) const {
        int64_t step = plan.reduced.inner().step[operand];
        return {job.operand[operand] + plan.channels.place(operand, c) + plan.reduced.outer(operand, row)
                    + start * step,
                step};
    }
    const T* span(int operand, int64_t c, int64_t row, int64_t start, int64_t size) const {
        Place p = place(operand, c, row, start);
        return neighbours<T>(p.at, p.step, size, room<T>(operand));
    }
    template <class V> const V* weight_span(int64_t c, int64_t row, int64_t start, int64_t size) const {
        Place p = place(job.weights, c, row, start);
        return weights_as<V>(job.weight_dtype, p.at, p.step, size, room<V>(3));
    }

    // Call `each(row, start, size)` for the segments from `first` to `last`.
    template <class Each> INLINE void for_segments(int64_t first, int64_t last, Each each) const {
        int64_t per = segments(), length = plan.reduced.inner().length;
        int64_t row = first / per, segment = first - row * per;
        for (int64_t i = first; i < last; ++i) {
            int64_t start = segment * SEGMENT, rest = length - start;
            each(row, start, rest < SEGMENT ? rest : SEGMENT);
            if (++segment == per) segment = 0, ++row;
        }
    }

    // s, q and, with weights, n of a channel's segments.
    template <class Terms, class Of>
    void add_segments(int64_t first, int64_t last, double pivot, Of terms_of, double (&result)[3]) const {
        Vec<double> high[Terms::SUMS], low[Terms::SUMS], sum[Terms::SUMS];
        for (int j = 0; j < Terms::SUMS; ++j) high[j] = low[j] = splat(0.0);
        for_segments(first, last, [&](int64_t row, int64_t start, int64_t size) {
            Terms terms = terms_of(row, start, size);
            span_sums(terms, size, (typename Terms::C)pivot, sum);
            for (int j = 0; j < Terms::SUMS; ++j) two_sum(high[j], low[j], sum[j]);
        });
        for (int j = 0; j < Terms::SUMS; ++j) {
            double rest = total(low[j]);  // NaN where a sum is infinite
            result[j] = total(high[j]) + (rest == rest ? rest : 0.0);
        }
    }

    typedef Along<T> X;
    typedef Along<double> W;

    void channel_moments_sums(int64_t c, int64_t first, int64_t last, double* const* out) const {
        double sum[3], pivot = out[3][c];
        if (weighted()) {
            add_segments<WeightedMomentTerms<X, W>>(
                first, last, pivot,
                [&](int64_t row, int64_t start, int64_t size) {
                    return WeightedMomentTerms<X, W>{
                        {span(0, c, row, start, size)}, {weight_span<double>(c, row, start, size)}};
                },
                sum);
        } else {
            sum[2] = 0;
            auto terms = [&](auto kind) {
                typedef decltype(kind) Terms;
                add_segments<Terms>(
                    first, last, pivot,
                    [&](int64_t row, int64_t start, int64_t size) {
                        return Terms{{span(0, c, row, start, size)}};
                    },
                    sum);
            };
            if (fast) terms(MomentTerms<C, X>());
            else terms(MomentTerms<double, X>());
            for_segments(first, last, [&](int64_t, int64_t, int64_t size) { sum[2] += (double)size; });
        }
        out[0][c] = sum[2];
        out[1][c] = sum[0];
        out[2][c] = sum[1];
    }

    // The mean of a channel's first values, as the type of the arithmetic rounds it. It only has to be
    // within a standard deviation of the mean.
    double channel_pivot(int64_t c) const {
        int64_t length = plan.reduced.inner().length, size = length < 64 ? length : 64;
        const T* x = span(0, c, 0, 0, size);
        const double* w = weighted() ? weight_span<double>(c, 0, 0, size) : nullptr;
        double n = 0, s = 0;
        for (int64_t i = 0; i < size; ++i) {
            double v = w ? w[i] : 1.0;
            if (v > 0) n += v, s += v * (double)value(x[i]);
        }
        return finite_or_zero((double)(C)(n > 0 ? s / n : 0.0));
    }

    void channel_grad_sums(int64_t c, int64_t first, int64_t last, double m, double* const* out) const {
        double sum[3];
        if (weighted()) {
            typedef WeightedGradTerms<X, W> Terms;
            add_segments<Terms>(
                first, last, m,
                [&](int64_t row, int64_t start, int64_t size) {
                    return Terms{{span(0, c, row, start, size)}, {span(1, c, row, start, size)},
                                 {weight_span<double>(c, row, start, size)}};
                },
                sum);
        } else {
            auto terms = [&](auto kind) {
                typedef decltype(kind) Terms;
                add_segments<Terms>(
                    first, last, m,
                    [&](int64_t row, int64_t start, int64_t size) {
                        return Terms{{span(0, c, row, start, size)}, {span(1, c, row, start, size)}};
                    },
                    sum);
            };
            if (fast) terms(GradTerms<C, X>());
            else terms(GradTerms<double, X>());
        }
        out[0][c] = sum[0];
        out[1][c] = sum[1];
    }

    // y or dx of segments of the channels from c0 to c1, in the order in which they usually lie in memory.
    template <int N, class Result, class Of>
    void write_segments(const Bounds& b, int target, Of result_of) const {
        const C* vectors[N];
        for (int k = 0; k < N; ++k) vectors[k] = job.vector<C>(k);
        int64_t per = segments(), length = plan.reduced.inner().length;
        int64_t step = plan.reduced.inner().step[target];
        bool dense = step == sizeof(T);
        for (int k = 0; k < target; ++k) dense &= plan.reduced.inner().step[k] == sizeof(T);
        dense &= !weighted();
        for (int64_t first = b.r0; first < b.r1;) {
            int64_t row = first / per, end = (row + 1) * per < b.r1 ? (row + 1) * per : b.r1;
            int64_t start = (first - row * per) * SEGMENT, stop = (end - row * per) * SEGMENT;
            if (stop > length) stop = length;
            int64_t most = dense ? stop - start : SEGMENT;  // what is copied has room for a segment
            for (int64_t c = b.c0; c < b.c1; ++c) {
                typename Result::K k = Result::K::of(vectors, c);
                for (int64_t at = start; at < stop; at += most) {
                    int64_t size = stop - at < most ? stop - at : most;
                    Result result = result_of(c, row, at, size);
                    char* to = (char*)place(target, c, row, at).at;
                    auto same = [&](int64_t) -> const typename Result::K& { return k; };
                    if (step == sizeof(T)) {
                        write_line(result, 0, (T*)to, size, same, job.streaming);
                    } else {
                        T* y = room<T>(target);
                        write_line(result, 0, y, size, same, false);
                        for (int64_t i = 0; i < size; ++i) *(T*)(to + i * step) = y[i];
                    }
                }
            }
            first = end;
        }
    }

    void write_spans(const Bounds& b) const {
        if (job.pass == OUTPUT || job.pass == FORWARD) {
            write_segments<3, Output<T, X>>(b, 1, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                return Output<T, X>{{span(0, c, row, at, size)}};
            });
        } else if (weighted()) {
            typedef WeightedGradInput<T, X, Along<C>> Result;
            write_segments<4, Result>(b, 2, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                return Result{{span(0, c, row, at, size)}, {span(1, c, row, at, size)},
                              {weight_span<C>(c, row, at, size)}};
            });
        } else {
            typedef GradInput<T, X> Result;
            write_segments<4, Result>(b, 2, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                return Result{{span(0, c, row, at, size)}, {span(1, c, row, at, size)}};
            });
        }
    }

    void spans(const Bounds& b) {
        switch (job.pass) {
            case MOMENTS: {
                double* out[4] = {job.part(b.block, 4, 0), job.part(b.block, 4, 1), job.part(b.block, 4, 2),
                                  job.part(b.block, 4, 3)};
                for (int64_t c = b.c0; c < b.c1; ++c) {
                    // The same in each tile, so that none has to wait for another.
                    if (!job.pivots_given) out[3][c] = channel_pivot(c);
                    channel_moments_sums(c, b.r0, b.r1, out);
                }
                break;
            }
            case FORWARD: {
                double* out[4] = {job.part(0, 4, 0), job.part(0, 4, 1), job.part(0, 4, 2), job.part(0, 4, 3)};
                for (int64_t c = b.c0; c < b.c1; ++c) {
                    out[3][c] = channel_pivot(c);
                    fast = job.fast;
                    channel_moments_sums(c, b.r0, b.r1, out);
                    if (finish_moments<C>(job, out, c, c + 1)) {
                        fast = false;
                        channel_moments_sums(c, b.r0, b.r1, out);
                        finish_moments<C>(job, out, c, c + 1);
                    }
                    forward_vectors<C>(job, c, c + 1);
                    write_spans({b.block, b.r0, b.r1, c, c + 1});
                }
                break;
            }
            case GRAD_SUMS: {
                double* out[2] = {job.part(b.block, 2, 0), job.part(b.block, 2, 1)};
                for (int64_t c = b.c0; c < b.c1; ++c)
                    channel_grad_sums(c, b.r0, b.r1, (double)job.vector<C>(0)[c], out);
                break;
            }
            case BACKWARD: {
                double* out[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
                for (int64_t c = b.c0; c < b.c1; ++c) {
                    means<C>(job, c, c + 1);
                    double m = (double)job.vector<C>(0)[c];
                    fast = job.fast;
                    channel_grad_sums(c, b.r0, b.r1, m, out);
                    if (gradients_out_of_range(job, out, c, c + 1)) {
                        fast = false;
                        channel_grad_sums(c, b.r0, b.r1, m, out);
                    }
                    backward_vectors<C>(job, out, c, c + 1);
                    write_spans({b.block, b.r0, b.r1, c, c + 1});
                }
                break;
            }
            default: write_spans(b);
        }
    }

    // Rows. A channel has `length` neighbouring columns, or one in each of so many `copies`.

    double* column_sums(int k) const { return (double*)scratch + k * plan.padded; }  // 11 rows
    C* column_vectors(int k) const { return (C*)(column_sums(11)) + k * plan.padded; }  // 4 rows
    double* wide_vector() const { return column_sums(10); }
    // Weights of a few rows in C, or double.
    template <class V> V* weight_row() const { return (V*)(column_sums(9)); }

    int64_t columns(const Bounds& b) const { return (b.c1 - b.c0) * plan.length * plan.copies; }

    // Rows that one step leads through, of the innermost of the axes of rows.
    Down<T> rows_at(int operand, const Bounds& b, int64_t r) const {
        return {(const T*)(job.operand[operand] + b.c0 * plan.channels.axis[0].step[operand]
                           + plan.reduced.outer(operand, r)),
                row_step(operand)};
    }
    int64_t row_step(int operand) const {
        int axes = plan.reduced.count;
        return axes > 1 ? plan.reduced.axis[axes - 2].step[operand] : 0;
    }
    // Call `each(r, count)` for such rows, and at most as many as `most`.
    template <class Each> void for_rows(int64_t r0, int64_t r1, int64_t most, Each each) const {
        int axes = plan.reduced.count;
        int64_t length = axes > 1 ? plan.reduced.axis[axes - 2].length : 1;
        for (int64_t r = r0; r < r1;) {
            int64_t n = length - r % length;
            if (n > r1 - r) n = r1 - r;
            if (n > most) n = most;
            each(r, n);
            r += n;
        }
    }
    template <class V> Down<V> weights_at(const Bounds& b, int64_t r) const {
        int64_t step = plan.channels.axis[0].step[job.weights];
        const char* at = job.operand[job.weights] + b.c0 * step + plan.reduced.outer(job.weights, r);
        return {weights_as<V>(job.weight_dtype, at, step, columns(b), weight_row<V>()), 0};
    }

    // A vector with a value for each column: where it is, or in `room`.
    template <class V, class S> const V* spread(const S* v, const Bounds& b, V* room) const {
        if constexpr (sizeof(V) == sizeof(S))
            if (plan.length == 1 && plan.copies == 1) return v + b.c0;
        V* to = room;
        for (int64_t j = 0; j < plan.copies; ++j)
            for (int64_t c = b.c0; c < b.c1; ++c)
                for (int64_t t = 0; t < plan.length; ++t) *to++ = (V)v[c];
        for (int t = 0; t < LANES; ++t) to[t] = V(0);
        return room;
    }

    void clear_sums(int first, int last, int64_t size) const {
        for (int k = first; k < last; ++k)
            for (int64_t t = 0; t < size; t += LANES) store(column_sums(k) + t, splat(0.0));
    }

    // Move partial sums to their totals, which are kept in two parts.
    void carry(int part, int high, int low, int64_t size) const {
        for (int64_t t = 0; t < size; t += LANES) {
            Vec<double> h = load(column_sums(high) + t), l = load(column_sums(low) + t);
            two_sum(h, l, load(column_sums(part) + t));
            store(column_sums(high) + t, h);
            store(column_sums(low) + t, l);
            store(column_sums(part) + t, splat(0.0));
        }
    }

    // The sum of each channel's columns; of float64 data, of sums in two parts.
    void fold(int high, int low, const Bounds& b, double* out) const {
        const double *h = column_sums(high), *l = column_sums(low);
        int64_t count = b.c1 - b.c0;
        bool parts = batches(b);
        Vec<double> s, rest;
        auto add = [&](int64_t column, int n) {
            if (narrow()) {
                s = s + load(h + column, n);
                return;
            }
            two_sum(s, rest, load(h + column, n));
            if (parts) rest = rest + load(l + column, n);
        };
        if (plan.length == 1) {
            for (int64_t c = 0; c < count; c += LANES) {
                int n = count - c < LANES ? int(count - c) : LANES;
                s = rest = splat(0.0);
                for (int64_t j = 0; j < plan.copies; ++j) add(j * count + c, n);
                store(out + b.c0 + c, s + rest, n);
            }
            return;
        }
        for (int64_t c = 0; c < count; ++c) {
            s = rest = splat(0.0);
            for (int64_t t = 0; t < plan.length; t += LANES)
                add(c * plan.length + t, plan.length - t < LANES ? int(plan.length - t) : LANES);
            out[b.c0 + c] = total(s) + total(rest);
        }
    }

    // Float64 terms are added in batches, whose sums are added in two parts. Sums of float32 terms have
    // fewer digits than a float64 sum of them.
    bool narrow() const { return fast && !weighted(); }
    bool batches(const Bounds& b) const { return !narrow() && b.r1 - b.r0 > BATCH; }

    // Sums of the columns of a tile: rows 3 + j are their high parts and 6 + j their low parts, of s, q, n.
    template <int OPERANDS, class S> void tile_sums(const Bounds& b, const S* pivots) const {
        constexpr bool GRAD = OPERANDS == 2;
        int64_t size = columns(b);
        bool parts = batches(b);
        int first = parts ? 0 : 3, sums = weighted() && !GRAD ? 3 : 2;
        clear_sums(first, parts ? 9 : 3 + sums, size);
        double* sum[3] = {column_sums(first), column_sums(first + 1), column_sums(first + 2)};
        const C* k = narrow() ? spread<C>(pivots, b, column_vectors(0)) : nullptr;
        const double* wide_k = narrow() ? nullptr : spread<double>(pivots, b, wide_vector());
        // Weights of a row are copied to where the next row's are.
        int64_t most = weighted() ? 1 : parts ? BATCH : b.r1 - b.r0, pending = 0;
        for_rows(b.r0, b.r1, most, [&](int64_t r, int64_t count) {
            add_rows<GRAD>(b, r, count, size, k, wide_k, sum);
            if (parts && (pending += count) >= BATCH) {
                for (int j = 0; j < sums; ++j) carry(j, 3 + j, 6 + j, size);
                pending = 0;
            }
        });
        if (pending)
            for (int j = 0; j < sums; ++j) carry(j, 3 + j, 6 + j, size);
    }

    // Add rows to the sums of their columns; in the type of the arithmetic where `k` is there.
    template <bool GRAD>
    void add_rows(
        const Bounds& b, int64_t r, int64_t count, int64_t size, const C* k, const double* wide_k,
        double* const* sum) const {
        typedef Down<T> X;
        typedef Down<double> W;
        int64_t bytes = size * sizeof(T);
        X x = rows_at(GRAD ? 1 : 0, b, r);
        if constexpr (GRAD) {
            X dy = rows_at(0, b, r);
            if (weighted())
                rows_sums(
                    WeightedGradTerms<X, W>{dy, x, weights_at<double>(b, r)}, count, size, bytes, wide_k, sum);
            else if (k) rows_sums(GradTerms<C, X>{dy, x}, count, size, 2 * bytes, k, sum);
            else rows_sums(GradTerms<double, X>{dy, x}, count, size, 2 * bytes, wide_k, sum);
        } else {
            if (weighted())
                rows_sums(
                    WeightedMomentTerms<X, W>{x, weights_at<double>(b, r)}, count, size, bytes, wide_k, sum);
            else if (k) rows_sums(MomentTerms<C, X>{x}, count, size, bytes, k, sum);
            else rows_sums(MomentTerms<double, X>{x}, count, size, bytes, wide_k, sum);
        }
    }

    void tile_moments(const Bounds& b, double* const* out) const {
        tile_sums<1>(b, (const double*)out[3]);
        fold(3, 6, b, out[1]);
        fold(4, 7, b, out[2]);
        if (weighted()) {
            fold(5, 8, b, out[0]);
        } else {
            double n = double((b.r1 - b.r0) * plan.length * plan.copies);
            for (int64_t c = b.c0; c < b.c1; ++c) out[0][c] = n;
        }
    }

    void tile_grad_sums(const Bounds& b, double* const* out) const {
        tile_sums<2>(b, (const C*)job.vector<C>(0));
        fold(3, 6, b, out[0]);
        fold(4, 7, b, out[1]);
    }

    // The mean of each channel's first values, as the type of the arithmetic rounds it.
    void tile_pivots(const Bounds& b, double* pivots) const {
        int64_t all = plan.grid.reduced, width = plan.length < LANES ? plan.length : LANES;
        if (plan.length > 1) {
            int64_t rows = 16 / width < all ? (16 / width ? 16 / width : 1) : all;
            for (int64_t c = b.c0; c < b.c1; ++c) {
                double s = 0;
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t t = 0; t < width; ++t)
                        s += (double)value(rows_at(0, b, r).first[(c - b.c0) * plan.length + t]);
                pivots[c] = finite_or_zero((double)(C)(s / double(rows * width)));
            }
            return;
        }
        int64_t rows = (16 + plan.copies - 1) / plan.copies, size = columns(b), count = b.c1 - b.c0;
        if (rows > all) rows = all;
        double *zero = wide_vector(), *sum[3] = {column_sums(3), column_sums(4), column_sums(5)};
        const C* narrow_zero = narrow() ? (const C*)zero : nullptr;
        clear_sums(3, weighted() ? 6 : 5, size);
        for (int64_t t = 0; t < size; t += LANES) store(zero + t, splat(0.0));
        for_rows(0, rows, weighted() ? 1 : rows, [&](int64_t r, int64_t n) {
            add_rows<false>(b, r, n, size, narrow_zero, zero, sum);
        });
        double *s = sum[0], *n = sum[2], *to = pivots + b.c0;
        for (int64_t j = 1; j < plan.copies; ++j)
            for (int64_t c = 0; c < count; ++c) {
                s[c] += s[j * count + c];
                if (weighted()) n[c] += n[j * count + c];
            }
        double share = 1 / double(rows * plan.copies);
        if (weighted())
            for (int64_t c = 0; c < count; ++c) s[c] = n[c] > 0 ? s[c] / n[c] : 0;
        else
            for (int64_t c = 0; c < count; ++c) s[c] *= share;
        for (int64_t c = 0; c < count; ++c) to[c] = finite_or_zero((double)(C)s[c]);
    }

    template <int N, class Of> void write_tile(const Bounds& b, int target, Of result_of) const {
        const C* vectors[N];
        for (int k = 0; k < N; ++k) vectors[k] = spread<C>(job.vector<C>(k), b, column_vectors(k));
        int64_t size = columns(b);
        for_rows(b.r0, b.r1, weighted() ? 1 : b.r1 - b.r0, [&](int64_t r, int64_t count) {
            auto result = result_of(r);
            typedef typename decltype(result)::K K;
            auto at = [&](int64_t t) { return K::load_at(vectors, t); };
            char* y = (char*)const_cast<T*>(rows_at(target, b, r).first);
            for (int64_t i = 0; i < count; ++i)
                write_line(result, i, (T*)(y + i * row_step(target)), size, at, job.streaming);
        });
    }

    void write_rows_of(const Bounds& b) const {
        typedef Down<T> X;
        if (job.pass == OUTPUT || job.pass == FORWARD)
            write_tile<3>(b, 1, [&](int64_t r) { return Output<T, X>{rows_at(0, b, r)}; });
        else if (weighted())
            write_tile<4>(b, 2, [&](int64_t r) {
                return WeightedGradInput<T, X, Down<C>>{
                    rows_at(0, b, r), rows_at(1, b, r), weights_at<C>(b, r)};
            });
        else
            write_tile<4>(b, 2, [&](int64_t r) {
                return GradInput<T, X>{rows_at(0, b, r), rows_at(1, b, r)};
            });
    }

    void rows(const Bounds& b) {
        double *out[4], **sums = out;
        bool gradient = job.pass == GRAD_SUMS || job.pass == BACKWARD;
        for (int k = 0; k < 4; ++k) out[k] = job.part(b.block, gradient ? 2 : 4, gradient ? k % 2 : k);
        switch (job.pass) {
            case MOMENTS:
                // The same in each tile, so that none has to wait for another.
                if (!job.pivots_given) tile_pivots(b, out[3]);
                tile_moments(b, sums);
                break;
            case FORWARD:
                tile_pivots(b, out[3]);
                tile_moments(b, sums);
                if (finish_moments<C>(job, sums, b.c0, b.c1)) {
                    fast = false;
                    tile_moments(b, sums);
                    finish_moments<C>(job, sums, b.c0, b.c1);
                }
                forward_vectors<C>(job, b.c0, b.c1);
                write_rows_of(b);
                break;
            case GRAD_SUMS: tile_grad_sums(b, sums); break;
            case BACKWARD:
                means<C>(job, b.c0, b.c1);
                tile_grad_sums(b, sums);
                if (gradients_out_of_range(job, sums, b.c0, b.c1)) {
                    fast = false;
                    tile_grad_sums(b, sums);
                }
                backward_vectors<C>(job, sums, b.c0, b.c1);
                write_rows_of(b);
                break;
            default: write_rows_of(b);
        }
    }

    void run(int64_t tile) {
        Bounds b = bounds_of(*job.grid, tile);
        if (job.grid->rows) rows(b);
        else spans(b);
        if (job.streaming) stream_fence();  // before another thread, or the caller, reads the result
    }
};

template <class T> void run_tile(const Job& job, int64_t tile, char* scratch) {
    Kernel<T>(job, scratch).run(tile);
}

// Between two passes over the tiles, for all channels.

// Add the sums of all blocks to those of the first.
static void add_blocks(const Job& job, int rows, int sums) {
    int64_t blocks = job.plan->grid.blocks(), channels = job.plan->channel_count;
    for (int64_t block = 1; block < blocks; ++block)
        for (int k = 0; k < sums; ++k) {
            double* to = job.part(0, rows, k);
            const double* from = job.part(block, rows, k);
            for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
        }
}

static bool join_moments(const Job& job) {
    add_blocks(job, 4, 3);
    double* sums[4] = {job.part(0, 4, 0), job.part(0, 4, 1), job.part(0, 4, 2), job.part(0, 4, 3)};
    int64_t channels = job.plan->channel_count;
    bool again = job.dtype == DOUBLE ? finish_moments<double>(job, sums, 0, channels)
                                     : finish_moments<float>(job, sums, 0, channels);
    if (again)
        for (int64_t block = 1; block < job.plan->grid.blocks(); ++block)
            __builtin_memcpy(job.part(block, 4, 3), sums[3], sizeof(double) * channels);
    return again;
}
static void join_forward(const Job& job) {
    if (job.dtype == DOUBLE) forward_vectors<double>(job, 0, job.plan->channel_count);
    else forward_vectors<float>(job, 0, job.plan->channel_count);
}
static void join_means(const Job& job) {
    if (job.dtype == DOUBLE) means<double>(job, 0, job.plan->channel_count);
    else means<float>(job, 0, job.plan->channel_count);
}
static bool join_sums(const Job& job) {
    add_blocks(job, 2, 2);
    double* sums[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
    return gradients_out_of_range(job, sums, 0, job.plan->channel_count);
}
static void join_backward(const Job& job) {
    double* sums[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
    if (job.dtype == DOUBLE) backward_vectors<double>(job, sums, 0, job.plan->channel_count);
    else backward_vectors<float>(job, sums, 0, job.plan->channel_count);
}

constexpr Kernels table = {
    ISA_NAME,
    {nullptr, run_tile<Half>, run_tile<BFloat16>, run_tile<float>, run_tile<double>},
    join_moments, join_forward, join_means, join_sums, join_backward,
};
