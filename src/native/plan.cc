#include "plan.h"

#include <algorithm>

namespace bn {

namespace {

// A tile's data, at most: it stays in a core's second-level cache between two readings.
constexpr int64_t TILE_BYTES = 1 << 20;
// A channel's data, at most, for its two readings to follow each other.
constexpr int64_t CHANNEL_BYTES = 1 << 22;
// Parts that a sum is cut into, at most: they are kept until they are added.
constexpr int64_t PARTS = 128;
// Columns of a tile: fewer are slow to read, more do not leave their sums in the first-level cache.
constexpr int64_t FEWEST_COLUMNS = 512, MOST_COLUMNS = 1024;
// From this size on, output is stored past the caches, which it would only flush.
constexpr int64_t STREAM_BYTES = 1 << 23;
// A run must be as long: a short one begins and ends within a cache line.
constexpr int64_t STREAM_RUN = 1 << 11;
// Shorter runs are worked on as rows also by a pass that nothing precedes.
constexpr int64_t SWEPT = 128;
// Runs of channels second that are shorter than this are worked on as rows.
constexpr int64_t SHORT_RUN = 512;
// Fewer neighbouring columns than this are not worth a row.
constexpr int64_t NARROW = 16;
// Columns of a row, at most, that is taken together from several; and how many such rows there must be.
constexpr int64_t WIDE = 1024, TALL = 64;

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of parts, none above `most`, that differ least; a multiple of 16 where it can be.
int64_t even(int64_t total, int64_t most) {
    int64_t size = divided(total, divided(total, most)), rounded = divided(size, 16) * 16;
    return size > 16 && rounded <= most ? rounded : size;
}

// Add an inner axis, merged with the one before it where one stride leads through both.
void append(Axes& axes, const Axis& next, int operands) {
    if (next.length == 1) return;
    if (axes.count) {
        Axis& last = axes.axis[axes.count - 1];
        bool merges = true;
        for (int k = 0; k < operands; ++k) merges &= last.step[k] == next.length * next.step[k];
        if (merges) {
            int64_t length = last.length * next.length;
            last = next;
            last.length = length;
            return;
        }
    }
    axes.axis[axes.count++] = next;
}

Axis one(const Shapes& s) {
    Axis axis = {1, {}};
    for (int k = 0; k < s.operands; ++k) axis.step[k] = s.itemsize;
    return axis;
}

bool all_steps(const Axis& axis, int operands, int64_t step) {
    return std::all_of(axis.step, axis.step + operands, [=](int64_t s) { return s == step; });
}

Grid sweep_of(int64_t rows, int64_t length, int64_t channels, int64_t size, int64_t nbytes) {
    int64_t tile = std::min(TILE_BYTES, std::max(TILE_BYTES / 8, nbytes / 16));
    int64_t run = std::max<int64_t>(1, length * size), segments = divided(length, SEGMENT);
    int64_t across = std::max<int64_t>(1, std::min(channels, tile / run));
    int64_t block = segments * std::max<int64_t>(1, tile / (run * across));
    if (run > tile) block = std::max<int64_t>(1, tile / (SEGMENT * size));
    int64_t reduced = rows * segments;
    block = std::min(block, std::max<int64_t>(1, reduced));
    bool streaming = nbytes >= STREAM_BYTES && run >= STREAM_RUN;
    return {reduced, block, channels, even(channels, across), false, streaming};
}

}  // namespace

void make_plan(const Shapes& s, Plan& plan) {
    Axes& rows = plan.reduced;
    Axes& chan = plan.channels;
    rows.count = chan.count = 0;
    int order[MAX_AXES], count = 0;
    int64_t total = 1, channels = 1;
    for (int i = 0; i < s.ndim; ++i) {
        total *= s.shape[i];
        if (s.channel_axes >> i & 1) {
            channels *= s.shape[i];
            Axis axis = {s.shape[i], {}};
            for (int k = 0; k < s.operands; ++k) axis.step[k] = s.strides[k][i];
            append(chan, axis, s.operands);
        } else {
            order[count++] = i;
        }
    }
    std::stable_sort(order, order + count, [&](int a, int b) {
        return std::abs(s.strides[0][a]) > std::abs(s.strides[0][b]);
    });
    for (int i = 0; i < count; ++i) {
        Axis axis = {s.shape[order[i]], {}};
        for (int k = 0; k < s.operands; ++k) axis.step[k] = s.strides[k][order[i]];
        append(rows, axis, s.operands);
    }
    int64_t size = s.itemsize, nbytes = total * size;
    int64_t values = channels ? total / channels : 0;
    if (!chan.count) chan.axis[chan.count++] = one(s);
    int64_t length = rows.count ? rows.inner().length : 1;
    bool unit_inner = !rows.count || all_steps(rows.inner(), s.data, size);
    int64_t outer = length ? values / length : 0;

    bool plain = s.operands == s.data, one_axis = chan.count == 1;
    const Axis& c = chan.axis[0];
    bool neighbours = one_axis && all_steps(c, s.data, size);
    bool short_runs = one_axis && plain && 1 < length && length <= SHORT_RUN && outer >= 4 && unit_inner
        && all_steps(c, s.data, length * size);
    int64_t copies = 1;
    if (neighbours && plain && rows.count == 1 && all_steps(rows.axis[0], s.data, c.length * size)) {
        copies = std::max<int64_t>(1, std::min(WIDE / std::max<int64_t>(1, c.length), length / TALL));
        while (length % copies) --copies;
    }
    bool across_rows;
    if (neighbours && c.length * copies >= NARROW) {
        if (copies > 1) {
            rows.axis[0].length /= copies;
            for (int k = 0; k < s.operands; ++k) rows.axis[0].step[k] *= copies;
        }
        outer = values / copies;
        length = 1;
        across_rows = true;
        rows.axis[rows.count++] = one(s);
    } else {
        copies = 1;
        across_rows = short_runs && c.length * length >= NARROW;
        if (!rows.count) rows.axis[rows.count++] = one(s);
    }

    plan.channel_count = channels;
    plan.values = values;
    plan.length = length;
    plan.copies = copies;
    plan.alone = nbytes * s.data <= ALONE_BYTES;
    int64_t read = values * size * std::max(1, s.data - 1);  // bytes of a channel that are read twice
    int64_t whole, across, block, reduced, some = std::max<int64_t>(1, channels);
    int64_t width = std::max<int64_t>(1, length * copies);  // columns of a channel
    if (across_rows) {
        int64_t most = std::max<int64_t>(1, MOST_COLUMNS / width);
        int64_t fewest = std::max<int64_t>(1, FEWEST_COLUMNS / width);
        reduced = outer;
        across = copies > 1 ? some : std::min(most, some);
        whole = std::min(across, TILE_BYTES / std::max<int64_t>(1, read));
        if (whole < std::min(fewest, some) || (length == 1 && !plan.alone))
            whole = 0;  // two threads on neighbouring columns are in each other's way
        else if (!plan.alone)  // a share for each thread
            whole = std::min(whole, std::max(fewest, some / 8));
        int64_t share = std::min(TILE_BYTES, std::max(TILE_BYTES / 8, nbytes / 16));
        int64_t fewest_rows = length > 1 ? 4 : BATCH;
        block = std::max({fewest_rows, share / (across * width * size), divided(reduced, PARTS)});
    } else {
        reduced = outer * divided(length, SEGMENT);
        whole = read <= CHANNEL_BYTES ? std::max<int64_t>(1, TILE_BYTES / 4 / std::max<int64_t>(1, read)) : 0;
        if (some < 4 && !plan.alone) whole = 0;
        across = std::max<int64_t>(1, TILE_BYTES / 2 / std::max<int64_t>(1, values * size));
        block = std::max(TILE_BYTES / 2 / (SEGMENT * size), divided(reduced, PARTS));
        if (across > 1) block = reduced;
    }
    if (whole) whole = even(some, whole);
    across = even(some, std::min(across, some));
    reduced = std::max<int64_t>(0, reduced);
    int64_t rows_once = std::max<int64_t>(1, reduced);
    block = std::max<int64_t>(1, std::min(block, rows_once));
    plan.grid = {reduced, block, channels, across, across_rows, nbytes >= STREAM_BYTES};
    plan.sweep = length >= SWEPT ? sweep_of(outer, length, some, size, nbytes) : plan.grid;
    plan.sweep.channels = channels;
    plan.has_whole = whole > 0;
    plan.whole = plan.grid;
    plan.whole.block = rows_once;
    plan.whole.across = std::max<int64_t>(1, whole);
    int64_t widest = std::max(whole, across) * width;
    plan.padded = divided(widest, 16) * 16 + 16;  // so that rows do not share a cache set
}

}  // namespace bn
