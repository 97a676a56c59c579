"""Virtual batches (ghost batches): each part of a batch is normalized by statistics of its own.

The parts of one size are one call: they become an axis of channels beside the channel axis. A last part
that is smaller is a call of its own, as each part is where it is large and calls cost little: the core
has kernels of their own for one channel axis.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import array_api_compat as compat

from batchnorm import outputs
from batchnorm.arrays import is_eager_on_host
from batchnorm.coefficients import weights_of
from batchnorm.epilogue import validate_epilogue
from batchnorm.errors import fail
from batchnorm.functional import batch_norm, batch_norm_backward
from batchnorm.layout import Layout
from batchnorm.moments import Moments, merge_rows
from batchnorm.overlap import validate_no_overlap
from batchnorm.validation import (
    validate_count,
    validate_input,
    validate_out,
    validate_same_shape,
    validate_weights,
)

Array = Any
CALL_EACH = 2**15
"""Values of a part that is worth a call on a host."""


class Parts(NamedTuple):
    """Moments of the parts of a batch."""

    stacked: Moments | None
    """Of the parts that one call had: vectors with an axis of parts."""
    axis: int
    """That axis; the others are the channels'."""
    single: tuple[Moments, ...]
    """Of parts that had a call each."""

    def merged(self) -> Moments:
        """Return the moments of the batch."""
        if self.stacked is None:
            return self.single[0] if len(self.single) == 1 else Moments.merge(*self.single)
        xp = compat.array_namespace(self.stacked.mean)
        zero = xp.zeros_like(self.stacked.mean)
        rows = (zero if v is None else zero + v for v in self.stacked)
        order = (self.axis, *(i for i in range(zero.ndim) if i != self.axis))
        whole = merge_rows(Moments(*(xp.permute_dims(v, order) for v in rows)))
        return Moments.merge(whole, *self.single) if self.single else whole


def forward(
    size: int,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    where: Array | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    **settings: Any,
) -> tuple[Array, Parts]:
    """Return y and the moments of each part; arguments as of `batch_norm`."""
    layout = validate_input(x, axis)
    validate_weights(layout, x, where)
    validate_epilogue(layout, x, residual, settings.get("activation"))
    validate_out(layout, x, out)
    validate_no_overlap(out, x=x, gamma=gamma, beta=beta, where=where, residual=residual)
    w = weights_of(where, x.ndim)
    found, cuts = [], _cuts(layout, x, size, is_eager_on_host(x))
    if settings.get("degenerate", "raise") == "raise":  # before anything is written to `out`
        for cut in cuts if where is not None else cuts[-1:]:
            part = cut.of(x)
            validate_count(validate_input(part, cut.axis), part, cut.of(w))
    out = _result(x) if out is None else out
    for cut in cuts:
        part = [cut.of(v) for v in (x, w, residual, out)]
        given: dict[str, Any] = {"axis": cut.axis, "where": part[1], "residual": part[2]}
        given |= {"gamma": cut.vector(gamma), "beta": cut.vector(beta), "out": part[3]}
        y, stats = batch_norm(part[0], **given, **settings)
        found.append((cut, y, stats))
    y = out if out is not None else _joined(cuts[0], [cut.back(y) for cut, y, _ in found])
    return y, _parts(found)


def backward(
    size: int,
    dy: Array,
    x: Array,
    stats: Parts,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    where: Array | None = None,
    residual: Any = None,
    y: Array | None = None,
    out: Array | None = None,
    **settings: Any,
) -> tuple[Array, ...]:
    """Return dx, dgamma, dbeta, and with a residual dresidual; arguments as `batch_norm_backward`."""
    layout = validate_input(x, axis)
    validate_same_shape(layout, x, "dy", dy)
    validate_out(layout, x, out)
    validate_no_overlap(out, dy=dy, x=x, gamma=gamma, beta=beta, where=where, y=y)
    w = weights_of(where, x.ndim)
    found, cuts = [], _cuts(layout, x, size, stats.stacked is None)
    out = _result(x) if out is None else out
    single = iter(stats.single)
    for cut in cuts:
        own: Any = stats.stacked if cut.parts else next(single)
        z = residual if residual is None or isinstance(residual, bool) else cut.of(residual)
        given: dict[str, Any] = {"axis": cut.axis, "where": cut.of(w), "residual": z, "y": cut.of(y)}
        given |= {"gamma": cut.vector(gamma), "beta": cut.vector(beta), "out": cut.of(out)}
        dx, *grads = batch_norm_backward(cut.of(dy), cut.of(x), own, **given, **settings)
        sums = [cut.xp.sum(v, axis=cut.batch_axis) if cut.parts else v for v in grads[:2]]
        found.append((cut.back(dx), *sums, *map(cut.back, grads[2:])))
    dx = out if out is not None else _joined(cuts[0], [f[0] for f in found])
    dgamma, dbeta = (functools.reduce(operator.add, (f[i] for f in found)) for i in (1, 2))
    if len(found[0]) == 3:
        return dx, dgamma, dbeta
    return dx, dgamma, dbeta, _joined(cuts[0], [f[3] for f in found])


class _Cut(NamedTuple):
    """Where parts lie in the batch, and how they become an axis: `parts` is 0 for one part by itself."""

    xp: Any
    batch_axis: int
    start: int
    stop: int
    parts: int
    axis: Any

    def of(self, v: Array | None) -> Array | None:
        """Return the parts of an array like x, or of weights that broadcast to it."""
        if v is None:
            return None
        n, i = v.shape[self.batch_axis], self.batch_axis
        if n > 1 or (self.start == 0 and self.stop == n):
            v = v[(slice(None),) * i + (slice(self.start, self.stop), ...)]
            lengths = (self.parts, (self.stop - self.start) // max(1, self.parts))
        else:
            lengths = (1, 1)
        return self.xp.reshape(v, (*v.shape[:i], *lengths, *v.shape[i + 1 :])) if self.parts else v

    def back(self, v: Array) -> Array:
        """Return parts as a piece of the batch."""
        i = self.batch_axis
        if not self.parts:
            return v
        return self.xp.reshape(v, (*v.shape[:i], self.stop - self.start, *v.shape[i + 2 :]))

    def vector(self, v: Array | None) -> Array | None:
        """Return gamma or beta for each part."""
        if v is None or not self.parts:
            return v
        i = self.batch_axis  # all axes before it are channel axes
        shape = (*v.shape[:i], self.parts, *v.shape[i:])
        return self.xp.broadcast_to(self.xp.expand_dims(v, axis=i), shape)


def _cuts(layout: Layout, x: Array, size: int, eager: bool) -> list[_Cut]:
    """Return the parts of one size as one, and the last one that is smaller; or large parts one by one.

    The backward pass has the parts of the forward pass, also where only one of them is eager.
    """
    axes = layout.channel_axes
    first = next(i for i in range(x.ndim + 1) if i not in axes)
    if first == x.ndim:  # no axis of values: one part of one value
        return [_Cut(layout.xp, 0, 0, x.shape[0], 0, axes)]
    n = x.shape[first]
    if not isinstance(n, int):
        fail(ValueError, "x", f"shape {tuple(x.shape)}", "a known number of examples to be divided")
    parts = n // size
    if parts and eager and math.prod(x.shape) * size >= CALL_EACH * n:
        starts = range(0, n, size)
        return [_Cut(layout.xp, first, i, min(i + size, n), 0, axes) for i in starts]
    # The new axis comes before the batch axis; channel axes after it move by one.
    moved = tuple(sorted((first, *(a + (a >= first) for a in axes))))
    cuts = [_Cut(layout.xp, first, 0, parts * size, parts, moved)] if parts else []
    if n % size or not parts:
        cuts.append(_Cut(layout.xp, first, parts * size, n, 0, axes))
    return cuts


def _result(x: Array) -> Array | None:
    """Return an array for the results of all parts, so that they need not be joined, or None."""
    if compat.is_numpy_array(x) and x.flags.c_contiguous:
        return outputs.empty_like(x)
    return compat.array_namespace(x).empty_like(x) if compat.is_cupy_array(x) else None


def _joined(cut: _Cut, pieces: list[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else cut.xp.concat(pieces, axis=cut.batch_axis)


def _parts(found: list[Any]) -> Parts:
    stacked = next((stats for cut, _, stats in found if cut.parts), None)
    single = tuple(stats for cut, _, stats in found if not cut.parts)
    return Parts(stacked, found[0][0].batch_axis, single)
