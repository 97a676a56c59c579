// The parameters of a launch, and how its threads share the elements of the big arrays.
//
// The big arrays have the shape (rows, C, row) or, channels last, (positions, C).
//
// vector    V elements that one instruction loads. They belong to one channel or, where ACROSS_CHANNELS
//           is set, to V neighbouring ones.
// position  the place of a vector among those of its channels.
// bundle    the neighbouring channels that one thread takes: V where ACROSS_CHANNELS is set, else one.
// slice     `slice_bundles` neighbouring bundles.
// part      `length` consecutive positions.
// tile      the positions of a part in the channels of a slice: what one block processes at a time.
// lane      the index of a thread among the `lanes` threads of a block that share a bundle.

const int THREADS = 256;
const int MAX_BUNDLES = 32;  // of a slice

enum Input { GAMMA, BETA, N, INPUT_MEAN, VAR, INPUT_LOW, INPUTS };
// What a launch does. ORDERED: tasks.cu; GIVEN: the factors are given; RAW: the sums are the result;
// FROM_Y: the residual is not z but y, from which the derivative is found.
enum Phase { SUM = 1, WRITE = 2, ORDERED = 4, GIVEN = 8, RAW = 16, FROM_Y = 32 };
const int MAX_FACTORS = 5;  // of a channel: m, a, b and c of dx, and b of what was activated

// The launch parameters. Python packs them field by field (launches.py).
struct Params {
    const void* x;
    const void* dy;
    void* out;
    const void* weights;
    const void* residual;  // z, or y; null where there is none
    void* dresidual;  // act'(h) dy; null where it is not asked for
    long long outer_stride, channel_stride, inner_stride;  // of the big arrays, in elements
    long long w_outer_stride, w_channel_stride, w_inner_stride;  // of the weights
    long long channels, row, positions;  // C; positions in a row of a channel; positions of a channel
    long long adjacent_lanes;  // of a bundle: consecutive threads
    long long slice_bundles, lanes;  // bundles of a slice; lanes of a bundle
    long long reducers;  // lanes that add the sums of the others, in the first step of a reduction
    // From a position of a lane to its next: positions along the row; elements; elements at a row's end.
    long long row_advance, advance, wrap, w_advance, w_wrap;
    long long slices, parts, length;  // tiles: slices x parts, of `length` positions each
    long long nodes;  // of the tree in which the sums of the parts of a slice are merged
    long long group;  // slices whose sums come before their outputs, while they are in the L2 cache
    long long phases;
    Vector inputs[6];  // gamma, beta, count, mean, variance, the low part of the mean
    Vector dgamma, dbeta;  // results of the backward pass
    double* stats;  // (4, C): count, mean, variance, and the low part of the mean
    void* factors[MAX_FACTORS];  // of each channel, in the type of the arithmetic
    double* partial;  // sums of parts, level by level of the tree
    // The next sequence number; for each slice, whether its sums are done; for each node of each slice,
    // how many blocks have arrived.
    unsigned* counters;
    double eps;
    long long activation;  // of the enum Activation
    double slope;
};

// A thread's share of a tile.
struct Tile {
    long long slice, part;
    long long begin, end;  // positions: begin, begin + lanes, ... < end
    long long channel;  // the first of its bundle
    int lane, bundle;  // indices of the thread among the lanes, and of its bundle in the slice
    bool leader;  // whether it stores the results of its bundle
};

template <int CH> __device__ inline Tile tile_of(const Params& params, long long slice, long long part) {
    Tile tile;
    int t = threadIdx.x, adjacent = (int)params.adjacent_lanes;
    int row_threads = adjacent * (int)params.slice_bundles;
    tile.slice = slice;
    tile.part = part;
    tile.bundle = t % row_threads / adjacent;
    tile.lane = t / row_threads * adjacent + t % adjacent;
    tile.channel = (slice * params.slice_bundles + tile.bundle) * CH;
    long long first = part * params.length, last = first + params.length;
    bool active = tile.lane < params.lanes && tile.channel < params.channels;
    tile.begin = first + tile.lane;
    tile.end = !active ? 0 : last < params.positions ? last : params.positions;
    tile.leader = active && tile.lane == 0;
    return tile;
}

// The offsets in memory of the successive positions of a lane, without a division for each.
template <int V, bool WEIGHTED> struct Cursor {
    long long offset, w_offset;
    unsigned in_row, row_advance, row;

    __device__ Cursor(const Params& params, const Tile& tile) {
        long long outer = tile.begin / params.row;
        row = (unsigned)params.row;
        row_advance = (unsigned)params.row_advance;
        in_row = (unsigned)(tile.begin - outer * params.row);
        offset = tile.channel * params.channel_stride + outer * params.outer_stride
                 + in_row * params.inner_stride;
        if (WEIGHTED)
            w_offset = tile.channel * params.w_channel_stride + outer * params.w_outer_stride
                       + in_row * params.w_inner_stride;
    }
    __device__ void next(const Params& params) {
        in_row += row_advance;
        offset += params.advance;
        if (WEIGHTED) w_offset += params.w_advance;
        if (in_row >= row || in_row < row_advance) {  // the latter: the sum exceeded 32 bits
            in_row -= row;
            offset += params.wrap;
            if (WEIGHTED) w_offset += params.w_wrap;
        }
    }
};

// The shared memory of a block.
template <typename A, int CH> struct SharedMemory {
    double sums[2 * CH][THREADS];
    double inputs[INPUTS][MAX_BUNDLES * CH];
    A factors[MAX_FACTORS][MAX_BUNDLES * CH];
    unsigned sequence_number;
    bool last;
};

// Sum K values over the lanes of each bundle; afterwards each of these lanes has the sums. Two steps of
// about the square root of the number of lanes need fewer barriers than a tree; the order is fixed.
template <int K, typename A, int CH>
__device__ inline void sum_over_lanes(
    double (&v)[K], SharedMemory<A, CH>& shared, const Params& params, const Tile& tile) {
    int bundles = (int)params.slice_bundles, lanes = (int)params.lanes, reducers = (int)params.reducers;
    int own = tile.lane * bundles + tile.bundle;
    bool active = tile.lane < lanes;
    __syncthreads();  // the previous sums have been read
    if (active)
        for (int k = 0; k < K; ++k) shared.sums[k][own] = v[k];
    __syncthreads();
    if (tile.lane < reducers) {
        for (int lane = tile.lane + reducers; lane < lanes; lane += reducers)
            for (int k = 0; k < K; ++k) v[k] += shared.sums[k][lane * bundles + tile.bundle];
        for (int k = 0; k < K; ++k) shared.sums[k][own] = v[k];
    }
    __syncthreads();
    if (active) {
        for (int k = 0; k < K; ++k) v[k] = 0;
        for (int lane = 0; lane < reducers; ++lane)
            for (int k = 0; k < K; ++k) v[k] += shared.sums[k][lane * bundles + tile.bundle];
    }
}

// Load the per-channel inputs of a tile into shared memory, one vector per lane. They may be read after
// the next barrier.
template <typename A, int CH>
__device__ inline void load_inputs(const Params& params, const Tile& tile, SharedMemory<A, CH>& shared) {
    const double defaults[INPUTS] = {1, 0, 1, 0, 1, 0};
    __syncthreads();  // the inputs of the previous tile have been read
    for (int k = tile.lane; k < INPUTS && tile.end > 0; k += (int)params.lanes)
        for (int i = 0; i < CH; ++i)
            shared.inputs[k][tile.bundle * CH + i] =
                load_channel(params.inputs[k], tile.channel + i, defaults[k]);
}
