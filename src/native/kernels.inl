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

template <class T> void run_tile(const Job& job, int64_t tile, char* scratch) {
    Bounds b = bounds_of(*job.grid, tile);
    if (job.grid->rows) Rows<T>(job, scratch).run(b);
    else Spans<T>(job, scratch).run(b);
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

static bool join_moments(const Job& job) {
    add_blocks(job, 4, 3);
    double* sums[4] = {job.part(0, 4, 0), job.part(0, 4, 1), job.part(0, 4, 2), job.part(0, 4, 3)};
    int64_t channels = job.plan->channel_count;
    bool again = job.dtype == DOUBLE ? finish_moments<double>(job, sums, 0, channels)
                                     : finish_moments<float>(job, sums, 0, channels);
    if (again)
        for (int64_t block = 1; block < job.plan->grid.blocks(); ++block)
            __builtin_memcpy(job.part(block, 4, 3), sums[3], sizeof(double) * channels);
    return again;
}
static void join_forward(const Job& job) {
    if (job.dtype == DOUBLE) forward_vectors<double>(job, 0, job.plan->channel_count);
    else forward_vectors<float>(job, 0, job.plan->channel_count);
}
static void join_means(const Job& job) {
    if (job.dtype == DOUBLE) means<double>(job, 0, job.plan->channel_count);
    else means<float>(job, 0, job.plan->channel_count);
}
static bool join_sums(const Job& job) {
    add_blocks(job, 2, 2);
    double* sums[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
    return gradients_out_of_range(job, sums, 0, job.plan->channel_count);
}
static void join_backward(const Job& job) {
    double* sums[2] = {job.part(0, 2, 0), job.part(0, 2, 1)};
    if (job.dtype == DOUBLE) backward_vectors<double>(job, sums, 0, job.plan->channel_count);
    else backward_vectors<float>(job, sums, 0, job.plan->channel_count);
}

constexpr Kernels table = {
    ISA_NAME,
    {nullptr, run_tile<Half>, run_tile<BFloat16>, run_tile<float>, run_tile<double>},
    join_moments, join_forward, join_means, join_sums, join_backward,
};
