r"""Forward mode and second order: the derivatives of `batch_norm` beyond its gradients.

With :math:`r = 1/\sqrt{\sigma^2 + \epsilon}`, :math:`\hat x = r (x - \mu)` and weights w (1 without
`where`), all follow from

.. math::
    \frac{\partial \hat x_i}{\partial x_j}
    = r \left( \delta_{ij} - w_j \frac{1 + \hat x_i \hat x_j}{n} \right), \qquad
    \frac{\partial r}{\partial x_j} = -\frac{r^2 w_j \hat x_j}{n}

and run on the same four kernels as the first order. Shapes in comments: x is (..., C, ...); (C) is a
per-channel vector in broadcast shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from batchnorm import checks
from batchnorm.functional import Axis
from batchnorm.kernels import KernelSet, pick
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.vectors import Centre, centre, compute, slope, sums_with, weights_of

Array = Any


def batch_norm_jvp(
    dx: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    r"""Tangents of `batch_norm`'s results along tangents of its arguments: forward mode.

    .. math::
        \dot y = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \left( \dot x
        - \frac{\sum w \dot x + \hat x \sum w \dot x \hat x}{n} \right) + \dot\gamma \hat x + \dot\beta,
        \qquad \dot\mu = \frac{\sum w \dot x}{n}, \qquad
        \dot{\sigma^2} = \frac{2 \sum w \dot x (x - \mu)}{n}

    Parameters
    ----------
    dx : array, shape (..., C, ...), or None
        Tangent of x; None for 0.
    dgamma, dbeta : array, shape (C,), or None
        Tangents of gamma and beta; None for 0.
    x, gamma, axis, eps, where
        As they were given to `batch_norm`.
    stats : Moments
        What `batch_norm` returned.

    Returns
    -------
    dy : array
        Tangent of y, of the shape, dtype, library and device of `x`.
    dmean, dvar : array, shape (C,)
        Tangents of the batch's mean and variance, in the dtypes of `stats`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`.
    """
    at = _checked(x, stats, gamma, where, axis, dx=dx)
    checks.vectors(at, dgamma=dgamma, dbeta=dbeta)
    eps = checks.scalar("eps", eps, 0)
    call = _Call.of(at, x, stats, gamma, where, eps, dx, dgamma, dbeta)
    if dx is None:
        dx = at.xp.zeros_like(x)
    dy, total, total_x = _along(call, dx, dgamma, dbeta)
    dmean, dvar = total / call.n, 2 * total_x / (call.n * call.rstd)  # (C), (C)
    vectors = (at.xp.astype(at.squeeze(v), stats.var.dtype) for v in (dmean, dvar))
    return at.xp.astype(dy, x.dtype, copy=False), *vectors


def batch_norm_double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
) -> tuple[Array, Array, Array]:
    r"""Gradients of `batch_norm_backward`: of a loss in its results, to its arguments.

    With u for `ddx`, a for `ddgamma`, b for `ddbeta`, :math:`S_1 = \sum dy`,
    :math:`S_2 = \sum dy \hat x`, :math:`U_1 = \sum w u`, :math:`U_2 = \sum w u \hat x` and
    :math:`Q = \sum u \, dy - (S_1 U_1 + S_2 U_2)/n`:

    .. math::
        \bar{dy} &= \gamma r \left( u - \frac{U_1 + \hat x U_2}{n} \right) + a \hat x + b, \qquad
        \bar\gamma = r Q \\
        \bar x &= r \left( e - w \left( \frac{\sum e}{n}
        + \hat x \, \frac{\sum e \hat x + \gamma r Q}{n} \right) \right), \qquad
        e = a \, dy - \frac{\gamma r}{n} (U_2 \, dy + S_2 w u)

    Parameters
    ----------
    ddx : array, shape (..., C, ...), or None
        Gradient of the loss with respect to dx; None for 0.
    ddgamma, ddbeta : array, shape (C,), or None
        Gradients of the loss with respect to dgamma and dbeta; None for 0.
    dy, x, stats, gamma, axis, eps, where
        As they were given to `batch_norm_backward`.

    Returns
    -------
    d_dy, d_x : array
        Gradients with respect to dy and x, of the shape, dtype, library and device of `x`. The second
        is the whole one: through the statistics too.
    d_gamma : array, shape (C,)
        In the dtype of gamma; without gamma in float32, or float64 for float64 data.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`.
    """
    at = _checked(x, stats, gamma, where, axis, dy=dy, ddx=ddx)
    checks.vectors(at, ddgamma=ddgamma, ddbeta=ddbeta)
    eps = checks.scalar("eps", eps, 0)
    call = _Call.of(at, x, stats, gamma, where, eps, dy, ddx, ddgamma, ddbeta)
    xp, rstd, n, a = at.xp, call.rstd, call.n, call.a
    dy = compute(at, dy)  # (..., C, ...)
    u = xp.zeros_like(dy) if ddx is None else compute(at, ddx)  # (..., C, ...)
    direct = at.vector(0.0 if ddgamma is None else ddgamma)  # (C)

    d_dy, u1, u2 = _along(call, u, ddgamma, ddbeta)
    zero = xp.zeros_like(call.mid.m)  # (C)
    own_x, own_dy, own_u, own_w = _again(call, (call.x, dy, u, call.w), ())
    s1, s2 = _sums(call._replace(x=own_x), own_dy, own_w)  # (C), (C)
    _, product = call.kernels.grad_sums(own_dy, own_u, zero, None, at)  # (C): sum of u dy
    q = product - (s1 * u1 + s2 * u2) / n  # (C)

    # e = k dy + h w u, and its sums.
    k, h = direct - a * u2 / n, -a * s2 / n  # (C), (C)
    sum_e = k * s1 + h * u1  # (C)
    sum_e_x = k * s2 + h * u2  # (C)
    # d_x = rstd (k dy + w (h u - sum_e / n - x_hat (sum_e_x + a q) / n))
    slope_x = -rstd * rstd * (sum_e_x + a * q) / n  # (C)
    constant = -rstd * sum_e / n - slope_x * call.mid.rest  # (C)
    k, h, slope_x, constant = (compute(at, v) for v in (rstd * k, rstd * h, slope_x, constant))
    x_again, dy, u, w = _again(call, (call.x, dy, u, call.w), (k, h, slope_x, constant))
    d_x = call.kernels.scale_shift(dy, zero, k, zero, at, None)
    d_x = _add(call, d_x, u, zero, h, zero, w)
    d_x = _add(call, d_x, x_again, call.mid.m, slope_x, constant, w)

    dtype = at.compute if gamma is None else gamma.dtype
    d_gamma = xp.astype(at.squeeze(rstd * q), dtype)
    return xp.astype(d_dy, x.dtype, copy=False), xp.astype(d_x, x.dtype, copy=False), d_gamma


class _Call(NamedTuple):
    """What all sums and outputs of a call share, with the big arrays in what they are worked on in."""

    kernels: KernelSet
    at: Layout
    x: Array
    w: Array | None
    mid: Centre
    n: Array
    rstd: Array
    a: Array

    @classmethod
    def of(
        cls,
        at: Layout,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        where: Array | None,
        eps: float,
        *others: Array | None,
    ) -> _Call:
        counted = stats.count if hasattr(stats.count, "dtype") else None
        kernels = pick(x, gamma, where, counted, *stats[1:], *others)
        x = compute(at, x)  # (..., C, ...)
        n = at.vector(stats.count)  # (C)
        n = at.xp.where(n > 0, n, at.xp.ones_like(n))  # (C)
        w = weights_of(where, x.ndim)
        rstd, a = slope(at, stats.var, gamma, eps)  # (C), (C)
        return cls(kernels, at, x, w, centre(at, stats), n, rstd, a)


def _checked(
    x: Array, stats: Any, gamma: Array | None, where: Array | None, axis: Axis, **like: Array | None
) -> Layout:
    at = checks.subject(x, axis)
    for argument, other in like.items():
        if other is not None or argument == "dy":
            checks.like(at, x, argument, other)
    checks.statistics(at, stats)
    checks.vectors(at, gamma=gamma)
    checks.weights(at, x, where)
    return at


def _sums(call: _Call, v: Array, w: Array | None) -> tuple[Array, Array]:
    """Σv and Σv·x_hat of each channel; a value of x without weight and without v may be NaN."""
    total, total_x = sums_with(call.kernels, call.at, v, call.x, call.mid, w)
    return total, call.rstd * total_x  # (C), (C)


def _along(
    call: _Call, u: Array, dgamma: Array | None, dbeta: Array | None
) -> tuple[Array, Array, Array]:
    """The tangent of y along u, dgamma and dbeta, and Σw·u and Σw·u·x_hat."""
    at, xp = call.at, call.at.xp
    u = weighted = compute(at, u)  # (..., C, ...)
    x = finite = call.x  # (..., C, ...)
    if call.w is not None:  # what weighs nothing may be NaN: its y is, but no other value's
        w = xp.astype(call.w, at.compute)  # (..., C, ...)
        weighted = xp.where(w > 0, w * u, xp.zeros_like(u))  # (..., C, ...)
        x = xp.where(w > 0, x, call.mid.m)  # (..., C, ...)
        finite = xp.where((w > 0) | xp.isfinite(call.x), call.x, call.mid.m)  # (..., C, ...)
    u1, u2 = _sums(call._replace(x=x), weighted, None)  # (C), (C)
    b = call.rstd * (at.vector(0.0 if dgamma is None else dgamma) - call.a * u2 / call.n)  # (C)
    c = at.vector(0.0 if dbeta is None else dbeta) - call.a * u1 / call.n - b * call.mid.rest  # (C)
    a, b, c = (compute(at, v) for v in (call.a, b, c))
    finite, u = _again(call, (finite, u), (a, b, c))
    zero = xp.zeros_like(call.mid.m)  # (C)
    scaled = call.kernels.scale_shift(u, zero, a, zero, at, None)  # (..., C, ...)
    return _add(call, scaled, finite, call.mid.m, b, c, None), u1, u2


def _again(call: _Call, big: tuple[Array | None, ...], vectors: tuple[Array, ...]) -> Sequence[Array]:
    """The big arrays of a pass with these vectors; what reads in chunks reads them anew for it."""
    if call.kernels.again is None:
        return big
    zero, one = call.at.xp.zeros_like(call.mid.m), call.at.xp.ones_like(call.mid.m)  # (C), (C)
    found: Sequence[Array] = call.kernels.again(big, (*vectors, call.mid.m, zero, one))
    return found


def _add(call: _Call, v: Array, x: Array, m: Array, b: Array, c: Array, w: Array | None) -> Array:
    """V + w·(b·(x - m) + c), in the kernel that makes dx."""
    one = call.at.xp.ones_like(call.mid.m)  # (C)
    return call.kernels.grad_input(v, x, m, one, b, c, w, call.at, None)
