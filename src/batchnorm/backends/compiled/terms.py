"""What all compiled loops share: jobs, where an axis leads, tiles, and the arithmetic of channels.

A pass over arrays is cut into tiles, each a block of the reduced axes by a block of channels; threads
take tiles, of their own share first, until none is left. What a tile computes depends on its number
alone, so that results are the same to the bit for any number of threads.

`rows` and `chan` describe the axes: row 0 their lengths, row 1 + k the steps of operand k, counted in
values. The last column of `rows` is the inner axis, along a run. Operands are in the order of the
arguments (x, y, w or dy, x, dx, w).
"""

from __future__ import annotations

import os

import numpy as np
from numba import njit

from batchnorm.backends.compiled.atomic import fetch_add, peek
from batchnorm.backends.compiled.lanes import (
    WIDTH,
    above_zero,
    any_above_zero,
    gather,
    load,
    narrow,
    root,
    rounded,
    scatter,
    splat,
    store,
    wide,
)
from batchnorm.backends.compiled.tables import item, real_item, row_of, set_item, table

# Values that are added before their sum joins the next level: bounds the error of a sum.
SEGMENT = 1024
# Values that a pivot is the mean of. It only has to be within a standard deviation of the mean.
SAMPLE = 64

OPTIONS = {
    "nogil": True,
    "error_model": "numpy",  # 1/0 is infinity
    "fastmath": {"contract"},
    "cache": os.environ.get("BATCHNORM_CACHE_COMPILED", "0") == "1",
}
# What only other loops call: without an entrance from Python it compiles faster.
compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
# What is too small to be compiled on its own.
inlined = njit(inline="always", no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)

F32, F64, INT = np.float32(0), np.float64(0), np.int64(0)

# A job: all that a thread needs to take part in a pass, as a row of numbers of 64 bits. Arrays are
# given by their addresses.
THREADS, REDUCED, BLOCK, CHANNELS, ACROSS = range(5)  # and the sizes of a tile
ROWS, INNER, CHAN, KEPT, OPERANDS = range(5, 10)  # `rows` and `chan`, and how many columns they have
FIRST, SECOND, THIRD, WEIGHTS = range(10, 14)  # operands: x, y or dy, x, dx
GAMMA, GAMMA_KIND, BETA, BETA_KIND, EPS = range(14, 19)
STATS, VECTORS, PARTS, SCRATCH, SCRATCH_BYTES = range(19, 24)
GIVEN, STREAMING, BLOCKS, COPIES, AGAIN = range(24, 29)
TILES = 29  # tiles taken of each thread's share, and what `crew.dispatch` notes for each helper
# Kinds of gamma and beta.
NONE, SINGLE, DOUBLE = range(3)


@compiled
def axes_of(job):
    """`rows` and `chan` of a job."""
    count = item(job, OPERANDS) + 1
    return (
        table(item(job, ROWS), count, item(job, INNER), INT),
        table(item(job, CHAN), count, item(job, KEPT), INT),
    )


@compiled
def doubles(job, place, rows, block):
    """One of a job's tables in float64, or a block of it."""
    channels = item(job, CHANNELS)
    return table(item(job, place) + block * rows * channels * 8, rows, channels, F64)


@compiled
def vectors_of(job, like):
    """The vectors of a job, in the dtype that values are worked on in."""
    return table(item(job, VECTORS), 4, item(job, CHANNELS), narrow(0.0, like))


# Where things are.


@compiled
def place(axes, operand, count, index):
    """Offset of an index over the first `count` axes."""
    offset = 0
    for k in range(count - 1, 0, -1):
        n = axes[0, k]
        up = index // n
        offset += (index - up * n) * axes[operand, k]
        index = up
    return offset + index * axes[operand, 0] if count else offset


@compiled
def lanes_at(address, index, step, count, like):
    """Sixteen values that lie a step apart, or the first of them."""
    if step == 1:
        return load(address, index, count, like)
    return gather(address, index, step, count, like)


@compiled
def put(address, index, step, value, count, like):
    """Write sixteen values that lie a step apart, or the first of them."""
    if step == 1:
        store(address, index, value, count, like)
    else:
        scatter(address, index, step, value, count, like)


@inlined
def two_sum(high, low, term):
    """Add a term to a sum in two parts (Knuth 1969)."""
    s = high + term
    back = s - high
    return s, low + ((high - (s - back)) + (term - back))


# Tiles.


@compiled
def next_tile(job, me, backwards):
    """The next tile for a thread: of its own share, then of another's; -1 when none is left.

    A share is the same from pass to pass and from call to call, so that a thread finds in its cache
    what it left there: a second pass goes through it backwards.
    """
    blocks = (item(job, REDUCED) + item(job, BLOCK) - 1) // item(job, BLOCK)
    tiles = blocks * ((item(job, CHANNELS) + item(job, ACROSS) - 1) // item(job, ACROSS))
    threads = item(job, THREADS)
    for j in range(threads):
        share = (me + j) % threads
        first, end = share * tiles // threads, (share + 1) * tiles // threads
        counter = job + 8 * (TILES + share)
        if peek(counter) < end - first:
            taken = fetch_add(counter)
            if taken < end - first:
                return end - 1 - taken if backwards else first + taken
    return -1


@compiled
def tile_bounds(job, tile):
    """First and last of the reduced blocks and channels of a tile."""
    channels, wide = item(job, CHANNELS), item(job, ACROSS)
    across = (channels + wide - 1) // wide
    block = tile // across
    c0, r0 = (tile - block * across) * wide, block * item(job, BLOCK)
    return (
        block,
        r0,
        min(item(job, REDUCED), r0 + item(job, BLOCK)),
        c0,
        min(channels, c0 + wide),
    )


# From sums to vectors, sixteen channels at a time.


@compiled
def finish_moments(sums, c0, c1, stats, like):
    """Write count, mean, variance and mean_lo of channels from their n, Σd, Σd² and pivots.

    With d = mean - pivot, var = q/n - d²: where d is below a standard deviation, next to nothing
    cancels. Where it is not, the mean is left as a better pivot for another try, and False returned.
    """
    near, zero, one = True, splat(0.0), splat(1.0)
    for c in range(c0, c1, WIDTH):
        count = min(WIDTH, c1 - c)
        n, pivot = load(row_of(sums, 0, c), 0, count, F64), load(row_of(sums, 3, c), 0, count, F64)
        some = above_zero(n, n, one)
        d = load(row_of(sums, 1, c), 0, count, F64) / some
        var = load(row_of(sums, 2, c), 0, count, F64) / some - d * d
        mean = pivot + d
        back = mean - pivot
        store(row_of(stats, 0, c), 0, n, count, F64)
        store(row_of(stats, 1, c), 0, mean, count, F64)
        store(row_of(stats, 2, c), 0, above_zero(zero - var, zero, var), count, F64)  # NaN stays
        store(row_of(stats, 3, c), 0, (pivot - (mean - back)) + (d - back), count, F64)
        store(row_of(sums, 3, c), 0, rounded(mean, like), count, F64)
        if any_above_zero(d * d - var):
            near = False
    return near


@compiled
def parameter(job, which, default, c, count):
    """Gamma or beta of channels, in float64. `which` is no literal: those are compiled one by one."""
    kind = item(job, which + 1)
    if kind == DOUBLE:
        return load(item(job, which), c, count, F64)
    if kind == SINGLE:
        return wide(load(item(job, which), c, count, F32))
    return splat(default)


@compiled
def forward_terms(job, stats, c0, c1, vectors, like):
    """m, a and b of y = a·(x - m) + b, to rows 0 to 2 of `vectors`."""
    zero = narrow(0.0, like)
    for c in range(c0, c1, WIDTH):
        count = min(WIDTH, c1 - c)
        mean = load(row_of(stats, 1, c), 0, count, F64)
        m = narrow(mean, like)
        a = parameter(job, INT + GAMMA, 1.0, c, count) / root(
            load(row_of(stats, 2, c), 0, count, F64) + splat(real_item(job, EPS))
        )
        rest = (mean - wide(m)) + load(row_of(stats, 3, c), 0, count, F64)
        b = parameter(job, INT + BETA, 0.0, c, count) - a * rest
        store(row_of(vectors, 0, c), 0, m, count, zero)
        store(row_of(vectors, 1, c), 0, narrow(a, like), count, zero)
        store(row_of(vectors, 2, c), 0, narrow(b, like), count, zero)


@compiled
def centres(stats, c0, c1, vectors, like):
    """The means as the data's dtype rounds them, to row 0 of `vectors`."""
    for c in range(c0, c1):
        vectors[0, c] = narrow(stats[1, c], like)


@compiled
def backward_terms(job, stats, c0, c1, sums, vectors, like):
    """a, b and c of dx = a·(dy + w·(b·(x - m) + c)), to rows 1 to 3 of `vectors`.

    `sums` has Σdy and Σdy·(x - m), and then dgamma and dbeta.
    """
    zero, zeros, one = narrow(0.0, like), splat(0.0), splat(1.0)
    for c in range(c0, c1, WIDTH):
        count = min(WIDTH, c1 - c)
        n, mean = load(row_of(stats, 0, c), 0, count, F64), load(row_of(stats, 1, c), 0, count, F64)
        sum_dy = load(row_of(sums, 0, c), 0, count, F64)
        some = above_zero(n, n, one)
        rest = (mean - wide(narrow(mean, like))) + load(row_of(stats, 3, c), 0, count, F64)
        rstd = one / root(load(row_of(stats, 2, c), 0, count, F64) + splat(real_item(job, EPS)))
        dgamma = rstd * (load(row_of(sums, 1, c), 0, count, F64) - rest * sum_dy)
        b = (zeros - rstd) * (dgamma / some)
        shift = (zeros - sum_dy) / some - b * rest
        store(row_of(sums, 0, c), 0, dgamma, count, F64)
        store(row_of(sums, 1, c), 0, sum_dy, count, F64)
        a = rstd * parameter(job, INT + GAMMA, 1.0, c, count)
        store(row_of(vectors, 1, c), 0, narrow(a, like), count, zero)
        store(row_of(vectors, 2, c), 0, narrow(b, like), count, zero)
        store(row_of(vectors, 3, c), 0, narrow(shift, like), count, zero)


# The same for all channels, between two passes over the tiles: jobs for one thread.


@compiled
def added(job, rows, count):
    """The sums of all blocks, in the place of the first block's."""
    first = doubles(job, PARTS, rows, 0)
    for block in range(1, item(job, BLOCKS)):
        part = doubles(job, PARTS, rows, block)
        for k in range(count):
            for c in range(0, first.shape[1], WIDTH):
                some = min(WIDTH, first.shape[1] - c)
                s = load(row_of(first, k, c), 0, some, F64) + load(row_of(part, k, c), 0, some, F64)
                store(row_of(first, k, c), 0, s, some, F64)
    return first


def join_moments(like, wlike):
    """Moments from the sums of all blocks, and the vectors of an output pass.

    Or AGAIN, where better pivots were left for another try.
    """

    def loop(job, me):
        sums, stats = added(job, 4, 3), doubles(job, STATS, 4, 0)
        channels = item(job, CHANNELS)
        near = finish_moments(sums, 0, channels, stats, like)
        set_item(job, AGAIN, 0 if near else 1)
        forward_terms(job, stats, 0, channels, vectors_of(job, like), like)
        if not near:
            for block in range(1, item(job, BLOCKS)):
                part = doubles(job, PARTS, 4, block)
                for c in range(channels):
                    part[3, c] = sums[3, c]

    return loop


def join_forward(like, wlike):
    """The vectors of an output pass from moments."""

    def loop(job, me):
        stats, vectors = doubles(job, STATS, 4, 0), vectors_of(job, like)
        forward_terms(job, stats, 0, item(job, CHANNELS), vectors, like)

    return loop


def join_centres(like, wlike):
    """The vector that gradients' sums need."""

    def loop(job, me):
        centres(doubles(job, STATS, 4, 0), 0, item(job, CHANNELS), vectors_of(job, like), like)

    return loop


def join_sums(like, wlike):
    """Sums of all blocks."""

    def loop(job, me):
        added(job, 2, 2)

    return loop


def join_backward(like, wlike):
    """The vectors of a pass for dx, and dgamma and dbeta."""

    def loop(job, me):
        sums, stats = added(job, 2, 2), doubles(job, STATS, 4, 0)
        backward_terms(job, stats, 0, item(job, CHANNELS), sums, vectors_of(job, like), like)

    return loop
