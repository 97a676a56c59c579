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

template <class P>
__device__ void task(const Job& job, long long slice, long long part, int what, typename P::Shared& room) {
    Tile tile = tile_of<P::CH>(job, slice, part);
    unsigned* done = job.counters + 1 + slice;
    if (what & SUM) {
        double m[P::CH][P::SUMS];
        P::prepare(job, tile, room);
        P::sum(job, tile, room, m);
        P::combine(m, room, job, tile);
        double* level = job.partial;  // (C, count, SUMS)
        unsigned* arrived = job.counters + 1 + job.slices + slice * job.nodes;
        for (long long count = job.parts, node = part; count > 1;) {
            if (tile.leads)
                for (int i = 0; i < P::CH; ++i)
                    for (int k = 0; k < P::SUMS; ++k)
                        level[((tile.c + i) * count + node) * P::SUMS + k] = m[i][k];
            __threadfence();
            __syncthreads();
            long long parent = node / FAN, first = parent * FAN;
            long long siblings = count - first < FAN ? count - first : FAN;
            if (threadIdx.x == 0) room.last = atomicAdd(arrived + parent, 1u) + 1 == siblings;
            __syncthreads();
            if (!room.last) return;
            __threadfence();
            P::gather(job, tile, level + (tile.c * count + first) * P::SUMS, count, siblings, m);
            P::combine(m, room, job, tile);
            level += job.channels * count * P::SUMS;
            count = (count + FAN - 1) / FAN;
            arrived += count;
            node = parent;
        }
        if (tile.leads) P::finish(job, tile, room, m);
        if (job.phases & ORDERED) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) atomicExch(done, 1u);
        }
    }
    if (what & WRITE) {
        if (job.phases & ORDERED) {
            if (threadIdx.x == 0)
                while (atomicAdd(done, 0u) == 0) __nanosleep(64);
            __threadfence();
        } else if (!(what & SUM) && !(job.phases & GIVEN)) {
            __syncthreads();  // until the last tile's factors have been read
            if (tile.leads) P::from_statistics(job, tile, room);
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
    long long tiles = job.slices * job.parts;
    if (!(job.phases & ORDERED)) {
        for (long long i = blockIdx.x; i < tiles; i += gridDim.x)
            task<P>(job, i % job.slices, i / job.slices, job.phases & (SUM | WRITE), room);
        return;
    }
    long long step = job.group * job.parts, groups = (job.slices + job.group - 1) / job.group;
    unsigned next = 0;
    if (threadIdx.x == 0) next = atomicAdd(job.counters, 1u);
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) room.ticket = next;
        __syncthreads();
        long long at = room.ticket;
        if (at >= 2 * groups * step) return;
        if (threadIdx.x == 0) next = atomicAdd(job.counters, 1u);  // known when this task is through

        // The steps above: the sums of group 0, of group 1, the outputs of group 0, ...
        long long block = at / step, place = at % step, group = (block + 1) / 2;
        bool sums = block == 0 || (block % 2 == 1 && group < groups);
        if (!sums) {
            group -= 1;
            place = step - 1 - place;  // the last that was read is most likely still in the cache
        }
        long long slice = group * job.group + place % job.group;
        if (slice < job.slices) task<P>(job, slice, place / job.group, sums ? SUM : WRITE, room);
    }
}
