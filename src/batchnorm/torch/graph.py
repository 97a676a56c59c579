"""What the functions of `batchnorm` are while PyTorch's compiler or exporter follows them.

The checks of values, libraries and devices are Python that a graph cannot hold; shapes and dtypes are
checked by the operators when they are traced.
"""

from __future__ import annotations

from typing import Any

import torch

from batchnorm.moments import Moments

Array = Any
_ops = torch.ops.batchnorm


def _axes(axis: int | tuple[int, ...], ndim: int) -> list[int]:
    return [a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))]


def _unsupported(**given: Any) -> None:
    for argument, value in given.items():
        if value is not None:
            raise TypeError(f"{argument}: got one in a graph of PyTorch, expected None")


def _weights(where: Array | None, ndim: int) -> Array | None:
    return where if where is None or where.ndim == ndim else where[(None,) * (ndim - where.ndim)]


def _tensors(stats: Moments, x: Array) -> list[Array]:
    """Moments as the operators take them."""
    n, mean, var, low = stats
    n = n if isinstance(n, torch.Tensor) else torch.full_like(var, n)
    return [n, mean, var, torch.zeros_like(mean) if low is None else low]


def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    out: Array | None = None,
) -> tuple[Array, Moments]:
    """`batchnorm.batch_norm` as an operator."""
    _unsupported(group=group, out=out)
    y, *stats = _ops.batch_norm(x, gamma, beta, _weights(where, x.ndim), _axes(axis, x.ndim), eps)
    return y, Moments(*stats)


def batch_norm_backward(
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    group: Any = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """`batchnorm.batch_norm_backward` as an operator."""
    _unsupported(group=group, out=out)
    w, axes = _weights(where, x.ndim), _axes(axis, x.ndim)
    found: tuple[Array, ...] = _ops.batch_norm_backward(dy, x, *_tensors(stats, x), gamma, w, axes, eps)
    return found


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """`batchnorm.normalize` as an operator."""
    _unsupported(out=out)
    return _ops.normalize(x, mean, var, gamma, beta, _axes(axis, x.ndim), eps)


def normalize_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    axis: Any = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    stats_grad: bool = False,
) -> tuple[Array, ...]:
    """`batchnorm.normalize_backward` as an operator."""
    _unsupported(out=out)
    found: tuple[Array, ...] = _ops.normalize_backward(dy, x, mean, var, gamma, _axes(axis, x.ndim), eps)
    return found if stats_grad else found[:3]


def moments(x: Array, *, axis: Any = 1, where: Array | None = None) -> Moments:
    """`batchnorm.moments` as an operator."""
    return Moments(*_ops.moments(x, _weights(where, x.ndim), _axes(axis, x.ndim)))
