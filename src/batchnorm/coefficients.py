"""What happens between two kernels: arithmetic on vectors of one number per channel.

Shapes in comments: x is (..., C, ...); (C) is a per-channel vector in broadcast shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


def rounded_mean(layout: Layout, stats: Moments) -> tuple[Array, Array]:
    """Return the mean as the dtype of the big array rounds it, and the residual: (C), (C)."""
    mean = layout.vector(stats.mean)  # (C)
    m = in_compute(layout, mean)  # (C)
    residual = mean - in_wide(layout, m)  # (C), exact
    return m, residual if stats.mean_lo is None else residual + layout.vector(stats.mean_lo)


def rstd_and_scale(layout: Layout, var: Array, gamma: Array | None, eps: float) -> tuple[Array, Array]:
    """Return 1/std and gamma/std: (C), (C)."""
    rstd = 1 / layout.xp.sqrt(layout.vector(var) + eps)  # (C)
    return rstd, rstd if gamma is None else layout.vector(gamma) * rstd


def forward_coefficients(
    layout: Layout, stats: Moments, gamma: Array | None, beta: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    """Return m, a and b of y = a·(x − m) + b: (C) each, in `layout.compute`."""
    m, residual = rounded_mean(layout, stats)  # (C), (C)
    _, a = rstd_and_scale(layout, stats.var, gamma, eps)  # (C)
    b = -a * residual  # (C)
    if beta is not None:
        b = b + layout.vector(beta)
    return m, in_compute(layout, a), in_compute(layout, b)


class Renorm(NamedTuple):
    """What batch renormalization compares a batch with, and the limits of the correction."""

    mean: Array
    var: Array
    r_max: Any
    d_max: Any


def renorm_corrections(xp: Any, stats: Moments, eps: Any, renorm: Renorm) -> tuple[Array, Array]:
    """Return r and d of γ·(r·x̂ + d) + β (Ioffe 2017, Algorithm 1), in the shape and dtype of `stats`.

    NaN passes the limits.
    """
    mean, var = (xp.astype(v, stats.var.dtype) for v in (renorm.mean, renorm.var))
    std = xp.sqrt(var + eps)
    d = (stats.mean - mean) if stats.mean_lo is None else (stats.mean - mean) + stats.mean_lo
    r, d, one = xp.sqrt(stats.var + eps) / std, d / std, xp.ones_like(std)
    r_max, d_max = (one * _representable(xp, one, v) for v in (renorm.r_max, renorm.d_max))
    r = xp.where(r > r_max, r_max, xp.where(r < 1 / r_max, 1 / r_max, r))
    return r, xp.where(d > d_max, d_max, xp.where(d < -d_max, -d_max, d))


def _representable(xp: Any, one: Array, limit: Any) -> Any:
    """Return a limit that is not beyond the largest number of a dtype."""
    largest = 2.0**128 - 2.0**104  # of float32
    return limit if hasattr(limit, "dtype") or one.dtype != xp.float32 else min(limit, largest)


def renormalized(
    xp: Any, gamma: Array | None, beta: Array | None, r: Array, d: Array
) -> tuple[Array, Array]:
    """Return γ·r and β + γ·d, with which batch norm is batch renormalization, in the dtype of r."""
    scale, shift = r, d
    if gamma is not None:
        wide = xp.astype(gamma, r.dtype)
        scale, shift = wide * r, wide * d
    return scale, shift if beta is None else xp.astype(beta, r.dtype) + shift


def backward_coefficients(
    layout: Layout, stats: Moments, gamma: Array | None, eps: float, sums: Sequence[Array]
) -> tuple[Array, ...]:
    """Return m, a, b and c of dx = a·(dy + w·(b·(x − m) + c)), and dgamma and dbeta.

    `sums` are Σdy and Σdy·(x − mean); all vectors are (C).
    """
    sum_dy, sum_dy_d = sums  # (C), (C)
    m, residual = rounded_mean(layout, stats)  # (C), (C)
    n = ones_for_zeros(layout.xp, layout.vector(stats.count))  # (C)
    rstd, a = rstd_and_scale(layout, stats.var, gamma, eps)  # (C), (C)
    dgamma = rstd * sum_dy_d  # (C)
    b = -rstd * (dgamma / n)  # (C)
    c = -sum_dy / n - b * residual  # (C)
    a, b, c = (in_compute(layout, v) for v in (a, b, c))
    return m, a, b, c, dgamma, sum_dy


def frozen_gradients(
    layout: Layout, stats: Moments, gamma: Array | None, eps: float, sums: Sequence[Array]
) -> tuple[Array, ...]:
    """Return a of dx = a·dy where the statistics are constants, and dgamma, dbeta, dmean, dvar: (C)."""
    sum_dy, sum_dy_d = sums  # (C), (C)
    rstd, a = rstd_and_scale(layout, stats.var, gamma, eps)  # (C), (C)
    dvar = -0.5 * a * rstd * (rstd * sum_dy_d)  # (C)
    return in_compute(layout, a), rstd * sum_dy_d, sum_dy, -a * sum_dy, dvar


def in_dtype_of(layout: Layout, parameter: Array | None, v: Array) -> Array:
    """Return a gradient in the shape and dtype of a parameter; a copy, as `out` may be dy."""
    return layout.xp.astype(layout.squeeze(v), layout.compute if parameter is None else parameter.dtype)


def in_compute(layout: Layout, v: Array) -> Array:
    """Return an array in the dtype of arithmetic on the big arrays."""
    return v if v.dtype == layout.compute else layout.xp.astype(v, layout.compute)


def in_wide(layout: Layout, v: Array) -> Array:
    """Return an array in the dtype of sums."""
    return v if v.dtype == layout.wide else layout.xp.astype(v, layout.wide)


def ones_for_zeros(xp: Any, n: Array) -> Array:
    """Return counts with 1 in the place of 0, to divide by."""
    return xp.where(n > 0, n, xp.ones_like(n))


def weights_of(where: Array | None, ndim: int) -> Array | None:
    """Return a mask or weights with as many axes as x, which is what kernels take."""
    if where is None or where.ndim == ndim:
        return where
    return where[(None,) * (ndim - where.ndim) + (...,)]
