// How kernels traverse arrays: axes merged to as few as strides allow, and tiles.
//
// A pass is cut into tiles, each a block of the reduced axes by a block of channels. What a tile computes
// depends on its number alone, so results are the same to the bit for any number of threads.

#pragma once

#include <cstdint>

// Functions of headers that several instruction sets are compiled with are inlined in each: a linker
// that kept one copy might keep one that some processor cannot run.
#define BN_ALWAYS __attribute__((always_inline)) inline

namespace bn {

constexpr int MAX_AXES = 64;
constexpr int MAX_OPERANDS = 6;  // x, y, z and weights, or dy, x, dx, z or y, g and weights

// Below this, data and results included, a second thread costs more than it saves.
constexpr int64_t ALONE_BYTES = 1 << 19;
// Values of a channel that are added before their sum joins the next level.
constexpr int64_t SEGMENT = 1024;
// Rows whose sums are added before they join the next level.
constexpr int64_t BATCH = 64;

struct Axis {
    int64_t length;
    int64_t step[MAX_OPERANDS];  // in bytes
};

// Axes from the outermost to the innermost; at least one.
struct Axes {
    int count = 0;
    Axis axis[MAX_AXES];

    // Offset in bytes of an index over the first `n` axes.
    BN_ALWAYS int64_t place(int operand, int n, int64_t index) const {
        int64_t offset = 0;
        for (int k = n - 1; k > 0; --k) {
            int64_t length = axis[k].length, up = index / length;
            offset += (index - up * length) * axis[k].step[operand];
            index = up;
        }
        return n ? offset + index * axis[0].step[operand] : 0;
    }
    BN_ALWAYS int64_t place(int operand, int64_t index) const { return place(operand, count, index); }
    // The same without the innermost axis.
    BN_ALWAYS int64_t outer(int operand, int64_t index) const { return place(operand, count - 1, index); }
    BN_ALWAYS const Axis& inner() const { return axis[count - 1]; }
};

// How one pass goes over arrays.
struct Grid {
    int64_t reduced, block;     // rows, or segments of rows, and those of a tile
    int64_t channels, across;   // channels, and those of a tile
    bool rows;                  // rows across channels, or else channel by channel
    bool streaming;             // whether results are stored past the caches

    BN_ALWAYS int64_t blocks() const { return reduced > block ? (reduced + block - 1) / block : 1; }
    BN_ALWAYS int64_t tiles() const { return blocks() * ((channels + across - 1) / across); }
};

struct Plan {
    Axes reduced, channels;
    int64_t channel_count;
    int64_t values;      // of a channel
    int64_t length;      // neighbouring columns of a channel in a row; a run's length otherwise
    int64_t copies;      // neighbouring rows that are taken for one
    bool has_whole;      // whether tiles of whole channels fit into caches
    Grid whole;          // such tiles, for both passes at once
    Grid grid;           // tiles for one pass of two
    Grid sweep;          // tiles for a pass that nothing precedes, in the order of memory
    bool alone;          // whether a second thread would not pay
    int64_t padded;      // columns of a row of a thread's scratch memory
};

// One call's arrays: all of one shape; `data` of them of the size of x, then perhaps weights.
struct Shapes {
    int ndim;
    const int64_t* shape;
    uint64_t channel_axes;               // a bit for each axis
    int data, operands;
    const int64_t* strides[MAX_OPERANDS];  // in bytes
    int64_t itemsize;
};

void make_plan(const Shapes& shapes, Plan& plan);

}  // namespace bn
