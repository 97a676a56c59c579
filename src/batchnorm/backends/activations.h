// Activations and their gradients, one line each; `epilogue.py` has the same for arrays of any library.
// Compiled for a number by NVRTC, and for sixteen, a `Vec`, by a C++ compiler: V is either.

#ifndef BATCHNORM_ACTIVATIONS_H
#define BATCHNORM_ACTIVATIONS_H

#ifndef BATCHNORM_COEFFICIENTS_H  // NVRTC reads one text, in which it comes before this
#include "coefficients.h"
#endif

#ifdef __CUDACC__
#define BN_FUNCTION __device__ inline
#else
#define BN_FUNCTION __attribute__((noinline))
#endif

namespace bn {

// The order of `KINDS` in `epilogue.py`; the last is their number.
enum Activation { IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, ACTIVATIONS };

// What formulas are made of, for one number; `vec.h` has it for sixteen.

BN_INLINE float constant(float, double c) { return (float)c; }
BN_INLINE double constant(double, double c) { return c; }
template <class V> BN_INLINE V at_most(V h, V c, V a, V b) { return h <= c ? a : b; }  // b where h is NaN
template <class V> BN_INLINE V at_least(V h, V c, V a, V b) { return h >= c ? a : b; }
template <class V> BN_INLINE V above(V h, V c, V a, V b) { return h > c ? a : b; }
template <class V> BN_INLINE V equal(V h, V c, V a, V b) { return h == c ? a : b; }
BN_INLINE float exponential(float v) { return expf(v); }
BN_INLINE double exponential(double v) { return exp(v); }

// The sigmoids of h and of -h, without overflow.
template <class V> struct Sigmoids {
    V s, t;
    BN_INLINE explicit Sigmoids(V h) {
        V zero = constant(h, 0), one = constant(h, 1);
        V e = exponential(at_least(h, zero, zero - h, h)), sum = one + e;
        s = at_least(h, zero, one, e) / sum;
        t = at_least(h, zero, e, one) / sum;
    }
};
// Long formulas are functions of their own: inlined wherever an activation may be, they take longer to
// compile than all the rest.
template <class V> BN_FUNCTION V silu(V h) { return h * Sigmoids<V>(h).s; }
template <class V> BN_FUNCTION V silu_gradient(V h, V v) {
    V zero = constant(h, 0), one = constant(h, 1);
    Sigmoids<V> of(h);
    return equal(v, zero, v, v * (of.s * (one + h * of.t)));
}

// act(h). NaN stays NaN.
template <class V> BN_INLINE V activate(int activation, V slope, V h) {
    V zero = constant(h, 0), six = constant(h, 6);
    switch (activation) {
        case RELU: return at_most(h, zero, zero, h);
        case RELU6: return at_least(h, six, six, at_most(h, zero, zero, h));
        case LEAKY_RELU: return above(h, zero, h, slope * h);
        case SILU: return silu(h);
        default: return h;
    }
}

// act'(h) v; 0 where v is 0.
template <class V> BN_INLINE V activation_gradient(int activation, V slope, V h, V v) {
    V zero = constant(h, 0), six = constant(h, 6);
    switch (activation) {
        case RELU: return at_most(h, zero, zero, v);
        case RELU6: return at_least(h, six, zero, at_most(h, zero, zero, v));
        case LEAKY_RELU: return above(h, zero, v, slope * v);
        case SILU: return silu_gradient(h, v);
        default: return v;
    }
}

}  // namespace bn

#endif
