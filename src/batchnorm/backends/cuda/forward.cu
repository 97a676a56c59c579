// The forward pass: moments of each channel, then y = act(a (x - m) + b + z).

template <typename T, int V, bool ACROSS_CHANNELS, bool EPILOGUE, typename A, int CH>
__device__ inline void output(const Params& params, const Tile& tile, const A (&f)[CH][MAX_FACTORS]) {
    const int IN_FLIGHT = V * sizeof(T) >= 8 ? 4 : 8;  // vectors in flight
    Cursor<V, false> cursor(params, tile);
    for (long long i = tile.begin; i < tile.end; i += IN_FLIGHT * params.lanes) {
        Pack<T, V> x[IN_FLIGHT], z[EPILOGUE ? IN_FLIGHT : 1];
        long long offset[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) {
            offset[k] = i + k * params.lanes < tile.end ? cursor.offset : -1;
            if (offset[k] >= 0) x[k] = load_streaming<T, V>(params.x, offset[k]);
            if constexpr (EPILOGUE)
                if (offset[k] >= 0) load_residual(z[k], params, offset[k]);
            cursor.next(params);
        }
        choose_activation<EPILOGUE>(params, [&](auto chosen) {
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; ++k) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const A* g = f[ACROSS_CHANNELS ? j : 0];
                    A h = g[1] * (value(x[k].item[j]) - g[0]) + g[2];
                    if constexpr (EPILOGUE) {
                        h = before_activation(params, h, value(z[k].item[j]));
                        h = activate<A>(chosen, params.slope, h);
                    }
                    set(x[k].item[j], h);
                }
                if (offset[k] >= 0) store_streaming<T, V>(params.out, offset[k], x[k]);
            }
        });
    }
}

template <typename T, int V, bool ACROSS_CHANNELS, typename W, bool EPILOGUE> struct Forward {
    typedef typename Number<T>::Compute A;
    typedef typename Weight<W, A>::Type U;
    static const bool WEIGHTED = Weight<W, A>::PRESENT;
    static const int CH = ACROSS_CHANNELS ? V : 1;  // channels of a bundle
    static const int SUMS = 4;  // doubles of a partial result: the moments
    static const int FACTORS = 3;  // m, a, b
    // Vectors in flight: as many as the registers allow.
    static const int DEPTH = ACROSS_CHANNELS ? (sizeof(T) == 2 ? 6 : 4)
                              : V == 1 && sizeof(A) == 4 && !WEIGHTED ? 16 : V == 8 ? 6 : 8;
    typedef SharedMemory<A, CH> Shared;

    static __device__ void prepare(const Params& params, const Tile& tile, Shared& shared) {
        load_inputs(params, tile, shared);
    }

    static __device__ void sum(const Params& params, const Tile& tile, Shared&, double (&m)[CH][SUMS]) {
        Accumulator accumulators[CH];
        Cursor<V, WEIGHTED> cursor(params, tile);
        for (long long i = tile.begin; i < tile.end; i += DEPTH * params.lanes)
            if (i + (DEPTH - 1) * params.lanes < tile.end)
                chunk<true>(params, cursor, i, tile.end, accumulators);
            else
                chunk<false>(params, cursor, i, tile.end, accumulators);
        for (int ch = 0; ch < CH; ++ch) accumulators[ch].result(m[ch]);
    }

    // Add DEPTH positions; all are loaded before the first is used.
    template <bool FULL>
    static __device__ void chunk(
        const Params& params, Cursor<V, WEIGHTED>& cursor, long long i, long long end,
        Accumulator (&accumulators)[CH]) {
        const int L = ACROSS_CHANNELS ? DEPTH : DEPTH * V;  // elements of a channel
        Pack<T, V> x[DEPTH];
        U weight[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            bool in_range = FULL || i + k * params.lanes < end;
            x[k] = load<T, V>(params.x, in_range ? cursor.offset : 0);
            weight[k] = in_range ? Weight<W, A>::read(params.weights, cursor.w_offset) : U(0);
            cursor.next(params);
        }
#pragma unroll
        for (int ch = 0; ch < CH; ++ch) {
            A v[L];
            U w[L];
#pragma unroll
            for (int j = 0; j < L; ++j) {
                v[j] = value(x[ACROSS_CHANNELS ? j : j / V].item[ACROSS_CHANNELS ? ch : j % V]);
                w[j] = weight[ACROSS_CHANNELS ? j : j / V];
            }
            accumulators[ch].add(v, w);
        }
    }

    static __device__ void combine(
        double (&m)[CH][SUMS], Shared& shared, const Params& params, const Tile& tile) {
        merge_moments(m, shared, params, tile);
    }

    static __device__ void gather(
        const Params& params, const Tile& tile, const double* sums, long long count,
        double (&m)[CH][SUMS]) {
        const int AT_ONCE = CH == 1 ? 4 : 1;
        Accumulator accumulators[CH];
        for (long long i = tile.lane; tile.end > 0 && i < count; i += AT_ONCE * params.lanes) {
            double part[AT_ONCE][CH][SUMS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
                for (int ch = 0; ch < CH; ++ch)
#pragma unroll
                    for (int k = 0; k < SUMS; ++k) {
                        long long index = i + j * params.lanes;
                        const double* from = sums + index * params.channels * SUMS + ch * SUMS + k;
                        part[j][ch][k] = index < count ? __ldcg(from) : 0;
                    }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
                for (int ch = 0; ch < CH; ++ch) accumulators[ch].add(part[j][ch]);
        }
        for (int ch = 0; ch < CH; ++ch) accumulators[ch].result(m[ch]);
    }

    // Statistics, and the factors of y.
    static __device__ void finish(
        const Params& params, const Tile& tile, Shared& shared, double (&m)[CH][SUMS]) {
        for (int ch = 0; ch < CH; ++ch) {
            long long c = tile.channel + ch;
            double var = m[ch][SQUARES] / (m[ch][COUNT] > 0 ? m[ch][COUNT] : 1);
            params.stats[c] = m[ch][COUNT];
            params.stats[params.channels + c] = m[ch][MEAN];
            params.stats[2 * params.channels + c] = var;
            params.stats[3 * params.channels + c] = m[ch][LOW];
            A f[FACTORS];
            int local = tile.bundle * CH + ch;
            forward_coefficients(
                m[ch][MEAN], m[ch][LOW], var, shared.inputs[GAMMA][local], shared.inputs[BETA][local],
                params.eps, f[0], f[1], f[2]);
            store_factors<Forward>(f, params, tile, shared, ch);
        }
    }

    static __device__ void write(const Params& params, const Tile& tile, const Shared& shared) {
        A f[CH][MAX_FACTORS];
        load_factors<Forward>(f, params, tile, shared);
        output<T, V, ACROSS_CHANNELS, EPILOGUE>(params, tile, f);
    }
};

template <typename T, int V, bool ACROSS_CHANNELS, typename W, bool EPILOGUE>
__global__ void __launch_bounds__(THREADS, 2) forward(const Params params) {
    run_tasks<Forward<T, V, ACROSS_CHANNELS, W, EPILOGUE>>(params);
}

// Outputs alone, from given statistics or factors. Fewer registers are needed, so that more blocks run
// at a time; vectors of a residual need some.
template <typename T, int V, bool ACROSS_CHANNELS, typename W, bool EPILOGUE>
__global__ void __launch_bounds__(THREADS, EPILOGUE ? 3 : 4) normalize(const Params params) {
    typedef typename Number<T>::Compute A;
    const int CH = ACROSS_CHANNELS ? V : 1;
    __shared__ SharedMemory<A, CH> shared;
    for (long long i = blockIdx.x; i < params.slices * params.parts; i += gridDim.x) {
        Tile tile = tile_of<CH>(params, i % params.slices, i / params.slices);
        A f[CH][MAX_FACTORS];
        if (!(params.phases & GIVEN)) {
            load_inputs(params, tile, shared);
            __syncthreads();
        }
        for (int ch = 0; ch < CH && tile.begin < tile.end; ++ch) {
            const auto& inputs = shared.inputs;
            int local = tile.bundle * CH + ch;
            if (params.phases & GIVEN)
                for (int k = 0; k < 3; ++k) f[ch][k] = ((const A*)params.factors[k])[tile.channel + ch];
            else
                forward_coefficients(
                    inputs[INPUT_MEAN][local], 0, inputs[VAR][local], inputs[GAMMA][local],
                    inputs[BETA][local], params.eps, f[ch][0], f[ch][1], f[ch][2]);
        }
        output<T, V, ACROSS_CHANNELS, EPILOGUE>(params, tile, f);
    }
}
