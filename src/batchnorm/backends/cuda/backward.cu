// The backward pass: sums of dy and of dy (x - m), then dx = a (dy + w (b (x - m) + c)).

template <typename T, int V, bool COLUMNS, typename W> struct Backward {
    typedef typename Number<T>::Compute A;
    typedef typename Weight<W, A>::Type U;
    static const bool WEIGHTED = Weight<W, A>::THERE;
    static const int CH = COLUMNS ? V : 1;  // channels of a thread
    static const int SUMS = 2;              // doubles of a partial result
    static const int FACTORS = 4;           // m, a, b, c
    static const int DEPTH = COLUMNS || WEIGHTED || V > 1 ? 4 : 8;
    typedef Room<A, CH> Shared;

    static __device__ void prepare(const Job& job, const Tile& tile, Shared& room) {
        fetch(job, tile, room);
        __syncthreads();
    }

    static __device__ void sum(const Job& job, const Tile& tile, Shared& room, double (&m)[CH][SUMS]) {
        A mean[CH];
        for (int ch = 0; ch < CH; ++ch) {
            m[ch][0] = m[ch][1] = 0;
            if (tile.begin < tile.end)  // the mean, as a number of x's kind
                mean[ch] = job.phases & GIVEN ? ((const A*)job.coef[0])[tile.c + ch]
                                              : (A)room.given[GIVEN_MEAN][tile.column * CH + ch];
        }
        Walk<V, WEIGHTED> walk(job, tile);
        for (long long i = tile.begin; i < tile.end; i += DEPTH * job.lanes) {
            const int L = COLUMNS ? DEPTH : DEPTH * V;  // values of a channel
            Pack<T, V> dy[DEPTH], x[DEPTH];
            bool counts[DEPTH];
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) {
                bool there = i + k * job.lanes < tile.end;
                dy[k] = load<T, V>(job.dy, there ? walk.at : 0);
                x[k] = load<T, V>(job.x, there ? walk.at : 0);
                counts[k] = there;
                if (WEIGHTED && there)  // without weight and without gradient, x may be NaN
                    counts[k] = value(dy[k].item[0]) != 0
                                || Weight<W, A>::read(job.weights, walk.w_at) > 0;
                walk.next(job);
            }
#pragma unroll
            for (int ch = 0; ch < CH; ++ch) {
                A g[L], gd[L];
#pragma unroll
                for (int j = 0; j < L; ++j) {
                    int k = COLUMNS ? j : j / V, item = COLUMNS ? ch : j % V;
                    g[j] = counts[k] ? value(dy[k].item[item]) : A(0);
                    gd[j] = counts[k] ? g[j] * (value(x[k].item[item]) - mean[ch]) : A(0);
                }
                m[ch][0] += tree<L>(g);
                m[ch][1] += tree<L>(gd);
            }
        }
    }

    static __device__ void combine(double (&m)[CH][SUMS], Shared& room, const Job& job, const Tile& tile) {
        double v[2 * CH];
        for (int ch = 0; ch < CH; ++ch) v[2 * ch] = m[ch][0], v[2 * ch + 1] = m[ch][1];
        total(v, room, job, tile);
        for (int ch = 0; ch < CH; ++ch) m[ch][0] = v[2 * ch], m[ch][1] = v[2 * ch + 1];
    }

    static __device__ void gather(
        const Job& job, const Tile& tile, const double* sums, long long count, double (&m)[CH][SUMS]) {
        for (int ch = 0; ch < CH; ++ch) m[ch][0] = m[ch][1] = 0;
#pragma unroll 4
        for (long long i = tile.lane; i < (tile.end > 0 ? count : 0); i += job.lanes)
#pragma unroll
            for (int ch = 0; ch < CH; ++ch)
#pragma unroll
                for (int k = 0; k < SUMS; ++k)
                    m[ch][k] += __ldcg(sums + i * job.channels * SUMS + ch * SUMS + k);
    }

    // Gradients of the parameters, and the factors of dx, as functional.py has them.
    static __device__ void finish(const Job& job, const Tile& tile, Shared& room, double (&m)[CH][SUMS]) {
        for (int ch = 0; ch < CH; ++ch) {
            long long c = tile.c + ch;
            if (job.phases & RAW) {
                job.stats[c] = m[ch][0];
                job.stats[job.channels + c] = m[ch][1];
                continue;
            }
            int at = tile.column * CH + ch;
            double mean = room.given[GIVEN_MEAN][at], n = room.given[N][at];
            A nearest = (A)mean;
            double rest = (mean - nearest) + room.given[GIVEN_LOW][at];
            double rstd = 1 / sqrt(room.given[VAR][at] + job.eps);
            double sum_dy = m[ch][0], dgamma = rstd * (m[ch][1] - rest * sum_dy);
            if (!(n > 0)) n = 1;
            double b = -rstd * (dgamma / n);
            double f[4] = {nearest, room.given[GAMMA][at] * rstd, b, -sum_dy / n - b * rest};
            give(job.dgamma, c, dgamma);
            give(job.dbeta, c, sum_dy);
            publish<Backward>(f, job, tile, room, ch);
        }
    }

    static __device__ void write(const Job& job, const Tile& tile, const Shared& room) {
        A f[CH][4];
        factors<Backward>(f, job, tile, room);
        Walk<V, WEIGHTED> walk(job, tile);
        const int AHEAD = V * sizeof(T) >= 8 ? 4 : 8;  // vectors on their way, of dy and of x
        for (long long i = tile.begin; i < tile.end; i += AHEAD * job.lanes) {
            Pack<T, V> dy[AHEAD], x[AHEAD];
            long long at[AHEAD];
            U w[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                at[k] = i + k * job.lanes < tile.end ? walk.at : -1;
                if (at[k] >= 0) {
                    dy[k] = load_last<T, V>(job.dy, at[k]);
                    x[k] = load_last<T, V>(job.x, at[k]);
                    w[k] = Weight<W, A>::read(job.weights, walk.w_at);
                }
                walk.next(job);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                if (at[k] < 0) continue;
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const A* h = f[COLUMNS ? j : 0];
                    A through = h[2] * (value(x[k].item[j]) - h[0]) + h[3];  // the statistics
                    if (WEIGHTED) through = w[k] > 0 ? A(w[k] * through) : A(0);
                    set(x[k].item[j], h[1] * (value(dy[k].item[j]) + through));
                }
                store<T, V>(job.out, at[k], x[k]);
            }
        }
    }
};

template <typename T, int V, bool COLUMNS, typename W>
__global__ void __launch_bounds__(THREADS, 2) backward(const Job job) {
    run<Backward<T, V, COLUMNS, W>>(job);
}
