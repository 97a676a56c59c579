"""Compiled loops over columns, backward: see `columns`, whose traversal this shares."""

from __future__ import annotations

from batchnorm.backends.compiled.arithmetic import grad_input_of, grad_sums_of, until_aligned
from batchnorm.backends.compiled.columns import (
    BATCH,
    carry,
    cleared,
    folded,
    four_places,
    scratch_of,
    spread,
)
from batchnorm.backends.compiled.lanes import WIDTH, load, narrow, store, stream, wide
from batchnorm.backends.compiled.terms import (
    COPIES,
    F64,
    FIRST,
    PARTS,
    SECOND,
    STATS,
    STREAMING,
    THIRD,
    WEIGHTS,
    axes_of,
    backward_terms,
    centres,
    compiled,
    doubles,
    item,
    next_tile,
    place,
    row_of,
    tile_bounds,
    vectors_of,
)

# fmt: off


@compiled
def add_four_grad_sums(dy, h, x, i, like, m, s, q, t, count):
    """Add dy and dy·(x - m) of four rows to the sums of sixteen columns."""
    k = wide(load(m, t, count, narrow(0.0, like)))
    g0, p0 = grad_sums_of(dy, h[0] + t, 1, x, i[0] + t, 1, like, 0, 0, 0, None, count, k)
    g1, p1 = grad_sums_of(dy, h[1] + t, 1, x, i[1] + t, 1, like, 0, 0, 0, None, count, k)
    g2, p2 = grad_sums_of(dy, h[2] + t, 1, x, i[2] + t, 1, like, 0, 0, 0, None, count, k)
    g3, p3 = grad_sums_of(dy, h[3] + t, 1, x, i[3] + t, 1, like, 0, 0, 0, None, count, k)
    store(s, t, load(s, t, None, F64) + ((g0 + g1) + (g2 + g3)), None, F64)
    store(q, t, load(q, t, None, F64) + ((p0 + p1) + (p2 + p3)), None, F64)


@compiled
def four_rows_grad_sums(dy, h, x, i, like, m, s, q, size):
    """The same for all columns."""
    whole = size // WIDTH * WIDTH
    for t in range(0, whole, WIDTH):
        add_four_grad_sums(dy, h, x, i, like, m, s, q, t, None)
    if whole < size:
        add_four_grad_sums(dy, h, x, i, like, m, s, q, whole, size - whole)


@compiled
def row_grad_sums(dy, h, x, i, like, w, j, wstep, wlike, m, s, q, size):
    """Add dy and dy·(x - m) of one row to the sums of its columns."""
    for t in range(0, size, WIDTH):
        count = min(WIDTH, size - t)
        k = wide(load(m, t, count, narrow(0.0, like)))
        at_w = j + t * wstep
        g, gd = grad_sums_of(dy, h + t, 1, x, i + t, 1, like, w, at_w, wstep, wlike, count, k)
        store(s, t, load(s, t, None, F64) + g, None, F64)
        store(q, t, load(q, t, None, F64) + gd, None, F64)


@compiled
def tile_grad_sums(
    dy, og, x, ox, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, vectors, room, sums, out
):
    """Σdy and Σdy·(x - m) of a tile's channels, to the rows of out; m is row 0 of `vectors`."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length * copies
    m, _ = spread(vectors, 0, 1, c0, c1, length, copies, room)
    # Sums of dy and of dy·(x - m), each: of a batch, and of the tile in two parts.
    cleared(sums, size)
    s, q = row_of(sums, 0, 0), row_of(sums, 1, 0)
    for batch in range(r0, r1, BATCH):
        r, last = batch, min(r1, batch + BATCH)
        if wlike is None:
            while r + 4 <= last:
                h, i = four_places(rows, 1, r, last, og), four_places(rows, 2, r, last, ox)
                four_rows_grad_sums(dy, h, x, i, like, m, s, q, size)
                r += 4
        while r < last:
            h1, i1 = og + place(rows, 1, inner, r), ox + place(rows, 2, inner, r)
            j = ow + place(rows, 4, inner, r) if wlike is not None else 0
            row_grad_sums(dy, h1, x, i1, like, w, j, wstep, wlike, m, s, q, size)
            r += 1
        for k in range(2):
            carry(sums, k, 2 + k, 4 + k, size)
    for k in range(2):
        folded(sums, 2 + k, 4 + k, c0, c1, length, copies, out, k)


def columns_grad_sums(like, wlike):
    """Σdy and Σdy·(x - m) of each tile; m is row 0 of the job's vectors."""

    def loop(job, me):
        rows, chan = axes_of(job)
        copies = item(job, COPIES)
        dy, x, w = item(job, FIRST), item(job, SECOND), item(job, WEIGHTS)
        wstep, vectors = chan[4, 0] if wlike is not None else 0, vectors_of(job, like)
        sums, room = scratch_of(job, me, rows, like)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            block, r0, r1, c0, c1 = tile_bounds(job, tile)
            og, ox, ow, out = c0 * chan[1, 0], c0 * chan[2, 0], c0 * wstep, doubles(job, PARTS, 2, block)
            tile_grad_sums(
                dy, og, x, ox, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, vectors, room,
                sums, out,
            )

    return loop


@compiled
def lanes_grad_input(dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t, count):
    """Dx = a·(dy + w·(b·(x - m) + c)) of sixteen columns of a row."""
    zero, at_w = narrow(0.0, like), j + t * wstep
    mm, aa = load(m, t, count, zero), load(a, t, count, zero)
    bb, cc = load(b, t, count, zero), load(shift, t, count, zero)
    return grad_input_of(dy, h + t, 1, x, i + t, 1, like, w, at_w, wstep, wlike, count, mm, aa, bb, cc)


@compiled
def row_grad_input(dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, size, streaming):
    """The same for all columns."""
    t = 0
    if streaming:
        t = until_aligned(dx, k, size, like)
        if t > 0:
            value = lanes_grad_input(
                dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t - t, t)
            store(dx, k, value, t, like)
        while t + WIDTH <= size:
            value = lanes_grad_input(
                dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t, None)
            stream(dx, k + t, value, like)
            t += WIDTH
    while t + WIDTH <= size:
        value = lanes_grad_input(
            dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t, None)
        store(dx, k + t, value, None, like)
        t += WIDTH
    if t < size:
        value = lanes_grad_input(
            dy, h, x, i, like, w, j, wstep, wlike, m, a, b, shift, t, size - t)
        store(dx, k + t, value, size - t, like)


@compiled
def tile_grad_input(
    dy, og, x, ox, dx, oo, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, vectors, room,
    streaming,
):
    """Dx of a tile."""
    inner = rows.shape[1] - 1
    length = rows[0, inner]
    size = (c1 - c0) * length * copies
    m, next_row = spread(vectors, 0, 4, c0, c1, length, copies, room)
    a, b, shift = m + next_row, m + 2 * next_row, m + 3 * next_row
    for r in range(r0, r1):
        h, i = og + place(rows, 1, inner, r), ox + place(rows, 2, inner, r)
        k = oo + place(rows, 3, inner, r)
        j = ow + place(rows, 4, inner, r) if wlike is not None else 0
        row_grad_input(dy, h, x, i, dx, k, like, w, j, wstep, wlike, m, a, b, shift, size, streaming)


def columns_grad_input(like, wlike):
    """Dx = a·(dy + w·(b·(x - m) + c)) of each tile, from the rows of the job's vectors."""

    def loop(job, me):
        rows, chan = axes_of(job)
        copies = item(job, COPIES)
        dy, x, dx, w = item(job, FIRST), item(job, SECOND), item(job, THIRD), item(job, WEIGHTS)
        wstep, vectors = chan[4, 0] if wlike is not None else 0, vectors_of(job, like)
        streaming = item(job, STREAMING) != 0
        _, room = scratch_of(job, me, rows, like)
        while True:
            tile = next_tile(job, me, True)
            if tile < 0:
                return
            _, r0, r1, c0, c1 = tile_bounds(job, tile)
            og, ox, oo, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * chan[3, 0], c0 * wstep
            tile_grad_input(
                dy, og, x, ox, dx, oo, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, vectors,
                room, streaming,
            )

    return loop


def columns_backward(like, wlike):
    """Gradients of each tile of whole channels."""

    def loop(job, me):
        rows, chan = axes_of(job)
        copies = item(job, COPIES)
        dy, x, dx, w = item(job, FIRST), item(job, SECOND), item(job, THIRD), item(job, WEIGHTS)
        wstep, vectors = chan[4, 0] if wlike is not None else 0, vectors_of(job, like)
        stats, out = doubles(job, STATS, 4, 0), doubles(job, PARTS, 2, 0)
        streaming = item(job, STREAMING) != 0
        sums, room = scratch_of(job, me, rows, like)
        while True:
            tile = next_tile(job, me, False)
            if tile < 0:
                return
            _, r0, r1, c0, c1 = tile_bounds(job, tile)
            og, ox, oo, ow = c0 * chan[1, 0], c0 * chan[2, 0], c0 * chan[3, 0], c0 * wstep
            centres(stats, c0, c1, vectors, like)
            tile_grad_sums(
                dy, og, x, ox, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, vectors, room,
                sums, out,
            )
            backward_terms(job, stats, c0, c1, out, vectors, like)
            tile_grad_input(
                dy, og, x, ox, dx, oo, like, w, ow, wstep, wlike, rows, copies, r0, r1, c0, c1, vectors,
                room, streaming,
            )

    return loop
