// Arithmetic on sixteen values: terms of sums, results, and lines of memory that either is taken over.

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

// 1 in the first n lanes, 0 in the others.
template <class C> INLINE Vec<C> first_lanes(int n) {
    alignas(64) static const C ones[2 * LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return load(ones + LANES - n);
}

// In the type of sums.
template <class Number, class C> INLINE Vec<Number> in(const Vec<C>& v) {
    if constexpr (sizeof(Number) == sizeof(C)) return v;
    else return wide(v);
}

// Coefficients: of a span the same for all of it; of rows a column's.
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

// The residual and the activation of a job, and what the activation was applied to.
template <class T, class X> struct Epilogue {
    typedef Compute<T> C;
    X residual;  // null where there is none
    int activation;
    C slope;
    bool from_y;

    INLINE Vec<C> before(const Vec<C>& h, int64_t i, int64_t t, int n) const {
        if (!residual.first) return h;
        Vec<C> z = load_as<C>(residual.at(i, t), n);
        return from_y ? z : h + z;
    }
    INLINE Vec<C> forward(const Vec<C>& h, int64_t i, int64_t t, int n) const {
        return activate(activation, splat(slope), before(h, i, t, n));
    }
    INLINE Vec<C> backward(const Vec<C>& h, const Vec<C>& dy, int64_t i, int64_t t, int n) const {
        return activation_gradient(activation, splat(slope), before(h, i, t, n), dy);
    }
};

template <bool CONDITION, class A, class B> struct ChoiceOf {
    typedef A Type;
};
template <class A, class B> struct ChoiceOf<false, A, B> {
    typedef B Type;
};
template <bool CONDITION, class A, class B> using Choice = typename ChoiceOf<CONDITION, A, B>::Type;

// Sources of the gradient to the norm's result: it is given, or dy is, from which it is found (and written
// to `target`, where that is not null). FIRST is the row of the coefficient b of dx, WANTED the number of
// coefficients, and MOST the number of terms that are worth adding as a tree.

template <class T, class X> struct Given {
    typedef Compute<T> C;
    static constexpr int FIRST = 2, WANTED = 1, MOST = 16;
    X dy;
    template <class Number, class K>
    INLINE Vec<Number> gradient(int64_t i, int64_t t, int n, const K&) const {
        return load_as<Number>(dy.at(i, t), n);
    }
};
template <class T, class X> struct ThroughActivation {
    typedef Compute<T> C;
    static constexpr int FIRST = 3, WANTED = 3, MOST = 4;  // m, and a and b of h
    X dy, x, target;
    Epilogue<T, X> epilogue;
    template <class Number, class K>
    INLINE Vec<Number> gradient(int64_t i, int64_t t, int n, const K& k) const {
        // As a function where speed matters less: inlined everywhere, it would double the time to compile.
        if constexpr (REGISTER > 16 && sizeof(Number) == sizeof(C)) return find(i, t, n, k.v);
        else return in<Number>(found(i, t, n, k.v));
    }
    INLINE Vec<C> find(int64_t i, int64_t t, int n, const Vec<C>* k) const {
        Vec<C> h = k[1] * (load_as<C>(x.at(i, t), n) - k[0]) + k[2];
        Vec<C> g = epilogue.backward(h, load_as<C>(dy.at(i, t), n), i, t, n);
        if (target.first) {
            T* to = const_cast<T*>(target.at(i, t));
            if (n == LANES) store(to, g);
            else store(to, g, n);
        }
        return g;
    }
    __attribute__((noinline)) Vec<C> found(int64_t i, int64_t t, int n, const Vec<C>* k) const {
        return find(i, t, n, k);
    }
};

// Terms of sums. `k` is the pivot, or in the first place the mean.

template <class Number, class X> struct MomentTerms {
    typedef Number C;
    typedef Coefficients<Number, 1> K;
    static constexpr bool WEIGHTED = false;
    static constexpr int SUMS = 2, OPERANDS = 1, MOST = 16;
    X x;
    INLINE void operator()(int64_t i, int64_t t, int n, const K& k, Vec<C> (&sum)[2]) const {
        Vec<C> d = load_as<C>(x.at(i, t), n) - k.v[0];
        if (n < LANES) d = d * first_lanes<C>(n);
        sum[0] = d;
        sum[1] = d * d;
    }
};
template <class X, class W> struct WeightedMomentTerms {
    typedef double C;
    typedef Coefficients<double, 1> K;
    static constexpr bool WEIGHTED = true;
    static constexpr int SUMS = 3, OPERANDS = 1, MOST = 16;
    X x;
    W w;
    INLINE void operator()(int64_t i, int64_t t, int n, const K& k, Vec<C> (&sum)[3]) const {
        Vec<C> v = load_as<C>(w.at(i, t), n), d = where_positive(v, load_as<C>(x.at(i, t), n) - k.v[0]);
        sum[0] = v * d;
        sum[1] = sum[0] * d;
        sum[2] = v;
    }
};
template <class Number, class G, class X> struct GradTerms {
    typedef Number C;
    typedef Coefficients<typename G::C, G::WANTED> K;
    static constexpr bool WEIGHTED = false;
    static constexpr int SUMS = 2, OPERANDS = 2, MOST = G::MOST;
    G dy;
    X x;
    INLINE void operator()(int64_t i, int64_t t, int n, const K& k, Vec<C> (&sum)[2]) const {
        Vec<C> g = dy.template gradient<C>(i, t, n, k), d = load_as<C>(x.at(i, t), n) - in<C>(k.v[0]);
        if (n < LANES) d = d * first_lanes<C>(n);
        sum[0] = g;
        sum[1] = g * d;
    }
};
template <class G, class X, class W> struct WeightedGradTerms {
    typedef double C;
    typedef Coefficients<typename G::C, G::WANTED> K;
    static constexpr bool WEIGHTED = true;
    static constexpr int SUMS = 2, OPERANDS = 2, MOST = G::MOST;
    G dy;
    X x;
    W w;
    INLINE void operator()(int64_t i, int64_t t, int n, const K& k, Vec<C> (&sum)[2]) const {
        Vec<C> g = dy.template gradient<C>(i, t, n, k), d = load_as<C>(x.at(i, t), n) - in<C>(k.v[0]);
        d = where_used(load_as<C>(w.at(i, t), n), g, d);
        sum[0] = g;
        sum[1] = g * d;
    }
};

// The sums of the terms of N times sixteen values, as a tree.
template <int N, class Terms>
INLINE void tree(
    const Terms& terms, int64_t i, int64_t t, int n, const typename Terms::K& k,
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
template <class Terms> constexpr int GROUP = sizeof(typename Terms::C) == 8 ? 2 : Terms::MOST;
template <class Terms> constexpr int GROUP_ROWS =
    sizeof(typename Terms::C) == 8 ? (Terms::WEIGHTED ? 1 : 4)
    : Terms::OPERANDS == 1 || Terms::MOST < 8 ? Terms::MOST : 8;

// The sums of a span, lane by lane.
template <class Terms>
INLINE void span_sums(
    const Terms& terms, int64_t size, const typename Terms::K& k, Vec<double> (&sum)[Terms::SUMS]) {
    constexpr int N = GROUP<Terms>;
    Vec<typename Terms::C> term[Terms::SUMS];
    for (int j = 0; j < Terms::SUMS; ++j) sum[j] = splat(0.0);
    auto add = [&] {
        for (int j = 0; j < Terms::SUMS; ++j) sum[j] = sum[j] + wide(term[j]);
    };
    int64_t t = 0;
    for (; t + N * LANES <= size; t += N * LANES) {
        tree<N>(terms, 0, t, LANES, k, term);
        add();
    }
    for (; t + LANES <= size; t += LANES) {
        terms(0, t, LANES, k, term);
        add();
    }
    if (t < size) {
        terms(0, t, int(size - t), k, term);
        add();
    }
}

// Add the sums of `count` rows to those of their columns, from i on, N rows at a time; the first row that
// is left over. The columns after `size` are of padding.
template <int N, class Terms>
INLINE int64_t add_groups(
    const Terms& terms, int64_t i, int64_t count, int64_t t, int n, const typename Terms::K& k,
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
    const Terms& terms, int64_t first, int64_t count, int64_t t, int n, const typename Terms::K& k,
    double* const* sums) {
    Vec<double> sum[Terms::SUMS];
    for (int j = 0; j < Terms::SUMS; ++j) sum[j] = load(sums[j] + t);
    int64_t i = add_groups<N>(terms, first, count, t, n, k, sum);
    if constexpr (N > 4) i = add_groups<4>(terms, i, count, t, n, k, sum);
    add_groups<1>(terms, i, count, t, n, k, sum);
    for (int j = 0; j < Terms::SUMS; ++j) store(sums[j] + t, sum[j]);
}

// Rows that are in the first-level cache are read column by column, with the sums in registers; others
// group by group, as they lie in memory.
constexpr int64_t NEAR_BYTES = 1 << 15;

template <class Terms, class At>
void rows_sums(
    const Terms& terms, int64_t count, int64_t size, int64_t row_bytes, At at, double* const* sums) {
    constexpr int N = GROUP_ROWS<Terms>;
    int64_t most = count * row_bytes <= NEAR_BYTES ? count : N;
    for (int64_t i = 0; i < count; i += most) {
        int64_t last = i + most < count ? i + most : count, t = 0;
        for (; t + LANES <= size; t += LANES) add_columns<N>(terms, i, last, t, LANES, at(t), sums);
        if (t < size) add_columns<N>(terms, i, last, t, int(size - t), at(t), sums);
    }
}

// Results.

template <class T, class X> struct Output {
    typedef Compute<T> C;
    typedef Coefficients<C, 3> K;  // m, a, b
    X x;
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        return k.v[1] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[2];
    }
};
template <class T, class X> struct ActivatedOutput {
    typedef Compute<T> C;
    typedef Coefficients<C, 3> K;
    X x;
    Epilogue<T, X> epilogue;
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        Vec<C> h = k.v[1] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[2];
        return epilogue.forward(h, i, t, n);
    }
};
template <class T, class G> struct ActivationGradient {
    typedef Compute<T> C;
    typedef Coefficients<C, 3> K;  // m, a, b
    G dy;
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        return dy.template gradient<C>(i, t, n, k);
    }
};
template <class T, class G, class X> struct GradInput {
    typedef Compute<T> C;
    typedef Coefficients<C, G::FIRST + 2> K;  // m, a, (b of h,) b, c
    G dy;
    X x;
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        Vec<C> d = k.v[G::FIRST] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[G::FIRST + 1];
        return k.v[1] * (dy.template gradient<C>(i, t, n, k) + d);
    }
};
template <class T, class G, class X, class W> struct WeightedGradInput {
    typedef Compute<T> C;
    typedef Coefficients<C, G::FIRST + 2> K;
    G dy;
    X x;
    W w;  // in C
    INLINE Vec<C> operator()(int64_t i, int64_t t, int n, const K& k) const {
        Vec<C> v = load_as<C>(w.at(i, t), n);
        Vec<C> d = k.v[G::FIRST] * (load_as<C>(x.at(i, t), n) - k.v[0]) + k.v[G::FIRST + 1];
        return k.v[1] * (dy.template gradient<C>(i, t, n, k) + where_positive(v, v * d));
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
