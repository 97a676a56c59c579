// What the threads of a call share, and the table of kernels of one instruction set.

#pragma once

#include <cstdint>

#include "../batchnorm/backends/activations.h"
#include "plan.h"

namespace bn {

enum DType { NONE, HALF, BFLOAT16, SINGLE, DOUBLE, MASK, DTYPES };
constexpr int ITEMSIZES[DTYPES] = {0, 2, 2, 4, 8, 1};
enum Pass { MOMENTS, OUTPUT, FORWARD, ACTIVATION_GRADIENT, GRAD_SUMS, GRAD_INPUT, BACKWARD };

constexpr int VECTORS = 5;  // rows of coefficients, at most

struct Job {
    const Plan* plan;
    const Grid* grid;
    Pass pass;
    DType dtype;        // of x, y, dy and dx
    DType weight_dtype; // NONE, MASK or a floating dtype
    bool fast;          // whether sixteen terms may be added in float32 before they join a float64 sum
    bool pivots_given;
    bool streaming;
    char* operand[MAX_OPERANDS];  // x, y or dy, x, dx (or g); then these, if they are there:
    int residual;  // z of act(a (x - m) + b + z); in a backward pass y, where that is given (0: none)
    int g;         // the gradient to z, which is written as the sums are taken (0: none)
    int weights;
    int activation;  // of `activations.h`
    double slope;
    bool from_y;
    double eps;
    const double* gamma;  // C values each; null for 1 and 0
    const double* beta;
    const double* running_mean;  // C values each, of batch renormalization; null without it
    const double* running_var;
    double r_max, d_max;
    double *count, *mean, *var, *low;  // C each: results of a forward pass, arguments of a backward pass
    void* vectors;     // rows of the kernel's coefficients, in the type of the arithmetic
    double* parts;     // sums of each block of a grid: 4 rows (n, s, q, pivot), or 2 (s, q)
    int64_t row;       // from one row of `vectors` or `parts` to the next, in values

    template <class C> C* vector(int k) const { return (C*)vectors + k * row; }
    bool fused() const { return activation || residual; }
    // Whether dx is made of act'(h) dy, with h found again, and not of g, which may have been rounded.
    bool through_activation() const {
        bool exact = dtype == SINGLE || dtype == DOUBLE || activation == RELU || activation == RELU6;
        return activation && !(g && exact);
    }
    int gradient() const { return activation && !through_activation() ? g : 0; }
    double* part(int64_t block, int rows, int k) const { return parts + (block * rows + k) * row; }
};

// Kernels of an instruction set, by the dtype of the data.
struct Kernels {
    const char* name;
    void (*tile[DTYPES])(const Job& job, int64_t tile, char* scratch);
    // From sums over all blocks (in the first block's place) to vectors; whether another reading is needed.
    bool (*join_moments)(const Job& job);
    void (*join_forward)(const Job& job);
    void (*join_given)(const Job& job);
    bool (*join_sums)(const Job& job);
    void (*join_backward)(const Job& job);
};

// The kernels for this processor, or those that BATCHNORM_ISA names; null for an unknown name.
const Kernels* kernels_for(const char* isa);
// Names of the instruction sets that this processor has, from the oldest; null after the last.
const char* const* instruction_sets();

}  // namespace bn
