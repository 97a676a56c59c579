// How blocks share a pass: in one launch, and with each array read from device memory once where the
// cache can hold what lies between its two readings.
//
// A task is a tile and what to do with it: SUM, WRITE or, where a block has all of a slice, both.
// Where a slice has several parts, their sums meet in a tree: of every FAN neighbours, the block that
// comes last puts them together and goes on to the next level, and the last of all finishes the slice.
// Where the outputs of a slice are tasks of their own (ORDERED), blocks draw tickets for
//
//     SUM group 0 | SUM group 1, WRITE group 0 | SUM group 2, WRITE group 1 | ... | WRITE last group
//
// so that sums are done when their outputs come to be written, while the group is still in the L2
// cache. A WRITE waits only for tasks with earlier tickets, which blocks that run already have drawn,
// and a SUM waits for nothing: some block can always go on, however few run at a time.

const int FAN = 32;

// Count an arrival, after which all that the block has written is seen by whoever counts a later one.
__device__ inline unsigned arrive(unsigned* counter) {
    __threadfence();
    unsigned before = atomicAdd(counter, 1u);
    __threadfence();
    return before + 1;
}

template <class P>
__device__ void task(const Job& job, long long slice, long long part, int what, typename P::Shared& room) {
    Tile tile = tile_of<P::CH>(job, slice, part);
    unsigned* done = job.counters + 1 + slice;
    if (what & SUM) {
        double m[P::CH][P::SUMS];
        P::prepare(job, tile, room);
        P::sum(job, tile, room, m);
        P::combine(m, room, job, tile);
        double* level = job.partial;  // (count, C, SUMS)
        unsigned* arrived = job.counters + 1 + job.slices + slice * job.nodes;
        for (long long count = job.parts, node = part; count > 1;) {
            if (tile.leads)
                for (int i = 0; i < P::CH; ++i)
                    for (int k = 0; k < P::SUMS; ++k)
                        level[(node * job.channels + tile.c + i) * P::SUMS + k] = m[i][k];
            long long parent = node / FAN, first = parent * FAN;
            long long siblings = count - first < FAN ? count - first : FAN;
            __syncthreads();
            if (threadIdx.x == 0) room.last = arrive(arrived + parent) == siblings;
            __syncthreads();
            if (!room.last) return;
            P::gather(job, tile, level + (first * job.channels + tile.c) * P::SUMS, siblings, m);
            P::combine(m, room, job, tile);
            level += job.channels * count * P::SUMS;
            count = (count + FAN - 1) / FAN;
            arrived += count;
            node = parent;
        }
        if (tile.leads) P::finish(job, tile, room, m);
        if (job.phases & ORDERED) {
            __syncthreads();
            if (threadIdx.x == 0) arrive(done);
        }
    }
    if (what & WRITE) {
        if (job.phases & ORDERED) {
            if (threadIdx.x == 0) {
                while (atomicAdd(done, 0u) == 0) __nanosleep(64);
                __threadfence();
            }
        }
        __syncthreads();
        P::write(job, tile, room);
    }
}

// The factors of a thread's channels: from the block that found them, or from memory.
template <class P>
__device__ inline void factors(
    typename P::A (&f)[P::CH][4], const Job& job, const Tile& tile, const typename P::Shared& room) {
    if (tile.begin >= tile.end) return;
    for (int k = 0; k < P::FACTORS; ++k)
        for (int i = 0; i < P::CH; ++i)
            if (job.phases & (ORDERED | GIVEN))  // past the L1 cache, which may hold what was there before
                f[i][k] = __ldcg((const typename P::A*)job.coef[k] + tile.c + i);
            else
                f[i][k] = room.coef[k][tile.column * P::CH + i];
}

// Hand factors on: to this block, and to others.
template <class P>
__device__ inline void publish(
    const double (&f)[4], const Job& job, const Tile& tile, typename P::Shared& room, int i) {
    for (int k = 0; k < P::FACTORS; ++k) {
        room.coef[k][tile.column * P::CH + i] = (typename P::A)f[k];
        if (job.phases & ORDERED) ((typename P::A*)job.coef[k])[tile.c + i] = (typename P::A)f[k];
    }
}

template <class P> __device__ void run(const Job& job) {
    __shared__ typename P::Shared room;
    const bool ordered = job.phases & ORDERED;
    const unsigned slices = job.slices, parts = job.parts, in_group = job.group;
    const unsigned step = in_group * parts, groups = (slices + in_group - 1) / in_group;
    const unsigned tasks = ordered ? 2 * groups * step : slices * parts;
    unsigned next = blockIdx.x;
    if (ordered && threadIdx.x == 0) next = atomicAdd(job.counters, 1u);
    for (;;) {
        unsigned at = next;
        if (ordered) {
            __syncthreads();
            if (threadIdx.x == 0) room.ticket = next;
            __syncthreads();
            at = room.ticket;
        }
        if (at >= tasks) return;
        if (!ordered)
            next += gridDim.x;
        else if (threadIdx.x == 0)
            next = atomicAdd(job.counters, 1u);  // known when this task is through

        unsigned slice = at % slices, part = at / slices;
        int what = job.phases & (SUM | WRITE);
        if (ordered) {  // the steps above: sums of group 0, of group 1, outputs of group 0, ...
            unsigned block = at / step, place = at % step, group = (block + 1) / 2;
            bool sums = block == 0 || (block % 2 == 1 && group < groups);
            if (!sums) {
                group -= 1;
                place = step - 1 - place;  // the last that was read is most likely still in the cache
            }
            slice = group * in_group + place % in_group;
            part = place / in_group;
            what = sums ? SUM : WRITE;
        }
        if (slice < slices) task<P>(job, slice, part, what, room);
    }
}
