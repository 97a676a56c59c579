"""Batch renormalization (Ioffe 2017): batch norm with gamma·r and beta + gamma·d."""

from __future__ import annotations

import sys
from typing import Any

import array_api_compat as compat

from batchnorm import core, groups, optimistic
from batchnorm.arguments import validate_group, validate_number
from batchnorm.arrays import constant
from batchnorm.backends.dispatch import backend_for
from batchnorm.coefficients import Renorm, renorm_corrections, renormalized, weights_of
from batchnorm.epilogue import validate_epilogue
from batchnorm.errors import fail
from batchnorm.functional import batch_norm, batch_norm_backward, moments
from batchnorm.layout import Layout
from batchnorm.moments import Moments, update_running
from batchnorm.overlap import validate_no_overlap
from batchnorm.tracing import recorded, traceable, transformed
from batchnorm.validation import (
    validate_count,
    validate_input,
    validate_out,
    validate_stats,
    validate_vectors,
    validate_weights,
)

Array = Any
Axis = int | tuple[int, ...]


@traceable
def batch_renorm(
    x: Array,
    running_mean: Array,
    running_var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    r_max: float | None = None,
    d_max: float | None = None,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    residual: Array | None = None,
    activation: Any = None,
    out: Array | None = None,
) -> tuple[Array, Moments]:
    r"""Normalize by the batch's statistics, corrected towards the running ones.

    .. math::
        y = \gamma \left( \frac{x - \mu_B}{\sigma_B} \, r + d \right) + \beta, \qquad
        r = \operatorname{clip}\left(\frac{\sigma_B}{\sigma}, \frac{1}{r_{max}}, r_{max}\right), \qquad
        d = \operatorname{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    with :math:`\sigma^2 = \text{variance} + \epsilon`. Without limits y is normalized by the running
    statistics, as in inference; with ``r_max=1`` and ``d_max=0`` it is that of `batch_norm`, to the bit.
    The gradient takes r and d as constants.

    Parameters
    ----------
    x : array, shape (..., C, ...)
        float16, bfloat16, float32 or float64, with C channels at `axis`.
    running_mean, running_var : array, shape (C,)
        The running statistics before this batch.
    gamma, beta : array, shape (C,), optional
        Scale and shift of each channel; 1 and 0 where they are left out.
    r_max : float, optional
        The limit of r, at least 1; None for none.
    d_max : float, optional
        The limit of d and of -d, at least 0; None for none.
    axis, eps, where, group, residual, activation, out
        As in `batch_norm`.

    Returns
    -------
    y : array
        Of the shape, dtype, library and device of `x`.
    stats : Moments
        Of the batch; `batch_renorm_backward` and `update_renorm` take it.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; or a limit that is out of its range.

    References
    ----------
    Ioffe (2017), Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models, Algorithm 1.
    """
    if group is None and out is None:
        given = x, gamma, beta, axis, eps, where, residual, activation, None, False
        done = _in_core("forward", x, given, running_mean, running_var, r_max, d_max)
        if done is not None:
            return done  # type: ignore[no-any-return]
    validate_group(group)
    with groups.call(group, "batch_renorm") as call:
        layout = validate_input(x, axis)
        validate_vectors(layout, gamma=gamma, beta=beta)
        renorm = _renorm(layout, running_mean, running_var, r_max, d_max)
        validate_weights(layout, x, where)
        if group is None:
            validate_count(layout, x, where)
        epilogue = validate_epilogue(layout, x, residual, activation)
        validate_out(layout, x, out)
        named = {"running_mean": running_mean, "running_var": running_var}
        validate_no_overlap(out, x=x, gamma=gamma, beta=beta, where=where, residual=residual, **named)
        eps = validate_number("eps", eps, 0)
        if _limits_are_closed(renorm):
            settings = {"axis": axis, "eps": eps, "where": where, "group": group}
            settings |= {"residual": residual, "activation": activation, "out": out}
            return batch_norm(x, gamma, beta, **settings)
        if group is None and not _differentiated(x, gamma, beta, where, residual):
            backend = backend_for(x, gamma, beta, where, out, residual, running_mean, running_var)
            w, last = weights_of(where, x.ndim), {"epilogue": epilogue, "out": out}
            return backend.renorm_forward(x, w, gamma, beta, eps, layout, renorm, **last)
        frozen = constant(x)
        stats = moments(frozen, axis=axis, where=where)
        if call is not None:
            call.announce_forward(layout, frozen)
            stats = call.allreduce_moments(stats)
    r, d = renorm_corrections(layout.xp, stats, eps, renorm)
    gamma, beta = renormalized(layout.xp, gamma, beta, r, d)  # not rounded to their dtypes
    settings = {"axis": axis, "eps": eps, "where": where, "group": group}
    return batch_norm(x, gamma, beta, **settings, residual=residual, activation=activation, out=out)


def batch_renorm_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    running_mean: Array,
    running_var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    r_max: float | None = None,
    d_max: float | None = None,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    residual: Array | bool | None = None,
    activation: Any = None,
    y: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    r"""Return the gradients of `batch_renorm`, for which r and d are constants.

    .. math::
        dx = dx_{BN}(\gamma r), \qquad d\gamma = r \sum g \, \hat x + d \sum g, \qquad
        d\beta = \sum g

    Parameters
    ----------
    dy : array, shape (..., C, ...)
        Gradient of the loss with respect to y.
    stats : Moments
        What `batch_renorm` returned.
    x, running_mean, running_var, gamma, beta, r_max, d_max, axis, eps, where, group, activation
        As they were given to `batch_renorm`; the running statistics are those before the batch.
    residual, y, out
        As in `batch_norm_backward`.

    Returns
    -------
    dx, dgamma, dbeta : array
        As from `batch_norm_backward`, and with a residual dresidual.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_backward`; or a limit that is out of its range.

    References
    ----------
    Ioffe (2017), section 3.
    """
    if group is None and out is None:
        given = dy, x, stats, gamma, beta, axis, eps, where, residual, activation, y, None, False
        done = _in_core("backward", x, given, running_mean, running_var, r_max, d_max)
        if done is not None:
            return done  # type: ignore[no-any-return]
    validate_group(group)
    with groups.call(group, "batch_renorm_backward"):
        layout = validate_input(x, axis)
        validate_stats(layout, stats)
        validate_vectors(layout, gamma=gamma, beta=beta)
        renorm = _renorm(layout, running_mean, running_var, r_max, d_max)
        eps = validate_number("eps", eps, 0)
        r, d = renorm_corrections(layout.xp, stats, eps, renorm)
        scaled = renormalized(layout.xp, gamma, beta, r, d)  # not rounded to the dtypes of parameters
    settings: dict[str, Any] = {"axis": axis, "eps": eps, "where": where, "group": group, "out": out}
    settings |= {"residual": residual, "activation": activation, "y": y}
    dx, dgamma, dbeta, *dresidual = batch_norm_backward(dy, x, stats, *scaled, **settings)
    dtype = layout.compute if gamma is None else gamma.dtype
    sums = (layout.xp.astype(v, dtype, copy=False) for v in (r * dgamma + d * dbeta, dbeta))  # (C)
    return dx, *sums, *dresidual


def update_renorm(
    mean: Array, var: Array, stats: Moments, *, momentum: float | Array = 0.1, eps: float = 1e-5
) -> tuple[Array, Array]:
    r"""Move running statistics towards those of a batch: the mean, and the standard deviation.

    .. math::
        \mu' = (1 - m) \mu + m \mu_B, \qquad \sigma' = (1 - m) \sigma + m \sigma_B, \qquad
        \sigma^2 = \text{variance} + \epsilon

    Batch renormalization averages standard deviations, where batch norm averages variances.

    Parameters
    ----------
    mean, var : array, shape (C,)
        The running mean and variance.
    stats : Moments
        The moments of the batch.
    momentum : float or 0-d array, default 0.1
        The weight m of the new batch, from 0 to 1.
    eps : float, default 1e-5
        Added to each variance.

    Returns
    -------
    mean, var : array, shape (C,)
        New arrays in the dtypes of the arguments. A channel with a count of 0 is unchanged.

    Raises
    ------
    TypeError, ValueError
        As `update_running`; or a number is out of range.

    References
    ----------
    Ioffe (2017), Algorithm 1.
    """
    new_mean, _ = update_running(mean, var, stats, momentum=momentum, correction=0)
    eps = validate_number("eps", eps, 0)
    layout = validate_input(mean, tuple(range(mean.ndim)), "mean")
    xp = layout.xp
    n, old, own = (layout.vector(v) for v in (stats.count, var, stats.var))  # (C)
    m = xp.astype(momentum, layout.wide) if hasattr(momentum, "dtype") else momentum
    one = xp.ones_like(old)
    # 1 - m too, before it is rounded to the dtype of statistics.
    m, rest = xp.where(n > 0, one * m, 0 * one), xp.where(n > 0, one * (1 - m), one)  # (C), (C)
    # ((1 - m) s + m t)² less eps, where st less eps is (vu + eps (v + u)) / (st + eps): nothing cancels.
    both = xp.sqrt(old + eps) * xp.sqrt(own + eps) + eps
    both = xp.where(both > 0, both, one)
    product = old / both * own + eps * ((old + own) / both)
    moved = rest * rest * old + m * m * own + 2 * m * rest * product
    return new_mean, xp.astype(moved, var.dtype, copy=False)


def _in_core(
    name: str, x: Array, given: tuple[Any, ...], mean: Array, var: Array, r_max: Any, d_max: Any
) -> Any:
    """Run a whole call in compiled code; None where that declines it."""
    fast = optimistic.for_array(x)
    if fast is not core.load() or mean is None or var is None:
        return None
    limits = validate_limits(r_max, d_max)
    return getattr(fast, name)(*given, (mean, var, *limits))


def _limits_are_closed(renorm: Renorm) -> bool:
    """Return whether r is 1 and d is 0, whatever a batch is: then this is batch norm."""
    return (type(renorm.r_max), type(renorm.d_max)) == (float, float) and renorm[2:] == (1.0, 0.0)


def _differentiated(x: Array, *others: Array | None) -> bool:
    """Return whether a framework may differentiate a call: then it is made of differentiable ones."""
    if compat.is_torch_array(x):
        return recorded((x, *others)) is not None or transformed() is not None
    return bool(compat.is_jax_array(x))


def _renorm(layout: Layout, running_mean: Array, running_var: Array, r_max: Any, d_max: Any) -> Renorm:
    """Validate what a batch is compared with, and the limits."""
    if running_mean is None or running_var is None:
        name = "running_mean" if running_mean is None else "running_var"
        fail(TypeError, name, "None", f"an array of shape {layout.channels}")
    validate_vectors(layout, running_mean=running_mean, running_var=running_var)
    limits = validate_limits(r_max, d_max)
    return Renorm(constant(running_mean), constant(running_var), *limits)


def validate_limits(r_max: Any, d_max: Any) -> tuple[Any, Any]:
    """Check the limits of r and d; None is the largest number."""
    most = sys.float_info.max
    return (
        most if r_max is None else validate_number("r_max", r_max, 1),
        most if d_max is None else validate_number("d_max", d_max, 0),
    )
