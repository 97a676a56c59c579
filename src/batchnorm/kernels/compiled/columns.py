"""Compiled loops over columns: channels last, or short runs of channels second.

Rows are read across many channels, four at a time, with one sum for each column. A channel has
`length` neighbouring columns (1 for channels last), which are folded at the end of a tile. Weights
come with a length of 1 only.
"""

from __future__ import annotations

import numpy as np

from batchnorm.kernels.compiled.lanes import (
    WIDTH,
    as_dtype_of,
    either,
    fetch_add,
    load,
    load1,
    narrow,
    only,
    store,
    store1,
    stream,
    streaming_size,
    wide,
)
from batchnorm.kernels.compiled.terms import (
    backward_terms,
    compiled,
    finish_moments,
    forward_terms,
    lanes_at,
    place,
    tile_bounds,
    tile_count,
    two_sum,
)

SAMPLE_ROWS = 8
# Rows that are added before their sums join the tile's: bounds the error of a sum.
BATCH = 128
F64 = np.float64(0)


@compiled
def repeated(vector, c0, c1, length, like):
    """A channel's value in each of its columns, in the dtype that values are worked on."""
    columns = np.full((c1 - c0) * length, narrow(0.0, like))
    for c in range(c0, c1):
        for t in range((c - c0) * length, (c - c0 + 1) * length):
            columns[t] = vector[c]
    return columns


@compiled
def carry(part, high, low):
    """Move partial sums of columns to their totals, which are kept in two parts."""
    for t in range(part.size):
        high[t], low[t] = two_sum(high[t], low[t], part[t])
        part[t] = 0.0


@compiled
def folded(high, low, c0, c1, length, out):
    """The sum of each channel's columns."""
    for c in range(c0, c1):
        s = rest = 0.0
        for t in range((c - c0) * length, (c - c0 + 1) * length):
            s, rest = two_sum(s, rest, high[t])
            rest += low[t]
        out[c] = s + rest


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
def tile_moments(x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, pivots, out):
    """Σw, Σw·d and Σw·d² of a tile's channels."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length
    pivot = repeated(pivots, c0, c1, length, F64)
    # Sums of n, s and q, each: of a batch, and of the tile in two parts.
    sums = np.zeros((9, size))
    n, s, q = sums[0].ctypes.data, sums[1].ctypes.data, sums[2].ctypes.data
    for batch in range(r0, r1, BATCH):
        r, last = batch, min(r1, batch + BATCH)
        if wlike is None:
            while r + 4 <= last:
                o0, o1 = ox + place(rows, 1, inner, r), ox + place(rows, 1, inner, r + 1)
                o2, o3 = ox + place(rows, 1, inner, r + 2), ox + place(rows, 1, inner, r + 3)
                four_rows_moments(x, o0, o1, o2, o3, like, pivot.ctypes.data, s, q, size)
                r += 4
        while r < last:
            o = ox + place(rows, 1, inner, r)
            j = ow + place(rows, 3, inner, r) if wlike is not None else 0
            row_moments(x, o, like, w, j, wstep, wlike, pivot.ctypes.data, n, s, q, size)
            r += 1
        for k in range(1 if wlike is None else 0, 3):
            carry(sums[k], sums[3 + k], sums[6 + k])
    for k in range(3):
        folded(sums[3 + k], sums[6 + k], c0, c1, length, out[k])
    if wlike is None:
        out[0, c0:c1] = np.float64((r1 - r0) * length)


@compiled
def tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, total_rows, c0, c1, pivots, out):
    """The mean of each channel's first rows, as the data's dtype rounds it."""
    pivots[c0:c1] = 0.0
    sample = min(SAMPLE_ROWS, total_rows)
    tile_moments(x, ox, like, w, ow, wstep, wlike, rows, 0, sample, c0, c1, pivots, out)
    for c in range(c0, c1):
        n = out[0, c]
        pivots[c] = np.float64(narrow(out[1, c] / n if n > 0 else 0.0, like))


@compiled
def columns_moments(counter, grid, x, w, like, wlike, rows, chan, pivots, given, parts):
    """Σw, Σw·d and Σw·d² of each tile; pivots are worked out unless they are given."""
    tiles = tile_count(grid)
    wstep = chan[3, 0] if wlike is not None else 0
    while True:
        tile = fetch_add(counter.ctypes.data)
        if tile >= tiles:
            return
        block, r0, r1, c0, c1 = tile_bounds(tile, grid)
        ox, ow = c0 * chan[1, 0], c0 * wstep
        out = parts[block]
        # Each tile works out the same pivots, so that none has to wait for another.
        mine = pivots if given else np.empty(pivots.size)
        if not given:
            tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, grid[0], c0, c1, mine, out)
            if block == 0:
                pivots[c0:c1] = mine[c0:c1]
        tile_moments(x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, mine, out)


# Output.


@compiled
def row_output(x, i, y, j, like, m, a, b, size, streaming):
    """y = a·(x - m) + b along a row."""
    zero = narrow(0.0, like)
    boundary, bytes_each = streaming_size(like)
    t = 0
    while t < size:
        aligned = not streaming or (y + (j + t) * bytes_each) % boundary == 0
        if aligned and t + WIDTH <= size:
            d = load(x, i + t, like) - load(m, t, zero)
            v = load(a, t, zero) * d + load(b, t, zero)
            if streaming:
                stream(y, j + t, v, like)
            else:
                store(y, j + t, v, like)
            t += WIDTH
        else:
            d1 = load1(x, i + t, like) - load1(m, t, zero)
            store1(y, j + t, load1(a, t, zero) * d1 + load1(b, t, zero), like)
            t += 1


@compiled
def tile_output(x, ox, y, oy, like, rows, r0, r1, c0, c1, m, a, b, streaming):
    """y of a tile, from the last row to the first: the last ones are still in cache."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    mm = repeated(m, c0, c1, length, like)
    aa = repeated(a, c0, c1, length, like)
    bb = repeated(b, c0, c1, length, like)
    for r in range(r1 - 1, r0 - 1, -1):
        i, j = ox + place(rows, 1, inner, r), oy + place(rows, 2, inner, r)
        row_output(
            x, i, y, j, like, mm.ctypes.data, aa.ctypes.data, bb.ctypes.data, mm.size, streaming
        )


@compiled
def columns_output(counter, grid, x, y, like, rows, chan, m, a, b, streaming):
    """y = a·(x - m) + b of each tile."""
    tiles = tile_count(grid)
    while True:
        tile = fetch_add(counter.ctypes.data)
        if tile >= tiles:
            return
        _, r0, r1, c0, c1 = tile_bounds(tiles - 1 - tile, grid)
        ox, oy = c0 * chan[1, 0], c0 * chan[2, 0]
        tile_output(x, ox, y, oy, like, rows, r0, r1, c0, c1, m, a, b, streaming)


@compiled
def columns_forward(
    counter, grid, x, y, w, like, wlike, rows, chan, gamma, beta, eps, stats, streaming
):
    """Statistics and output of each tile of whole channels."""
    tiles = tile_count(grid)
    wstep = chan[3, 0] if wlike is not None else 0
    while True:
        tile = fetch_add(counter.ctypes.data)
        if tile >= tiles:
            return
        _, r0, r1, c0, c1 = tile_bounds(tile, grid)
        ox, oy, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * wstep
        pivots, sums = np.empty(c1), np.empty((3, c1))
        tile_pivots(x, ox, like, w, ow, wstep, wlike, rows, r1, c0, c1, pivots, sums)
        for _ in range(2):  # a second time where the pivot was too far from the mean
            near = True
            tile_moments(x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, pivots, sums)
            for c in range(c0, c1):
                near &= finish_moments(sums[0, c], pivots[c], sums[1, c], sums[2, c], c, stats)
            if near:
                break
            for c in range(c0, c1):
                pivots[c] = np.float64(narrow(stats[1, c], like))
        zero = narrow(0.0, like)
        m, a, b = np.full(c1, zero), np.full(c1, zero), np.full(c1, zero)
        for c in range(c0, c1):
            m[c], a[c], b[c] = forward_terms(stats, c, gamma, beta, eps, like)
        tile_output(x, ox, y, oy, like, rows, r0, r1, c0, c1, m, a, b, streaming)


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
def tile_grad_sums(dy, og, x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, m, out):
    """Σdy and Σdy·(x - m) of a tile's channels."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length
    mm = repeated(m, c0, c1, length, like)
    # Sums of dy and of dy·(x - m), each: of a batch, and of the tile in two parts.
    sums = np.zeros((6, size))
    s, q = sums[0].ctypes.data, sums[1].ctypes.data
    for batch in range(r0, r1, BATCH):
        r, last = batch, min(r1, batch + BATCH)
        if wlike is None:
            while r + 4 <= last:
                g0, g1 = og + place(rows, 1, inner, r), og + place(rows, 1, inner, r + 1)
                g2, g3 = og + place(rows, 1, inner, r + 2), og + place(rows, 1, inner, r + 3)
                o0, o1 = ox + place(rows, 2, inner, r), ox + place(rows, 2, inner, r + 1)
                o2, o3 = ox + place(rows, 2, inner, r + 2), ox + place(rows, 2, inner, r + 3)
                four_rows_grad_sums(
                    dy, g0, g1, g2, g3, x, o0, o1, o2, o3, like, mm.ctypes.data, s, q, size
                )
                r += 4
        while r < last:
            g, o = og + place(rows, 1, inner, r), ox + place(rows, 2, inner, r)
            j = ow + place(rows, 4, inner, r) if wlike is not None else 0
            row_grad_sums(dy, g, x, o, like, w, j, wstep, wlike, mm.ctypes.data, s, q, size)
            r += 1
        for k in range(2):
            carry(sums[k], sums[2 + k], sums[4 + k])
    for k in range(2):
        folded(sums[2 + k], sums[4 + k], c0, c1, length, out[k])


@compiled
def columns_grad_sums(counter, grid, dy, x, w, like, wlike, rows, chan, m, parts):
    """Σdy and Σdy·(x - m) of each tile."""
    tiles = tile_count(grid)
    wstep = chan[4, 0] if wlike is not None else 0
    while True:
        tile = fetch_add(counter.ctypes.data)
        if tile >= tiles:
            return
        block, r0, r1, c0, c1 = tile_bounds(tile, grid)
        og, ox, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * wstep
        tile_grad_sums(
            dy, og, x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, m, parts[block]
        )


@compiled
def row_grad_input(
    dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, size, streaming
):
    """dx = a·(dy + w·(b·(x - m) + c)) along a row."""
    zero = narrow(0.0, like)
    boundary, bytes_each = streaming_size(like)
    t = 0
    while t < size:
        aligned = not streaming or (dx + (k + t) * bytes_each) % boundary == 0
        if aligned and t + WIDTH <= size:
            g = load(dy, h + t, like)
            d = load(x, i + t, like) - load(m, t, zero)
            d = load(b, t, zero) * d + load(shift, t, zero)
            if wlike is not None:
                v = lanes_at(w, j + t * wstep, wstep, wlike)
                d = only(v, as_dtype_of(v, d) * d)
            value = load(a, t, zero) * (g + d)
            if streaming:
                stream(dx, k + t, value, like)
            else:
                store(dx, k + t, value, like)
            t += WIDTH
        else:
            d1 = load1(x, i + t, like) - load1(m, t, zero)
            d1 = load1(b, t, zero) * d1 + load1(shift, t, zero)
            if wlike is not None:
                v1 = load1(w, j + t * wstep, wlike)
                d1 = only(v1, as_dtype_of(v1, d1) * d1)
            store1(dx, k + t, load1(a, t, zero) * (load1(dy, h + t, like) + d1), like)
            t += 1


@compiled
def tile_grad_input(
    dy, og, x, ox, dx, oo, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, m, a, b, shift, streaming
):
    """dx of a tile, from the last row to the first: the last ones are still in cache."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    mm, aa = repeated(m, c0, c1, length, like), repeated(a, c0, c1, length, like)
    bb, cc = repeated(b, c0, c1, length, like), repeated(shift, c0, c1, length, like)
    for r in range(r1 - 1, r0 - 1, -1):
        h, i = og + place(rows, 1, inner, r), ox + place(rows, 2, inner, r)
        k = oo + place(rows, 3, inner, r)
        j = ow + place(rows, 4, inner, r) if wlike is not None else 0
        row_grad_input(
            dy, h, x, i, dx, k, like, w, j, wstep, wlike, mm.ctypes.data, aa.ctypes.data,
            bb.ctypes.data, cc.ctypes.data, mm.size, streaming,
        )


@compiled
def columns_grad_input(
    counter, grid, dy, x, dx, w, like, wlike, rows, chan, m, a, b, shift, streaming
):
    """dx = a·(dy + w·(b·(x - m) + c)) of each tile."""
    tiles = tile_count(grid)
    wstep = chan[4, 0] if wlike is not None else 0
    while True:
        tile = fetch_add(counter.ctypes.data)
        if tile >= tiles:
            return
        _, r0, r1, c0, c1 = tile_bounds(tiles - 1 - tile, grid)
        og, ox, oo = c0 * chan[1, 0], c0 * chan[2, 0], c0 * chan[3, 0]
        tile_grad_input(
            dy, og, x, ox, dx, oo, like, w, c0 * wstep, wstep, wlike, rows, r0, r1, c0, c1,
            m, a, b, shift, streaming,
        )


@compiled
def columns_backward(
    counter, grid, dy, x, dx, w, like, wlike, rows, chan, gamma, eps, stats, grads, streaming
):
    """Gradients of each tile of whole channels."""
    tiles = tile_count(grid)
    wstep = chan[4, 0] if wlike is not None else 0
    while True:
        tile = fetch_add(counter.ctypes.data)
        if tile >= tiles:
            return
        _, r0, r1, c0, c1 = tile_bounds(tile, grid)
        og, ox, oo, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * chan[3, 0], c0 * wstep
        zero = narrow(0.0, like)
        m, a = np.full(c1, zero), np.full(c1, zero)
        b, shift = np.full(c1, zero), np.full(c1, zero)
        for c in range(c0, c1):
            m[c] = narrow(stats[1, c], like)
        sums = np.empty((2, c1))
        tile_grad_sums(dy, og, x, ox, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1, m, sums)
        for c in range(c0, c1):
            a[c], b[c], shift[c] = backward_terms(
                stats, c, gamma, eps, sums[0, c], sums[1, c], grads, like
            )
        tile_grad_input(
            dy, og, x, ox, dx, oo, like, w, ow, wstep, wlike, rows, r0, r1, c0, c1,
            m, a, b, shift, streaming,
        )
