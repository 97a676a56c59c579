"""Channels with fewer than two values: constants in their place, and statistics of nothing.

A channel of one value, or of no weight, has no spread to be normalized by. With ``degenerate="shift"``
it is a channel of zeros that all count: its y is beta, no gradient goes through it, and the count of its
statistics is 0, so that running statistics are not moved by it.
"""

from __future__ import annotations

from typing import Any

from batchnorm import groups, passes
from batchnorm.arguments import validate_group
from batchnorm.arrays import known_false
from batchnorm.backends.base import to_out
from batchnorm.coefficients import in_dtype_of, ones_for_zeros, weights_of
from batchnorm.epilogue import validate_epilogue
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.overlap import validate_no_overlap
from batchnorm.validation import (
    count_positive,
    validate_input,
    validate_out,
    validate_same_shape,
    validate_stats,
    validate_vectors,
    validate_weights,
)

Array = Any
CHOICES = ("raise", "shift")


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
        what = f"degenerate channels of {layout.channels}"
        call.announce(what, [(1, *layout.channels)], groups.wide_name(layout))
        (n,) = call.all_reduce(n)
    return n >= 2


def shifted(layout: Layout, x: Array, where: Array | None, enough: Array) -> tuple[Array, Array | None]:
    """Return x and where with zeros of weight 1 in degenerate channels; as they are without such."""
    xp = layout.xp
    if known_false(xp.any(~enough)):
        return x, where
    keep = layout.vector(enough) > 0  # (C)
    x = xp.where(keep, x, xp.zeros_like(x))
    w = weights_of(where, x.ndim)
    if w is not None:
        w = w | ~keep if w.dtype == xp.bool else xp.where(keep, w, xp.ones_like(w))
    return x, w


def without_degenerate(xp: Any, stats: Moments, enough: Array) -> Moments:
    """Return statistics of which those of degenerate channels are of nothing."""
    return stats._replace(count=xp.where(enough, stats.count, xp.zeros_like(stats.count)))


def statistics_of_nothing(layout: Layout) -> Moments:
    """Return moments of no values in any channel."""
    zero = layout.squeeze(layout.vector(0.0))
    return Moments(zero, zero, zero, zero)


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    group: Any,
    settings: dict[str, Any],
) -> tuple[Array, Moments]:
    """Return y and stats of a call with ``degenerate="shift"``."""
    validate_group(group)
    with groups.call(group, "batch_norm") as call:
        layout = validate_input(x, settings["axis"])
        validate_vectors(layout, gamma=gamma, beta=beta)
        validate_weights(layout, x, where)
        validate_epilogue(layout, x, settings["residual"], settings["activation"])
        validate_out(layout, x, settings["out"])
        enough = enough_values(layout, x, where, call)
    xp = layout.xp
    too_few = layout.values is not None and layout.values < 2
    if too_few if group is None else known_false(xp.any(enough)):
        nothing = statistics_of_nothing(layout)
        return _constants(layout, x, gamma, beta, settings), nothing
    x, where = shifted(layout, x, where, enough)
    if type(settings["eps"]) in (int, float) and settings["eps"] == 0:  # 0 / 0 is not 0
        out = settings.pop("out")
        y, stats = passes.forward(x, gamma, beta, where, group, **settings)
        keep = layout.vector(enough) > 0  # (C)
        y = xp.where(keep, y, _constants(layout, x, gamma, beta, settings))
        return to_out(layout, y, x.dtype, out), without_degenerate(xp, stats, enough)
    y, stats = passes.forward(x, gamma, beta, where, group, **settings)
    return y, without_degenerate(xp, stats, enough)


def _constants(
    layout: Layout, x: Array, gamma: Array | None, beta: Array | None, settings: dict[str, Any]
) -> Array:
    """Return y of a batch whose channels are all degenerate: no eps is needed to divide by 1."""
    one = layout.squeeze(layout.vector(1.0))
    zeros, _ = shifted(layout, x, None, one < 0)  # of which a framework finds a gradient of 0
    return passes.inference(zeros, one - one, one, gamma, beta, **settings)


def backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    group: Any,
    settings: dict[str, Any],
) -> tuple[Array, ...]:
    """Return the gradients of a call with ``degenerate="shift"``."""
    validate_group(group)
    out = settings["out"]
    with groups.call(group, "batch_norm_backward"):
        layout = validate_input(x, settings["axis"])
        validate_same_shape(layout, x, "dy", dy)
        validate_stats(layout, stats)
        validate_vectors(layout, gamma=gamma, beta=beta)
        validate_weights(layout, x, where)
        validate_out(layout, x, out)
        validate_no_overlap(out, dy=dy, x=x, gamma=gamma, beta=beta, where=where)
    xp = layout.xp
    zero = xp.zeros_like(layout.vector(stats.var))  # (C)
    count = layout.vector(stats.count) + zero  # (C), where it is one number for all too
    enough = layout.squeeze(count > 0)
    if known_false(xp.any(~enough)):
        return passes.backward(dy, x, stats, gamma, beta, where, group, **settings)
    keep = layout.vector(enough) > 0  # (C)
    del settings["out"]
    if known_false(xp.any(enough)):
        zeros = xp.zeros_like(x)
        one = layout.squeeze(layout.vector(1.0))
        grads = passes.inference_backward(dy, zeros, one - one, one, gamma, beta, **settings)
        if group is not None:
            with groups.call(group, "batch_norm_backward") as call:
                call.announce_backward(layout, x)
                sums = call.all_reduce(*(layout.vector(v) for v in grads[1:3]))
            grads = (grads[0], *(in_dtype_of(layout, gamma, v) for v in sums), *grads[3:])
    else:
        x, where = shifted(layout, x, where, enough)
        var = xp.where(enough, stats.var, xp.ones_like(stats.var))  # to divide by, without eps too
        moved = stats._replace(count=layout.squeeze(ones_for_zeros(xp, count)), var=var)
        grads = passes.backward(dy, x, moved, gamma, beta, where, group, **settings)
    dx = xp.where(keep, grads[0], xp.zeros_like(grads[0]))
    return to_out(layout, dx, x.dtype, out), *grads[1:]
