"""The equations: check, pick kernels, and run them with the arithmetic of `vectors` between them."""

from __future__ import annotations

from typing import Any

from batchnorm import checks, groups
from batchnorm.kernels import pick, written
from batchnorm.moments import Moments
from batchnorm.tracing import traceable
from batchnorm.vectors import (
    backward_from,
    centre,
    compute,
    grad_params,
    moments_by,
    scale_shift_by,
    slope,
    sums_with,
    weights_of,
)

Array = Any
Axis = int | tuple[int, ...]


@traceable
def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    out: Array | None = None,
) -> tuple[Array, Moments]:
    r"""Normalize each channel by the batch's own mean and variance, then scale and shift it.

    .. math::
        y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
        \mu = \frac{1}{n} \sum x, \qquad \sigma^2 = \frac{1}{n} \sum (x - \mu)^2

    Parameters
    ----------
    x : array, shape (..., C, ...)
        float16, bfloat16, float32 or float64, with C channels at `axis`.
    gamma, beta : array, shape (C,), optional
        Scale and shift of each channel; 1 and 0 where they are left out.
    axis : int or tuple of ints, default 1
        The channel axis: 1 for channels second, -1 for channels last. A tuple (in increasing order)
        keeps several axes; gamma then has the shape ``(x.shape[a] for a in axis)``.
    eps : float, default 1e-5
        Added to the variance.
    where : array, optional
        A mask, or weights >= 0, that broadcasts to `x`: what each value weighs in the mean and the
        variance. All of `x` is normalized, also what weighs nothing; that may hold NaN.
    group : object with ``all_reduce(array) -> array``, optional
        Sums an array over the members of a group, each of which calls this function with its part of
        the batch. The statistics are then those of the joined batch.
    out : array, optional
        Where to write y, of the shape and dtype of `x`; may be `x`. Not for immutable or lazy arrays.

    Returns
    -------
    y : array
        Of the shape, dtype, library and device of `x`.
    stats : Moments
        Of the batch; `batch_norm_backward` and `update_running` take it.

    Raises
    ------
    TypeError
        A dtype that cannot be normalized, or arrays of different libraries.
    ValueError
        A shape that does not fit, arrays on different devices, an empty batch, fewer than two values
        in a channel, or (where values can be looked at) a negative weight.

    References
    ----------
    Ioffe & Szegedy (2015), Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift, Algorithm 1.
    """
    checks.group(group)
    with groups.call(group, "batch_norm") as call:
        plain = where is None and group is None
        key = checks.key("batch_norm", axis, out, x, gamma, beta) if plain else None
        at = checks.passed(key)
        if at is None:
            at = checks.subject(x, axis)
            checks.vectors(at, gamma=gamma, beta=beta)
            checks.weights(at, x, where)
            if group is None:
                checks.enough_values(at, x, where)
            checks.output(at, x, out)
            checks.scalar("eps", eps, 0)
            checks.remember(key, at)
        checks.apart(out, x=x, gamma=gamma, beta=beta, where=where)
        eps = checks.scalar("eps", eps, 0)

        kernels = pick(x, gamma, beta, where, out)
        y: Array
        if call is not None:
            call.announce_forward(at, x)
            if kernels.joined is None or out is not None:
                return groups.forward(kernels, at, x, where, gamma, beta, eps, out, group)
            y, stats = kernels.joined(x, where, gamma, beta, eps, at, group)
            return y, stats
    if kernels.forward is not None:
        y, stats = kernels.forward(x, weights_of(where, x.ndim), gamma, beta, eps, at, out)
        return y, stats
    stats = moments_by(kernels, at, x, where)
    return scale_shift_by(kernels, at, x, stats, gamma, beta, eps, out), stats


@traceable
def batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    r"""Gradients of `batch_norm`, through its statistics.

    .. math::
        \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
        d\gamma = \sum dy \, \hat x, \qquad d\beta = \sum dy, \qquad
        dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \left(
        dy - w \, \frac{d\beta + \hat x \, d\gamma}{n} \right)

    Parameters
    ----------
    dy : array, shape (..., C, ...)
        Gradient of the loss with respect to y.
    x, gamma, axis, eps, where, group
        As they were given to `batch_norm`. w is `where`, or 1.
    stats : Moments
        What `batch_norm` returned.
    out : array, optional
        Where to write dx; may be `dy` or `x`.

    Returns
    -------
    dx : array
        Of the shape, dtype, library and device of `x`.
    dgamma, dbeta : array, shape (C,)
        In the dtype of gamma; without gamma in float32, or float64 for float64 data. With a `group`
        they are the sums over the joined batch, the same on every member.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; and `stats` that are not Moments of these channels.

    References
    ----------
    Ioffe & Szegedy (2015), section 3; the derivation is in the documentation.
    """
    checks.group(group)
    with groups.call(group, "batch_norm_backward") as call:
        plain = where is None and group is None and isinstance(stats, Moments)
        key = checks.key("batch_norm_backward", axis, out, dy, x, gamma, *stats) if plain else None
        at = checks.passed(key)
        if at is None:
            at = checks.subject(x, axis)
            checks.like(at, x, "dy", dy)
            checks.statistics(at, stats)
            checks.vectors(at, gamma=gamma)
            checks.weights(at, x, where)
            checks.output(at, x, out)
            checks.scalar("eps", eps, 0)
            checks.remember(key, at)
        if out is not None:
            named = {f"stats.{name}": v for name, v in zip(stats._fields, stats, strict=True)}
            checks.apart(out, dy=dy, x=x, gamma=gamma, where=where, **named)
        eps = checks.scalar("eps", eps, 0)

        counted = stats.count if hasattr(stats.count, "dtype") else None
        kernels = pick(dy, x, gamma, where, out, counted, *stats[1:])
        w = weights_of(where, x.ndim)
        if call is not None:
            call.announce_backward(at, x)
            own = sums_with(kernels, at, dy, x, centre(at, stats), w)
            joined = groups.all_reduce(group, *own)
            return backward_from(kernels, at, dy, x, w, stats, gamma, eps, joined, out)
    if kernels.backward is not None:
        dx, dgamma, dbeta = kernels.backward(dy, x, w, stats, gamma, eps, at, out)
        dtype = at.compute if gamma is None else gamma.dtype
        if dgamma.dtype == dtype:
            return dx, dgamma, dbeta
        return dx, at.xp.astype(dgamma, dtype), at.xp.astype(dbeta, dtype)
    sums = sums_with(kernels, at, dy, x, centre(at, stats), w)
    return backward_from(kernels, at, dy, x, w, stats, gamma, eps, sums, out)


@traceable
def normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    r"""Normalize by statistics that are given: inference, or a frozen layer.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    The mean is subtracted first, so that no digits cancel. `fold` gives the form y = scale·x + shift,
    which saves a subtraction and loses ``|mean|/std`` times eps.

    Parameters
    ----------
    x : array, shape (..., C, ...)
        float16, bfloat16, float32 or float64, with C channels at `axis`; may be empty.
    mean, var : array, shape (C,)
        The statistics, in any floating dtype: a float64 mean beside float32 data keeps its digits.
    gamma, beta, axis, eps, out
        As in `batch_norm`.

    Returns
    -------
    array
        y, of the shape, dtype, library and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.
    """
    key = checks.key("normalize", axis, out, x, mean, var, gamma, beta)
    at = checks.passed(key)
    if at is None:
        at = checks.subject(x, axis)
        checks.vectors(at, mean=mean, var=var, gamma=gamma, beta=beta)
        checks.output(at, x, out)
        checks.remember(key, at)
    checks.apart(out, x=x, mean=mean, var=var, gamma=gamma, beta=beta)
    eps = checks.scalar("eps", eps, 0)
    kernels = pick(x, mean, var, gamma, beta, out)
    if kernels.inference is not None:
        return kernels.inference(x, mean, var, gamma, beta, eps, at, out)
    return scale_shift_by(kernels, at, x, Moments(1, mean, var), gamma, beta, eps, out)


@traceable
def normalize_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    stats_grad: bool = False,
) -> tuple[Array, ...]:
    r"""Gradients of `normalize`, whose statistics do not depend on `x`.

    .. math::
        dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \, dy, \qquad
        d\mu = -\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \sum dy, \qquad
        d\sigma^2 = -\frac{\gamma}{2 (\sigma^2 + \epsilon)^{3/2}} \sum dy \, (x - \mu)

    Parameters
    ----------
    dy : array, shape (..., C, ...)
        Gradient of the loss with respect to y.
    x, mean, var, gamma, axis, eps
        As they were given to `normalize`.
    out : array, optional
        Where to write dx; may be `dy` or `x`.
    stats_grad : bool, default False
        Whether to return the gradients to mean and variance too.

    Returns
    -------
    dx : array
        Of the shape, dtype, library and device of `x`.
    dgamma, dbeta : array, shape (C,)
        As from `batch_norm_backward`.
    dmean, dvar : array, shape (C,)
        In the dtypes of `mean` and `var`; only with `stats_grad`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.
    """
    at = checks.subject(x, axis)
    checks.like(at, x, "dy", dy)
    checks.vectors(at, mean=mean, var=var, gamma=gamma)
    eps = checks.scalar("eps", eps, 0)
    checks.output(at, x, out)
    checks.apart(out, dy=dy, x=x, mean=mean, var=var, gamma=gamma)
    stats_grad = checks.flag("stats_grad", stats_grad)

    kernels = pick(dy, x, out, mean, var, gamma)
    mid = centre(at, Moments(1, mean, var))
    sum_dy, sum_dy_d = sums_with(kernels, at, dy, x, mid, None)
    rstd, a = slope(at, var, gamma, eps)  # (C), (C)
    grads = grad_params(at, gamma, rstd * sum_dy_d, sum_dy)
    if stats_grad:
        dmean = at.squeeze(-a * sum_dy)
        dvar = at.squeeze(-0.5 * a * rstd * (rstd * sum_dy_d))
        grads = (*grads, at.xp.astype(dmean, mean.dtype), at.xp.astype(dvar, var.dtype))
    zero, a = at.xp.zeros_like(mid.m), compute(at, a)  # (C), (C)
    if dy.dtype == x.dtype:
        return kernels.scale_shift(dy, zero, a, zero, at, out), *grads
    dx = kernels.scale_shift(compute(at, dy), zero, a, zero, at, None)
    return written(at.xp.astype(dx, x.dtype), out), *grads


@traceable
def moments(x: Array, *, axis: Axis = 1, where: Array | None = None) -> Moments:
    r"""Count, mean and population variance of each channel.

    .. math:: n = \sum w, \qquad \mu = \frac{1}{n} \sum w x, \qquad
              \sigma^2 = \frac{1}{n} \sum w (x - \mu)^2

    Parameters
    ----------
    x : array, shape (..., C, ...)
        With C channels at `axis`. One value per channel, or none, is fine: the moments of nothing
        are a count of 0, and merging them changes nothing.
    axis, where
        As in `batch_norm`. w is `where`, or 1; the sum of the weights is the count.

    Returns
    -------
    Moments
        Vectors of shape (C,), in float64 where the device has it, else float32.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.
    """
    at = checks.subject(x, axis)
    checks.weights(at, x, where)
    return moments_by(pick(x, where), at, x, where)
