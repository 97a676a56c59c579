"""What all compiled loops share: where an axis leads, tiles, and the arithmetic of one channel.

A tile is a block of the reduced axes by a block of channels; threads take tiles, of their own share
first, until none is left. What a tile computes depends on its number alone, so that results are the
same to the bit for any number of threads.

`rows` and `chan` describe the axes: row 0 their lengths, row 1 + k the steps of operand k, counted in
values. The last column of `rows` is the inner axis, along a run. Operands are in the order of the
arguments (x, y, w or dy, x, dx, w). A `grid` is (size, block) of the reduced axes, then of channels.
"""

from __future__ import annotations

import os

import numpy as np
from numba import njit

from batchnorm.kernels.compiled.lanes import (
    address_of,
    fetch_add,
    gather,
    load,
    narrow,
    peek,
    rounded,
    scatter,
    store,
)

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
# What Python calls, and what only other loops call: without an entrance it compiles faster.
entrance = njit(**OPTIONS)
compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
# What is too small to be compiled on its own.
inlined = njit(inline="always", no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)


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
def lanes_at(address, index, step, like):
    """Sixteen values that lie a step apart."""
    if step == 1:
        return load(address, index, like)
    return gather(address, index, step, like)


@compiled
def put(address, index, step, value, like):
    """Write sixteen values that lie a step apart."""
    if step == 1:
        store(address, index, value, like)
    else:
        scatter(address, index, step, value, like)


@inlined
def two_sum(high, low, term):
    """Add a term to a sum in two parts (Knuth 1969)."""
    s = high + term
    back = s - high
    return s, low + ((high - (s - back)) + (term - back))


# From sums to vectors, one channel at a time.


@compiled
def finish_moments(sums, c, stats, like):
    """Write count, mean, variance and mean_lo of a channel from its n, Σd, Σd² and pivot.

    With d = mean - pivot, var = q/n - d²: where d is below a standard deviation, next to nothing
    cancels. Where it is not, the mean is left as a better pivot for another try, and False returned.
    """
    n, pivot = sums[0, c], sums[3, c]
    some = n if n > 0 else 1.0
    d = sums[1, c] / some
    var = sums[2, c] / some - d * d
    mean = pivot + d
    back = mean - pivot
    stats[0, c] = n
    stats[1, c] = mean
    stats[2, c] = 0.0 if var < 0 else var
    stats[3, c] = (pivot - (mean - back)) + (d - back)
    sums[3, c] = rounded(mean, like)
    return not d * d > var


@compiled
def forward_terms(stats, c, gamma, beta, eps, like):
    """m, a and b of y = a·(x - m) + b."""
    mean = stats[1, c]
    m = narrow(mean, like)
    a = gamma[c] / np.sqrt(stats[2, c] + eps)
    b = beta[c] - a * ((mean - np.float64(m)) + stats[3, c])
    return m, narrow(a, like), narrow(b, like)


@compiled
def backward_terms(stats, c, gamma, eps, sums, grads, like):
    """a, b and c of dx = a·(dy + w·(b·(x - m) + c)) from Σdy and Σdy·(x - m); writes dgamma, dbeta."""
    n, mean, sum_dy = stats[0, c], stats[1, c], sums[0, c]
    some = n if n > 0 else 1.0
    rest = (mean - np.float64(narrow(mean, like))) + stats[3, c]
    rstd = 1.0 / np.sqrt(stats[2, c] + eps)
    dgamma = rstd * (sums[1, c] - rest * sum_dy)
    grads[0, c], grads[1, c] = dgamma, sum_dy
    b = -rstd * (dgamma / some)
    shift = -sum_dy / some - b * rest
    return narrow(rstd * gamma[c], like), narrow(b, like), narrow(shift, like)


# The same for all channels, between two passes over the tiles.


@entrance
def added(parts, count):
    """Add the first rows of all blocks to those of the first block, in their order."""
    for block in range(1, parts.shape[0]):
        for k in range(count):
            for c in range(parts.shape[2]):
                parts[0, k, c] += parts[block, k, c]


@entrance
def all_moments(parts, stats, like):
    """Moments from the sums of all blocks; False leaves better pivots in them for another try."""
    added(parts, 3)
    near = True
    for c in range(parts.shape[2]):
        near &= finish_moments(parts[0], c, stats, like)
    for block in range(1, parts.shape[0]):
        for c in range(parts.shape[2]):
            parts[block, 3, c] = parts[0, 3, c]
    return near


@entrance
def all_centres(stats, vectors, like):
    """The means as the data's dtype rounds them, to row 0 of `vectors`."""
    for c in range(stats.shape[1]):
        vectors[0, c] = narrow(stats[1, c], like)


@entrance
def all_forward_terms(stats, gamma, beta, eps, vectors, like):
    """m, a and b of y = a·(x - m) + b, to the rows of `vectors`."""
    for c in range(stats.shape[1]):
        vectors[0, c], vectors[1, c], vectors[2, c] = forward_terms(stats, c, gamma, beta, eps, like)


@entrance
def all_backward_terms(stats, gamma, eps, sums, grads, vectors, like):
    """a, b and c of dx = a·(dy + w·(b·(x - m) + c)), to rows 1 to 3 of `vectors`."""
    for c in range(stats.shape[1]):
        vectors[1, c], vectors[2, c], vectors[3, c] = backward_terms(
            stats, c, gamma, eps, sums, grads, like
        )


# Tiles.


@entrance
def watch(ring, address, known, tries):
    """See `threads.watch`."""
    if ring:
        fetch_add(ring)
    for _ in range(tries):
        if peek(address) != known:
            return


@inlined
def ring_bells(counter, me):
    """Tell the helpers, whose bells' addresses are row 1, that the interpreter is free."""
    if me == 0:
        for helper in range(counter.shape[1]):
            if counter[1, helper]:
                fetch_add(counter[1, helper])


@compiled
def next_tile(counter, me, tiles, backwards):
    """The next tile for a thread: of its own share, then of another's; -1 when none is left.

    A share is the same from pass to pass and from call to call, so that a thread finds in its cache
    what it left there: a second pass goes through it backwards.
    """
    threads = counter.shape[1]
    for j in range(threads):
        share = (me + j) % threads
        first, end = share * tiles // threads, (share + 1) * tiles // threads
        if counter[0, share] < end - first:
            taken = fetch_add(address_of(counter) + 8 * share)
            if taken < end - first:
                return end - 1 - taken if backwards else first + taken
    return -1


@inlined
def tile_bounds(tile, grid):
    """First and last of the reduced blocks and channels of a tile."""
    across = (grid[2] + grid[3] - 1) // grid[3]
    block = tile // across
    c0 = (tile - block * across) * grid[3]
    r0 = block * grid[1]
    return block, r0, min(grid[0], r0 + grid[1]), c0, min(grid[2], c0 + grid[3])


@inlined
def tile_count(grid):
    """How many tiles a grid has."""
    return ((grid[0] + grid[1] - 1) // grid[1]) * ((grid[2] + grid[3] - 1) // grid[3])
