"""The passes in general: validate the arguments, choose a backend, and run it."""

from __future__ import annotations

from typing import Any

from batchnorm import groups
from batchnorm.arguments import validate_bool, validate_group, validate_number
from batchnorm.backends.dispatch import backend_for
from batchnorm.coefficients import weights_of
from batchnorm.epilogue import Epilogue, validate_backward_epilogue, validate_epilogue
from batchnorm.moments import Moments
from batchnorm.overlap import validate_no_overlap
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


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    group: Any,
    *,
    axis: Any,
    eps: Any,
    residual: Array | None,
    activation: Any,
    out: Array | None = None,
) -> tuple[Array, Moments]:
    """Return y and the moments of a batch; arguments as of `batch_norm`."""
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


def backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    group: Any,
    *,
    axis: Any,
    eps: Any,
    residual: Array | bool | None,
    activation: Any,
    y: Array | None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of `forward`; arguments as of `batch_norm_backward`."""
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


def inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: Any,
    residual: Array | None,
    activation: Any,
    out: Array | None = None,
) -> Array:
    """Return y by given statistics; arguments as of `normalize`."""
    layout = validate_input(x, axis)
    validate_vectors(layout, mean=mean, var=var, gamma=gamma, beta=beta)
    epilogue = validate_epilogue(layout, x, residual, activation)
    validate_out(layout, x, out)
    validate_no_overlap(out, x=x, mean=mean, var=var, gamma=gamma, beta=beta, residual=residual)
    eps = validate_number("eps", eps, 0)
    backend = backend_for(x, mean, var, gamma, beta, out, residual)
    stats = Moments(1, mean, var)
    return backend.inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue, out=out)


def inference_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: Any,
    residual: Array | bool | None,
    activation: Any,
    y: Array | None,
    out: Array | None = None,
    stats_grad: bool = False,
) -> tuple[Array, ...]:
    """Return the gradients of `inference`; arguments as of `normalize_backward`."""
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
