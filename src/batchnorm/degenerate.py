"""Channels with fewer than two values: constants in their place, and statistics of nothing.

A channel of one value, or of no weight, has no spread to be normalized by. With ``degenerate="shift"``
it is a channel of zeros that all count: its y is beta, no gradient goes through it, and the count of its
statistics is 0, so that running statistics are not moved by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from batchnorm.arrays import known_false
from batchnorm.coefficients import weights_of
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import count_positive

Array = Any
CHOICES = ("raise", "shift")


class Shifted(NamedTuple):
    """The arguments of a call whose degenerate channels are constants."""

    x: Array
    where: Array | None
    enough: Array
    """Which channels have two values: a boolean vector in the shape of gamma."""


def enough_values(layout: Layout, x: Array, where: Array | None, call: Any) -> Array:
    """Return which channels have two values of positive weight, in the whole group."""
    xp = layout.xp
    if layout.values is None:  # the shape is not known before a graph is run
        w = weights_of(where, x.ndim)
        counted = xp.ones_like(x, dtype=xp.bool)
        if w is not None:
            counted = counted & (w if w.dtype == xp.bool else w > 0)
        n = xp.sum(xp.astype(counted, layout.wide), axis=layout.reduced_axes, keepdims=True)  # (C)
    elif where is not None:
        n = count_positive(layout, x, where)  # (C)
        n = xp.broadcast_to(n, layout.broadcast)
    else:
        n = layout.vector(layout.values)
    n = layout.squeeze(n)
    if call is not None:
        name = "float64" if layout.wide == xp.float64 else "float32"
        call.announce(f"degenerate channels of {layout.channels}", [(1, *layout.channels)], name)
        (n,) = call.all_reduce(n)
    return n >= 2


def shifted(layout: Layout, x: Array, where: Array | None, enough: Array) -> Shifted:
    """Return the arguments with zeros of weight 1 in degenerate channels; as they are without such."""
    xp = layout.xp
    if known_false(xp.any(~enough)):
        return Shifted(x, where, enough)
    keep = layout.vector(enough) > 0  # (C)
    x = xp.where(keep, x, xp.zeros_like(x))
    w = weights_of(where, x.ndim)
    if w is not None:
        w = w | ~keep if w.dtype == xp.bool else xp.where(keep, w, xp.ones_like(w))
    return Shifted(x, w, enough)


def without_degenerate(xp: Any, stats: Moments, enough: Array) -> Moments:
    """Return statistics of which those of degenerate channels are of nothing."""
    return stats._replace(count=xp.where(enough, stats.count, xp.zeros_like(stats.count)))


def statistics_of_nothing(layout: Layout) -> Moments:
    """Return moments of no values in any channel."""
    zero = layout.squeeze(layout.vector(0.0))
    return Moments(zero, zero, zero, zero)
