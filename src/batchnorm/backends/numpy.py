"""The four kernels with NumPy alone: the fallback where nothing is compiled.

Arrays are worked on in blocks that stay in a processor's cache from one NumPy call to the next, with
their axes in the order of memory. The moments of blocks are merged, and sums of blocks added as a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm import outputs
from batchnorm.backends.base import Backend
from batchnorm.backends.blocks import Block, plan_of
from batchnorm.backends.generic import GENERIC
from batchnorm.epilogue import (
    ACTIVATIONS,
    Activation,
    Epilogue,
    gradient_dtype,
)
from batchnorm.layout import Layout
from batchnorm.moments import Moments, merge_rows

Array = Any

# Float64 values that are added one after the other where a sum runs across memory.
LEAF = 16
# Values of a dot product, at most: it adds long ones in chains, and on threads.
DOT = 2**9


class NumPy(Backend):
    """NumPy's own loops, block by block."""

    name = "numpy"
    summary = "NumPy in blocks that stay in cache"

    @np.errstate(all="ignore")
    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""

        def of_block(block: Block, x: Array, w: Array | None) -> tuple[Array, ...]:
            d = block.wide(x)
            n = divisor = np.full(block.vector, float(block.values))
            if w is not None:
                weights = block.wide(w)
                zero = ~(weights > 0)
                d[zero] = 0.0  # elements of zero weight may be NaN
                n = _sum(weights, block.reduced)
                divisor = np.where(n > 0, n, 1.0)
            mean = _sum(d if w is None else d * weights, block.reduced) / divisor
            d -= mean
            if w is not None:
                d[zero] = 0.0
            low = _sum(d if w is None else d * weights, block.reduced) / divisor
            var = _sum(d if w is None else d * weights, block.reduced, d) / divisor - low * low
            rounded = mean + low
            return n, rounded, var, low - (rounded - mean)

        if x.size == 0:
            return GENERIC.moments(x, w, layout)
        rows, back = _rows(of_block, 4, layout, x, x, _broadcast(w, x))
        n, mean, var, low = (back(v) for v in merge_rows(Moments(*rows)))
        return n, mean, low, var

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        return self.output(x, m, a, b, layout, out=out)

    @np.errstate(all="ignore")
    def output(
        self,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return y = act(a·(x − m) + b + z)."""
        y = outputs.empty_like(x) if out is None else out
        plan = plan_of(x.shape, x.strides, layout.channel_axes)
        z = None if epilogue is None else epilogue.residual
        x, m, a, b, z, target = plan.transposed(x, m, a, b, z, y)
        for block in plan.blocks:
            to = target[(*block.selection, ...)]
            d = np.subtract(x[block.selection], m[block.channels], dtype=layout.compute)
            d *= a[block.channels]
            if epilogue is None:
                np.add(d, b[block.channels], out=to, casting="same_kind")
                continue
            d += b[block.channels]
            if z is not None:
                d += z[block.selection]
            _activate(d, epilogue.activation, to)
        return y

    @np.errstate(all="ignore")
    def activation_gradient(
        self, dy: Array, x: Array, m: Array, a: Array, b: Array, epilogue: Epilogue, layout: Layout
    ) -> Array:
        """Return g = act'(a·(x − m) + b + z)·dy."""
        dtype = gradient_dtype(layout, dy)
        g = outputs.empty_like(dy) if dy.dtype == dtype else np.empty_like(dy, dtype=dtype)
        plan = plan_of(x.shape, x.strides, layout.channel_axes)
        dy, x, m, a, b, z, y, target = plan.transposed(dy, x, m, a, b, epilogue.residual, epilogue.y, g)
        for block in plan.blocks:
            at = block.selection
            if y is None:
                h = np.subtract(x[at], m[block.channels], dtype=layout.compute)
                h *= a[block.channels]
                h += b[block.channels]
                if z is not None:
                    h += z[at]
            else:
                h = y[at].astype(layout.compute, copy=False)
            target[(*at, ...)] = _gradient_through(h, dy[at].astype(dtype), epilogue.activation)
        return g

    @np.errstate(all="ignore")
    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""

        def of_block(block: Block, x: Array, dy: Array, m: Array, w: Array | None) -> tuple[Array, ...]:
            g, d = block.wide(dy), block.wide(x)
            d -= m[block.channels].reshape(block.vector)
            if w is not None:  # an element of zero weight and zero gradient may be NaN
                d[~((block.wide(w) > 0) | (g != 0))] = 0.0
            return _sum(g, block.reduced), _sum(g, block.reduced, d)

        if x.size == 0:
            return GENERIC.grad_sums(dy, x, m, w, layout)
        rows, back = _rows(of_block, 2, layout, x, x, dy, m.astype(np.float64), _broadcast(w, x))
        sum_dy, sum_dy_d = (back(_sum(v, (0,))[0]) for v in rows)
        return sum_dy, sum_dy_d

    @np.errstate(all="ignore")
    def grad_input(
        self,
        dy: Array,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        c: Array,
        w: Array | None,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> Array:
        """Return dx = a·(dy + w·(b·(x − m) + c))."""
        dx = outputs.empty_like(x) if out is None else out
        plan = plan_of(x.shape, x.strides, layout.channel_axes)
        dy, x, m, a, b, c, w, target = plan.transposed(dy, x, m, a, b, c, _broadcast(w, x), dx)
        for block in plan.blocks:
            d = np.subtract(x[block.selection], m[block.channels], dtype=layout.compute)
            d *= b[block.channels]
            d += c[block.channels]
            if w is not None:
                weights = w[block.selection]
                np.multiply(d, weights, out=d, casting="same_kind")
                d[~(weights > 0)] = 0.0  # elements of zero weight may be NaN
            d += dy[block.selection]
            np.multiply(d, a[block.channels], out=target[(*block.selection, ...)], casting="same_kind")
        return dx


def _leaky(h: Array, slope: float) -> None:
    (np.maximum if slope <= 1 else np.minimum)(h, h * slope, out=h)


# Activations in place, and their gradients, which NumPy has functions for; for the others it allocates
# at each step.
IN_PLACE: dict[str, Callable[[Array, float], Any]] = {
    "relu": lambda h, slope: np.maximum(h, 0, out=h),
    "relu6": lambda h, slope: np.clip(h, 0, 6, out=h),
    "leaky_relu": _leaky,
}
GRADIENTS_IN_PLACE: dict[str, Callable[[Array, Array], Any]] = {
    "relu": lambda h, v: _keep(v, ~(h <= 0)),
    "relu6": lambda h, v: _keep(v, ~((h <= 0) | (h >= 6))),
}


def _keep(v: Array, mask: Array) -> None:
    """Set v to 0 where the mask is False: as bits, of which 0 times infinity is 0, without branches."""
    bits = v.view(np.uint64 if v.itemsize == 8 else np.uint32)
    np.multiply(bits, mask, out=bits)


def _activate(h: Array, activation: Activation | None, to: Array) -> None:
    """Write act(h), for which h may be overwritten."""
    if activation is not None and activation.name in IN_PLACE:
        IN_PLACE[activation.name](h, activation.slope)
    elif activation is not None:
        h = ACTIVATIONS[activation.name].value(np, h, activation.slope)
    to[...] = h


def _gradient_through(h: Array, v: Array, activation: Activation | None) -> Array:
    """Return act'(h)·v, for which v may be overwritten; 0 where v is 0."""
    if activation is None:
        return v
    name, slope = activation
    if name in GRADIENTS_IN_PLACE:
        GRADIENTS_IN_PLACE[name](h, v)
        return v
    return np.where(v == 0, v, ACTIVATIONS[name].gradient(np, h, v, slope))


NUMPY = NumPy()


def _broadcast(w: Array | None, x: Array) -> Array | None:
    """Return weights in the shape of x."""
    return w if w is None or w.shape == x.shape else np.broadcast_to(w, x.shape)


def _rows(
    of_block: Callable[..., tuple[Array, ...]], count: int, layout: Layout, x: Array, *arrays: Array
) -> tuple[Any, Callable[[Array], Array]]:
    """Return vectors of each block, (count, rows, C), and what restores the axes of a vector."""
    plan = plan_of(x.shape, x.strides, layout.channel_axes)
    given = plan.transposed(*arrays)
    if len(plan.blocks) == 1:
        shape = (1, *(layout.broadcast[axis] for axis in plan.order))
        found = of_block(plan.blocks[0], *given)
        return [v.reshape(shape) for v in found], lambda v: v.transpose(plan.back)
    rows: Any = np.empty((count, plan.rows, *(layout.broadcast[axis] for axis in plan.order)))
    for block in plan.blocks:
        places = rows[(slice(None), block.row, *block.channels)]
        for place, v in zip(places, of_block(block, *given), strict=True):
            place[...] = v.reshape(place.shape)
    return rows, lambda v: v.transpose(plan.back)


def _sum(v: Array, axes: tuple[int, ...], factor: Array | None = None) -> Array:
    """Sum v, or v·factor, over axes, which are kept with length 1; as a tree."""
    if factor is not None and axes and axes[-1] == v.ndim - 1:
        cuts = [slice(i, i + DOT) for i in range(0, v.shape[-1], DOT)]
        v = np.stack([np.vecdot(v[..., cut], factor[..., cut]) for cut in cuts], axis=-1)
    elif factor is not None:
        v = v * factor
    for axis in reversed(axes):
        while v.shape[axis] > LEAF and axis != v.ndim - 1:  # NumPy sums what lies together as a tree
            n, rest = divmod(v.shape[axis], LEAF)
            before, after, pick = v.shape[:axis], v.shape[axis + 1 :], (slice(None),) * axis
            leaves = (v[(*pick, slice(0, n * LEAF))] if rest else v).reshape((*before, LEAF, n, *after))
            tail = v[(*pick, slice(n * LEAF, None))]
            v = np.add.reduce(leaves, axis=axis)
            if rest:
                v = np.concatenate((v, np.add.reduce(tail, axis=axis, keepdims=True)), axis=axis)
        v = np.add.reduce(v, axis=axis, keepdims=True)
    return v
