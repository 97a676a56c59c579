"""The public functions: a call goes whole to compiled code, or to the general passes."""

from __future__ import annotations

from typing import Any

from batchnorm import degenerate as degenerates
from batchnorm import optimistic, passes
from batchnorm.arguments import validate_choice
from batchnorm.backends.dispatch import backend_for
from batchnorm.coefficients import weights_of
from batchnorm.moments import Moments
from batchnorm.tracing import traceable
from batchnorm.validation import validate_input, validate_weights

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
    residual: Array | None = None,
    activation: Any = None,
    degenerate: str = "raise",
    out: Array | None = None,
) -> tuple[Array, Moments]:
    r"""Normalize each channel by the batch's own mean and variance, then scale and shift it.

    .. math::
        y = \operatorname{act}\left(
        \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + z \right), \qquad
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
        variance. All of `x` is normalized, elements of zero weight too, which may be NaN.
    group : object with ``all_reduce(array) -> array``, optional
        Sums an array over the members of a group, each of which calls this function with its part of
        the batch. The statistics are then those of the joined batch.
    residual : array, optional
        z, which is added before the activation; of the shape and dtype of `x`.
    activation : {"relu", "relu6", "leaky_relu", "silu"}, ("leaky_relu", slope) or None
        act, applied in the same pass and before y is rounded to a dtype of 16 bits; the slope of
        "leaky_relu" is 0.01. None for no activation.
    degenerate : {"raise", "shift"}
        What becomes of a channel with fewer than two values of positive weight (in the whole group).
        "raise" is an error, where values can be looked at. "shift" gives beta (and what follows it), a
        count of 0, so that `update_running` leaves the channel alone, and no gradient to x or gamma.
    out : array, optional
        Where to write y, of the shape and dtype of `x`; may be `x` or `residual`. Not for immutable or
        lazy arrays.

    Returns
    -------
    y : array
        Of the shape, dtype, library and device of `x`.
    stats : Moments
        Of the batch, as exact as y needs; `batch_norm_backward` and `update_running` take it. `moments`
        sums float32 data more exactly.

    Raises
    ------
    TypeError
        A dtype that cannot be normalized, or arrays of different libraries.
    ValueError
        A shape that does not fit, arrays on different devices, or (where values can be looked at) a
        negative weight; with ``degenerate="raise"`` an empty batch, or fewer than two values in a
        channel.

    References
    ----------
    Ioffe & Szegedy (2015), Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift, Algorithm 1.
    """
    if group is None and degenerate == "raise":
        done = optimistic.for_array(x).forward(
            x, gamma, beta, axis, eps, where, residual, activation, out, False
        )
        if done is not None:
            return done  # type: ignore[no-any-return]
    settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation, "out": out}
    if validate_choice("degenerate", degenerate, degenerates.CHOICES) == "shift":
        return degenerates.forward(x, gamma, beta, where, group, settings)
    return passes.forward(x, gamma, beta, where, group, **settings)


@traceable
def batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    residual: Array | bool | None = None,
    activation: Any = None,
    y: Array | None = None,
    degenerate: str = "raise",
    out: Array | None = None,
) -> tuple[Array, ...]:
    r"""Return the gradients of `batch_norm`, through its statistics.

    .. math::
        g = \operatorname{act}'(\gamma \hat x + \beta + z) \, dy, \qquad
        \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
        d\gamma = \sum g \, \hat x, \qquad d\beta = \sum g, \qquad
        dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \left(
        g - w \, \frac{d\beta + \hat x \, d\gamma}{n} \right), \qquad dz = g

    Parameters
    ----------
    dy : array, shape (..., C, ...)
        Gradient of the loss with respect to y.
    x, gamma, beta, axis, eps, where, group, activation
        As they were given to `batch_norm`. w is `where`, or 1. beta matters to an activation only.
    stats : Moments
        What `batch_norm` returned.
    residual : array or bool, optional
        The residual that was added; or True, if `y` is given or there was no activation.
    y : array, optional
        What `batch_norm` returned, unchanged: the derivative of "relu", "relu6" and "leaky_relu" is then
        found from it. Without a residual it is found again from x, and y need not be kept.
    degenerate : {"raise", "shift"}
        As it was given to `batch_norm`. "raise" is an error if a count of `stats` is 0.
    out : array, optional
        Where to write dx; may be `dy` or `x`.

    Returns
    -------
    dx : array
        Of the shape, dtype, library and device of `x`.
    dgamma, dbeta : array, shape (C,)
        In the dtype of gamma; without gamma in float32, or float64 for float64 data. With a `group`
        they are the sums over the joined batch, the same on every member.
    dresidual : array
        As dx; only with a residual.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; `stats` that are not Moments of these channels; a derivative that cannot be
        found from what is given.

    References
    ----------
    Ioffe & Szegedy (2015), section 3; the derivation is in the documentation.
    """
    if group is None and degenerate == "raise":
        done = optimistic.for_array(x).backward(
            dy, x, stats, gamma, beta, axis, eps, where, residual, activation, y, out, False
        )
        if done is not None:
            return done  # type: ignore[no-any-return]
    settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation}
    settings |= {"y": y, "out": out}
    if validate_choice("degenerate", degenerate, degenerates.CHOICES) == "shift":
        return degenerates.backward(dy, x, stats, gamma, beta, where, group, settings)
    return passes.backward(dy, x, stats, gamma, beta, where, group, **settings)


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
    residual: Array | None = None,
    activation: Any = None,
    out: Array | None = None,
) -> Array:
    r"""Normalize by statistics that are given: inference, or a frozen layer.

    .. math:: y = \operatorname{act}\left(
              \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + z \right)

    The mean is subtracted first, so that no digits cancel. `fold` gives the form y = scale·x + shift,
    which saves a subtraction and loses ``|mean|/std`` times eps.

    Parameters
    ----------
    x : array, shape (..., C, ...)
        float16, bfloat16, float32 or float64, with C channels at `axis`; may be empty.
    mean, var : array, shape (C,)
        The statistics, in any floating dtype: a float64 mean beside float32 data keeps its digits.
    gamma, beta, axis, eps, residual, activation, out
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
    done = optimistic.for_array(x).inference(
        x, mean, var, None, gamma, beta, axis, eps, residual, activation, out, False
    )
    if done is not None:
        return done
    settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation, "out": out}
    return passes.inference(x, mean, var, gamma, beta, **settings)


@traceable
def normalize_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
    residual: Array | bool | None = None,
    activation: Any = None,
    y: Array | None = None,
    out: Array | None = None,
    stats_grad: bool = False,
) -> tuple[Array, ...]:
    r"""Return the gradients of `normalize`, whose statistics do not depend on `x`.

    .. math::
        dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \, g, \qquad
        d\mu = -\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \sum g, \qquad
        d\sigma^2 = -\frac{\gamma}{2 (\sigma^2 + \epsilon)^{3/2}} \sum g \, (x - \mu), \qquad dz = g

    Parameters
    ----------
    dy : array, shape (..., C, ...)
        Gradient of the loss with respect to y.
    x, mean, var, gamma, beta, axis, eps, activation
        As they were given to `normalize`. beta matters to an activation only.
    residual, y
        As in `batch_norm_backward`, and g as there.
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
    dresidual : array
        As dx; only with a residual.
    dmean, dvar : array, shape (C,)
        In the dtypes of `mean` and `var`; only with `stats_grad`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.
    """
    settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation}
    settings |= {"y": y, "out": out, "stats_grad": stats_grad}
    return passes.inference_backward(dy, x, mean, var, gamma, beta, **settings)


@traceable
def moments(x: Array, *, axis: Axis = 1, where: Array | None = None) -> Moments:
    r"""Return count, mean and population variance of each channel.

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
    layout = validate_input(x, axis)
    validate_weights(layout, x, where)
    return backend_for(x, where).statistics(x, weights_of(where, x.ndim), layout)
