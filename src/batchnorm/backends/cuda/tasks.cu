// How blocks share a pass, in one launch. Each array is read from device memory once, where the L2 cache
// holds what is read between the sums of a slice and its outputs.
//
// A task is a tile and a phase: SUM, WRITE or, where a slice is one tile, both. Where a slice has
// several parts, their sums are merged in a tree: of every FAN siblings, the block that arrives last
// merges the sums and continues at the next level; the last at the root finishes the slice. Where the
// outputs of a slice are separate tasks (ORDERED), blocks take sequence numbers from a counter, in the
// following order of tasks, whose stages are separated by bars,
//
//     SUM group 0 | SUM group 1 | WRITE group 0 | SUM group 2 | WRITE group 1 | ... | WRITE last group
//
// so that the sums of a group are done when its outputs are written, and the group is still in the L2
// cache. A WRITE waits only for tasks with lower sequence numbers, which running blocks have taken, and
// a SUM waits for nothing. So at least one block can always proceed, however few run at a time.

const int FAN = 32;

// Count an arrival. All that the block has written is visible to the blocks that count later ones.
__device__ inline unsigned arrive(unsigned* counter) {
    __threadfence();
    unsigned before = atomicAdd(counter, 1u);
    __threadfence();
    return before + 1;
}

template <class P>
__device__ void run_task(
    const Params& params, long long slice, long long part, int phases, typename P::Shared& shared) {
    Tile tile = tile_of<P::CH>(params, slice, part);
    unsigned* done = params.counters + 1 + slice;
    if (phases & SUM) {
        double m[P::CH][P::SUMS];
        P::prepare(params, tile, shared);
        P::sum(params, tile, shared, m);
        P::combine(m, shared, params, tile);
        double* level = params.partial;  // (count, C, SUMS)
        unsigned* arrived = params.counters + 1 + params.slices + slice * params.nodes;
        for (long long count = params.parts, node = part; count > 1;) {
            if (tile.leader)
                for (int i = 0; i < P::CH; ++i)
                    for (int k = 0; k < P::SUMS; ++k)
                        level[(node * params.channels + tile.channel + i) * P::SUMS + k] = m[i][k];
            long long parent = node / FAN, first = parent * FAN;
            long long siblings = count - first < FAN ? count - first : FAN;
            __syncthreads();
            if (threadIdx.x == 0) shared.last = arrive(arrived + parent) == siblings;
            __syncthreads();
            if (!shared.last) return;
            const double* sums = level + (first * params.channels + tile.channel) * P::SUMS;
            P::gather(params, tile, sums, siblings, m);
            P::combine(m, shared, params, tile);
            level += params.channels * count * P::SUMS;
            count = (count + FAN - 1) / FAN;
            arrived += count;
            node = parent;
        }
        if (tile.leader) P::finish(params, tile, shared, m);
        if (params.phases & ORDERED) {
            __syncthreads();
            if (threadIdx.x == 0) arrive(done);
        }
    }
    if (phases & WRITE) {
        if (params.phases & ORDERED) {
            if (threadIdx.x == 0) {
                while (atomicAdd(done, 0u) == 0) __nanosleep(64);
                __threadfence();
            }
        }
        __syncthreads();
        P::write(params, tile, shared);
    }
}

// Load the factors of a bundle: from shared memory, or from device memory where another block or the
// caller computed them.
template <class P>
__device__ inline void load_factors(
    typename P::A (&f)[P::CH][MAX_FACTORS], const Params& params, const Tile& tile,
    const typename P::Shared& shared) {
    if (tile.begin >= tile.end) return;
    for (int k = 0; k < P::FACTORS; ++k)
        for (int i = 0; i < P::CH; ++i)
            if (params.phases & (ORDERED | GIVEN))  // not from the L1 cache, which may be stale
                f[i][k] = __ldcg((const typename P::A*)params.factors[k] + tile.channel + i);
            else
                f[i][k] = shared.factors[k][tile.bundle * P::CH + i];
}

// Store factors for this block and, where outputs are separate tasks, for the blocks that write them.
template <class P>
__device__ inline void store_factors(
    const typename P::A (&f)[P::FACTORS], const Params& params, const Tile& tile,
    typename P::Shared& shared, int i) {
    for (int k = 0; k < P::FACTORS; ++k) {
        shared.factors[k][tile.bundle * P::CH + i] = f[k];
        if (params.phases & ORDERED) ((typename P::A*)params.factors[k])[tile.channel + i] = f[k];
    }
}

template <class P> __device__ void run_tasks(const Params& params) {
    __shared__ typename P::Shared shared;
    const bool ordered = params.phases & ORDERED;
    const unsigned slices = params.slices, parts = params.parts, group_slices = params.group;
    const unsigned stage_tasks = group_slices * parts;
    const unsigned groups = (slices + group_slices - 1) / group_slices;
    const unsigned tasks = ordered ? 2 * groups * stage_tasks : slices * parts;
    unsigned next = blockIdx.x;
    if (ordered && threadIdx.x == 0) next = atomicAdd(params.counters, 1u);
    for (;;) {
        unsigned number = next;
        if (ordered) {
            __syncthreads();
            if (threadIdx.x == 0) shared.sequence_number = next;
            __syncthreads();
            number = shared.sequence_number;
        }
        if (number >= tasks) return;
        if (!ordered)
            next += gridDim.x;
        else if (threadIdx.x == 0)
            next = atomicAdd(params.counters, 1u);  // the result arrives during this task

        unsigned slice = number % slices, part = number / slices;
        int phases = params.phases & (SUM | WRITE);
        if (ordered) {  // the stages above: sums of group 0, of group 1, outputs of group 0, ...
            unsigned stage = number / stage_tasks, index = number % stage_tasks, group = (stage + 1) / 2;
            bool sums = stage == 0 || (stage % 2 == 1 && group < groups);
            if (!sums) {
                group -= 1;
                index = stage_tasks - 1 - index;  // what was read last is most likely still in the cache
            }
            slice = group * group_slices + index % group_slices;
            part = index / group_slices;
            phases = sums ? SUM : WRITE;
        }
        if (slice < slices) run_task<P>(params, slice, part, phases, shared);
    }
}
