"""What the functions of `batchnorm` are while PyTorch's compiler or exporter follows them.

The checks of values, libraries and devices are Python that a graph cannot hold; shapes, dtypes and axes
are checked by the operators when they are traced.

In a graph that stays in this process (`torch.compile`), a call is an operator of this package; in a
program that leaves it, what `leaving` has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchnorm import functional, tracing
from batchnorm.coefficients import weights_of
from batchnorm.moments import Moments
from batchnorm.torch import leaving

Array = Any
_ops = torch.ops.batchnorm
_compiler: Any = torch.compiler


def follow(name: str, *args: Any, group: Any = None, out: Array | None = None, **kwargs: Any) -> Any:
    """Give what the function of that name gives, as operators that the graph holds."""
    for argument, value in (("group", group), ("out", out)):
        if value is not None:
            raise TypeError(f"{argument}: got one in a graph of PyTorch, expected None")
    plain = leaving.functions().get(name)
    if plain is not None:
        return plain(*args, **kwargs)
    decomposed = _transformed() or tracing.differentiates_weights(kwargs.get("where")) is not None
    found = (_OWN if decomposed else _OPERATORS)[name](*args, **kwargs)
    return found


def _is_transformed() -> bool:
    return tracing.transformed() is not None


_transformed = _compiler.assume_constant_result(_is_transformed)  # its guards watch what decides it


def _own(name: str) -> Callable[..., Any]:
    """The function on PyTorch's own operators, which the compiler sees when it traces the graph."""
    function = getattr(functional, name).__wrapped__

    def call(*args: Any, **kwargs: Any) -> Any:
        with tracing.own_operators("PyTorch transforms the tensors in a graph"):
            return function(*args, **kwargs)

    in_graph: Callable[..., Any] = _compiler.allow_in_graph(call)
    return in_graph


def _axes(axis: int | tuple[int, ...]) -> list[int]:
    return list(axis) if isinstance(axis, tuple) else [axis]


def _tensors(stats: Moments, x: Array) -> list[Array]:
    """Moments as the operators take them."""
    n, mean, var, low = stats
    n = n if isinstance(n, torch.Tensor) else torch.full_like(var, n)
    return [n, mean, var, torch.zeros_like(mean) if low is None else low]


def _batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    where: Array | None = None,
) -> tuple[Array, Moments]:
    y, *stats = _ops.batch_norm(x, gamma, beta, weights_of(where, x.ndim), _axes(axis), eps)
    return y, Moments(*stats)


def _batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    where: Array | None = None,
) -> tuple[Array, ...]:
    w, axes = weights_of(where, x.ndim), _axes(axis)
    found: tuple[Array, ...] = _ops.batch_norm_backward(dy, x, *_tensors(stats, x), gamma, w, axes, eps)
    return found


def _normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
) -> Array:
    return _ops.normalize(x, mean, var, gamma, beta, _axes(axis), eps)


def _normalize_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    stats_grad: bool = False,
) -> tuple[Array, ...]:
    found: tuple[Array, ...] = _ops.normalize_backward(dy, x, mean, var, gamma, _axes(axis), eps)
    return found if stats_grad else found[:3]


def _moments(x: Array, *, axis: Any = 1, where: Array | None = None) -> Moments:
    return Moments(*_ops.moments(x, weights_of(where, x.ndim), _axes(axis)))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "batch_norm_backward": _batch_norm_backward,
    "normalize": _normalize,
    "normalize_backward": _normalize_backward,
    "moments": _moments,
}
_OWN = {name: _own(name) for name in _OPERATORS}
