"""Compiled loops over columns, forward: channels last, or short runs of channels second.

Rows are read across many channels, four at a time, with one sum for each column. A channel has
`length` neighbouring columns (1 for channels last). Where there are few channels, some neighbouring
rows are taken for one, in which all channels come in so many `copies`. Either way, a channel's columns
are folded at the end of a tile. Weights come with a length of 1 and without copies.
"""

from __future__ import annotations

import numpy as np

from batchnorm.backends.compiled.arithmetic import moments_of, output_of, until_aligned
from batchnorm.backends.compiled.lanes import (
    WIDTH,
    above_zero,
    load,
    narrow,
    rounded,
    splat,
    store,
    stream,
    total,
    wide,
)
from batchnorm.backends.compiled.terms import (
    ACROSS,
    COPIES,
    F64,
    FIRST,
    GIVEN,
    PARTS,
    REDUCED,
    SAMPLE,
    SCRATCH,
    SCRATCH_BYTES,
    SECOND,
    STATS,
    STREAMING,
    WEIGHTS,
    axes_of,
    compiled,
    doubles,
    finish_moments,
    forward_terms,
    item,
    next_tile,
    place,
    row_of,
    table,
    tile_bounds,
    two_sum,
    vectors_of,
)

# Rows that a pivot is the mean of, which is then off by a fourth of a standard deviation, typically.
SAMPLE_ROWS = 16
# Rows that are added before their sums join the tile's: bounds the error of a sum.
BATCH = 64
# Rows of scratch memory, for sums and for repeated vectors.
SUMS, ROOM = 10, 4


@compiled
def scratch_of(job, me, rows, like):
    """A thread's own tables: sums of columns in float64, and room for vectors."""
    columns = item(job, ACROSS) * rows[0, rows.shape[1] - 1] * item(job, COPIES)
    padded = (columns + WIDTH - 1) // WIDTH * WIDTH + WIDTH  # so that rows do not share a cache set
    address = item(job, SCRATCH) + me * item(job, SCRATCH_BYTES)
    sums = table(address, SUMS, padded, F64)
    return sums, table(address + SUMS * padded * 8, ROOM, padded, narrow(0.0, like))


@compiled
def four_places(axes, operand, index, last, origin):
    """Where four rows begin; the last one again where there are fewer."""
    inner = axes.shape[1] - 1
    return (
        origin + place(axes, operand, inner, index),
        origin + place(axes, operand, inner, min(index + 1, last)),
        origin + place(axes, operand, inner, min(index + 2, last)),
        origin + place(axes, operand, inner, min(index + 3, last)),
    )


@compiled
def spread(vectors, first, last, c0, c1, length, copies, room):
    """Some vectors with a value for each column: the address of the first, and the step to the next.

    That is where they are, or `room`, to which they are written where channels have several columns.
    """
    if length == 1 and copies == 1:
        return row_of(vectors, first, c0), row_of(vectors, 1, 0) - row_of(vectors, 0, 0)
    for k in range(first, last):
        for c in range(c0, c1 if length > 1 else c0):
            value = vectors[k, c]
            for t in range(0, length, WIDTH):
                count = min(WIDTH, length - t)
                store(row_of(room, k - first, (c - c0) * length + t), 0, splat(value), count, value)
        for c in range(c0, c1 if length == 1 else c0, WIDTH):
            count = min(WIDTH, c1 - c)
            value = load(row_of(vectors, k, c), 0, count, room[0, 0])
            for j in range(copies):
                store(row_of(room, k - first, j * (c1 - c0) + c - c0), 0, value, count, room[0, 0])
    return row_of(room, 0, 0), row_of(room, 1, 0) - row_of(room, 0, 0)


@compiled
def carry(sums, part, high, low, size):
    """Move partial sums of columns to their totals, which are kept in two parts."""
    p, h, r = row_of(sums, part, 0), row_of(sums, high, 0), row_of(sums, low, 0)
    for t in range(0, size, WIDTH):  # rows are padded to whole lanes
        s, rest = two_sum(load(h, t, None, F64), load(r, t, None, F64), load(p, t, None, F64))
        store(h, t, s, None, F64)
        store(r, t, rest, None, F64)
        store(p, t, splat(0.0), None, F64)


@compiled
def folded(sums, high, low, c0, c1, length, copies, out, row):
    """The sum of each channel's columns, of sums in two parts."""
    h, r = row_of(sums, high, 0), row_of(sums, low, 0)
    if length == 1:
        for t in range(0, c1 - c0, WIDTH):
            count = min(WIDTH, c1 - c0 - t)
            s = rest = splat(0.0)
            for j in range(copies):
                column = j * (c1 - c0) + t
                s, rest = two_sum(s, rest, load(h, column, count, F64))
                rest = rest + load(r, column, count, F64)
            store(row_of(out, row, c0), t, s + rest, count, F64)
        return
    for c in range(c0, c1):
        first = (c - c0) * length
        s = rest = splat(0.0)
        for t in range(0, length, WIDTH):
            count = min(WIDTH, length - t)
            s, rest = two_sum(s, rest, load(h, first + t, count, F64))
            rest = rest + load(r, first + t, count, F64)
        out[row, c] = total(s) + total(rest)


@compiled
def cleared(sums, size):
    """Set all sums to zero."""
    for k in range(SUMS):
        for t in range(0, size, WIDTH):
            store(row_of(sums, k, 0), t, splat(0.0), None, F64)


# Moments.


@compiled
def add_four_moments(x, i, like, pivot, s, q, t, count):
    """Add d and d² of four rows to the sums of sixteen columns, with d = x - pivot."""
    k = load(pivot, t, count, F64)
    d0 = wide(load(x, i[0] + t, count, like)) - k
    d1 = wide(load(x, i[1] + t, count, like)) - k
    d2 = wide(load(x, i[2] + t, count, like)) - k
    d3 = wide(load(x, i[3] + t, count, like)) - k
    store(s, t, load(s, t, None, F64) + ((d0 + d1) + (d2 + d3)), None, F64)
    store(q, t, load(q, t, None, F64) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)), None, F64)


@compiled
def four_rows_moments(x, i, like, pivot, s, q, size):
    """The same for all columns."""
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        add_four_moments(x, i, like, pivot, s, q, t, None)
    if whole < size:
        add_four_moments(x, i, like, pivot, s, q, whole, size - whole)


@compiled
def row_moments(x, i, like, w, j, wstep, wlike, pivot, n, s, q, size):
    """Add w (where there are weights), w·d and w·d² of one row to the sums of its columns."""
    for t in range(0, size, WIDTH):
        count = min(WIDTH, size - t)
        k = load(pivot, t, count, F64)
        v, vd, vdd = moments_of(x, i + t, 1, like, w, j + t * wstep, wstep, wlike, count, k)
        if wlike is not None:
            store(n, t, load(n, t, None, F64) + v, None, F64)
        store(s, t, load(s, t, None, F64) + vd, None, F64)
        store(q, t, load(q, t, None, F64) + vdd, None, F64)


@compiled
def tile_moments(x, ox, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, sums, out):
    """Σw, Σw·d and Σw·d² of a tile's channels, to rows 0 to 2 of out; its row 3 has the pivots."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length * copies
    # Sums of n, s and q, each: of a batch, and of the tile in two parts. Then room for pivots.
    cleared(sums, size)
    pivots = table(row_of(sums, 9, 0), 1, sums.shape[1], F64)
    pivot, _ = spread(out, 3, 4, c0, c1, length, copies, pivots)
    n, s, q = row_of(sums, 0, 0), row_of(sums, 1, 0), row_of(sums, 2, 0)
    for batch in range(r0, r1, BATCH):
        r, last = batch, min(r1, batch + BATCH)
        if wlike is None:
            while r + 4 <= last:
                four_rows_moments(x, four_places(rows, 1, r, last, ox), like, pivot, s, q, size)
                r += 4
        while r < last:
            i = ox + place(rows, 1, inner, r)
            j = ow + place(rows, 3, inner, r) if wlike is not None else 0
            row_moments(x, i, like, w, j, wstep, wlike, pivot, n, s, q, size)
            r += 1
        for k in range(1 if wlike is None else 0, 3):
            carry(sums, k, 3 + k, 6 + k, size)
    for k in range(1 if wlike is None else 0, 3):
        folded(sums, 3 + k, 6 + k, c0, c1, length, copies, out, k)
    if wlike is None:
        for c in range(c0, c1):
            out[0, c] = np.float64((r1 - r0) * length * copies)


@compiled
def tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, copies, all_rows, c0, c1, sums, out):
    """The mean of each channel's first values as the data's dtype rounds it, to row 3 of out."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    width = min(WIDTH, length)
    if length > 1:
        sample = min(SAMPLE // width, all_rows)
        some = np.float64(sample * width)
        for c in range(c0, c1):
            s = splat(0.0)
            for r in range(sample):
                i = ox + place(rows, 1, inner, r) + (c - c0) * length
                s = s + wide(load(x, i, width, like))
            out[3, c] = rounded(total(s) / some, like)
        return
    size, sample = (c1 - c0) * copies, min((SAMPLE_ROWS + copies - 1) // copies, all_rows)
    cleared(sums, size)
    n, s, q, zero = row_of(sums, 0, 0), row_of(sums, 1, 0), row_of(sums, 2, 0), row_of(sums, 3, 0)
    for r in range(sample):
        i = ox + place(rows, 1, inner, r)
        j = ow + place(rows, 3, inner, r) if wlike is not None else 0
        row_moments(x, i, like, w, j, wstep, wlike, zero, n, s, q, size)
    for k in range(1 if wlike is None else 0, 2):
        folded(sums, k, 3 + k, c0, c1, length, copies, out, k)
    zeros, one = splat(0.0), splat(1.0)
    for c in range(c0, c1, WIDTH):
        count = min(WIDTH, c1 - c)
        some = splat(np.float64(sample * copies))
        if wlike is not None:
            some = load(row_of(out, 0, c), 0, count, F64)
        mean = load(row_of(out, 1, c), 0, count, F64) / above_zero(some, some, one)
        mean = rounded(above_zero(some, mean, zeros), like)
        store(row_of(out, 3, c), 0, mean, count, F64)


def columns_moments(like, wlike):
    """Σw, Σw·d and Σw·d² of each tile; pivots, row 3, are worked out unless they are given."""

    def loop(job, me):
        rows, chan = axes_of(job)
        copies = item(job, COPIES)
        x, w = item(job, FIRST), item(job, WEIGHTS)
        wstep = chan[3, 0] if wlike is not None else 0
        sums, _ = scratch_of(job, me, rows, like)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            block, r0, r1, c0, c1 = tile_bounds(job, tile)
            ox, ow, out = c0 * chan[1, 0], c0 * wstep, doubles(job, PARTS, 4, block)
            if not item(job, GIVEN):  # the same in each tile, so that none has to wait for another
                all_rows = item(job, REDUCED)
                tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, copies, all_rows, c0, c1, sums, out)
            tile_moments(x, ox, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, sums, out)

    return loop


# Output.


@compiled
def lanes_output(x, i, like, m, a, b, t, count):
    """Y = a·(x - m) + b of sixteen columns of a row."""
    zero = narrow(0.0, like)
    mm, aa, bb = load(m, t, count, zero), load(a, t, count, zero), load(b, t, count, zero)
    return output_of(x, i + t, 1, like, count, mm, aa, bb)


@compiled
def row_output(x, i, y, j, like, m, a, b, size, streaming):
    """The same for all columns."""
    t = 0
    if streaming:
        t = until_aligned(y, j, size, like)
        if t > 0:
            store(y, j, lanes_output(x, i, like, m, a, b, t - t, t), t, like)
        while t + WIDTH <= size:
            stream(y, j + t, lanes_output(x, i, like, m, a, b, t, None), like)
            t += WIDTH
    while t + WIDTH <= size:
        store(y, j + t, lanes_output(x, i, like, m, a, b, t, None), None, like)
        t += WIDTH
    if t < size:
        store(y, j + t, lanes_output(x, i, like, m, a, b, t, size - t), size - t, like)


@compiled
def tile_output(x, ox, y, oy, like, rows, copies, r0, r1, c0, c1, vectors, room, streaming):
    """Y of a tile."""
    length = rows[0, rows.shape[1] - 1]
    m, next_row = spread(vectors, 0, 3, c0, c1, length, copies, room)
    a, b = m + next_row, m + 2 * next_row
    inner = rows.shape[1] - 1
    for r in range(r0, r1):
        i, j = ox + place(rows, 1, inner, r), oy + place(rows, 2, inner, r)
        row_output(x, i, y, j, like, m, a, b, (c1 - c0) * length * copies, streaming)


def columns_output(like, wlike):
    """Y = a·(x - m) + b of each tile; m, a and b are the rows of the job's vectors."""

    def loop(job, me):
        rows, chan = axes_of(job)
        copies = item(job, COPIES)
        x, y, streaming = item(job, FIRST), item(job, SECOND), item(job, STREAMING) != 0
        vectors = vectors_of(job, like)
        _, room = scratch_of(job, me, rows, like)
        while True:
            tile = next_tile(job, me, True)
            if tile < 0:
                return
            _, r0, r1, c0, c1 = tile_bounds(job, tile)
            ox, oy = c0 * chan[1, 0], c0 * chan[2, 0]
            tile_output(x, ox, y, oy, like, rows, copies, r0, r1, c0, c1, vectors, room, streaming)

    return loop


def columns_forward(like, wlike):
    """Statistics and output of each tile of whole channels."""

    def loop(job, me):
        rows, chan = axes_of(job)
        copies = item(job, COPIES)
        x, y, w = item(job, FIRST), item(job, SECOND), item(job, WEIGHTS)
        wstep = chan[3, 0] if wlike is not None else 0
        vectors, streaming = vectors_of(job, like), item(job, STREAMING) != 0
        stats, out = doubles(job, STATS, 4, 0), doubles(job, PARTS, 4, 0)
        sums, room = scratch_of(job, me, rows, like)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            _, r0, r1, c0, c1 = tile_bounds(job, tile)
            ox, oy, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * wstep
            tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, copies, r1, c0, c1, sums, out)
            for _ in range(2):  # a second time where the pivot was too far from the mean
                tile_moments(x, ox, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, sums, out)
                if finish_moments(out, c0, c1, stats, like):
                    break
            forward_terms(job, stats, c0, c1, vectors, like)
            tile_output(x, ox, y, oy, like, rows, copies, r0, r1, c0, c1, vectors, room, streaming)

    return loop
