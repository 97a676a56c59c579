"""The public functions: validate the arguments, choose a backend, and run its pass."""

from __future__ import annotations

from typing import Any

from batchnorm import groups, optimistic
from batchnorm.arguments import validate_bool, validate_choice, validate_group, validate_number
from batchnorm.arrays import known_false
from batchnorm.backends.base import to_out
from batchnorm.backends.dispatch import backend_for
from batchnorm.coefficients import in_dtype_of, ones_for_zeros, weights_of
from batchnorm.degenerate import (
    CHOICES,
    enough_values,
    shifted,
    statistics_of_nothing,
    without_degenerate,
)
from batchnorm.epilogue import Epilogue, validate_backward_epilogue, validate_epilogue
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.overlap import validate_no_overlap
from batchnorm.tracing import traceable
from batchnorm.validation import (
    validate_count,
    validate_input,
    validate_out,
    validate_same_shape,
    validate_stats,
    validate_vectors,
    validate_weights,
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
    if validate_choice("degenerate", degenerate, CHOICES) == "shift":
        settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation, "out": out}
        return _shifted_forward(x, gamma, beta, where, group, settings)
    validate_group(group)
    with groups.call(group, "batch_norm") as call:
        layout = validate_input(x, axis)
        validate_vectors(layout, gamma=gamma, beta=beta)
        validate_weights(layout, x, where)
        if group is None:
            validate_count(layout, x, where)
        epilogue = validate_epilogue(layout, x, residual, activation)
        validate_out(layout, x, out)
        validate_no_overlap(out, x=x, gamma=gamma, beta=beta, where=where, residual=residual)
        eps = validate_number("eps", eps, 0)

        backend = backend_for(x, gamma, beta, where, out, residual)
        w, settings = weights_of(where, x.ndim), {"epilogue": epilogue, "out": out}
        if call is not None:
            return backend.forward_in_group(call, x, w, gamma, beta, eps, layout, **settings)
    return backend.forward(x, w, gamma, beta, eps, layout, **settings)


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
    if validate_choice("degenerate", degenerate, CHOICES) == "shift":
        settings = {"axis": axis, "eps": eps, "residual": residual, "activation": activation}
        settings |= {"y": y, "out": out}
        return _shifted_backward(dy, x, stats, gamma, beta, where, group, settings)
    validate_group(group)
    with groups.call(group, "batch_norm_backward") as call:
        layout = validate_input(x, axis)
        validate_same_shape(layout, x, "dy", dy)
        validate_stats(layout, stats)
        validate_vectors(layout, gamma=gamma, beta=beta)
        validate_weights(layout, x, where)
        epilogue = validate_backward_epilogue(layout, x, residual, activation, y)
        read = _read_by(epilogue)
        validate_out(layout, x, out)
        if out is not None:
            named = {f"stats.{name}": v for name, v in zip(stats._fields, stats, strict=True)}
            named |= read
            validate_no_overlap(out, dy=dy, x=x, gamma=gamma, beta=beta, where=where, **named)
        eps = validate_number("eps", eps, 0)

        counted = stats.count if hasattr(stats.count, "dtype") else None
        backend = backend_for(dy, x, gamma, where, out, counted, *stats[1:], beta, *read.values())
        w, settings = weights_of(where, x.ndim), {"beta": beta, "epilogue": epilogue, "out": out}
        if call is not None:
            return backend.backward_in_group(call, dy, x, w, stats, gamma, eps, layout, **settings)
    return backend.backward(dy, x, w, stats, gamma, eps, layout, **settings)


def _shifted_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    group: Any,
    settings: dict[str, Any],
) -> tuple[Array, Moments]:
    """Return y and stats of a call with ``degenerate="shift"``."""
    validate_group(group)
    with groups.call(group, "batch_norm") as call:
        layout = validate_input(x, settings["axis"])
        validate_vectors(layout, gamma=gamma, beta=beta)
        validate_weights(layout, x, where)
        validate_epilogue(layout, x, settings["residual"], settings["activation"])
        validate_out(layout, x, settings["out"])
        enough = enough_values(layout, x, where, call)
    xp = layout.xp
    too_few = layout.values is not None and layout.values < 2
    if too_few if group is None else known_false(xp.any(enough)):
        nothing = statistics_of_nothing(layout)
        return _constants(layout, x, gamma, beta, settings), nothing
    x, where, _ = shifted(layout, x, where, enough)
    if type(settings["eps"]) in (int, float) and settings["eps"] == 0:  # 0 / 0 is not 0
        out = settings.pop("out")
        y, stats = batch_norm(x, gamma, beta, where=where, group=group, **settings)
        keep = layout.vector(enough) > 0  # (C)
        y = xp.where(keep, y, _constants(layout, x, gamma, beta, settings))
        return to_out(layout, y, x.dtype, out), without_degenerate(xp, stats, enough)
    y, stats = batch_norm(x, gamma, beta, where=where, group=group, **settings)
    return y, without_degenerate(xp, stats, enough)


def _constants(
    layout: Layout, x: Array, gamma: Array | None, beta: Array | None, settings: dict[str, Any]
) -> Array:
    """Return y of a batch whose channels are all degenerate: no eps is needed to divide by 1."""
    one = layout.squeeze(layout.vector(1.0))
    zeros = shifted(layout, x, None, one < 0).x  # of which a framework finds a gradient of 0
    return normalize(zeros, one - one, one, gamma, beta, **settings)


def _shifted_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    group: Any,
    settings: dict[str, Any],
) -> tuple[Array, ...]:
    """Return the gradients of a call with ``degenerate="shift"``."""
    validate_group(group)
    out = settings["out"]
    with groups.call(group, "batch_norm_backward"):
        layout = validate_input(x, settings["axis"])
        validate_same_shape(layout, x, "dy", dy)
        validate_stats(layout, stats)
        validate_vectors(layout, gamma=gamma, beta=beta)
        validate_weights(layout, x, where)
        validate_out(layout, x, out)
        validate_no_overlap(out, dy=dy, x=x, gamma=gamma, beta=beta, where=where)
    xp = layout.xp
    zero = xp.zeros_like(layout.vector(stats.var))  # (C)
    count = layout.vector(stats.count) + zero  # (C), where it is one number for all too
    enough = layout.squeeze(count > 0)
    if known_false(xp.any(~enough)):
        return batch_norm_backward(dy, x, stats, gamma, beta, where=where, group=group, **settings)
    keep = layout.vector(enough) > 0  # (C)
    del settings["out"]
    if known_false(xp.any(enough)):
        zeros = xp.zeros_like(x)
        one = layout.squeeze(layout.vector(1.0))
        grads = normalize_backward(dy, zeros, one - one, one, gamma, beta, **settings)
        if group is not None:
            with groups.call(group, "batch_norm_backward") as call:
                call.announce_backward(layout, x)
                sums = call.all_reduce(*(layout.vector(v) for v in grads[1:3]))
            grads = (grads[0], *(in_dtype_of(layout, gamma, v) for v in sums), *grads[3:])
    else:
        x, where, _ = shifted(layout, x, where, enough)
        var = xp.where(enough, stats.var, xp.ones_like(stats.var))  # to divide by, without eps too
        moved = stats._replace(count=layout.squeeze(ones_for_zeros(xp, count)), var=var)
        grads = batch_norm_backward(dy, x, moved, gamma, beta, where=where, group=group, **settings)
    dx = xp.where(keep, grads[0], xp.zeros_like(grads[0]))
    return to_out(layout, dx, x.dtype, out), *grads[1:]


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
    layout = validate_input(x, axis)
    validate_vectors(layout, mean=mean, var=var, gamma=gamma, beta=beta)
    epilogue = validate_epilogue(layout, x, residual, activation)
    validate_out(layout, x, out)
    validate_no_overlap(out, x=x, mean=mean, var=var, gamma=gamma, beta=beta, residual=residual)
    eps = validate_number("eps", eps, 0)
    backend = backend_for(x, mean, var, gamma, beta, out, residual)
    stats = Moments(1, mean, var)
    return backend.inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue, out=out)


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
    layout = validate_input(x, axis)
    validate_same_shape(layout, x, "dy", dy)
    validate_vectors(layout, mean=mean, var=var, gamma=gamma, beta=beta)
    epilogue = validate_backward_epilogue(layout, x, residual, activation, y)
    read = _read_by(epilogue)
    eps = validate_number("eps", eps, 0)
    validate_out(layout, x, out)
    validate_no_overlap(out, dy=dy, x=x, mean=mean, var=var, gamma=gamma, beta=beta, **read)
    stats_grad = validate_bool("stats_grad", stats_grad)
    backend = backend_for(dy, x, out, mean, var, gamma, beta, *read.values())
    stats, settings = Moments(1, mean, var), {"beta": beta, "epilogue": epilogue, "out": out}
    results = backend.inference_backward(dy, x, stats, gamma, eps, layout, **settings)
    return results if stats_grad else results[:-2]


def _read_by(epilogue: Epilogue | None) -> dict[str, Array | None]:
    """Return the big arrays that an epilogue reads in a backward pass, by what an error calls them."""
    return {} if epilogue is None else {"the residual": epilogue.residual, "y": epilogue.y}


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
