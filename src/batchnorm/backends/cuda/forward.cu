// The forward pass: moments of each channel, then y = a (x - m) + b.

// y = gamma (x - mean) / std + beta, with the mean as m, a number of x's kind, and the rest of it.
template <typename A, int N_GIVEN>
__device__ inline void factor(
    double (&f)[4], const Job& job, const double (&given)[VECTORS][N_GIVEN], int c, double mean, double low,
    double var) {
    A m = (A)mean;
    f[0] = m;
    f[1] = given[GAMMA][c] * (1 / sqrt(var + job.eps));
    f[2] = given[BETA][c] - f[1] * ((mean - m) + low);
    f[3] = 0;
}

template <typename T, int V, bool COLUMNS, typename A, int CH>
__device__ inline void output(const Job& job, const Tile& tile, const A (&f)[CH][4]) {
    const int AHEAD = V * sizeof(T) >= 8 ? 4 : 8;  // vectors on their way
    Walk<V, false> walk(job, tile);
    for (long long i = tile.begin; i < tile.end; i += AHEAD * job.lanes) {
        Pack<T, V> x[AHEAD];
        long long at[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            at[k] = i + k * job.lanes < tile.end ? walk.at : -1;
            if (at[k] >= 0) x[k] = load_last<T, V>(job.x, at[k]);
            walk.next(job);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const A* g = f[COLUMNS ? j : 0];
                set(x[k].item[j], g[1] * (value(x[k].item[j]) - g[0]) + g[2]);
            }
            if (at[k] >= 0) store<T, V>(job.out, at[k], x[k]);
        }
    }
}

template <typename T, int V, bool COLUMNS, typename W> struct Forward {
    typedef typename Number<T>::Compute A;
    typedef typename Weight<W, A>::Type U;
    static const bool WEIGHTED = Weight<W, A>::THERE;
    static const int CH = COLUMNS ? V : 1;  // channels of a thread
    static const int SUMS = 4;              // doubles of a partial result: the moments
    static const int FACTORS = 3;           // m, a, b
    // Loads in flight: as many as registers allow.
    static const int DEPTH = COLUMNS ? (sizeof(T) == 2 ? 6 : 4)
                              : V == 1 && sizeof(A) == 4 && !WEIGHTED ? 16 : V == 8 ? 6 : 8;
    typedef Room<A, CH> Shared;

    static __device__ void prepare(const Job& job, const Tile& tile, Shared& room) { fetch(job, tile, room); }

    static __device__ void sum(const Job& job, const Tile& tile, Shared&, double (&m)[CH][SUMS]) {
        Running running[CH];
        Walk<V, WEIGHTED> walk(job, tile);
        for (long long i = tile.begin; i < tile.end; i += DEPTH * job.lanes)
            if (i + (DEPTH - 1) * job.lanes < tile.end)
                chunk<true>(job, walk, i, tile.end, running);
            else
                chunk<false>(job, walk, i, tile.end, running);
        for (int ch = 0; ch < CH; ++ch) running[ch].result(m[ch]);
    }

    // DEPTH positions, loaded before the first is used.
    template <bool FULL>
    static __device__ void chunk(
        const Job& job, Walk<V, WEIGHTED>& walk, long long i, long long end, Running (&running)[CH]) {
        const int L = COLUMNS ? DEPTH : DEPTH * V;  // values of a channel
        Pack<T, V> x[DEPTH];
        U weight[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            bool there = FULL || i + k * job.lanes < end;
            x[k] = load<T, V>(job.x, there ? walk.at : 0);
            weight[k] = there ? Weight<W, A>::read(job.weights, walk.w_at) : U(0);
            walk.next(job);
        }
#pragma unroll
        for (int ch = 0; ch < CH; ++ch) {
            A v[L];
            U w[L];
#pragma unroll
            for (int j = 0; j < L; ++j) {
                v[j] = value(x[COLUMNS ? j : j / V].item[COLUMNS ? ch : j % V]);
                w[j] = weight[COLUMNS ? j : j / V];
            }
            running[ch].add(v, w);
        }
    }

    static __device__ void combine(double (&m)[CH][SUMS], Shared& room, const Job& job, const Tile& tile) {
        pool(m, room, job, tile);
    }

    static __device__ void gather(
        const Job& job, const Tile& tile, const double* sums, long long count, double (&m)[CH][SUMS]) {
        const int AT_ONCE = CH == 1 ? 4 : 1;
        Running running[CH];
        for (long long i = tile.lane; tile.end > 0 && i < count; i += AT_ONCE * job.lanes) {
            double part[AT_ONCE][CH][SUMS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
                for (int ch = 0; ch < CH; ++ch)
#pragma unroll
                    for (int k = 0; k < SUMS; ++k) {
                        long long at = i + j * job.lanes;
                        const double* from = sums + at * job.channels * SUMS + ch * SUMS + k;
                        part[j][ch][k] = at < count ? __ldcg(from) : 0;
                    }
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
                for (int ch = 0; ch < CH; ++ch) running[ch].add(part[j][ch]);
        }
        for (int ch = 0; ch < CH; ++ch) running[ch].result(m[ch]);
    }

    // Statistics, and y = gamma (x - mean) / std + beta as factors.
    static __device__ void finish(const Job& job, const Tile& tile, Shared& room, double (&m)[CH][SUMS]) {
        for (int ch = 0; ch < CH; ++ch) {
            long long c = tile.c + ch;
            double var = m[ch][SQUARES] / (m[ch][COUNT] > 0 ? m[ch][COUNT] : 1);
            job.stats[c] = m[ch][COUNT];
            job.stats[job.channels + c] = m[ch][MEAN];
            job.stats[2 * job.channels + c] = var;
            job.stats[3 * job.channels + c] = m[ch][LOW];
            double f[4];
            factor<A>(f, job, room.given, tile.column * CH + ch, m[ch][MEAN], m[ch][LOW], var);
            publish<Forward>(f, job, tile, room, ch);
        }
    }

    static __device__ void write(const Job& job, const Tile& tile, const Shared& room) {
        A f[CH][4];
        factors<Forward>(f, job, tile, room);
        output<T, V, COLUMNS>(job, tile, f);
    }
};

template <typename T, int V, bool COLUMNS, typename W>
__global__ void __launch_bounds__(THREADS, 2) forward(const Job job) {
    run<Forward<T, V, COLUMNS, W>>(job);
}

// Outputs alone, from statistics or factors that are given: more blocks at a time, as registers allow.
template <typename T, int V, bool COLUMNS, typename W>
__global__ void __launch_bounds__(THREADS, 4) normalize(const Job job) {
    typedef typename Number<T>::Compute A;
    const int CH = COLUMNS ? V : 1;
    __shared__ Room<A, CH> room;
    for (long long i = blockIdx.x; i < job.slices * job.parts; i += gridDim.x) {
        Tile tile = tile_of<CH>(job, i % job.slices, i / job.slices);
        A f[CH][4];
        if (!(job.phases & GIVEN)) {
            fetch(job, tile, room);
            __syncthreads();
        }
        for (int ch = 0; ch < CH && tile.begin < tile.end; ++ch) {
            double g[4];
            int c = tile.column * CH + ch;
            if (!(job.phases & GIVEN))
                factor<A>(g, job, room.given, c, room.given[GIVEN_MEAN][c], 0, room.given[VAR][c]);
            for (int k = 0; k < 3; ++k)
                f[ch][k] = job.phases & GIVEN ? ((const A*)job.coef[k])[tile.c + ch] : (A)g[k];
        }
        output<T, V, COLUMNS>(job, tile, f);
    }
}
