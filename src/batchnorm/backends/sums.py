"""Sums over reduced axes, of an error that does not grow with the number of values: trees, in pieces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from batchnorm.arrays import PIECE, cut_along, is_eager_on_host
from batchnorm.layout import Layout

Array = Any

# Values that are added one after the other before partial sums meet in a tree. The error of a sum then
# grows with LEAF and with log(n), not with n.
LEAF = 32


def pieces(layout: Layout, x: Array, *arrays: Array | None) -> Iterator[tuple[int | None, list[Any]]]:
    """Cut x, and what broadcasts to it, along its longest reduced axis.

    Gives for each piece its number of values per channel, and the arrays' pieces. They stay in cache;
    what a compiler or a GPU is to have as a whole is one piece.
    """
    reduced = layout.reduced_axes
    size = math.prod(x.shape) if layout.values else 0
    if size <= PIECE or not reduced or not is_eager_on_host(x):
        yield layout.values, [x, *arrays]
        return
    axis = max(reduced, key=lambda i: x.shape[i])
    for cut in cut_along(tuple(x.shape), axis):
        part = [a if a is None or a.shape[axis] == 1 else a[cut] for a in (x, *arrays)]
        yield math.prod(part[0].shape[j] for j in reduced), part


def total(v: Array, layout: Layout) -> Array:
    """Sum over the reduced axes: (..., C, ...) -> (C)."""
    xp = layout.xp
    if layout.values is None:  # a lazy shape cannot be cut
        return xp.sum(v, axis=layout.reduced_axes, keepdims=True)
    if not is_eager_on_host(v):  # XLA fuses sums over single axes with what it adds, and not a reshape
        for axis in reversed(layout.reduced_axes):
            v = tree_sum(v, axis, layout)
        return v
    neighbours = itertools.groupby(range(v.ndim), lambda axis: axis in layout.channel_axes)
    merged = [(are_channels, math.prod(v.shape[i] for i in axes)) for are_channels, axes in neighbours]
    v = xp.reshape(v, tuple(n for _, n in merged))
    for axis, (are_channels, _) in enumerate(merged):
        v = v if are_channels else tree_sum(v, axis, layout)
    return xp.reshape(v, layout.broadcast)


def tree_sum(v: Array, axis: int, layout: Layout) -> Array:
    """Sum over one axis, which is kept with length 1, as a tree."""
    xp, n = layout.xp, v.shape[axis]
    if n <= LEAF:
        return xp.sum(v, axis=axis, keepdims=True)
    before, after, whole = v.shape[:axis], v.shape[axis + 1 :], n // LEAF * LEAF
    pick = (slice(None),) * axis

    leaves = xp.reshape(v[(*pick, slice(0, whole), ...)], (*before, whole // LEAF, LEAF, *after))
    total = tree_sum(xp.sum(leaves, axis=axis + 1), axis, layout)
    if whole < n:
        total = total + xp.sum(v[(*pick, slice(whole, n), ...)], axis=axis, keepdims=True)
    return total
