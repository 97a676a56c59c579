"""The functions of `batchnorm` in graphs of PyTorch's compiler and exporter.

The checks of values, libraries and devices are Python code that cannot be part of a graph. The operators
check shapes, dtypes and axes when they are traced.

In a graph that runs in this process (`torch.compile`), a call is an operator of this package. In a
program that runs in other processes, it is a function of `leaving`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as compat_torch
import torch

from batchnorm import functional, tracing
from batchnorm.coefficients import Renorm, renorm_corrections, renormalized, weights_of
from batchnorm.epilogue import backward_epilogue, validate_activation
from batchnorm.moments import Moments
from batchnorm.renormalization import validate_limits
from batchnorm.torch import leaving
from batchnorm.torch.operators import epilogue_arguments

Array = Any
_ops = torch.ops.batchnorm
_compiler: Any = torch.compiler


def call_in_graph(
    name: str, *args: Any, group: Any = None, out: Array | None = None, **kwargs: Any
) -> Any:
    """Return the results of the named function, computed by operators of the graph."""
    for argument, value in (("group", group), ("out", out)):
        if value is not None:
            raise TypeError(f"{argument}: got one in a graph of PyTorch, expected None")
    if kwargs.pop("degenerate", "raise") != "raise":
        raise TypeError("degenerate: got 'shift' in a graph of PyTorch, expected 'raise'")
    if name == "batch_renorm":
        return _batch_renorm(*args, **kwargs)
    exported = leaving.exported_functions().get(name)
    if exported is not None:
        return exported(*args, **kwargs)
    decomposed = _transformed() or tracing.differentiates_weights(kwargs.get("where"))
    found = (_DECOMPOSED if decomposed else _OPERATORS)[name](*args, **kwargs)
    return found


def _is_transformed() -> bool:
    return tracing.transformed() is not None


_transformed = _compiler.assume_constant_result(
    _is_transformed
)  # guards of the compiler cover the state of the transforms


def _decomposed(name: str) -> Callable[..., Any]:
    """Return the function on PyTorch's own operators, which the compiler traces."""
    function = getattr(functional, name).__wrapped__

    def call(*args: Any, **kwargs: Any) -> Any:
        with tracing.own_operators("PyTorch transforms the tensors in a graph"):
            return function(*args, **kwargs)

    in_graph: Callable[..., Any] = _compiler.allow_in_graph(call)
    return in_graph


def _axes(axis: int | tuple[int, ...]) -> list[int]:
    return list(axis) if isinstance(axis, tuple) else [axis]


def _tensors(stats: Moments, x: Array) -> list[Array]:
    """Return moments as arguments of the operators."""
    n, mean, var, low = stats
    n = n if isinstance(n, torch.Tensor) else torch.full_like(var, n)
    return [n, mean, var, torch.zeros_like(mean) if low is None else low]


def _through_epilogue(
    dy: Array,
    x: Array,
    stats: list[Any],
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    axes: list[int],
    eps: float,
    residual: Any,
    activation: Any,
    y: Array | None,
) -> tuple[Array, ...]:
    """Return the gradient to the result of the norm, and with a residual to that."""
    epilogue = backward_epilogue(residual, activation, y)
    if epilogue is None:
        return (dy,)
    g = dy
    if epilogue.activation is not None:
        vectors = gamma, beta, epilogue.residual, epilogue.y, w
        g = _ops.activation_gradient(dy, x, *stats, *vectors, axes, eps, *epilogue.activation)
    return (g, g.to(x.dtype)) if epilogue.gradient else (g,)


def _batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    residual: Array | None = None,
    activation: Any = None,
) -> tuple[Array, Moments]:
    last = epilogue_arguments(validate_activation(activation), residual)
    y, *stats = _ops.batch_norm(x, gamma, beta, weights_of(where, x.ndim), _axes(axis), eps, *last)
    return y, Moments(*stats)


def _batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    residual: Any = None,
    activation: Any = None,
    y: Array | None = None,
) -> tuple[Array, ...]:
    w, axes, vectors = weights_of(where, x.ndim), _axes(axis), _tensors(stats, x)
    last = vectors, w, gamma, beta, axes, eps, residual, activation, y
    g, *dresidual = _through_epilogue(dy, x, *last)
    return *_ops.batch_norm_backward(g, x, *vectors, gamma, w, axes, eps), *dresidual


def _normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    residual: Array | None = None,
    activation: Any = None,
) -> Array:
    last = _axes(axis), eps, *epilogue_arguments(validate_activation(activation), residual)
    return _ops.normalize(x, mean, var, gamma, beta, *last)


def _normalize_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    residual: Any = None,
    activation: Any = None,
    y: Array | None = None,
    stats_grad: bool = False,
) -> tuple[Array, ...]:
    axes, stats = _axes(axis), [None, mean, var, None]
    last = stats, None, gamma, beta, axes, eps, residual, activation, y
    g, *dresidual = _through_epilogue(dy, x, *last)
    dx, dgamma, dbeta, *others = _ops.normalize_backward(g, x, mean, var, gamma, axes, eps)
    return dx, dgamma, dbeta, *dresidual, *(others if stats_grad else ())


def _moments(x: Array, *, axis: Any = 1, where: Array | None = None) -> Moments:
    return Moments(*_ops.moments(x, weights_of(where, x.ndim), _axes(axis)))


def _batch_renorm(
    x: Array,
    running_mean: Array,
    running_var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    r_max: float | None = None,
    d_max: float | None = None,
    eps: float = 1e-5,
    **settings: Any,
) -> tuple[Array, Moments]:
    """Return `batch_renorm` by functions that a graph has."""
    own = {name: settings[name] for name in ("axis", "where") if name in settings}
    stats = call_in_graph("moments", x.detach(), **own)
    limits = validate_limits(r_max, d_max)
    renorm = Renorm(running_mean.detach(), running_var.detach(), *limits)
    r, d = renorm_corrections(compat_torch, stats, eps, renorm)
    scale, shift = renormalized(compat_torch, gamma, beta, r, d)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = scale.to(dtype if gamma is None else gamma.dtype)
    shift = shift.to(dtype if beta is None else beta.dtype)
    return call_in_graph("batch_norm", x, scale, shift, eps=eps, **settings)  # type: ignore[no-any-return]


_OPERATORS: dict[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "batch_norm_backward": _batch_norm_backward,
    "normalize": _normalize,
    "normalize_backward": _normalize_backward,
    "moments": _moments,
}
_DECOMPOSED = {name: _decomposed(name) for name in _OPERATORS}
