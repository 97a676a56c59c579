"""Compiled loops over planes: channels second or first, where one channel lies in long runs."""

from __future__ import annotations

import numpy as np

from batchnorm.backends.compiled.arithmetic import (
    grad_input_of,
    grad_sums_of,
    moments_of,
    output_of,
    until_aligned,
)
from batchnorm.backends.compiled.lanes import WIDTH, rounded, splat, stream, total
from batchnorm.backends.compiled.terms import (
    FIRST,
    GIVEN,
    PARTS,
    SAMPLE,
    SECOND,
    SEGMENT,
    STATS,
    STREAMING,
    THIRD,
    WEIGHTS,
    axes_of,
    backward_terms,
    centres,
    compiled,
    doubles,
    finish_moments,
    forward_terms,
    item,
    next_tile,
    place,
    put,
    tile_bounds,
    two_sum,
    vectors_of,
)


@compiled
def segments_of(rows):
    """Segments of a run."""
    return (rows[0, rows.shape[1] - 1] + SEGMENT - 1) // SEGMENT


@compiled
def segment_at(rows, operand, origin, row, start):
    """Where a segment of a run begins, and the step from value to value."""
    inner = rows.shape[1] - 1
    step = rows[operand, inner]
    return origin + place(rows, operand, inner, row) + start * step, step


# Moments.


@compiled
def run_moments(x, i, step, like, w, j, wstep, wlike, size, k):
    """Σw (where there are weights), Σw·d and Σw·d² of a run, with d = x - k, lane by lane."""
    n = s = q = r = p = splat(0.0)
    t = 0
    if wlike is None:
        while t + 2 * WIDTH <= size:  # two at a time: sums half as deep
            _, d, dd = moments_of(x, i + t * step, step, like, w, j, wstep, wlike, None, k)
            t += WIDTH
            _, e, ee = moments_of(x, i + t * step, step, like, w, j, wstep, wlike, None, k)
            t += WIDTH
            s, r, q, p = s + d, r + e, q + dd, p + ee
        s, q = s + r, q + p
    while t + WIDTH <= size:
        v, vd, vdd = moments_of(x, i + t * step, step, like, w, j + t * wstep, wstep, wlike, None, k)
        n, s, q = n + v, s + vd, q + vdd
        t += WIDTH
    if t < size:
        rest = size - t
        v, vd, vdd = moments_of(x, i + t * step, step, like, w, j + t * wstep, wstep, wlike, rest, k)
        n, s, q = n + v, s + vd, q + vdd
    return n, s, q


@compiled
def channel_pivot(x, ox, like, w, ow, wlike, rows):
    """The mean of the first values of a channel, as the data's dtype rounds it."""
    inner = rows.shape[1] - 1
    size = min(SAMPLE, rows[0, inner])
    step, wstep = rows[1, inner], (rows[3, inner] if wlike is not None else 0)
    n, s, _ = run_moments(x, ox, step, like, w, ow, wstep, wlike, size, splat(0.0))
    some = np.float64(size) if wlike is None else total(n)
    return rounded(total(s) / some if some > 0 else 0.0, like)


@compiled
def channel_moments(x, ox, like, w, ow, wlike, rows, first, last, c, out):
    """Σw, Σw·d and Σw·d² of segments of a channel, to rows 0 to 2 of out; its row 3 has the pivot."""
    length, per, k = rows[0, rows.shape[1] - 1], segments_of(rows), splat(out[3, c])
    n = n_lo = s = s_lo = q = q_lo = splat(0.0)
    values = 0
    for segment in range(first, last):
        row = segment // per
        start = (segment - row * per) * SEGMENT
        size = min(SEGMENT, length - start)
        i, step = segment_at(rows, 1, ox, row, start)
        j, wstep = segment_at(rows, 3, ow, row, start) if wlike is not None else (0, 0)
        dn, ds, dq = run_moments(x, i, step, like, w, j, wstep, wlike, size, k)
        if wlike is not None:
            n, n_lo = two_sum(n, n_lo, dn)
        s, s_lo = two_sum(s, s_lo, ds)
        q, q_lo = two_sum(q, q_lo, dq)
        values += size
    out[0, c] = np.float64(values) if wlike is None else total(n) + total(n_lo)
    out[1, c] = total(s) + total(s_lo)
    out[2, c] = total(q) + total(q_lo)


def planes_moments(like, wlike):
    """Σw, Σw·d and Σw·d² of each tile; pivots, row 3, are worked out unless they are given."""

    def loop(job, me):
        rows, chan = axes_of(job)
        kept, x, w = chan.shape[1], item(job, FIRST), item(job, WEIGHTS)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            block, first, last, c0, c1 = tile_bounds(job, tile)
            out = doubles(job, PARTS, 4, block)
            for c in range(c0, c1):
                ox = place(chan, 1, kept, c)
                ow = place(chan, 3, kept, c) if wlike is not None else 0
                if not item(job, GIVEN):  # the same in each tile, so that none has to wait for another
                    out[3, c] = channel_pivot(x, ox, like, w, ow, wlike, rows)
                channel_moments(x, ox, like, w, ow, wlike, rows, first, last, c, out)

    return loop


# Output.


@compiled
def run_output(x, i, step, y, j, ystep, like, size, m, a, b, streaming):
    """Y = a·(x - m) + b along a run."""
    t = 0
    if streaming and ystep == 1:
        t = until_aligned(y, j, size, like)
        if t > 0:
            put(y, j, ystep, output_of(x, i, step, like, t, m, a, b), t, like)
        while t + WIDTH <= size:
            stream(y, j + t, output_of(x, i + t * step, step, like, None, m, a, b), like)
            t += WIDTH
    while t + WIDTH <= size:
        value = output_of(x, i + t * step, step, like, None, m, a, b)
        put(y, j + t * ystep, ystep, value, None, like)
        t += WIDTH
    if t < size:
        value = output_of(x, i + t * step, step, like, size - t, m, a, b)
        put(y, j + t * ystep, ystep, value, size - t, like)


@compiled
def part_output(x, y, like, rows, chan, first, last, c0, c1, vectors, streaming):
    """Y of segments of some channels, in the order in which they usually lie in memory."""
    length, per, kept = rows[0, rows.shape[1] - 1], segments_of(rows), chan.shape[1]
    while first < last:
        row = first // per
        end = min(last, (row + 1) * per)
        start = (first - row * per) * SEGMENT
        size = min(length, (end - row * per) * SEGMENT) - start
        i, step = segment_at(rows, 1, 0, row, start)
        j, ystep = segment_at(rows, 2, 0, row, start)
        for c in range(c0, c1):
            m, a, b = splat(vectors[0, c]), splat(vectors[1, c]), splat(vectors[2, c])
            ox, oy = i + place(chan, 1, kept, c), j + place(chan, 2, kept, c)
            run_output(x, ox, step, y, oy, ystep, like, size, m, a, b, streaming)
        first = end


def planes_output(like, wlike):
    """Y = a·(x - m) + b of each tile; m, a and b are the rows of the job's vectors."""

    def loop(job, me):
        rows, chan = axes_of(job)
        x, y = item(job, FIRST), item(job, SECOND)
        vectors, streaming = vectors_of(job, like), item(job, STREAMING) != 0
        while True:
            tile = next_tile(job, me, True)
            if tile < 0:
                return
            _, first, last, c0, c1 = tile_bounds(job, tile)
            part_output(x, y, like, rows, chan, first, last, c0, c1, vectors, streaming)

    return loop


def planes_forward(like, wlike):
    """Statistics and output of each tile of whole channels, a channel at a time."""

    def loop(job, me):
        rows, chan = axes_of(job)
        kept, x, y, w = chan.shape[1], item(job, FIRST), item(job, SECOND), item(job, WEIGHTS)
        vectors, streaming = vectors_of(job, like), item(job, STREAMING) != 0
        stats, out = doubles(job, STATS, 4, 0), doubles(job, PARTS, 4, 0)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            _, first, last, c0, c1 = tile_bounds(job, tile)
            for c in range(c0, c1):
                ox = place(chan, 1, kept, c)
                ow = place(chan, 3, kept, c) if wlike is not None else 0
                out[3, c] = channel_pivot(x, ox, like, w, ow, wlike, rows)
                for _ in range(2):  # a second time where the pivot was too far from the mean
                    channel_moments(x, ox, like, w, ow, wlike, rows, first, last, c, out)
                    if finish_moments(out, c, c + 1, stats, like):
                        break
                forward_terms(job, stats, c, c + 1, vectors, like)
                part_output(x, y, like, rows, chan, first, last, c, c + 1, vectors, streaming)

    return loop


# Gradients.


@compiled
def run_grad_sums(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, size, m):
    """Σdy and Σdy·(x - m) of a run, lane by lane."""
    s = q = splat(0.0)
    t = 0
    while t + WIDTH <= size:
        at_h, at_x, at_w = h + t * hstep, i + t * step, j + t * wstep
        g, gd = grad_sums_of(dy, at_h, hstep, x, at_x, step, like, w, at_w, wstep, wlike, None, m)
        s, q = s + g, q + gd
        t += WIDTH
    if t < size:
        at_h, at_x, at_w = h + t * hstep, i + t * step, j + t * wstep
        g, gd = grad_sums_of(dy, at_h, hstep, x, at_x, step, like, w, at_w, wstep, wlike, size - t, m)
        s, q = s + g, q + gd
    return s, q


@compiled
def channel_grad_sums(dy, og, x, ox, like, w, ow, wlike, rows, first, last, c, m, out):
    """Σdy and Σdy·(x - m) of segments of a channel, to rows 0 and 1 of out."""
    length, per, mm = rows[0, rows.shape[1] - 1], segments_of(rows), splat(np.float64(m))
    s = s_lo = q = q_lo = splat(0.0)
    for segment in range(first, last):
        row = segment // per
        start = (segment - row * per) * SEGMENT
        size = min(SEGMENT, length - start)
        h, hstep = segment_at(rows, 1, og, row, start)
        i, step = segment_at(rows, 2, ox, row, start)
        j, wstep = segment_at(rows, 4, ow, row, start) if wlike is not None else (0, 0)
        ds, dq = run_grad_sums(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, size, mm)
        s, s_lo = two_sum(s, s_lo, ds)
        q, q_lo = two_sum(q, q_lo, dq)
    out[0, c], out[1, c] = total(s) + total(s_lo), total(q) + total(q_lo)


@compiled
def run_grad_input(
    dy, h, hstep, x, i, step, dx, k, kstep, like, w, j, wstep, wlike, size, m, a, b, c, streaming
):
    """Dx = a·(dy + w·(b·(x - m) + c)) along a run."""
    t = 0
    if streaming and kstep == 1:
        t = until_aligned(dx, k, size, like)
        if t > 0:
            value = grad_input_of(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, t, m, a, b, c)
            put(dx, k, kstep, value, t, like)
        while t + WIDTH <= size:
            at_h, at_x, at_w = h + t * hstep, i + t * step, j + t * wstep
            value = grad_input_of(
                dy, at_h, hstep, x, at_x, step, like, w, at_w, wstep, wlike, None, m, a, b, c
            )
            stream(dx, k + t, value, like)
            t += WIDTH
    while t + WIDTH <= size:
        at_h, at_x, at_w = h + t * hstep, i + t * step, j + t * wstep
        value = grad_input_of(
            dy, at_h, hstep, x, at_x, step, like, w, at_w, wstep, wlike, None, m, a, b, c
        )
        put(dx, k + t * kstep, kstep, value, None, like)
        t += WIDTH
    if t < size:
        at_h, at_x, at_w, rest = h + t * hstep, i + t * step, j + t * wstep, size - t
        value = grad_input_of(
            dy, at_h, hstep, x, at_x, step, like, w, at_w, wstep, wlike, rest, m, a, b, c
        )
        put(dx, k + t * kstep, kstep, value, rest, like)


@compiled
def part_grad_input(dy, x, dx, like, w, wlike, rows, chan, first, last, c0, c1, vectors, streaming):
    """Dx of segments of some channels, in the order of `part_output`."""
    length, per, kept = rows[0, rows.shape[1] - 1], segments_of(rows), chan.shape[1]
    while first < last:
        row = first // per
        end = min(last, (row + 1) * per)
        start = (first - row * per) * SEGMENT
        size = min(length, (end - row * per) * SEGMENT) - start
        h, hstep = segment_at(rows, 1, 0, row, start)
        i, step = segment_at(rows, 2, 0, row, start)
        k, kstep = segment_at(rows, 3, 0, row, start)
        j, wstep = segment_at(rows, 4, 0, row, start) if wlike is not None else (0, 0)
        for c in range(c0, c1):
            m, a, b = splat(vectors[0, c]), splat(vectors[1, c]), splat(vectors[2, c])
            shift, ow = splat(vectors[3, c]), 0
            og, ox, oo = place(chan, 1, kept, c), place(chan, 2, kept, c), place(chan, 3, kept, c)
            if wlike is not None:
                ow = place(chan, 4, kept, c)
            # fmt: off
            run_grad_input(
                dy, h + og, hstep, x, i + ox, step, dx, k + oo, kstep, like, w, j + ow, wstep, wlike,
                size, m, a, b, shift, streaming,
            )
            # fmt: on
        first = end


def planes_grad_sums(like, wlike):
    """Σdy and Σdy·(x - m) of each tile; m is row 0 of the job's vectors."""

    def loop(job, me):
        rows, chan = axes_of(job)
        kept, vectors = chan.shape[1], vectors_of(job, like)
        dy, x, w = item(job, FIRST), item(job, SECOND), item(job, WEIGHTS)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            block, first, last, c0, c1 = tile_bounds(job, tile)
            out = doubles(job, PARTS, 2, block)
            for c in range(c0, c1):
                og, ox = place(chan, 1, kept, c), place(chan, 2, kept, c)
                ow = place(chan, 4, kept, c) if wlike is not None else 0
                m = vectors[0, c]
                channel_grad_sums(dy, og, x, ox, like, w, ow, wlike, rows, first, last, c, m, out)

    return loop


def planes_grad_input(like, wlike):
    """Dx = a·(dy + w·(b·(x - m) + c)) of each tile, from the rows of the job's vectors."""

    def loop(job, me):
        rows, chan = axes_of(job)
        vectors, streaming = vectors_of(job, like), item(job, STREAMING) != 0
        dy, x, dx, w = item(job, FIRST), item(job, SECOND), item(job, THIRD), item(job, WEIGHTS)
        while True:
            tile = next_tile(job, me, True)
            if tile < 0:
                return
            _, first, last, c0, c1 = tile_bounds(job, tile)
            part_grad_input(
                dy, x, dx, like, w, wlike, rows, chan, first, last, c0, c1, vectors, streaming
            )

    return loop


def planes_backward(like, wlike):
    """Gradients of each tile of whole channels, a channel at a time."""

    def loop(job, me):
        rows, chan = axes_of(job)
        kept, vectors = chan.shape[1], vectors_of(job, like)
        dy, x, dx, w = item(job, FIRST), item(job, SECOND), item(job, THIRD), item(job, WEIGHTS)
        stats, out = doubles(job, STATS, 4, 0), doubles(job, PARTS, 2, 0)
        streaming = item(job, STREAMING) != 0
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            _, first, last, c0, c1 = tile_bounds(job, tile)
            centres(stats, c0, c1, vectors, like)
            for c in range(c0, c1):
                og, ox = place(chan, 1, kept, c), place(chan, 2, kept, c)
                ow = place(chan, 4, kept, c) if wlike is not None else 0
                m = vectors[0, c]
                channel_grad_sums(dy, og, x, ox, like, w, ow, wlike, rows, first, last, c, m, out)
                backward_terms(job, stats, c, c + 1, out, vectors, like)
                part_grad_input(
                    dy, x, dx, like, w, wlike, rows, chan, first, last, c, c + 1, vectors, streaming
                )

    return loop
