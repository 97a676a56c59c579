"""Compiled loops over columns: channels last, or short runs of channels second.

Rows are read across many channels, four at a time, with one sum for each column. A channel has
`length` neighbouring columns (1 for channels last), which are folded at the end of a tile. Weights
come with a length of 1 only.
"""

from __future__ import annotations

import numpy as np

from batchnorm.kernels.compiled.lanes import (
    WIDTH,
    address_of,
    as_dtype_of,
    either,
    load,
    load1,
    narrow,
    only,
    rounded,
    splat,
    store,
    store1,
    stream,
    streaming_size,
    total,
    wide,
)
from batchnorm.kernels.compiled.terms import (
    backward_terms,
    compiled,
    entrance,
    finish_moments,
    forward_terms,
    inlined,
    lanes_at,
    next_tile,
    place,
    ring_bells,
    tile_bounds,
    tile_count,
    two_sum,
)

# Rows that a pivot is the mean of, which is then off by a fourth of a standard deviation, typically.
SAMPLE_ROWS = 16
# Rows that are added before their sums join the tile's: bounds the error of a sum.
BATCH = 64
F64 = np.float64(0)


@inlined
def row_of(table, row, first):
    """The address of a place in a table."""
    return address_of(table) + (row * table.shape[1] + first) * table.itemsize


@compiled
def repeated(vectors, row, c0, c1, length, room, place_in_room):
    """The address of a channel's value in each of its columns; written to `room` where it must be."""
    if length == 1:
        return row_of(vectors, row, c0)
    for c in range(c0, c1):
        for t in range((c - c0) * length, (c - c0 + 1) * length):
            room[place_in_room, t] = vectors[row, c]
    return row_of(room, place_in_room, 0)


@inlined
def carry(sums, part, high, low, size):
    """Move partial sums of columns to their totals, which are kept in two parts."""
    for t in range(size):
        sums[high, t], sums[low, t] = two_sum(sums[high, t], sums[low, t], sums[part, t])
        sums[part, t] = 0.0


@compiled
def folded(sums, high, low, c0, c1, length, out, row):
    """The sum of each channel's columns."""
    whole = length // WIDTH * WIDTH
    for c in range(c0, c1):
        first = (c - c0) * length
        lanes = rest = splat(0.0)
        for t in range(first, first + whole, WIDTH):
            lanes, rest = two_sum(lanes, rest, load(row_of(sums, high, 0), t, F64))
            rest = rest + load(row_of(sums, low, 0), t, F64)
        s, s_rest = total(lanes), total(rest)
        for t in range(first + whole, first + length):
            s, s_rest = two_sum(s, s_rest, sums[high, t])
            s_rest += sums[low, t]
        out[row, c] = s + s_rest


@inlined
def cleared(sums, count, size):
    """Set the first rows of a table to zero."""
    for k in range(count):
        for t in range(size):
            sums[k, t] = 0.0


# Moments.


@compiled
def four_rows_moments(x, o0, o1, o2, o3, like, pivot, s, q, size):
    """Add d and d² of four rows to the sums of their columns, with d = x - pivot."""
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        k = load(pivot, t, F64)
        d0 = wide(load(x, o0 + t, like)) - k
        d1 = wide(load(x, o1 + t, like)) - k
        d2 = wide(load(x, o2 + t, like)) - k
        d3 = wide(load(x, o3 + t, like)) - k
        store(s, t, load(s, t, F64) + ((d0 + d1) + (d2 + d3)), F64)
        store(q, t, load(q, t, F64) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)), F64)
    for t in range(whole, size):
        k1 = load1(pivot, t, F64)
        e0 = wide(load1(x, o0 + t, like)) - k1
        e1 = wide(load1(x, o1 + t, like)) - k1
        e2 = wide(load1(x, o2 + t, like)) - k1
        e3 = wide(load1(x, o3 + t, like)) - k1
        store1(s, t, load1(s, t, F64) + ((e0 + e1) + (e2 + e3)), F64)
        store1(q, t, load1(q, t, F64) + ((e0 * e0 + e1 * e1) + (e2 * e2 + e3 * e3)), F64)


@compiled
def row_moments(x, o, like, w, j, wstep, wlike, pivot, n, s, q, size):
    """Add w, w·d and w·d² of one row to the sums of its columns."""
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        d = wide(load(x, o + t, like)) - load(pivot, t, F64)
        vd = d
        if wlike is not None:
            v = wide(lanes_at(w, j + t * wstep, wstep, wlike))
            d = only(v, d)
            vd = v * d
            store(n, t, load(n, t, F64) + v, F64)
        store(s, t, load(s, t, F64) + vd, F64)
        store(q, t, load(q, t, F64) + vd * d, F64)
    for t in range(whole, size):
        d1 = wide(load1(x, o + t, like)) - load1(pivot, t, F64)
        vd1 = d1
        if wlike is not None:
            v1 = wide(load1(w, j + t * wstep, wlike))
            d1 = only(v1, d1)
            vd1 = v1 * d1
            store1(n, t, load1(n, t, F64) + v1, F64)
        store1(s, t, load1(s, t, F64) + vd1, F64)
        store1(q, t, load1(q, t, F64) + vd1 * d1, F64)


@compiled
def tile_moments(x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, sums, out):
    """Σw, Σw·d and Σw·d² of a tile's channels, to rows 0 to 2 of out; its row 3 has the pivots."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length
    pivot = repeated(out, 3, c0, c1, length, sums, 9)
    # Sums of n, s and q, each: of a batch, and of the tile in two parts.
    cleared(sums, 9, size)
    n, s, q = row_of(sums, 0, 0), row_of(sums, 1, 0), row_of(sums, 2, 0)
    for batch in range(r0, r1, BATCH):
        r, last = batch, min(r1, batch + BATCH)
        if wlike is None:
            while r + 4 <= last:
                o0, o1 = ox + place(rows, 1, inner, r), ox + place(rows, 1, inner, r + 1)
                o2, o3 = ox + place(rows, 1, inner, r + 2), ox + place(rows, 1, inner, r + 3)
                four_rows_moments(x, o0, o1, o2, o3, like, pivot, s, q, size)
                r += 4
        while r < last:
            o = ox + place(rows, 1, inner, r)
            j = ow + place(rows, 3, inner, r) if wlike is not None else 0
            row_moments(x, o, like, w, j, wstep, wlike, pivot, n, s, q, size)
            r += 1
        for k in range(1 if wlike is None else 0, 3):
            carry(sums, k, 3 + k, 6 + k, size)
    for k in range(1 if wlike is None else 0, 3):
        folded(sums, 3 + k, 6 + k, c0, c1, length, out, k)
    if wlike is None:
        for c in range(c0, c1):
            out[0, c] = np.float64((r1 - r0) * length)


@compiled
def tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, total_rows, c0, c1, sums, out):
    """The mean of each channel's first rows as the data's dtype rounds it, to row 3 of out."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    sample, width = min(SAMPLE_ROWS, total_rows), min(SAMPLE_ROWS, length)
    cleared(sums, 4, c1 - c0)
    n, s, q, zero = row_of(sums, 0, 0), row_of(sums, 1, 0), row_of(sums, 2, 0), row_of(sums, 3, 0)
    for r in range(sample):
        i = ox + place(rows, 1, inner, r)
        if length == 1:
            j = ow + place(rows, 3, inner, r) if wlike is not None else 0
            row_moments(x, i, like, w, j, wstep, wlike, zero, n, s, q, c1 - c0)
        else:
            for c in range(c1 - c0):
                for t in range(i + c * length, i + c * length + width):
                    sums[1, c] += wide(load1(x, t, like))
    for c in range(c1 - c0):
        some = np.float64(sample * width) if wlike is None else sums[0, c]
        out[3, c0 + c] = rounded(sums[1, c] / some if some > 0 else 0.0, like)


@entrance
def columns_moments(counter, me, grid, x, w, like, wlike, rows, chan, parts, given):
    """Σw, Σw·d and Σw·d² of each tile; pivots, row 3, are worked out unless they are given."""
    ring_bells(counter, me)
    tiles = tile_count(grid)
    wstep = chan[3, 0] if wlike is not None else 0
    sums = np.empty((10, grid[3] * rows[0, rows.shape[1] - 1]))
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        block, r0, r1, c0, c1 = tile_bounds(tile, grid)
        ox, ow, out = c0 * chan[1, 0], c0 * wstep, parts[block]
        if not given:  # the same in each tile, so that none has to wait for another
            tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, grid[0], c0, c1, sums, out)
        tile_moments(x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, sums, out)


# Output.


@inlined
def one_output(x, i, y, j, like, m, a, b, t):
    """The same for one column; how many it was."""
    zero = narrow(0.0, like)
    d = load1(x, i + t, like) - load1(m, t, zero)
    store1(y, j + t, load1(a, t, zero) * d + load1(b, t, zero), like)
    return 1


@compiled
def row_output(x, i, y, j, like, m, a, b, size, streaming):
    """Y = a·(x - m) + b along a row."""
    zero = narrow(0.0, like)
    t = 0
    if streaming:
        boundary, bytes_each = streaming_size(like)
        while t < size and (y + (j + t) * bytes_each) % boundary:
            t += one_output(x, i, y, j, like, m, a, b, t)
        while t + WIDTH <= size:
            d = load(x, i + t, like) - load(m, t, zero)
            stream(y, j + t, load(a, t, zero) * d + load(b, t, zero), like)
            t += WIDTH
    else:
        while t + WIDTH <= size:
            d = load(x, i + t, like) - load(m, t, zero)
            store(y, j + t, load(a, t, zero) * d + load(b, t, zero), like)
            t += WIDTH
    while t < size:
        t += one_output(x, i, y, j, like, m, a, b, t)


@compiled
def tile_output(x, ox, y, oy, like, rows, r0, r1, c0, c1, vectors, room, streaming):
    """Y of a tile."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    m = repeated(vectors, 0, c0, c1, length, room, 0)
    a = repeated(vectors, 1, c0, c1, length, room, 1)
    b = repeated(vectors, 2, c0, c1, length, room, 2)
    for r in range(r0, r1):
        i, j = ox + place(rows, 1, inner, r), oy + place(rows, 2, inner, r)
        row_output(x, i, y, j, like, m, a, b, (c1 - c0) * length, streaming)


@entrance
def columns_output(counter, me, grid, x, y, like, rows, chan, vectors, streaming):
    """Y = a·(x - m) + b of each tile; m, a and b are the rows of `vectors`."""
    ring_bells(counter, me)
    tiles = tile_count(grid)
    room = np.empty((4, grid[3] * rows[0, rows.shape[1] - 1]), vectors.dtype)
    while True:
        tile = next_tile(counter, me, tiles, True)
        if tile < 0:
            return
        _, r0, r1, c0, c1 = tile_bounds(tile, grid)
        ox, oy = c0 * chan[1, 0], c0 * chan[2, 0]
        tile_output(x, ox, y, oy, like, rows, r0, r1, c0, c1, vectors, room, streaming)


@entrance
def columns_forward(
    counter, me, grid, x, y, w, like, wlike, rows, chan, gamma, beta, eps, stats, vectors, streaming
):
    """Statistics and output of each tile of whole channels."""
    ring_bells(counter, me)
    tiles = tile_count(grid)
    wstep = chan[3, 0] if wlike is not None else 0
    columns = grid[3] * rows[0, rows.shape[1] - 1]
    sums, room = np.empty((10, columns)), np.empty((4, columns), vectors.dtype)
    out = np.empty((4, grid[2]))
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        _, r0, r1, c0, c1 = tile_bounds(tile, grid)
        ox, oy, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * wstep
        tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, r1, c0, c1, sums, out)
        for _ in range(2):  # a second time where the pivot was too far from the mean
            near = True
            tile_moments(x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, sums, out)
            for c in range(c0, c1):
                near &= finish_moments(out, c, stats, like)
            if near:
                break
        for c in range(c0, c1):
            vectors[0, c], vectors[1, c], vectors[2, c] = forward_terms(stats, c, gamma, beta, eps, like)
        tile_output(x, ox, y, oy, like, rows, r0, r1, c0, c1, vectors, room, streaming)


# Gradients.


@compiled
def four_rows_grad_sums(dy, g0, g1, g2, g3, x, o0, o1, o2, o3, like, m, s, q, size):
    """Add dy and dy·(x - m) of four rows to the sums of their columns."""
    zero = narrow(0.0, like)
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        k = wide(load(m, t, zero))
        h0, h1 = wide(load(dy, g0 + t, like)), wide(load(dy, g1 + t, like))
        h2, h3 = wide(load(dy, g2 + t, like)), wide(load(dy, g3 + t, like))
        d0, d1 = wide(load(x, o0 + t, like)) - k, wide(load(x, o1 + t, like)) - k
        d2, d3 = wide(load(x, o2 + t, like)) - k, wide(load(x, o3 + t, like)) - k
        store(s, t, load(s, t, F64) + ((h0 + h1) + (h2 + h3)), F64)
        store(q, t, load(q, t, F64) + ((h0 * d0 + h1 * d1) + (h2 * d2 + h3 * d3)), F64)
    for t in range(whole, size):
        k1 = wide(load1(m, t, zero))
        e0, e1 = wide(load1(dy, g0 + t, like)), wide(load1(dy, g1 + t, like))
        e2, e3 = wide(load1(dy, g2 + t, like)), wide(load1(dy, g3 + t, like))
        f0, f1 = wide(load1(x, o0 + t, like)) - k1, wide(load1(x, o1 + t, like)) - k1
        f2, f3 = wide(load1(x, o2 + t, like)) - k1, wide(load1(x, o3 + t, like)) - k1
        store1(s, t, load1(s, t, F64) + ((e0 + e1) + (e2 + e3)), F64)
        store1(q, t, load1(q, t, F64) + ((e0 * f0 + e1 * f1) + (e2 * f2 + e3 * f3)), F64)


@compiled
def row_grad_sums(dy, g, x, o, like, w, j, wstep, wlike, m, s, q, size):
    """Add dy and dy·(x - m) of one row to the sums of its columns."""
    zero = narrow(0.0, like)
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        h = wide(load(dy, g + t, like))
        d = wide(load(x, o + t, like)) - wide(load(m, t, zero))
        if wlike is not None:  # a value without weight and without gradient may be NaN
            d = either(lanes_at(w, j + t * wstep, wstep, wlike), h, d)
        store(s, t, load(s, t, F64) + h, F64)
        store(q, t, load(q, t, F64) + h * d, F64)
    for t in range(whole, size):
        h1 = wide(load1(dy, g + t, like))
        d1 = wide(load1(x, o + t, like)) - wide(load1(m, t, zero))
        if wlike is not None:
            d1 = either(load1(w, j + t * wstep, wlike), h1, d1)
        store1(s, t, load1(s, t, F64) + h1, F64)
        store1(q, t, load1(q, t, F64) + h1 * d1, F64)


@compiled
def tile_grad_sums(
    dy, og, x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, vectors, room, sums, out
):
    """Σdy and Σdy·(x - m) of a tile's channels, to the rows of out; m is row 0 of `vectors`."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length
    m = repeated(vectors, 0, c0, c1, length, room, 0)
    # Sums of dy and of dy·(x - m), each: of a batch, and of the tile in two parts.
    cleared(sums, 6, size)
    s, q = row_of(sums, 0, 0), row_of(sums, 1, 0)
    for batch in range(r0, r1, BATCH):
        r, last = batch, min(r1, batch + BATCH)
        if wlike is None:
            while r + 4 <= last:
                g0, g1 = og + place(rows, 1, inner, r), og + place(rows, 1, inner, r + 1)
                g2, g3 = og + place(rows, 1, inner, r + 2), og + place(rows, 1, inner, r + 3)
                o0, o1 = ox + place(rows, 2, inner, r), ox + place(rows, 2, inner, r + 1)
                o2, o3 = ox + place(rows, 2, inner, r + 2), ox + place(rows, 2, inner, r + 3)
                four_rows_grad_sums(dy, g0, g1, g2, g3, x, o0, o1, o2, o3, like, m, s, q, size)
                r += 4
        while r < last:
            g, o = og + place(rows, 1, inner, r), ox + place(rows, 2, inner, r)
            j = ow + place(rows, 4, inner, r) if wlike is not None else 0
            row_grad_sums(dy, g, x, o, like, w, j, wstep, wlike, m, s, q, size)
            r += 1
        for k in range(2):
            carry(sums, k, 2 + k, 4 + k, size)
    for k in range(2):
        folded(sums, 2 + k, 4 + k, c0, c1, length, out, k)


@entrance
def columns_grad_sums(counter, me, grid, dy, x, w, like, wlike, rows, chan, vectors, parts):
    """Σdy and Σdy·(x - m) of each tile; m is row 0 of `vectors`."""
    ring_bells(counter, me)
    tiles = tile_count(grid)
    wstep = chan[4, 0] if wlike is not None else 0
    columns = grid[3] * rows[0, rows.shape[1] - 1]
    sums, room = np.empty((6, columns)), np.empty((4, columns), vectors.dtype)
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        block, r0, r1, c0, c1 = tile_bounds(tile, grid)
        og, ox, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * wstep
        tile_grad_sums(
            dy,
            og,
            x,
            ox,
            like,
            w,
            ow,
            wstep,
            wlike,
            rows,
            r0,
            r1,
            c0,
            c1,
            vectors,
            room,
            sums,
            parts[block],
        )


@compiled
def lanes_grad_input(dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t):
    """Dx = a·(dy + w·(b·(x - m) + c)) of sixteen columns."""
    zero = narrow(0.0, like)
    d = load(x, i + t, like) - load(m, t, zero)
    d = load(b, t, zero) * d + load(shift, t, zero)
    if wlike is not None:
        v = lanes_at(w, j + t * wstep, wstep, wlike)
        d = only(v, as_dtype_of(v, d) * d)
    return load(a, t, zero) * (load(dy, h + t, like) + d)


@compiled
def one_grad_input(dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, t):
    """The same for one column; how many it was."""
    zero = narrow(0.0, like)
    d = load1(x, i + t, like) - load1(m, t, zero)
    d = load1(b, t, zero) * d + load1(shift, t, zero)
    if wlike is not None:
        v = load1(w, j + t * wstep, wlike)
        d = only(v, as_dtype_of(v, d) * d)
    store1(dx, k + t, load1(a, t, zero) * (load1(dy, h + t, like) + d), like)
    return 1


@compiled
def row_grad_input(dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, size, streaming):
    """Dx = a·(dy + w·(b·(x - m) + c)) along a row."""
    t = 0
    if streaming:
        boundary, bytes_each = streaming_size(like)
        while t < size and (dx + (k + t) * bytes_each) % boundary:
            t += one_grad_input(dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, t)
        while t + WIDTH <= size:
            value = lanes_grad_input(dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t)
            stream(dx, k + t, value, like)
            t += WIDTH
    else:
        while t + WIDTH <= size:
            value = lanes_grad_input(dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t)
            store(dx, k + t, value, like)
            t += WIDTH
    while t < size:
        t += one_grad_input(dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, t)


@compiled
def tile_grad_input(
    dy, og, x, ox, dx, oo, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, vectors, room, streaming
):
    """Dx of a tile."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    m = repeated(vectors, 0, c0, c1, length, room, 0)
    a = repeated(vectors, 1, c0, c1, length, room, 1)
    b = repeated(vectors, 2, c0, c1, length, room, 2)
    shift = repeated(vectors, 3, c0, c1, length, room, 3)
    for r in range(r0, r1):
        h, i = og + place(rows, 1, inner, r), ox + place(rows, 2, inner, r)
        k = oo + place(rows, 3, inner, r)
        j = ow + place(rows, 4, inner, r) if wlike is not None else 0
        row_grad_input(
            dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, (c1 - c0) * length, streaming
        )


@entrance
def columns_grad_input(counter, me, grid, dy, x, dx, w, like, wlike, rows, chan, vectors, streaming):
    """Dx = a·(dy + w·(b·(x - m) + c)) of each tile; m, a, b and c are the rows of `vectors`."""
    ring_bells(counter, me)
    tiles = tile_count(grid)
    wstep = chan[4, 0] if wlike is not None else 0
    room = np.empty((4, grid[3] * rows[0, rows.shape[1] - 1]), vectors.dtype)
    while True:
        tile = next_tile(counter, me, tiles, True)
        if tile < 0:
            return
        _, r0, r1, c0, c1 = tile_bounds(tile, grid)
        og, ox, oo = c0 * chan[1, 0], c0 * chan[2, 0], c0 * chan[3, 0]
        tile_grad_input(
            dy,
            og,
            x,
            ox,
            dx,
            oo,
            like,
            w,
            c0 * wstep,
            wstep,
            wlike,
            rows,
            r0,
            r1,
            c0,
            c1,
            vectors,
            room,
            streaming,
        )


@entrance
def columns_backward(
    counter,
    me,
    grid,
    dy,
    x,
    dx,
    w,
    like,
    wlike,
    rows,
    chan,
    gamma,
    eps,
    stats,
    grads,
    vectors,
    streaming,
):
    """Gradients of each tile of whole channels."""
    ring_bells(counter, me)
    tiles = tile_count(grid)
    wstep = chan[4, 0] if wlike is not None else 0
    columns = grid[3] * rows[0, rows.shape[1] - 1]
    sums, room = np.empty((6, columns)), np.empty((4, columns), vectors.dtype)
    out = np.empty((2, grid[2]))
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        _, r0, r1, c0, c1 = tile_bounds(tile, grid)
        og, ox, oo, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * chan[3, 0], c0 * wstep
        for c in range(c0, c1):
            vectors[0, c] = narrow(stats[1, c], like)
        tile_grad_sums(
            dy, og, x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, vectors, room, sums, out
        )
        for c in range(c0, c1):
            vectors[1, c], vectors[2, c], vectors[3, c] = backward_terms(
                stats, c, gamma, eps, out, grads, like
            )
        tile_grad_input(
            dy,
            og,
            x,
            ox,
            dx,
            oo,
            like,
            w,
            ow,
            wstep,
            wlike,
            rows,
            r0,
            r1,
            c0,
            c1,
            vectors,
            room,
            streaming,
        )
