// The four kernels, and forward and backward passes of tiles of whole channels. Compiled once for each
// instruction set, in a namespace of its own.
//
// Two traversals: spans, where a channel lies in long runs, and rows across channels (channels last, or
// short runs of channels second), with a sum for each column. Either one adds up what `Terms` gives for
// sixteen values, and writes what `Result` gives.

#include "terms.inl"
#include "channels.inl"
#include "spans.inl"
#include "rows.inl"

// The pass of a job, over a tile of all rows or of some.
template <class Traversal> INLINE void run_pass(Traversal tile, const Bounds& all) {
    typedef typename Traversal::C C;
    const Job& job = tile.job;
    if (job.pass == OUTPUT || job.pass == ACTIVATION_GRADIENT || job.pass == GRAD_INPUT)
        return tile.write(all);
    int rows = job.pass == GRAD_SUMS || job.pass == BACKWARD ? 2 : 4;
    double* sums[4];
    for (int k = 0; k < rows; ++k) sums[k] = job.part(all.block, rows, k);
    Bounds b = all;
    for (; b.c0 < all.c1; b.c0 = b.c1) {
        b.c1 = Traversal::BY_CHANNEL ? b.c0 + 1 : all.c1;
        tile.fast = job.fast;
        switch (job.pass) {
            case MOMENTS:
                // The same in each tile, so that none has to wait for another.
                if (!job.pivots_given) tile.pivots(b, sums[3]);
                tile.moments(b, sums);
                break;
            case FORWARD:
                tile.pivots(b, sums[3]);
                tile.moments(b, sums);
                if (finish_moments<C>(job, sums, b.c0, b.c1)) {
                    tile.fast = false;
                    tile.moments(b, sums);
                    finish_moments<C>(job, sums, b.c0, b.c1);
                }
                forward_vectors<C>(job, b.c0, b.c1);
                tile.write(b);
                break;
            case GRAD_SUMS: tile.grad_sums(b, sums); break;
            default:
                given_vectors<C>(job, b.c0, b.c1);
                tile.grad_sums(b, sums);
                if (gradients_out_of_range(job, sums, b.c0, b.c1)) {
                    tile.fast = false;
                    tile.grad_sums(b, sums);
                }
                backward_vectors<C>(job, sums, b.c0, b.c1);
                tile.write(b);
        }
    }
}

template <class T> void run_tile(const Job& job, int64_t tile, char* scratch) {
    Bounds b = bounds_of(*job.grid, tile);
    if (job.grid->rows) run_pass(Rows<T>(job, scratch), b);
    else run_pass(Spans<T>(job, scratch), b);
    if (job.streaming) stream_fence();  // before another thread, or the caller, reads the result
}

// Between two passes over the tiles, for all channels.

// Add the sums of all blocks to those of the first.
static void add_blocks(const Job& job, int rows, int sums) {
    int64_t blocks = job.plan->grid.blocks(), channels = job.plan->channel_count;
    for (int64_t block = 1; block < blocks; ++block)
        for (int k = 0; k < sums; ++k) {
            double* to = job.part(0, rows, k);
            const double* from = job.part(block, rows, k);
            for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
        }
}

// Call `f` with a zero of the type of the arithmetic.
template <class F> static auto by_arithmetic(const Job& job, F f) {
    return job.dtype == DOUBLE ? f(0.0) : f(0.0f);
}

static bool join_moments(const Job& job) {
    add_blocks(job, 4, 3);
    double* sums[4] = {job.part(0, 4, 0), job.part(0, 4, 1), job.part(0, 4, 2), job.part(0, 4, 3)};
    int64_t channels = job.plan->channel_count;
    bool again = by_arithmetic(
        job, [&](auto zero) { return finish_moments<decltype(zero)>(job, sums, 0, channels); });
    if (again)
        for (int64_t block = 1; block < job.plan->grid.blocks(); ++block)
            __builtin_memcpy(job.part(block, 4, 3), sums[3], sizeof(double) * channels);
    return again;
}
static void join_forward(const Job& job) {
    by_arithmetic(
        job, [&](auto zero) { forward_vectors<decltype(zero)>(job, 0, job.plan->channel_count); });
}
static void join_given(const Job& job) {
    by_arithmetic(
        job, [&](auto zero) { given_vectors<decltype(zero)>(job, 0, job.plan->channel_count); });
}
static bool join_sums(const Job& job) {
    add_blocks(job, 2, 2);
    double* sums[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
    return gradients_out_of_range(job, sums, 0, job.plan->channel_count);
}
static void join_backward(const Job& job) {
    double* sums[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
    by_arithmetic(job, [&](auto zero) {
        backward_vectors<decltype(zero)>(job, sums, 0, job.plan->channel_count);
    });
}

constexpr Kernels table = {
    ISA_NAME,
    {nullptr, run_tile<Half>, run_tile<BFloat16>, run_tile<float>, run_tile<double>},
    join_moments, join_forward, join_given, join_sums, join_backward,
};
