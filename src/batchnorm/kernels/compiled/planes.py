"""Compiled loops over planes: channels second or first, where one channel lies in long runs."""

from __future__ import annotations

import numpy as np

from batchnorm.kernels.compiled.lanes import (
    WIDTH,
    as_dtype_of,
    either,
    load1,
    narrow,
    only,
    rounded,
    splat,
    store1,
    stream,
    streaming_size,
    total,
    wide,
)
from batchnorm.kernels.compiled.terms import (
    SAMPLE,
    SEGMENT,
    backward_terms,
    compiled,
    entrance,
    finish_moments,
    forward_terms,
    lanes_at,
    next_tile,
    place,
    put,
    ring_bells,
    tile_bounds,
    tile_count,
    two_sum,
)


@compiled
def run_moments(x, i, step, like, w, j, wstep, wlike, size, pivot):
    """Σw, Σw·d and Σw·d² of a run, with d = x - pivot."""
    k = splat(pivot)
    n = s = q = r = p = splat(0.0)
    t, whole = 0, size // WIDTH * WIDTH
    if wlike is None:
        while t + WIDTH < whole:  # two at a time: sums half as deep
            d = wide(lanes_at(x, i + t * step, step, like)) - k
            e = wide(lanes_at(x, i + (t + WIDTH) * step, step, like)) - k
            s, r, q, p = s + d, r + e, q + d * d, p + e * e
            t += 2 * WIDTH
        s, q = s + r, q + p
    while t < whole:
        d = wide(lanes_at(x, i + t * step, step, like)) - k
        if wlike is None:
            s, q = s + d, q + d * d
        else:
            v = wide(lanes_at(w, j + t * wstep, wstep, wlike))
            d = only(v, d)
            vd = v * d
            n, s, q = n + v, s + vd, q + vd * d
        t += WIDTH
    n1, s1, q1 = total(n), total(s), total(q)
    for t in range(whole, size):
        d1 = wide(load1(x, i + t * step, like)) - pivot
        if wlike is None:
            s1, q1 = s1 + d1, q1 + d1 * d1
        else:
            v1 = wide(load1(w, j + t * wstep, wlike))
            d1 = only(v1, d1)
            n1, s1, q1 = n1 + v1, s1 + v1 * d1, q1 + v1 * d1 * d1
    return (np.float64(size) if wlike is None else n1), s1, q1


@compiled
def channel_pivot(x, ox, like, w, ow, wlike, rows):
    """The mean of the first values of a channel, as the data's dtype rounds it."""
    inner = rows.shape[1] - 1
    size = min(SAMPLE, rows[0, inner])
    n, s, _ = run_moments(x, ox, rows[1, inner], like, w, ow, rows[3, inner], wlike, size, 0.0)
    return rounded(s / n if n > 0 else 0.0, like)


@compiled
def channel_moments(x, ox, like, w, ow, wlike, rows, first, last, pivot):
    """Σw, Σw·d and Σw·d² of segments of a channel."""
    inner = rows.shape[1] - 1
    length, step, wstep = rows[0, inner], rows[1, inner], rows[3, inner]
    per = (length + SEGMENT - 1) // SEGMENT
    n = n_lo = s = s_lo = q = q_lo = 0.0
    for segment in range(first, last):
        row = segment // per
        start = (segment - row * per) * SEGMENT
        i = ox + place(rows, 1, inner, row) + start * step
        j = ow + (place(rows, 3, inner, row) + start * wstep if wlike is not None else 0)
        size = min(SEGMENT, length - start)
        dn, ds, dq = run_moments(x, i, step, like, w, j, wstep, wlike, size, pivot)
        n, n_lo = two_sum(n, n_lo, dn)
        s, s_lo = two_sum(s, s_lo, ds)
        q, q_lo = two_sum(q, q_lo, dq)
    return n + n_lo, s + s_lo, q + q_lo


@compiled
def run_output(x, i, step, y, j, ystep, like, size, m, a, b, streaming):
    """Y = a·(x - m) + b along a run."""
    mm, aa, bb = splat(m), splat(a), splat(b)
    t = 0
    if streaming and ystep == 1:
        boundary, bytes_each = streaming_size(like)
        while t < size and (y + (j + t) * bytes_each) % boundary:
            store1(y, j + t, a * (load1(x, i + t * step, like) - m) + b, like)
            t += 1
        while t + WIDTH <= size:
            v = lanes_at(x, i + t * step, step, like)
            stream(y, j + t, aa * (v - mm) + bb, like)
            t += WIDTH
    else:
        while t + WIDTH <= size:
            v = lanes_at(x, i + t * step, step, like)
            put(y, j + t * ystep, ystep, aa * (v - mm) + bb, like)
            t += WIDTH
    while t < size:
        store1(y, j + t * ystep, a * (load1(x, i + t * step, like) - m) + b, like)
        t += 1


@compiled
def channel_output(x, ox, y, oy, like, rows, first, last, c, vectors, streaming):
    """Y of segments of a channel."""
    m, a, b = vectors[0, c], vectors[1, c], vectors[2, c]
    inner = rows.shape[1] - 1
    length, step, ystep = rows[0, inner], rows[1, inner], rows[2, inner]
    per = (length + SEGMENT - 1) // SEGMENT
    for segment in range(first, last):
        row = segment // per
        start = (segment - row * per) * SEGMENT
        i = ox + place(rows, 1, inner, row) + start * step
        j = oy + place(rows, 2, inner, row) + start * ystep
        size = min(SEGMENT, length - start)
        run_output(x, i, step, y, j, ystep, like, size, m, a, b, streaming)


@compiled
def tile_channel_moments(x, ox, like, w, ow, wlike, rows, first, last, c, out):
    """Σw, Σw·d and Σw·d² of segments of a channel, to rows 0 to 2 of out; its row 3 has the pivot."""
    n, s, q = channel_moments(x, ox, like, w, ow, wlike, rows, first, last, out[3, c])
    out[0, c], out[1, c], out[2, c] = n, s, q


@entrance
def planes_moments(counter, me, grid, x, w, like, wlike, rows, chan, parts, given):
    """Σw, Σw·d and Σw·d² of each tile; pivots, row 3, are worked out unless they are given."""
    kept = chan.shape[1]
    ring_bells(counter, me)
    tiles = tile_count(grid)
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        block, first, last, c0, c1 = tile_bounds(tile, grid)
        out = parts[block]
        for c in range(c0, c1):
            ox = place(chan, 1, kept, c)
            ow = place(chan, 3, kept, c) if wlike is not None else 0
            if not given:  # the same in each tile, so that none has to wait for another
                out[3, c] = channel_pivot(x, ox, like, w, ow, wlike, rows)
            tile_channel_moments(x, ox, like, w, ow, wlike, rows, first, last, c, out)


@entrance
def planes_output(counter, me, grid, x, y, like, rows, chan, vectors, streaming):
    """Y = a·(x - m) + b of each tile; m, a and b are the rows of `vectors`."""
    kept = chan.shape[1]
    ring_bells(counter, me)
    tiles = tile_count(grid)
    while True:
        tile = next_tile(counter, me, tiles, True)
        if tile < 0:
            return
        _, first, last, c0, c1 = tile_bounds(tile, grid)
        for c in range(c0, c1):
            ox, oy = place(chan, 1, kept, c), place(chan, 2, kept, c)
            channel_output(x, ox, y, oy, like, rows, first, last, c, vectors, streaming)


@entrance
def planes_forward(
    counter, me, grid, x, y, w, like, wlike, rows, chan, gamma, beta, eps, stats, vectors, streaming
):
    """Statistics and output of each tile of whole channels, a channel at a time."""
    kept = chan.shape[1]
    ring_bells(counter, me)
    tiles = tile_count(grid)
    out = np.empty((4, grid[2]))
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        _, first, last, c0, c1 = tile_bounds(tile, grid)
        for c in range(c0, c1):
            ox, oy = place(chan, 1, kept, c), place(chan, 2, kept, c)
            ow = place(chan, 3, kept, c) if wlike is not None else 0
            out[3, c] = channel_pivot(x, ox, like, w, ow, wlike, rows)
            for _ in range(2):  # a second time where the pivot was too far from the mean
                tile_channel_moments(x, ox, like, w, ow, wlike, rows, first, last, c, out)
                if finish_moments(out, c, stats, like):
                    break
            vectors[0, c], vectors[1, c], vectors[2, c] = forward_terms(stats, c, gamma, beta, eps, like)
            channel_output(x, ox, y, oy, like, rows, first, last, c, vectors, streaming)


@compiled
def run_grad_sums(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, size, m):
    """Σdy and Σdy·(x - m) of a run."""
    mm = splat(np.float64(m))
    s = q = splat(0.0)
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        g = wide(lanes_at(dy, h + t * hstep, hstep, like))
        d = wide(lanes_at(x, i + t * step, step, like)) - mm
        if wlike is not None:  # a value without weight and without gradient may be NaN
            v = wide(lanes_at(w, j + t * wstep, wstep, wlike))
            d = either(v, g, d)
        s, q = s + g, q + g * d
    s1, q1 = total(s), total(q)
    for t in range(whole, size):
        g1 = wide(load1(dy, h + t * hstep, like))
        d1 = wide(load1(x, i + t * step, like)) - np.float64(m)
        if wlike is not None:
            d1 = either(wide(load1(w, j + t * wstep, wlike)), g1, d1)
        s1, q1 = s1 + g1, q1 + g1 * d1
    return s1, q1


@compiled
def channel_grad_sums(dy, og, x, ox, like, w, ow, wlike, rows, first, last, m):
    """Σdy and Σdy·(x - m) of segments of a channel."""
    inner = rows.shape[1] - 1
    length, hstep, step, wstep = rows[0, inner], rows[1, inner], rows[2, inner], rows[4, inner]
    per = (length + SEGMENT - 1) // SEGMENT
    s = s_lo = q = q_lo = 0.0
    for segment in range(first, last):
        row = segment // per
        start = (segment - row * per) * SEGMENT
        h = og + place(rows, 1, inner, row) + start * hstep
        i = ox + place(rows, 2, inner, row) + start * step
        j = ow + (place(rows, 4, inner, row) + start * wstep if wlike is not None else 0)
        size = min(SEGMENT, length - start)
        ds, dq = run_grad_sums(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, size, m)
        s, s_lo = two_sum(s, s_lo, ds)
        q, q_lo = two_sum(q, q_lo, dq)
    return s + s_lo, q + q_lo


@compiled
def run_grad_input(
    dy, h, hstep, x, i, step, dx, k, kstep, like, w, j, wstep, wlike, size, m, a, b, c, streaming
):
    """Dx = a·(dy + w·(b·(x - m) + c)) along a run."""
    mm, aa, bb, cc = splat(m), splat(a), splat(b), splat(c)
    boundary, bytes_each = streaming_size(like)
    past = streaming and kstep == 1
    t = 0
    while t < size:
        aligned = not past or (dx + (k + t) * bytes_each) % boundary == 0
        if aligned and t + WIDTH <= size:
            g = lanes_at(dy, h + t * hstep, hstep, like)
            d = bb * (lanes_at(x, i + t * step, step, like) - mm) + cc
            if wlike is not None:
                v = lanes_at(w, j + t * wstep, wstep, wlike)
                d = only(v, as_dtype_of(v, d) * d)
            if past:
                stream(dx, k + t, aa * (g + d), like)
            else:
                put(dx, k + t * kstep, kstep, aa * (g + d), like)
            t += WIDTH
        else:
            d1 = b * (load1(x, i + t * step, like) - m) + c
            if wlike is not None:
                v1 = load1(w, j + t * wstep, wlike)
                d1 = only(v1, as_dtype_of(v1, d1) * d1)
            store1(dx, k + t * kstep, a * (load1(dy, h + t * hstep, like) + d1), like)
            t += 1


@compiled
def channel_grad_input(
    dy, og, x, ox, dx, oo, like, w, ow, wlike, rows, first, last, c, vectors, streaming
):
    """Dx of segments of a channel."""
    m, a, b, shift = vectors[0, c], vectors[1, c], vectors[2, c], vectors[3, c]
    inner = rows.shape[1] - 1
    length, hstep, step = rows[0, inner], rows[1, inner], rows[2, inner]
    kstep, wstep = rows[3, inner], rows[4, inner]
    per = (length + SEGMENT - 1) // SEGMENT
    for segment in range(first, last):
        row = segment // per
        start = (segment - row * per) * SEGMENT
        h = og + place(rows, 1, inner, row) + start * hstep
        i = ox + place(rows, 2, inner, row) + start * step
        k = oo + place(rows, 3, inner, row) + start * kstep
        j = ow + (place(rows, 4, inner, row) + start * wstep if wlike is not None else 0)
        size = min(SEGMENT, length - start)
        run_grad_input(
            dy,
            h,
            hstep,
            x,
            i,
            step,
            dx,
            k,
            kstep,
            like,
            w,
            j,
            wstep,
            wlike,
            size,
            m,
            a,
            b,
            shift,
            streaming,
        )


@entrance
def planes_grad_sums(counter, me, grid, dy, x, w, like, wlike, rows, chan, vectors, parts):
    """Σdy and Σdy·(x - m) of each tile; m is row 0 of `vectors`."""
    kept = chan.shape[1]
    ring_bells(counter, me)
    tiles = tile_count(grid)
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        block, first, last, c0, c1 = tile_bounds(tile, grid)
        out = parts[block]
        for c in range(c0, c1):
            og, ox = place(chan, 1, kept, c), place(chan, 2, kept, c)
            ow = place(chan, 4, kept, c) if wlike is not None else 0
            out[0, c], out[1, c] = channel_grad_sums(
                dy, og, x, ox, like, w, ow, wlike, rows, first, last, vectors[0, c]
            )


@entrance
def planes_grad_input(counter, me, grid, dy, x, dx, w, like, wlike, rows, chan, vectors, streaming):
    """Dx = a·(dy + w·(b·(x - m) + c)) of each tile; m, a, b and c are the rows of `vectors`."""
    kept = chan.shape[1]
    ring_bells(counter, me)
    tiles = tile_count(grid)
    while True:
        tile = next_tile(counter, me, tiles, True)
        if tile < 0:
            return
        _, first, last, c0, c1 = tile_bounds(tile, grid)
        for c in range(c0, c1):
            og, ox, oo = place(chan, 1, kept, c), place(chan, 2, kept, c), place(chan, 3, kept, c)
            ow = place(chan, 4, kept, c) if wlike is not None else 0
            channel_grad_input(
                dy, og, x, ox, dx, oo, like, w, ow, wlike, rows, first, last, c, vectors, streaming
            )


@entrance
def planes_backward(
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
    """Gradients of each tile of whole channels, a channel at a time."""
    kept = chan.shape[1]
    ring_bells(counter, me)
    tiles = tile_count(grid)
    out = np.empty((2, grid[2]))
    while True:
        tile = next_tile(counter, me, tiles, False)
        if tile < 0:
            return
        _, first, last, c0, c1 = tile_bounds(tile, grid)
        for c in range(c0, c1):
            og, ox, oo = place(chan, 1, kept, c), place(chan, 2, kept, c), place(chan, 3, kept, c)
            ow = place(chan, 4, kept, c) if wlike is not None else 0
            vectors[0, c] = narrow(stats[1, c], like)
            out[0, c], out[1, c] = channel_grad_sums(
                dy, og, x, ox, like, w, ow, wlike, rows, first, last, vectors[0, c]
            )
            vectors[1, c], vectors[2, c], vectors[3, c] = backward_terms(
                stats, c, gamma, eps, out, grads, like
            )
            channel_grad_input(
                dy, og, x, ox, dx, oo, like, w, ow, wlike, rows, first, last, c, vectors, streaming
            )
