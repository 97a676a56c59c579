// The arithmetic of single channels: conversions of 16-bit numbers, moments, and the coefficients of the
// kernels. Compiled by a C++ compiler for CPUs and by NVRTC for GPUs; `coefficients.py` has the same for
// arrays of any library.

#ifndef BATCHNORM_COEFFICIENTS_H
#define BATCHNORM_COEFFICIENTS_H

#ifdef __CUDACC__
#define BN_INLINE __device__ inline
#else
#include <cmath>
#define BN_INLINE __attribute__((always_inline)) inline
#endif

namespace bn {

// 16-bit numbers, by their bits.

BN_INLINE unsigned bits_of(float v) {
#ifdef __CUDACC__
    return __float_as_uint(v);
#else
    unsigned bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
#endif
}

BN_INLINE float float_of(unsigned bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
#endif
}

BN_INLINE float bfloat16_to_float(unsigned short bits) { return float_of((unsigned)bits << 16); }

BN_INLINE unsigned short float_to_bfloat16(float v) {
    unsigned bits = bits_of(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry it into infinity
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to even
}

#ifdef __CUDACC__
BN_INLINE float half_to_float(unsigned short bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
BN_INLINE unsigned short float_to_half(float v) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
#else
BN_INLINE float half_to_float(unsigned short h) {
    unsigned sign = (unsigned)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    float v = float_of(magnitude << 13) * 0x1p112f;  // exact, for subnormal numbers too
    if (magnitude >= 0x7c00u) v = float_of((magnitude << 13) | 0x7f800000u);
    return float_of(bits_of(v) | sign);
}
BN_INLINE unsigned short float_to_half(float v) {
    unsigned bits = bits_of(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // 65520 and above
    if (magnitude < 0x38800000u)  // subnormal: the addition rounds at the place of 2^-24
        return (unsigned short)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);  // to even
    return (unsigned short)(sign | ((magnitude - 0x38000000u) >> 13));
}
#endif

// Sums in two parts (Knuth 1969, TwoSum).
template <class V> BN_INLINE void two_sum(V& high, V& low, V term) {
    V s = high + term, back = s - high;
    low = low + ((high - (s - back)) + (term - back));
    high = s;
}

// From n, the sum of d and the sum of d^2, with d = x - pivot, to moments. With d = mean - pivot,
// var = q/n - d^2; where d is below a standard deviation, next to nothing cancels.
struct ChannelMoments {
    double count, mean, var, low;
};

BN_INLINE ChannelMoments channel_moments(double n, double s, double q, double pivot) {
    double some = n > 0 ? n : 1;
    double d = s / some, var = q / some - d * d;
    double mean = pivot + d, back = mean - pivot;
    ChannelMoments m = {n, mean, 0 > var ? 0 : var, (pivot - (mean - back)) + (d - back)};
    return m;  // a variance of NaN stays
}

// Whether a pivot was too far from the mean for that.
BN_INLINE bool far_pivot(double n, double s, double q) {
    double some = n > 0 ? n : 1, d = s / some;
    return 2 * (d * d) > q / some;
}

// Merging of moments (Chan et al. 1983, eq. 2.1, for any number of parts), without a division for each
// part. The mean is mean + low; `squares` is n var, the sum of squared deviations from it.

// What a part adds to the sums of d and of d^2, with d = x - pivot: zeros where it has no values.
BN_INLINE void deviation_sums(
    double n, double mean, double low, double squares, double pivot, double& s, double& q) {
    double d = (mean - pivot) + low;
    s = n * d;
    q = squares + s * d;
}

// And back: the mean is pivot + d.
BN_INLINE double squares_about_mean(double n, double s, double q, double& d) {
    d = n > 0 ? s / n : 0;
    return q - s * d;
}

// The last step, about a pivot that is the mean but for rounding errors: `mean` is the rounded mean.
BN_INLINE void merged_moments(
    double n, double s, double q, double pivot, double& mean, double& low, double& squares) {
    double d, sum = squares_about_mean(n, s, q, d);
    mean = pivot + d;
    low = d - (mean - pivot);  // exact: Dekker 1971, Fast2Sum
    squares = sum < 0 ? 0 : sum;  // NaN stays NaN
}

// y = a (x - m) + b, with m the mean as A, the type of the arithmetic, rounds it.
template <class A>
BN_INLINE void forward_coefficients(
    double mean, double low, double var, double gamma, double beta, double eps, A& m, A& a, A& b) {
    m = (A)mean;
    double residual = (mean - (double)m) + low;
    double rstd = 1 / sqrt(var + eps), scale = rstd * gamma;
    a = (A)scale;
    b = (A)(beta - scale * residual);
}

// r and d of batch renormalization (Ioffe 2017, Algorithm 1), within their limits, which NaN passes. They are
// constants of a backward pass, so that y = gamma (r xhat + d) + beta is batch norm with other gamma and beta.
BN_INLINE void renorm_corrections(
    double mean, double low, double var, double running_mean, double running_var, double eps, double r_max,
    double d_max, double& r, double& d) {
    double running_std = sqrt(running_var + eps), r_min = 1 / r_max;
    r = sqrt(var + eps) / running_std;
    d = ((mean - running_mean) + low) / running_std;
    r = r > r_max ? r_max : r < r_min ? r_min : r;
    d = d > d_max ? d_max : d < -d_max ? -d_max : d;
}

// dx = a (dy + w (b (x - m) + c)), dgamma and dbeta, from the sums of dy and of dy (x - m).
template <class A>
BN_INLINE void backward_coefficients(
    double n, double mean, double low, double var, double gamma, double eps, double sum_dy,
    double sum_dy_d, double& dgamma, A& m, A& a, A& b, A& c) {
    m = (A)mean;
    double residual = (mean - (double)m) + low;
    double rstd = 1 / sqrt(var + eps), some = n > 0 ? n : 1;
    dgamma = rstd * (sum_dy_d - residual * sum_dy);
    double slope = -rstd * (dgamma / some);
    a = (A)(rstd * gamma);
    b = (A)slope;
    c = (A)(-sum_dy / some - slope * residual);
}

}  // namespace bn

#endif
