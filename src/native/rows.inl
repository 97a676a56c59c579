// Tiles of rows across channels: channels last, or short runs of channels second. A channel has `length`
// neighbouring columns, or one in each of so many `copies`.

template <class T> struct Rows : Tile<T> {
    using typename Tile<T>::C;
    using Tile<T>::Tile;
    using Tile<T>::job;
    using Tile<T>::plan;
    using Tile<T>::scratch;
    using Tile<T>::fast;
    using Tile<T>::weighted;
    using Tile<T>::epilogue;

    double* column_sums(int k) const { return (double*)scratch + k * plan.padded; }  // 11 rows
    C* column_vectors(int k) const { return (C*)(column_sums(11)) + k * plan.padded; }  // VECTORS rows
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
    typedef Down<T> X;
    Epilogue<T, X> epilogue_at(const Bounds& b, int64_t r) const {
        return epilogue(job.residual ? rows_at(job.residual, b, r) : X{nullptr, 0});
    }
    template <bool THROUGH> using Gradient = Choice<THROUGH, ThroughActivation<T, X>, Given<T, X>>;
    template <bool THROUGH> Gradient<THROUGH> gradient(int operand, int target, const Bounds& b, int64_t r) const {
        X dy = rows_at(operand, b, r);
        if constexpr (THROUGH)
            return {dy, rows_at(1, b, r), target ? rows_at(target, b, r) : X{nullptr, 0}, epilogue_at(b, r)};
        else return {dy};
    }
    // Coefficients of columns: the first N of the job's vectors.
    template <int N> struct Columns {
        const C* vectors[N];
        INLINE Coefficients<C, N> operator()(int64_t t) const {
            return Coefficients<C, N>::load_at(vectors, t);
        }
    };
    template <int N> Columns<N> columns_of(const Bounds& b) const {
        Columns<N> found;
        for (int k = 0; k < N; ++k)
            found.vectors[k] = spread<C>(job.template vector<C>(k), b, column_vectors(k));
        return found;
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
    // `add(r, count, sum)` adds those of some rows.
    template <class Add> void tile_sums(const Bounds& b, int sums, Add add) const {
        int64_t size = columns(b);
        bool parts = batches(b);
        int first = parts ? 0 : 3;
        clear_sums(first, parts ? 9 : 3 + sums, size);
        double* sum[3] = {column_sums(first), column_sums(first + 1), column_sums(first + 2)};
        // Weights of a row are copied to where the next row's are.
        int64_t most = weighted() ? 1 : parts ? BATCH : b.r1 - b.r0, pending = 0;
        for_rows(b.r0, b.r1, most, [&](int64_t r, int64_t count) {
            add(r, count, (double* const*)sum);
            if (parts && (pending += count) >= BATCH) {
                for (int j = 0; j < sums; ++j) carry(j, 3 + j, 6 + j, size);
                pending = 0;
            }
        });
        if (pending)
            for (int j = 0; j < sums; ++j) carry(j, 3 + j, 6 + j, size);
    }

    // Add rows to the sums of their columns; in the type of the arithmetic where `k` is there.
    void add_moments(
        const Bounds& b, int64_t r, int64_t count, const C* k, const double* wide_k,
        double* const* sum) const {
        int64_t size = columns(b), bytes = size * sizeof(T);
        X x = rows_at(0, b, r);
        auto wide_at = [&](int64_t t) { return Coefficients<double, 1>{{load(wide_k + t)}}; };
        if (weighted()) {
            typedef WeightedMomentTerms<X, Down<double>> Terms;
            rows_sums(Terms{x, weights_at<double>(b, r)}, count, size, bytes, wide_at, sum);
        } else if (k) {
            auto at = [&](int64_t t) { return Coefficients<C, 1>{{load(k + t)}}; };
            rows_sums(MomentTerms<C, X>{x}, count, size, bytes, at, sum);
        } else {
            rows_sums(MomentTerms<double, X>{x}, count, size, bytes, wide_at, sum);
        }
    }
    template <bool THROUGH, class At>
    void add_gradients(const Bounds& b, int64_t r, int64_t count, At at, double* const* sum) const {
        typedef Gradient<THROUGH> G;
        int64_t size = columns(b), bytes = 2 * size * sizeof(T);
        G dy = gradient<THROUGH>(0, job.g, b, r);
        X x = rows_at(1, b, r);
        if (weighted()) {
            typedef WeightedGradTerms<G, X, Down<double>> Terms;
            rows_sums(Terms{dy, x, weights_at<double>(b, r)}, count, size, bytes, at, sum);
        } else if (narrow()) {
            rows_sums(GradTerms<C, G, X>{dy, x}, count, size, bytes, at, sum);
        } else {
            rows_sums(GradTerms<double, G, X>{dy, x}, count, size, bytes, at, sum);
        }
    }

    static constexpr bool BY_CHANNEL = false;
    void moments(const Bounds& b, double* const* out) const {
        const double* pivots = out[3];
        const C* k = narrow() ? spread<C>(pivots, b, column_vectors(0)) : nullptr;
        const double* wide_k = narrow() ? nullptr : spread<double>(pivots, b, wide_vector());
        tile_sums(b, weighted() ? 3 : 2, [&](int64_t r, int64_t count, double* const* sum) {
            add_moments(b, r, count, k, wide_k, sum);
        });
        fold(3, 6, b, out[1]);
        fold(4, 7, b, out[2]);
        if (weighted()) {
            fold(5, 8, b, out[0]);
        } else {
            double n = double((b.r1 - b.r0) * plan.length * plan.copies);
            for (int64_t c = b.c0; c < b.c1; ++c) out[0][c] = n;
        }
    }

    void grad_sums(const Bounds& b, double* const* out) const {
        choose(job.activation != IDENTITY, [&](auto through) {
            auto at = columns_of<Gradient<through.value>::WANTED>(b);
            tile_sums(b, 2, [&](int64_t r, int64_t count, double* const* sum) {
                add_gradients<through.value>(b, r, count, at, sum);
            });
        });
        fold(3, 6, b, out[0]);
        fold(4, 7, b, out[1]);
    }

    // The mean of each channel's first values, as the type of the arithmetic rounds it.
    void pivots(const Bounds& b, double* pivots) const {
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
            add_moments(b, r, n, narrow_zero, zero, sum);
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
        auto at = columns_of<N>(b);
        int64_t size = columns(b);
        for_rows(b.r0, b.r1, weighted() ? 1 : b.r1 - b.r0, [&](int64_t r, int64_t count) {
            auto result = result_of(r);
            char* y = (char*)const_cast<T*>(rows_at(target, b, r).first);
            for (int64_t i = 0; i < count; ++i)
                write_line(result, i, (T*)(y + i * row_step(target)), size, at, job.streaming);
        });
    }

    void write(const Bounds& b) const {
        if (job.pass == OUTPUT || job.pass == FORWARD) {
            if (job.fused())
                write_tile<3>(b, 1, [&](int64_t r) {
                    return ActivatedOutput<T, X>{rows_at(0, b, r), epilogue_at(b, r)};
                });
            else
                write_tile<3>(b, 1, [&](int64_t r) { return Output<T, X>{rows_at(0, b, r)}; });
        } else if (job.pass == ACTIVATION_GRADIENT) {
            write_tile<3>(b, 2, [&](int64_t r) {
                return ActivationGradient<T, Gradient<true>>{gradient<true>(0, 0, b, r)};
            });
        } else {
            choose(job.through_activation(), [&](auto through) { write_gradient<through.value>(b); });
        }
    }

    template <bool THROUGH> void write_gradient(const Bounds& b) const {
        typedef Gradient<THROUGH> G;
        constexpr int N = G::FIRST + 2;
        int dy = job.gradient();
        if (weighted())
            write_tile<N>(b, 2, [&](int64_t r) {
                return WeightedGradInput<T, G, X, Down<C>>{
                    gradient<THROUGH>(dy, 0, b, r), rows_at(1, b, r), weights_at<C>(b, r)};
            });
        else
            write_tile<N>(b, 2, [&](int64_t r) {
                return GradInput<T, G, X>{gradient<THROUGH>(dy, 0, b, r), rows_at(1, b, r)};
            });
    }
};
