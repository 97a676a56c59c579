"""What happens between kernels: arithmetic on vectors of one number per channel.

Shapes in comments: x is (..., C, ...); (C) is a per-channel vector in broadcast shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from batchnorm.kernels import KernelSet
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


class Centre(NamedTuple):
    """A mean in two parts: m in the dtype of the big array, and the rest of it."""

    m: Array
    rest: Array


def centre(at: Layout, stats: Moments) -> Centre:
    """Give a mean in two parts."""
    mean = at.vector(stats.mean)  # (C)
    m = compute(at, mean)  # (C)
    rest = mean - at.xp.astype(m, at.wide, copy=False)  # (C), exact
    return Centre(m, rest if stats.mean_lo is None else rest + at.vector(stats.mean_lo))


def slope(at: Layout, var: Array, gamma: Array | None, eps: float) -> tuple[Array, Array]:
    """Give 1/std and gamma/std."""
    rstd = 1 / at.xp.sqrt(at.vector(var) + eps)  # (C)
    return rstd, rstd if gamma is None else at.vector(gamma) * rstd  # (C), (C)


def moments_by(kernels: KernelSet, at: Layout, x: Array, where: Array | None) -> Moments:
    """Give moments as users have them."""
    w = weights_of(where, x.ndim)
    count, mean, mean_lo, var = (at.squeeze(v) for v in kernels.moments(x, w, at))
    return Moments(count, mean, var, mean_lo)


def scale_shift_by(
    kernels: KernelSet,
    at: Layout,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    out: Array | None,
) -> Array:
    """Give y from statistics, by the kernel that makes it."""
    mid = centre(at, stats)
    _, a = slope(at, stats.var, gamma, eps)  # (C)
    b = -a * mid.rest  # (C)
    if beta is not None:
        b = b + at.vector(beta)
    return kernels.scale_shift(x, mid.m, compute(at, a), compute(at, b), at, out)


def sums_with(
    kernels: KernelSet, at: Layout, dy: Array, x: Array, mid: Centre, w: Array | None
) -> tuple[Array, Array]:
    """Σdy and Σdy·(x − mean), the latter from the kernel's Σdy·(x − m)."""
    sum_dy, sum_dy_d = kernels.grad_sums(dy, x, mid.m, w, at)  # (C), (C)
    return sum_dy, sum_dy_d - mid.rest * sum_dy


def backward_from(
    kernels: KernelSet,
    at: Layout,
    dy: Array,
    x: Array,
    w: Array | None,
    stats: Moments,
    gamma: Array | None,
    eps: float,
    sums: Sequence[Array],
    out: Array | None,
) -> tuple[Array, ...]:
    """Give dx, dgamma and dbeta from the sums over the whole batch, by the kernel that makes dx."""
    sum_dy, sum_dy_d = sums  # (C), (C)
    mid = centre(at, stats)
    n = at.vector(stats.count)  # (C)
    n = at.xp.where(n > 0, n, at.xp.ones_like(n))
    rstd, a = slope(at, stats.var, gamma, eps)  # (C), (C)
    dgamma = rstd * sum_dy_d  # (C)
    b = -rstd * (dgamma / n)  # (C)
    c = -sum_dy / n - b * mid.rest  # (C)
    a, b, c = (compute(at, v) for v in (a, b, c))
    grads = grad_params(at, gamma, dgamma, sum_dy)
    return kernels.grad_input(dy, x, mid.m, a, b, c, w, at, out), *grads


def grad_params(at: Layout, gamma: Array | None, dgamma: Array, dbeta: Array) -> tuple[Array, ...]:
    """Gradients of the parameters in their shape and dtype; copies, as `out` may be dy."""
    dtype = at.compute if gamma is None else gamma.dtype
    return tuple(at.xp.astype(at.squeeze(v), dtype) for v in (dgamma, dbeta))


def compute(at: Layout, v: Array) -> Array:
    """Bring an array to what the big arrays are worked on in."""
    return at.xp.astype(v, at.compute, copy=False)


def weights_of(where: Array | None, ndim: int) -> Array | None:
    """A mask or weights with as many axes as x, which is what kernels take."""
    if where is None or where.ndim == ndim:
        return where
    return where[(None,) * (ndim - where.ndim) + (...,)]
