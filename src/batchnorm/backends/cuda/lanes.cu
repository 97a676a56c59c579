// Who does what: a job, its tiles, and the lanes that share a tile.
//
// The big arrays lie as (rows, C, row) or, channels last, as (positions, C). A position is where one
// vector of V values begins. Its values belong to one channel, or (COLUMNS) to V neighbouring ones.
//
// A block takes a tile: the channels of a slice, and a part of the positions. Its threads are lanes:
// `lanes` of them walk through the positions of each of `lane_channels` channels (or bundles of V).

const int THREADS = 256;
const int MOST = 32;  // lanes beside each other that have channels of their own, at most

enum Given { GAMMA, BETA, N, GIVEN_MEAN, VAR, GIVEN_LOW, VECTORS };
enum Phase { SUM = 1, WRITE = 2, ORDERED = 4, GIVEN = 8, RAW = 16 };

// Python packs this, field by field (launches.py).
struct Job {
    const void* x;
    const void* dy;
    void* out;
    const void* weights;
    long long outer, channel, inner;  // steps of the big arrays, in values
    long long w_outer, w_channel, w_inner;  // the same of the weights
    long long channels, row, positions;  // C; positions in a row of a channel; positions of a channel
    long long lane_run, lane_channels, lanes;  // neighbouring lanes of a channel; channels; lanes of each
    long long few;  // lanes that sum for the others
    long long rest, advance, wrap, w_advance, w_wrap;  // from a lane's position to its next
    long long slices, parts, length;  // tiles: slices x parts, of so many positions each
    long long nodes;  // where sums of parts meet, of each slice
    long long group;  // slices whose sums come before their outputs, while they are in cache
    long long phases;
    Vector given[6];  // gamma, beta, count, mean, variance, the low part of the mean
    Vector dgamma, dbeta;  // what is found
    double* stats;  // (4, C): count, mean, variance, and the low part of the mean
    void* coef[4];  // factors of each channel, in what values are worked on in
    double* partial;  // sums of parts, level by level of a tree
    unsigned* counters;  // the next ticket; slices that are done; for each slice, who arrived at each node
    double eps;
};

// A thread's share of a tile.
struct Tile {
    long long slice, part;
    long long begin, end;  // positions: begin, begin + lanes, ... < end
    long long c;  // its first channel
    int lane, column;  // its place among the lanes of a channel, and among the channels
    bool leads;  // whether it writes what its channels' lanes have found
};

template <int CH> __device__ inline Tile tile_of(const Job& job, long long slice, long long part) {
    Tile tile;
    int t = threadIdx.x, run = (int)job.lane_run, wide = run * (int)job.lane_channels;
    tile.slice = slice;
    tile.part = part;
    tile.column = t % wide / run;
    tile.lane = t / wide * run + t % run;
    tile.c = (slice * job.lane_channels + tile.column) * CH;
    long long first = part * job.length, last = first + job.length;
    bool works = tile.lane < job.lanes && tile.c < job.channels;
    tile.begin = first + tile.lane;
    tile.end = !works ? 0 : last < job.positions ? last : job.positions;
    tile.leads = works && tile.lane == 0;
    return tile;
}

// Where a lane's next position is in memory, without a division per step.
template <int V, bool WEIGHTED> struct Walk {
    long long at, w_at;
    unsigned place, rest, row;

    __device__ Walk(const Job& job, const Tile& tile) {
        long long outer = tile.begin / job.row;
        row = (unsigned)job.row;
        rest = (unsigned)job.rest;
        place = (unsigned)(tile.begin - outer * job.row);
        at = tile.c * job.channel + outer * job.outer + place * job.inner;
        if (WEIGHTED) w_at = tile.c * job.w_channel + outer * job.w_outer + place * job.w_inner;
    }
    __device__ void next(const Job& job) {
        place += rest;
        at += job.advance;
        if (WEIGHTED) w_at += job.w_advance;
        if (place >= row || place < rest) {  // the latter: more than 32 bits
            place -= row;
            at += job.wrap;
            if (WEIGHTED) w_at += job.w_wrap;
        }
    }
};

// Memory that the threads of a block share.
template <typename A, int CH> struct Room {
    double sums[2 * CH][THREADS];
    double given[VECTORS][MOST * CH];
    A coef[4][MOST * CH];
    unsigned ticket;
    bool last;
};

// Sum K numbers over the lanes of each channel; afterwards all of these have the sums. In two steps of
// about the root of the lanes: fewer barriers than a tree, and in one order, whoever comes first.
template <int K, typename A, int CH>
__device__ inline void total(double (&v)[K], Room<A, CH>& room, const Job& job, const Tile& tile) {
    int width = (int)job.lane_channels, lanes = (int)job.lanes, few = (int)job.few;
    int mine = tile.lane * width + tile.column;
    bool works = tile.lane < lanes;
    __syncthreads();  // until the last totals have been read
    if (works)
        for (int k = 0; k < K; ++k) room.sums[k][mine] = v[k];
    __syncthreads();
    if (tile.lane < few) {
        for (int lane = tile.lane + few; lane < lanes; lane += few)
            for (int k = 0; k < K; ++k) v[k] += room.sums[k][lane * width + tile.column];
        for (int k = 0; k < K; ++k) room.sums[k][mine] = v[k];
    }
    __syncthreads();
    if (works) {
        for (int k = 0; k < K; ++k) v[k] = 0;
        for (int lane = 0; lane < few; ++lane)
            for (int k = 0; k < K; ++k) v[k] += room.sums[k][lane * width + tile.column];
    }
}

// Bring what is given for the channels of a tile into the block, one vector per lane: to be read after
// the next barrier.
template <typename A, int CH>
__device__ inline void fetch(const Job& job, const Tile& tile, Room<A, CH>& room) {
    const double otherwise[VECTORS] = {1, 0, 1, 0, 1, 0};
    __syncthreads();  // until the last tile's have been read
    for (int k = tile.lane; k < VECTORS && tile.end > 0; k += (int)job.lanes)
        for (int i = 0; i < CH; ++i)
            room.given[k][tile.column * CH + i] = given(job.given[k], tile.c + i, otherwise[k]);
}
