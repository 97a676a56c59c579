// The backward pass: sums of g and of g (x - m), then dx = a (g + w (b (x - m) + c)). Without an epilogue g
// is dy, with one act'(h) dy.
//
// That is computed in both phases, and written in the second, as the gradient to the residual. Where a
// group stays in the cache, this moves as few bytes as if the sums wrote it and the second phase read it
// instead of dy and z; elsewhere one array in eight more. But dx does not have the error of a g that was
// rounded to 16 bits, and no block reads elements that another one wrote, which its L1 cache may not have.

template <typename T, int V, bool ACROSS_CHANNELS, typename W, bool EPILOGUE> struct Backward {
    typedef typename Number<T>::Compute A;
    typedef typename Weight<W, A>::Type U;
    static const bool WEIGHTED = Weight<W, A>::PRESENT;
    static const int CH = ACROSS_CHANNELS ? V : 1;  // channels of a bundle
    static const int SUMS = 2;  // doubles of a partial result
    static const int FACTORS = EPILOGUE ? 5 : 4;  // m, a, b, c, and b of h
    static const int H = 4;  // the place of the last
    // Vectors of each array in flight: as many as the registers allow, in sums and in outputs.
    static const bool FEW = EPILOGUE && V * sizeof(T) == 16;
    static const int DEPTH = FEW ? 2 : ACROSS_CHANNELS || WEIGHTED || V > 1 || EPILOGUE ? 4 : 8;
    typedef SharedMemory<A, CH> Shared;

    static __device__ void prepare(const Params& params, const Tile& tile, Shared& shared) {
        load_inputs(params, tile, shared);
        __syncthreads();
        if constexpr (EPILOGUE) {
            const auto& inputs = shared.inputs;
            for (int ch = 0; ch < CH && tile.leader; ++ch) {
                int local = tile.bundle * CH + ch;
                forward_coefficients(
                    inputs[INPUT_MEAN][local], inputs[INPUT_LOW][local], inputs[VAR][local],
                    inputs[GAMMA][local], inputs[BETA][local], params.eps, shared.factors[0][local],
                    shared.factors[1][local], shared.factors[H][local]);
            }
            __syncthreads();
        }
    }

    // The gradient to the norm's result, from dy: that is 0 where dy is 0, whatever x is.
    template <typename Chosen>
    static __device__ __forceinline__ A gradient(
        Chosen chosen, const Params& params, const A (&f)[MAX_FACTORS], A x, A z, A dy) {
        A h = before_activation(params, A(f[1] * (x - f[0]) + f[H]), z);
        return activation_gradient<A>(chosen, params.slope, h, dy);
    }

    static __device__ void sum(
        const Params& params, const Tile& tile, Shared& shared, double (&m)[CH][SUMS]) {
        A f[CH][MAX_FACTORS];
        for (int ch = 0; ch < CH; ++ch) {
            m[ch][0] = m[ch][1] = 0;
            if (tile.begin < tile.end)  // the mean, rounded to the type of the arithmetic
                f[ch][0] = params.phases & GIVEN ? ((const A*)params.factors[0])[tile.channel + ch]
                                                 : (A)shared.inputs[INPUT_MEAN][tile.bundle * CH + ch];
            if constexpr (EPILOGUE) {
                f[ch][1] = shared.factors[1][tile.bundle * CH + ch];
                f[ch][H] = shared.factors[H][tile.bundle * CH + ch];
            }
        }
        Cursor<V, WEIGHTED> cursor(params, tile);
        for (long long i = tile.begin; i < tile.end; i += DEPTH * params.lanes) {
            const int L = ACROSS_CHANNELS ? DEPTH : DEPTH * V;  // elements of a channel
            Pack<T, V> dy[DEPTH], x[DEPTH], z[EPILOGUE ? DEPTH : 1];
            bool used[DEPTH], weighs[DEPTH];
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) {
                bool in_range = i + k * params.lanes < tile.end;
                dy[k] = load<T, V>(params.dy, in_range ? cursor.offset : 0);
                x[k] = load<T, V>(params.x, in_range ? cursor.offset : 0);
                if constexpr (EPILOGUE)
                    if (params.residual)
                        z[k] = load<T, V>(params.residual, in_range ? cursor.offset : 0);
                used[k] = in_range;
                if (WEIGHTED && in_range) {  // elements of zero weight and gradient may be NaN
                    used[k] = value(dy[k].item[0]) != 0
                                || Weight<W, A>::read(params.weights, cursor.w_offset) > 0;
                    if (EPILOGUE)
                        weighs[k] = Weight<W, A>::read(params.weights, cursor.w_offset) > 0;
                }
                cursor.next(params);
            }
            choose_activation<EPILOGUE, RELU>(params, [&](auto chosen) {
#pragma unroll
                for (int ch = 0; ch < CH; ++ch) {
                    A g[L], gd[L];
#pragma unroll
                    for (int j = 0; j < L; ++j) {
                        int k = ACROSS_CHANNELS ? j : j / V, item = ACROSS_CHANNELS ? ch : j % V;
                        g[j] = used[k] ? value(dy[k].item[item]) : A(0);
                        if constexpr (EPILOGUE) {
                            A v = value(x[k].item[item]), given = value(z[k].item[item]);
                            g[j] = gradient(chosen, params, f[ch], v, given, g[j]);
                            if (WEIGHTED)  // g may be 0 where dy is not
                                used[k] = used[k] && (weighs[k] || g[j] != 0);
                        }
                        gd[j] = used[k] ? g[j] * (value(x[k].item[item]) - f[ch][0]) : A(0);
                    }
                    m[ch][0] += pairwise_sum<L>(g);
                    m[ch][1] += pairwise_sum<L>(gd);
                }
            });
        }
    }

    static __device__ void combine(
        double (&m)[CH][SUMS], Shared& shared, const Params& params, const Tile& tile) {
        double v[2 * CH];
        for (int ch = 0; ch < CH; ++ch) v[2 * ch] = m[ch][0], v[2 * ch + 1] = m[ch][1];
        sum_over_lanes(v, shared, params, tile);
        for (int ch = 0; ch < CH; ++ch) m[ch][0] = v[2 * ch], m[ch][1] = v[2 * ch + 1];
    }

    static __device__ void gather(
        const Params& params, const Tile& tile, const double* sums, long long count,
        double (&m)[CH][SUMS]) {
        for (int ch = 0; ch < CH; ++ch) m[ch][0] = m[ch][1] = 0;
#pragma unroll 4
        for (long long i = tile.lane; i < (tile.end > 0 ? count : 0); i += params.lanes)
#pragma unroll
            for (int ch = 0; ch < CH; ++ch)
#pragma unroll
                for (int k = 0; k < SUMS; ++k)
                    m[ch][k] += __ldcg(sums + i * params.channels * SUMS + ch * SUMS + k);
    }

    // Gradients of the parameters, and the factors of dx.
    static __device__ void finish(
        const Params& params, const Tile& tile, Shared& shared, double (&m)[CH][SUMS]) {
        for (int ch = 0; ch < CH; ++ch) {
            long long c = tile.channel + ch;
            if (params.phases & RAW) {
                params.stats[c] = m[ch][0];
                params.stats[params.channels + c] = m[ch][1];
                continue;
            }
            const auto& inputs = shared.inputs;
            int local = tile.bundle * CH + ch;
            double sum_dy = m[ch][0], dgamma;
            A f[FACTORS];
            backward_coefficients(
                inputs[N][local], inputs[INPUT_MEAN][local], inputs[INPUT_LOW][local],
                inputs[VAR][local], inputs[GAMMA][local], params.eps, sum_dy, m[ch][1], dgamma, f[0],
                f[1], f[2], f[3]);
            if constexpr (EPILOGUE) f[H] = shared.factors[H][local];
            store_channel(params.dgamma, c, dgamma);
            store_channel(params.dbeta, c, sum_dy);
            store_factors<Backward>(f, params, tile, shared, ch);
        }
    }

    static __device__ void write(const Params& params, const Tile& tile, const Shared& shared) {
        A f[CH][MAX_FACTORS];
        load_factors<Backward>(f, params, tile, shared);
        Cursor<V, WEIGHTED> cursor(params, tile);
        const int IN_FLIGHT = FEW ? 2 : V * sizeof(T) >= 8 ? 4 : 8;
        for (long long i = tile.begin; i < tile.end; i += IN_FLIGHT * params.lanes) {
            Pack<T, V> dy[IN_FLIGHT], x[IN_FLIGHT], z[EPILOGUE ? IN_FLIGHT : 1];
            long long offset[IN_FLIGHT];
            U w[IN_FLIGHT];
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; ++k) {
                offset[k] = i + k * params.lanes < tile.end ? cursor.offset : -1;
                if (offset[k] >= 0) {
                    dy[k] = load_streaming<T, V>(params.dy, offset[k]);
                    x[k] = load_streaming<T, V>(params.x, offset[k]);
                    if constexpr (EPILOGUE) load_residual(z[k], params, offset[k]);
                    w[k] = Weight<W, A>::read(params.weights, cursor.w_offset);
                }
                cursor.next(params);
            }
            choose_activation<EPILOGUE, RELU>(params, [&](auto chosen) {
#pragma unroll
                for (int k = 0; k < IN_FLIGHT; ++k) {
                    if (offset[k] < 0) continue;
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        const auto& h = f[ACROSS_CHANNELS ? j : 0];
                        // The gradient through the statistics.
                        A via_stats = h[2] * (value(x[k].item[j]) - h[0]) + h[3];
                        if (WEIGHTED) via_stats = w[k] > 0 ? A(w[k] * via_stats) : A(0);
                        A g = value(dy[k].item[j]);
                        if constexpr (EPILOGUE) {
                            g = gradient(chosen, params, h, value(x[k].item[j]), value(z[k].item[j]), g);
                            set(dy[k].item[j], g);
                        }
                        set(x[k].item[j], h[1] * (g + via_stats));
                    }
                    if (!EPILOGUE || params.out) store_streaming<T, V>(params.out, offset[k], x[k]);
                    if (EPILOGUE && params.dresidual)
                        store_streaming<T, V>(params.dresidual, offset[k], dy[k]);
                }
            });
        }
    }
};

template <typename T, int V, bool ACROSS_CHANNELS, typename W, bool EPILOGUE>
__global__ void __launch_bounds__(THREADS, 2) backward(const Params params) {
    run_tasks<Backward<T, V, ACROSS_CHANNELS, W, EPILOGUE>>(params);
}
