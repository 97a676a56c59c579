"""The four kernels in pure array API code: the specification of every other kernel set.

Notation: x and dy have shape (..., C, ...); a per-channel vector v is kept in broadcast shape
(1, ..., C, ..., 1), written (C) below. `at` says which axes are channels and which dtypes to use:
`at.compute` is what the big array is touched in (float32, or float64 for float64 data) and `at.wide`
is what sums are kept in (float64 where the device has it, else float32).

The code runs on eager and lazy libraries, on mutable and immutable arrays: it never asks an array
for its truth, never writes to one, and never makes a shape that depends on values.
"""

from __future__ import annotations

from typing import Any

from batchnorm.layout import Layout, definite, two_parts

Array = Any

# Values that are added one after the other before partial sums meet in a tree. The error of a sum
# then grows with LEAF and with log(n), not with n; 32 keeps it under an eps at any size.
LEAF = 32


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count n, mean as a high and a low part, and population variance of each channel.

    n = Σw,  mean = Σw·x / n,  var = Σw·(x − mean)² / n, with w = 1 where no weights are given.
    """
    xp = at.xp
    x = xp.astype(x, at.wide, copy=False)  # (..., C, ...)
    if w is None:
        n = _size(x, at)  # (C)
    else:
        w, x = xp.broadcast_arrays(xp.astype(w, at.wide), x)  # (..., C, ...)
        x = xp.where(w > 0, x, xp.zeros_like(x))  # what weighs nothing may be NaN
        n = _total(w, at)  # (C)

    mean, mean_lo = two_parts(xp, *_average(x, w, n, at))  # (C), (C)
    d = (x - mean) - mean_lo  # (..., C, ...), exact where |mean| is large against the spread
    var, var_lo = _average(d * d, w, n, at)  # (C), (C)
    return n, mean, mean_lo, var + var_lo


def scale_shift(x: Array, m: Array, a: Array, b: Array, at: Layout) -> Array:
    """Give y = a·(x − m) + b: the mean goes first, so that no large terms cancel."""
    xp = at.xp
    d = xp.astype(x, at.compute, copy=False) - m  # (..., C, ...)
    return xp.astype(a * d + b, x.dtype, copy=False)  # (..., C, ...)


def grad_sums(dy: Array, x: Array, m: Array, w: Array | None, at: Layout) -> tuple[Array, Array]:
    """Σdy and Σdy·(x − m) of each channel."""
    xp = at.xp
    dy = xp.astype(dy, at.wide, copy=False)  # (..., C, ...)
    d = xp.astype(x, at.wide, copy=False) - xp.astype(m, at.wide, copy=False)  # (..., C, ...)
    if w is not None:  # a value without weight and without gradient may be NaN
        d = xp.where((xp.astype(w, at.wide) > 0) | (dy != 0), d, xp.zeros_like(d))
    return _total(dy, at), _total(dy * d, at)  # (C), (C)


def grad_input(
    dy: Array, x: Array, m: Array, a: Array, b: Array, c: Array, w: Array | None, at: Layout
) -> Array:
    """Give dx = a·(dy + w·(b·(x − m) + c)): directly, and through mean and variance.

    Scaled by a = γ/std last, no factor is larger or smaller than the data or their inverse.
    """
    xp = at.xp
    dy = xp.astype(dy, at.compute, copy=False)  # (..., C, ...)
    d = xp.astype(x, at.compute, copy=False) - m  # (..., C, ...)
    if w is not None:  # a value without weight may be NaN: out before a product, for a gradient of this
        w = xp.astype(w, at.compute)
        d = xp.where(w > 0, d, xp.zeros_like(d))
    statistics = b * d + c  # (..., C, ...)
    if w is not None:
        statistics = xp.where(w > 0, w * statistics, xp.zeros_like(statistics))
    return xp.astype(a * (dy + statistics), x.dtype, copy=False)  # (..., C, ...)


def _average(v: Array, w: Array | None, n: Array, at: Layout) -> tuple[Array, Array]:
    """Weighted mean in two parts: (..., C, ...) -> (C), (C), 0 where a channel has no values.

    The first is a sum of all values, off by the rounding of that sum; the second is the mean of what
    is left, whose terms cancel, so that next to nothing is lost.
    """
    xp = at.xp
    nonzero = xp.where(n > 0, n, xp.ones_like(n))  # (C)
    high = definite(xp, _total(v if w is None else w * v, at) / nonzero)  # (C)
    rest = v - high  # (..., C, ...)
    return high, _total(rest if w is None else w * rest, at) / nonzero


def _size(x: Array, at: Layout) -> Array:
    """Values per channel: (..., C, ...) -> (C), counted only where the shape does not tell."""
    xp = at.xp
    if at.values is None:
        return _total(xp.ones_like(x), at)
    return xp.full(at.broadcast, float(at.values), dtype=at.wide, device=at.device)


def _total(v: Array, at: Layout) -> Array:
    """Sum over all axes but the channels', as a tree: (..., C, ...) -> (C)."""
    for axis in reversed(at.reduced):
        v = _sum(v, axis, at)
    return v


def _sum(v: Array, axis: int, at: Layout) -> Array:
    """Sum over one axis, which is kept with length 1."""
    xp, n = at.xp, v.shape[axis]
    if at.values is None or n <= LEAF:  # a lazy shape cannot be cut; the library's own sum has to do
        return xp.sum(v, axis=axis, keepdims=True)
    before, after, whole = v.shape[:axis], v.shape[axis + 1 :], n // LEAF * LEAF
    pick = (slice(None),) * axis

    leaves = xp.reshape(v[(*pick, slice(0, whole), ...)], (*before, whole // LEAF, LEAF, *after))
    total = _sum(xp.sum(leaves, axis=axis + 1), axis, at)
    if whole < n:
        total = total + xp.sum(v[(*pick, slice(whole, n), ...)], axis=axis, keepdims=True)
    return total
