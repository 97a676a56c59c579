// Moments: of values, of lanes, of parts. The same algebra as in moments.py, without its divisions.

enum Moment { COUNT, MEAN, LOW, SQUARES };  // the mean is MEAN + LOW; SQUARES are about it

// A thread's moments of one channel, about a pivot: the mean of its first values. Whatever these are,
// an outlier too, nothing cancels that the spread does not hold.
struct Running {
    double count = 0, pivot = 0, sum = 0, squares = 0;

    // L values with weights. Sums are in double, so that they are right to its last digits whatever
    // the data; only the pivot, which may be any number near, comes from what values are worked on in.
    template <int L, typename A, typename U> __device__ void add(const A (&v)[L], const U (&w)[L]) {
        if (count == 0) {
            A first = v[0], about[L], n[L];
#pragma unroll
            for (int i = L - 1; i > 0; --i)
                if (w[i] > 0 && !(w[0] > 0)) first = v[i];
#pragma unroll
            for (int i = 0; i < L; ++i) {
                n[i] = w[i] > 0 ? 1 : 0;
                about[i] = w[i] > 0 ? v[i] - first : A(0);
            }
            A values = tree<L>(n);
            if (!(values > 0)) return;
            pivot = first + tree<L>(about) / values;
        }
        double n[2] = {0, 0}, s[2] = {0, 0}, q[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < L; ++i) {
            double d = w[i] > 0 ? v[i] - pivot : 0;  // what weighs nothing may be NaN
            double wd = w[i] * d;
            n[i % 2] += w[i];
            s[i % 2] += wd;
            q[i % 2] += wd * d;
        }
        count += n[0] + n[1];
        sum += s[0] + s[1];
        squares += q[0] + q[1];
    }

    // Moments of a part.
    __device__ void add(const double (&m)[4]) {
        if (count == 0) pivot = m[MEAN];
        double d = m[COUNT] > 0 ? (m[MEAN] - pivot) + m[LOW] : 0;
        count += m[COUNT];
        sum += m[COUNT] * d;
        squares += m[SQUARES] + m[COUNT] * d * d;
    }

    __device__ void result(double (&m)[4]) const {
        double offset = count > 0 ? sum / count : 0;
        m[COUNT] = count;
        m[MEAN] = pivot;
        m[LOW] = offset;
        m[SQUARES] = squares - sum * offset;
    }
};

// Moments of lanes become those of their channel: a mean from all, then what is left of each about it.
template <typename A, int CH>
__device__ inline void pool(double (&m)[CH][4], Room<A, CH>& room, const Job& job, const Tile& tile) {
    double v[2 * CH];
    for (int i = 0; i < CH; ++i) {
        v[2 * i] = m[i][COUNT];
        v[2 * i + 1] = m[i][COUNT] * (m[i][MEAN] + m[i][LOW]);
    }
    total(v, room, job, tile);
    double count[CH], high[CH];
    for (int i = 0; i < CH; ++i) {
        count[i] = v[2 * i];
        high[i] = count[i] > 0 ? v[2 * i + 1] / count[i] : 0;
        double d = (m[i][MEAN] - high[i]) + m[i][LOW];
        v[2 * i] = m[i][COUNT] * d;
        v[2 * i + 1] = m[i][SQUARES] + m[i][COUNT] * d * d;
    }
    total(v, room, job, tile);
    for (int i = 0; i < CH; ++i) {
        double rest = count[i] > 0 ? v[2 * i] / count[i] : 0;
        m[i][COUNT] = count[i];
        m[i][MEAN] = high[i] + rest;
        m[i][LOW] = rest - (m[i][MEAN] - high[i]);  // exact: Dekker 1971, Fast2Sum
        double squares = v[2 * i + 1] - v[2 * i] * rest;
        m[i][SQUARES] = squares < 0 ? 0 : squares;  // NaN stays NaN
    }
}
