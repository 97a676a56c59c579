// Moments of elements, lanes and parts.

enum Moment { COUNT, MEAN, LOW, SQUARES };  // the mean is MEAN + LOW; SQUARES: squared deviations

// The moments of one channel in a thread, as sums of deviations from a pivot: the mean of the first
// values. These contribute to the spread, so cancellation stays small relative to it even where they
// are outliers.
struct Accumulator {
    double count = 0, pivot = 0, sum = 0, squares = 0;

    // Add L values with weights. The sums are in double, for accuracy with any data. The pivot may be
    // any value near the data, so it is computed in the type of the arithmetic.
    template <int L, typename A, typename U> __device__ void add(const A (&v)[L], const U (&w)[L]) {
        if (count == 0) {
            A first = v[0], deviation[L], n[L];
#pragma unroll
            for (int i = L - 1; i > 0; --i)
                if (w[i] > 0 && !(w[0] > 0)) first = v[i];
#pragma unroll
            for (int i = 0; i < L; ++i) {
                n[i] = w[i] > 0 ? 1 : 0;
                deviation[i] = w[i] > 0 ? v[i] - first : A(0);
            }
            A values = pairwise_sum<L>(n);
            if (!(values > 0)) return;
            pivot = first + pairwise_sum<L>(deviation) / values;
        }
        double n[2] = {0, 0}, s[2] = {0, 0}, q[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < L; ++i) {
            double d = w[i] > 0 ? v[i] - pivot : 0;  // elements of zero weight may be NaN
            double wd = w[i] * d;
            n[i % 2] += w[i];
            s[i % 2] += wd;
            q[i % 2] += wd * d;
        }
        count += n[0] + n[1];
        sum += s[0] + s[1];
        squares += q[0] + q[1];
    }

    // Add the moments of a part.
    __device__ void add(const double (&m)[4]) {
        if (count == 0) pivot = m[MEAN];
        double s, q;
        deviation_sums(m[COUNT], m[MEAN], m[LOW], m[SQUARES], pivot, s, q);
        count += m[COUNT];
        sum += s;
        squares += q;
    }

    __device__ void result(double (&m)[4]) const {
        m[COUNT] = count;
        m[MEAN] = pivot;
        m[SQUARES] = squares_about_mean(count, sum, squares, m[LOW]);
    }
};

// Merge the moments of the lanes: first the mean of all, then the deviations of each lane from it.
template <typename A, int CH>
__device__ inline void merge_moments(
    double (&m)[CH][4], SharedMemory<A, CH>& shared, const Params& params, const Tile& tile) {
    double v[2 * CH];
    for (int i = 0; i < CH; ++i) {
        v[2 * i] = m[i][COUNT];
        v[2 * i + 1] = m[i][COUNT] * (m[i][MEAN] + m[i][LOW]);
    }
    sum_over_lanes(v, shared, params, tile);
    double count[CH], high[CH];
    for (int i = 0; i < CH; ++i) {
        count[i] = v[2 * i];
        high[i] = count[i] > 0 ? v[2 * i + 1] / count[i] : 0;
        deviation_sums(
            m[i][COUNT], m[i][MEAN], m[i][LOW], m[i][SQUARES], high[i], v[2 * i], v[2 * i + 1]);
    }
    sum_over_lanes(v, shared, params, tile);
    for (int i = 0; i < CH; ++i) {
        m[i][COUNT] = count[i];
        merged_moments(
            count[i], v[2 * i], v[2 * i + 1], high[i], m[i][MEAN], m[i][LOW], m[i][SQUARES]);
    }
}
