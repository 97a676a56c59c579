// Passes over arrays in memory, for any binding: no Python here.

#pragma once

#include <cstdint>

#include "job.h"
#include "threads.h"

namespace bn {

// An array of the size of x, or weights, in memory.
struct Operand {
    char* data = nullptr;
    DType dtype = NONE;
    const int64_t* strides = nullptr;  // in bytes, of the axes of x
};

// What the passes of a call have in common.
struct Call {
    int ndim;
    const int64_t* shape;
    uint64_t channel_axes;  // a bit for each axis
    Operand weights;        // none where its data is null
    Operand residual;       // z of act(a (x - m) + b + z), or y in a backward pass; none where its data is null
    Operand g;              // where a backward pass writes the gradient to z; none where its data is null
    int activation;         // of `activations.h`
    double slope;
    bool from_y;            // whether `residual` is y
    const double* gamma;    // C values, or null for 1
    const double* beta;     // C values, or null for 0
    double eps;
    const double* running_mean;  // C values each, for batch renormalization in `forward`; null without it
    const double* running_var;
    double r_max, d_max;
    double *count, *mean, *var, *low;  // C values each; of a pass that is given statistics `low` may be null
    const Kernels* kernels;
    Threads* threads;
    int thread_count;
    bool exact;  // whether float32 sums are to be avoided
};

// What of a pass is wanted.
enum class Wanted { ALL, STATISTICS };

// Write count, mean, var and low; with ALL, y too, unless a channel of the mask has less than
// `fewest` values: false is returned then.
bool forward(const Call& call, const Operand& x, const Operand& y, Wanted wanted, double fewest);
// Write y by the statistics of the call.
void inference(const Call& call, const Operand& x, const Operand& y);
// Write dx, dgamma and dbeta, and g.
void backward(
    const Call& call, const Operand& dy, const Operand& x, const Operand& dx, double* dgamma, double* dbeta);

// The kernels. Vectors have C values in the type of the arithmetic: float, or double for float64 data.
void scale_shift(const Call& call, const Operand& x, const void* const* m_a_b, const Operand& y);
void grad_sums(
    const Call& call, const Operand& dy, const Operand& x, const void* m, double* sum_dy, double* sum_dy_d);
void activation_gradient(
    const Call& call, const Operand& dy, const Operand& x, const void* const* m_a_b, const Operand& g);
void grad_input(
    const Call& call, const Operand& dy, const Operand& x, const void* const* m_a_b_c, const Operand& dx);

}  // namespace bn
