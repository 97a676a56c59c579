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

from batchnorm.arguments import validate_number
from batchnorm.backends.base import Backend
from batchnorm.backends.dispatch import backend_for
from batchnorm.coefficients import (
    forward_coefficients,
    in_compute,
    ones_for_zeros,
    rounded_mean,
    rstd_and_scale,
    weights_of,
)
from batchnorm.epilogue import (
    Epilogue,
    curvature,
    tangent_through,
    validate_backward_epilogue,
    with_residual,
)
from batchnorm.errors import fail
from batchnorm.functional import Axis
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import (
    validate_input,
    validate_same_shape,
    validate_stats,
    validate_vectors,
    validate_weights,
)

Array = Any


def batch_norm_jvp(
    dx: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    residual: Array | bool | None = None,
    dresidual: Array | None = None,
    activation: Any = None,
    y: Array | None = None,
) -> tuple[Array, Array, Array]:
    r"""Return tangents of `batch_norm`'s results along tangents of its arguments: forward mode.

    .. math::
        \dot h = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \left( \dot x
        - \frac{\sum w \dot x + \hat x \sum w \dot x \hat x}{n} \right) + \dot\gamma \hat x + \dot\beta
        + \dot z, \qquad \dot y = \operatorname{act}'(h) \, \dot h,

    .. math::
        \dot\mu = \frac{\sum w \dot x}{n}, \qquad
        \dot{\sigma^2} = \frac{2 \sum w \dot x (x - \mu)}{n}

    Parameters
    ----------
    dx : array, shape (..., C, ...), or None
        Tangent of x; None for 0.
    dgamma, dbeta : array, shape (C,), or None
        Tangents of gamma and beta; None for 0.
    x, gamma, beta, axis, eps, where, activation
        As they were given to `batch_norm`.
    stats : Moments
        What `batch_norm` returned.
    residual, y
        As in `batch_norm_backward`.
    dresidual : array, shape (..., C, ...), or None
        Tangent of the residual; None for 0.

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
    layout = _checked(x, stats, gamma, where, axis, dx=dx)
    validate_vectors(layout, beta=beta, dgamma=dgamma, dbeta=dbeta)
    epilogue = _checked_epilogue(layout, x, residual, activation, y, dresidual=dresidual)
    eps = validate_number("eps", eps, 0)
    last = {"beta": beta, "epilogue": epilogue, "dresidual": dresidual}
    return jvp(layout, dx, dgamma, dbeta, x, stats, gamma, where, eps, **last)


def jvp(
    layout: Layout,
    dx: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    where: Array | None,
    eps: float,
    *,
    beta: Array | None = None,
    epilogue: Epilogue | None = None,
    dresidual: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return what `batch_norm_jvp` does, of validated arguments."""
    call = _Call.of(layout, x, stats, gamma, where, eps, dx, dgamma, dbeta)
    if dx is None:
        dx = layout.xp.zeros_like(x)
    dy, total, total_x = _along(call, dx, dgamma, dbeta)
    if dresidual is not None:
        dy = dy + in_compute(layout, dresidual)  # (..., C, ...)
    if epilogue is not None:
        h = before_activation(layout, call.x, stats, gamma, beta, eps, epilogue)  # (..., C, ...)
        dy = tangent_through(layout, h, dy, epilogue)
    dmean, dvar = total / call.n, 2 * total_x / (call.n * call.rstd)  # (C), (C)
    vectors = (layout.xp.astype(layout.squeeze(v), stats.var.dtype) for v in (dmean, dvar))
    return layout.xp.astype(dy, x.dtype, copy=False), *vectors


def batch_norm_double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    residual: Array | bool | None = None,
    ddresidual: Array | None = None,
    activation: Any = None,
    y: Array | None = None,
) -> tuple[Array, ...]:
    r"""Return gradients of `batch_norm_backward`: of a loss in its results, to its arguments.

    With u for `ddx`, a for `ddgamma`, b for `ddbeta`, :math:`S_1 = \sum dy`,
    :math:`S_2 = \sum dy \hat x`, :math:`U_1 = \sum w u`, :math:`U_2 = \sum w u \hat x` and
    :math:`Q = \sum u \, dy - (S_1 U_1 + S_2 U_2)/n`:

    .. math::
        \bar{dy} &= \gamma r \left( u - \frac{U_1 + \hat x U_2}{n} \right) + a \hat x + b, \qquad
        \bar\gamma = r Q \\
        \bar x &= r \left( e - w \left( \frac{\sum e}{n}
        + \hat x \, \frac{\sum e \hat x + \gamma r Q}{n} \right) \right), \qquad
        e = a \, dy - \frac{\gamma r}{n} (U_2 \, dy + S_2 w u)

    With an activation, dy is :math:`g = \operatorname{act}'(h) \, dy` above, and

    .. math::
        \bar{dy} = \operatorname{act}'(h) \, (\bar g + \bar{dz}), \qquad
        \bar h = \operatorname{act}''(h) \, dy \, (\bar g + \bar{dz})

    whose gradients through `batch_norm` are added to those of x, gamma, beta and z. For all but "silu"
    the second derivative is 0.

    Parameters
    ----------
    ddx : array, shape (..., C, ...), or None
        Gradient of the loss with respect to dx; None for 0.
    ddgamma, ddbeta : array, shape (C,), or None
        Gradients of the loss with respect to dgamma and dbeta; None for 0.
    dy, x, stats, gamma, beta, axis, eps, where, residual, activation, y
        As they were given to `batch_norm_backward`.
    ddresidual : array, shape (..., C, ...), or None
        Gradient of the loss with respect to dresidual; None for 0.

    Returns
    -------
    d_dy, d_x : array
        Gradients with respect to dy and x, of the shape, dtype, library and device of `x`. The second
        is the whole one: through the statistics too.
    d_gamma : array, shape (C,)
        In the dtype of gamma; without gamma in float32, or float64 for float64 data.
    d_beta : array, shape (C,)
        As d_gamma; only with an activation or a residual.
    d_residual : array
        As d_x; only with a residual.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`.
    """
    layout = _checked(x, stats, gamma, where, axis, dy=dy, ddx=ddx)
    validate_vectors(layout, beta=beta, ddgamma=ddgamma, ddbeta=ddbeta)
    epilogue = _checked_epilogue(layout, x, residual, activation, y, ddresidual=ddresidual)
    eps = validate_number("eps", eps, 0)
    if epilogue is None:
        return double_backward(layout, ddx, ddgamma, ddbeta, dy, x, stats, gamma, where, eps)
    backend = backend_for(dy, x, gamma, beta, where, *stats[1:], ddx, ddresidual, *epilogue[1:3])
    g, *_ = backend.through_epilogue(dy, x, stats, gamma, beta, eps, layout, epilogue)
    d_g, d_x, d_gamma = double_backward(
        layout, ddx, ddgamma, ddbeta, g, x, stats, gamma, where, eps, rounded=False
    )
    call = _Call.of(layout, x, stats, gamma, where, eps, dy, ddx, ddgamma, ddbeta)
    if ddresidual is not None:
        d_g = d_g + in_compute(layout, ddresidual)  # (..., C, ...)
    h = before_activation(layout, call.x, stats, gamma, beta, eps, epilogue)  # (..., C, ...)
    d_dy = tangent_through(layout, h, d_g, epilogue)  # (..., C, ...)
    bend = curvature(layout, h, epilogue)  # (..., C, ...), or None
    xp = layout.xp
    if bend is None:
        d_beta, d_h = xp.zeros_like(d_gamma), xp.zeros_like(d_x)
    else:
        d_h = bend * in_compute(layout, dy) * d_g  # (..., C, ...)
        w = call.w
        more, more_gamma, d_beta = call.backend.norm_backward(d_h, call.x, w, stats, gamma, eps, layout)
        d_x, d_gamma = d_x + more, d_gamma + more_gamma
    d_dy, d_x, d_h = (xp.astype(v, x.dtype, copy=False) for v in (d_dy, d_x, d_h))
    return d_dy, d_x, d_gamma, d_beta, *((d_h,) if epilogue.gradient else ())


def double_backward(
    layout: Layout,
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    where: Array | None,
    eps: float,
    *,
    rounded: bool = True,
) -> tuple[Array, Array, Array]:
    """Return what `batch_norm_double_backward` does without an epilogue, of validated arguments.

    The gradients of dy and x are in the dtype of x, or else in that of the arithmetic.
    """
    call = _Call.of(layout, x, stats, gamma, where, eps, dy, ddx, ddgamma, ddbeta)
    xp, rstd, n, a = layout.xp, call.rstd, call.n, call.a
    dy = in_compute(layout, dy)  # (..., C, ...)
    u = xp.zeros_like(dy) if ddx is None else in_compute(layout, ddx)  # (..., C, ...)
    direct = layout.vector(0.0 if ddgamma is None else ddgamma)  # (C)

    d_dy, u1, u2 = _along(call, u, ddgamma, ddbeta)
    zero = xp.zeros_like(call.m)  # (C)
    own_x, own_dy, own_u, own_w = _again(call, (call.x, dy, u, call.w), ())
    s1, s2 = _sums(call._replace(x=own_x), own_dy, own_w)  # (C), (C)
    _, product = call.backend.grad_sums(own_dy, own_u, zero, None, layout)  # (C): sum of u dy
    q = product - (s1 * u1 + s2 * u2) / n  # (C)

    # e = k dy + h w u, and its sums.
    k, h = direct - a * u2 / n, -a * s2 / n  # (C), (C)
    sum_e = k * s1 + h * u1  # (C)
    sum_e_x = k * s2 + h * u2  # (C)
    # d_x = rstd (k dy + w (h u - sum_e / n - x_hat (sum_e_x + a q) / n))
    slope_x = -rstd * rstd * (sum_e_x + a * q) / n  # (C)
    constant = -rstd * sum_e / n - slope_x * call.residual  # (C)
    k, h, slope_x, constant = (in_compute(layout, v) for v in (rstd * k, rstd * h, slope_x, constant))
    x_again, dy, u, w = _again(call, (call.x, dy, u, call.w), (k, h, slope_x, constant))
    d_x = call.backend.scale_shift(dy, zero, k, zero, layout)
    d_x = _add(call, d_x, u, zero, h, zero, w)
    d_x = _add(call, d_x, x_again, call.m, slope_x, constant, w)

    dtype = layout.compute if gamma is None else gamma.dtype
    d_gamma = xp.astype(layout.squeeze(rstd * q), dtype)
    if not rounded:
        return d_dy, d_x, d_gamma
    return xp.astype(d_dy, x.dtype, copy=False), xp.astype(d_x, x.dtype, copy=False), d_gamma


class _Call(NamedTuple):
    """What all sums and outputs of a call share, with the big arrays in what they are worked on in."""

    backend: Backend
    layout: Layout
    x: Array
    w: Array | None
    m: Array
    residual: Array
    n: Array
    rstd: Array
    a: Array

    @classmethod
    def of(
        cls,
        layout: Layout,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        where: Array | None,
        eps: float,
        *others: Array | None,
    ) -> _Call:
        counted = stats.count if hasattr(stats.count, "dtype") else None
        backend = backend_for(x, gamma, where, counted, *stats[1:], *others)
        x = in_compute(layout, x)  # (..., C, ...)
        n = ones_for_zeros(layout.xp, layout.vector(stats.count))  # (C)
        w = weights_of(where, x.ndim)
        rstd, a = rstd_and_scale(layout, stats.var, gamma, eps)  # (C), (C)
        return cls(backend, layout, x, w, *rounded_mean(layout, stats), n, rstd, a)


def _checked(
    x: Array, stats: Any, gamma: Array | None, where: Array | None, axis: Axis, **like: Array | None
) -> Layout:
    layout = validate_input(x, axis)
    for argument, other in like.items():
        if other is not None or argument == "dy":
            validate_same_shape(layout, x, argument, other)
    validate_stats(layout, stats)
    validate_vectors(layout, gamma=gamma)
    validate_weights(layout, x, where)
    return layout


def _checked_epilogue(
    layout: Layout, x: Array, residual: Any, activation: Any, y: Any, **along: Array | None
) -> Epilogue | None:
    """Check the epilogue of a backward pass, and what goes along with its residual."""
    epilogue = validate_backward_epilogue(layout, x, residual, activation, y)
    for argument, v in along.items():
        if v is not None:
            validate_same_shape(layout, x, argument, v)
            if epilogue is None or not epilogue.gradient:
                fail(ValueError, argument, "an array", "None, as there is no residual")
    return epilogue


def before_activation(
    layout: Layout,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    epilogue: Epilogue,
) -> Array:
    """Return what the activation was applied to; or y, from which its derivative follows as well."""
    if epilogue.y is not None:
        return in_compute(layout, epilogue.y)
    m, a, b = forward_coefficients(layout, stats, gamma, beta, eps)  # (C), (C), (C)
    return with_residual(layout, a * (in_compute(layout, x) - m) + b, epilogue)  # (..., C, ...)


def _sums(call: _Call, v: Array, w: Array | None) -> tuple[Array, Array]:
    """Return Σv and Σv·x_hat of each channel; elements of zero weight and zero v may be NaN in x."""
    total, total_x = call.backend.grad_sums(v, call.x, call.m, w, call.layout)  # (C), (C)
    return total, call.rstd * (total_x - call.residual * total)


def _along(
    call: _Call, u: Array, dgamma: Array | None, dbeta: Array | None
) -> tuple[Array, Array, Array]:
    """Return the tangent of y along u, dgamma and dbeta, and Σw·u and Σw·u·x_hat."""
    layout, xp = call.layout, call.layout.xp
    u = weighted = in_compute(layout, u)  # (..., C, ...)
    x = finite = call.x  # (..., C, ...)
    if call.w is not None:  # elements of zero weight may be NaN: their y is, but no other value's
        w = xp.astype(call.w, layout.compute)  # (..., C, ...)
        weighted = xp.where(w > 0, w * u, xp.zeros_like(u))  # (..., C, ...)
        x = xp.where(w > 0, x, call.m)  # (..., C, ...)
        finite = xp.where((w > 0) | xp.isfinite(call.x), call.x, call.m)  # (..., C, ...)
    u1, u2 = _sums(call._replace(x=x), weighted, None)  # (C), (C)
    b = call.rstd * (layout.vector(0.0 if dgamma is None else dgamma) - call.a * u2 / call.n)  # (C)
    c = layout.vector(0.0 if dbeta is None else dbeta) - call.a * u1 / call.n - b * call.residual  # (C)
    a, b, c = (in_compute(layout, v) for v in (call.a, b, c))
    finite, u = _again(call, (finite, u), (a, b, c))
    zero = xp.zeros_like(call.m)  # (C)
    scaled = call.backend.scale_shift(u, zero, a, zero, layout)  # (..., C, ...)
    return _add(call, scaled, finite, call.m, b, c, None), u1, u2


def _again(
    call: _Call, big: tuple[Array | None, ...], vectors: tuple[Array, ...]
) -> Sequence[Array | None]:
    """Return the big arrays for kernels that take these vectors; a lazy library reads them again."""
    zero, one = call.layout.xp.zeros_like(call.m), call.layout.xp.ones_like(call.m)  # (C), (C)
    return call.backend.reread(big, (*vectors, call.m, zero, one))


def _add(call: _Call, v: Array, x: Array, m: Array, b: Array, c: Array, w: Array | None) -> Array:
    """Return v + w·(b·(x − m) + c), by the kernel that makes dx."""
    one = call.layout.xp.ones_like(call.m)  # (C)
    return call.backend.grad_input(v, x, m, one, b, c, w, call.layout)
