// Tiles of spans: channels second or first, where one channel lies in long runs. A run is cut into segments.

template <class T> struct Spans : Tile<T> {
    using typename Tile<T>::C;
    using Tile<T>::Tile;
    using Tile<T>::job;
    using Tile<T>::plan;
    using Tile<T>::scratch;
    using Tile<T>::fast;
    using Tile<T>::weighted;
    using Tile<T>::epilogue;
    typedef Along<T> X;
    typedef Along<double> W;

    int64_t segments() const { return (plan.reduced.inner().length + SEGMENT - 1) / SEGMENT; }

    // Room for a segment of an operand.
    template <class V> V* room(int operand) const { return (V*)(scratch + operand * SEGMENT * 8); }

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
        return weights_as<V>(job.weight_dtype, p.at, p.step, size, room<V>(job.weights));
    }
    Epilogue<T, X> epilogue_of(int64_t c, int64_t row, int64_t start, int64_t size) const {
        return epilogue(X{job.residual ? span(job.residual, c, row, start, size) : nullptr});
    }

    // Where a segment of a result is made: its place, or room that is then copied from.
    T* result_span(int operand, int64_t c, int64_t row, int64_t start) const {
        Place p = place(operand, c, row, start);
        return p.step == sizeof(T) ? (T*)p.at : room<T>(operand);
    }
    void copy_result(int operand, int64_t c, int64_t row, int64_t start, int64_t size) const {
        Place p = place(operand, c, row, start);
        if (p.step == sizeof(T)) return;
        const T* y = room<T>(operand);
        for (int64_t i = 0; i < size; ++i) *(T*)(const_cast<char*>(p.at) + i * p.step) = y[i];
    }

    // The gradient to the norm's result: given in an operand, or found from dy, x and the epilogue.
    template <bool THROUGH> using Gradient = Choice<THROUGH, ThroughActivation<T, X>, Given<T, X>>;
    template <bool THROUGH>
    Gradient<THROUGH> gradient(
        int operand, const T* x, T* target, int64_t c, int64_t row, int64_t start, int64_t size) const {
        X dy{span(operand, c, row, start, size)};
        if constexpr (THROUGH) return {dy, {x}, {target}, epilogue_of(c, row, start, size)};
        else return {dy};
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

    // s, q and, with weights, n of a channel's segments; `done` is called after each.
    template <class Terms, class Of, class Done>
    void add_segments(
        int64_t first, int64_t last, const typename Terms::K& k, Of terms_of, Done done,
        double (&result)[3]) const {
        Vec<double> high[Terms::SUMS], low[Terms::SUMS], sum[Terms::SUMS];
        for (int j = 0; j < Terms::SUMS; ++j) high[j] = low[j] = splat(0.0);
        for_segments(first, last, [&](int64_t row, int64_t start, int64_t size) {
            Terms terms = terms_of(row, start, size);
            span_sums(terms, size, k, sum);
            for (int j = 0; j < Terms::SUMS; ++j) two_sum(high[j], low[j], sum[j]);
            done(row, start, size);
        });
        for (int j = 0; j < Terms::SUMS; ++j) {
            double rest = total(low[j]);  // NaN where a sum is infinite
            result[j] = total(high[j]) + (rest == rest ? rest : 0.0);
        }
    }

    void channel_moments_sums(int64_t c, int64_t first, int64_t last, double* const* out) const {
        double sum[3], pivot = out[3][c];
        auto nothing = [](int64_t, int64_t, int64_t) {};
        if (weighted()) {
            add_segments<WeightedMomentTerms<X, W>>(
                first, last, {{splat(pivot)}},
                [&](int64_t row, int64_t start, int64_t size) {
                    return WeightedMomentTerms<X, W>{
                        {span(0, c, row, start, size)}, {weight_span<double>(c, row, start, size)}};
                },
                nothing, sum);
        } else {
            sum[2] = 0;
            auto terms = [&](auto kind) {
                typedef decltype(kind) Terms;
                add_segments<Terms>(
                    first, last, {{splat((typename Terms::C)pivot)}},
                    [&](int64_t row, int64_t start, int64_t size) {
                        return Terms{{span(0, c, row, start, size)}};
                    },
                    nothing, sum);
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

    template <bool THROUGH>
    void channel_grad_sums(int64_t c, int64_t first, int64_t last, double* const* out) const {
        typedef Gradient<THROUGH> G;
        double sum[3];
        const C* vectors[G::WANTED];
        for (int k = 0; k < G::WANTED; ++k) vectors[k] = job.template vector<C>(k);
        auto k = Coefficients<C, G::WANTED>::of(vectors, c);
        auto parts = [&](int64_t row, int64_t start, int64_t size, auto make) {
            const T* x = span(1, c, row, start, size);
            T* target = job.g ? result_span(job.g, c, row, start) : nullptr;
            return make(gradient<THROUGH>(0, x, target, c, row, start, size), X{x});
        };
        auto done = [&](int64_t row, int64_t start, int64_t size) {
            if (THROUGH && job.g) copy_result(job.g, c, row, start, size);
        };
        if (weighted()) {
            typedef WeightedGradTerms<G, X, W> Terms;
            add_segments<Terms>(
                first, last, k,
                [&](int64_t row, int64_t start, int64_t size) {
                    return parts(row, start, size, [&](G dy, X x) {
                        return Terms{dy, x, {weight_span<double>(c, row, start, size)}};
                    });
                },
                done, sum);
        } else {
            auto terms = [&](auto kind) {
                typedef decltype(kind) Terms;
                add_segments<Terms>(
                    first, last, k,
                    [&](int64_t row, int64_t start, int64_t size) {
                        return parts(row, start, size, [](G dy, X x) { return Terms{dy, x}; });
                    },
                    done, sum);
            };
            if (fast) terms(GradTerms<C, G, X>());
            else terms(GradTerms<double, G, X>());
        }
        out[0][c] = sum[0];
        out[1][c] = sum[1];
    }

    // y or dx of segments of the channels from c0 to c1, in the order in which they usually lie in memory.
    template <int N, class Result, class Of>
    void write_segments(const Bounds& b, int target, Of result_of) const {
        const C* vectors[N];
        for (int k = 0; k < N; ++k) vectors[k] = job.template vector<C>(k);
        int64_t per = segments(), length = plan.reduced.inner().length;
        int64_t step = plan.reduced.inner().step[target];
        bool dense = step == sizeof(T);
        const int read[] = {0, target - 1, job.residual, job.g};  // x, or dy and x
        for (int k : read) dense &= plan.reduced.inner().step[k] == sizeof(T);
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
                    auto same = [&](int64_t) -> const typename Result::K& { return k; };
                    T* y = result_span(target, c, row, at);
                    write_line(result, 0, y, size, same, job.streaming && step == sizeof(T));
                    copy_result(target, c, row, at, size);
                }
            }
            first = end;
        }
    }

    void write(const Bounds& b) const {
        if (job.pass == OUTPUT || job.pass == FORWARD) {
            if (job.fused())
                write_segments<3, ActivatedOutput<T, X>>(
                    b, 1, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                        return ActivatedOutput<T, X>{
                            {span(0, c, row, at, size)}, epilogue_of(c, row, at, size)};
                    });
            else
                write_segments<3, Output<T, X>>(b, 1, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                    return Output<T, X>{{span(0, c, row, at, size)}};
                });
        } else if (job.pass == ACTIVATION_GRADIENT) {
            typedef ActivationGradient<T, Gradient<true>> Result;
            write_segments<3, Result>(b, 2, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                return Result{gradient<true>(0, span(1, c, row, at, size), nullptr, c, row, at, size)};
            });
        } else {
            choose(job.through_activation(), [&](auto through) { write_gradient<through.value>(b); });
        }
    }

    template <bool THROUGH> void write_gradient(const Bounds& b) const {
        typedef Gradient<THROUGH> G;
        int dy = job.gradient();
        if (weighted()) {
            typedef WeightedGradInput<T, G, X, Along<C>> Result;
            write_segments<G::FIRST + 2, Result>(
                b, 2, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                    const T* x = span(1, c, row, at, size);
                    return Result{gradient<THROUGH>(dy, x, nullptr, c, row, at, size), {x},
                                  {weight_span<C>(c, row, at, size)}};
                });
        } else {
            typedef GradInput<T, G, X> Result;
            write_segments<G::FIRST + 2, Result>(
                b, 2, [&](int64_t c, int64_t row, int64_t at, int64_t size) {
                    const T* x = span(1, c, row, at, size);
                    return Result{gradient<THROUGH>(dy, x, nullptr, c, row, at, size), {x}};
                });
        }
    }

    // The pass of kernels.inl takes one channel at a time: its second reading finds it in the cache.
    static constexpr bool BY_CHANNEL = true;
    void pivots(const Bounds& b, double* to) const {
        for (int64_t c = b.c0; c < b.c1; ++c) to[c] = channel_pivot(c);
    }
    void moments(const Bounds& b, double* const* sums) const {
        for (int64_t c = b.c0; c < b.c1; ++c) channel_moments_sums(c, b.r0, b.r1, sums);
    }
    void grad_sums(const Bounds& b, double* const* sums) const {
        choose(job.activation != IDENTITY, [&](auto through) {
            for (int64_t c = b.c0; c < b.c1; ++c) channel_grad_sums<through.value>(c, b.r0, b.r1, sums);
        });
    }
};
