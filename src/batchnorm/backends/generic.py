"""The four kernels in pure array API code: the specification of every other backend.

Notation: x and dy have shape (..., C, ...); a per-channel vector v is kept in broadcast shape
(1, ..., C, ..., 1), written (C) below. `layout` says which axes are channels and which dtypes to use:
`layout.compute` is the dtype of arithmetic on the big array (float32, or float64 for float64 data) and
`layout.wide` is the dtype of sums (float64 where the device has it, else float32).

The code runs on eager and lazy libraries, on mutable and immutable arrays: it never asks an array
for its truth, never writes to one, and never makes a shape that depends on values.
"""

from __future__ import annotations

from typing import Any

from batchnorm.backends.base import Backend
from batchnorm.backends.sums import pieces, total, tree_sum
from batchnorm.coefficients import in_compute, in_wide, ones_for_zeros
from batchnorm.layout import Layout, definite, two_parts
from batchnorm.moments import Moments, merge_rows

Array = Any


class Generic(Backend):
    """Array API code that every library runs."""

    name = "generic"
    summary = "array API code that every library runs"

    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count n, mean as a high and a low part, and population variance of each channel.

        n = Σw,  mean = Σw·x / n,  var = Σw·(x − mean)² / n, with w = 1 where no weights are given.
        """
        parts = [_moments(n, layout, *arrays) for n, arrays in pieces(layout, x, w)]
        rows = (layout.xp.stack(v) for v in zip(*parts, strict=True))  # (parts, C) each
        n, mean, var, mean_lo = merge_rows(Moments(*rows))
        return n, mean, mean_lo, var

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b: the mean goes first, so that no large terms cancel."""
        y = a * (in_compute(layout, x) - m) + b  # (..., C, ...)
        return layout.xp.astype(y, x.dtype, copy=False)

    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        sums = [_grad_sums(m, layout, *arrays) for _, arrays in pieces(layout, x, dy, w)]
        sum_dy, sum_dy_d = (
            tree_sum(layout.xp.stack(v), 0, layout)[0, ...] for v in zip(*sums, strict=True)
        )
        return sum_dy, sum_dy_d

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
        """Return dx = a·(dy + w·(b·(x − m) + c)): directly, and through mean and variance.

        Scaled by a = γ/std last, no factor is larger or smaller than the data or their inverse.
        """
        xp = layout.xp
        d = in_compute(layout, x) - m  # (..., C, ...)
        if w is not None:  # before a product: elements of zero weight may be NaN, for a gradient of this
            w = in_compute(layout, w)
            d = xp.where(w > 0, d, xp.zeros_like(d))
        through_statistics = b * d + c  # (..., C, ...)
        if w is not None:
            through = w * through_statistics
            through_statistics = xp.where(w > 0, through, xp.zeros_like(through))
        dx = a * (in_compute(layout, dy) + through_statistics)  # (..., C, ...)
        return xp.astype(dx, x.dtype, copy=False)


GENERIC = Generic()


def _moments(values: int | None, layout: Layout, x: Array, w: Array | None) -> tuple[Array, ...]:
    """Return count, mean, var and mean_lo of a piece of x, (C) each."""
    xp = layout.xp
    x = in_wide(layout, x)  # (..., C, ...)
    if w is not None:
        x = xp.where(_positive(w, layout), x, xp.zeros_like(x))  # elements of zero weight may be NaN
        w, x = xp.broadcast_arrays(xp.astype(w, layout.wide), x)  # (..., C, ...)
        n = total(w, layout)  # (C)
    elif values is None:
        n = total(xp.ones_like(x), layout)  # (C)
    else:
        n = xp.full(layout.broadcast, float(values), dtype=layout.wide, device=layout.device)  # (C)
    divisor = ones_for_zeros(xp, n)  # (C)

    def average(v: Array) -> Array:
        return total(v if w is None else w * v, layout) / divisor

    high = definite(xp, average(x))  # (C), off by the rounding of a sum
    mean, mean_lo = two_parts(xp, high, average(x - high))  # (C), (C)
    d = (x - mean) - mean_lo  # (..., C, ...), exact where |mean| is large against the spread
    square = d * d  # (..., C, ...)
    var = definite(xp, average(square))  # (C), off by the rounding of a sum
    return n, mean, var + average(square - var), mean_lo


def _grad_sums(m: Array, layout: Layout, x: Array, dy: Array, w: Array | None) -> tuple[Array, Array]:
    """Return Σdy and Σdy·(x − m) of a piece of x, (C) each."""
    dy = in_wide(layout, dy)  # (..., C, ...)
    d = in_wide(layout, x) - in_wide(layout, m)  # (..., C, ...)
    if w is not None:  # an element of zero weight and zero gradient may be NaN
        d = layout.xp.where(_positive(w, layout) | (dy != 0), d, layout.xp.zeros_like(d))
    return total(dy, layout), total(dy * d, layout)


def _positive(w: Array, layout: Layout) -> Array:
    """Return where a mask or weights are above zero."""
    return w if w.dtype == layout.xp.bool else w > 0
