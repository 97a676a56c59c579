"""Functions of `batchnorm` in programs that run in other processes, without this package.

Such programs are made by `torch.export` and tools that use it, including PyTorch's ONNX exporter, and
for inference by `torch.jit.trace`. The functions use only PyTorch's own operators, and accept batches of
any size: no shape of x becomes a constant of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from batchnorm.arguments import validate_axes
from batchnorm.backends.generic import GENERIC
from batchnorm.coefficients import weights_of
from batchnorm.epilogue import validate_activation, validate_epilogue
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import validate_input, validate_vectors

Array = Any

_compiler: Any = torch.compiler
_jit: Any = torch.jit
_functional: Any = torch.nn.functional


def is_exporting() -> bool:
    """Return whether the program that is traced runs in other processes, without updates in place."""
    return bool(exported_functions())


def exported_functions() -> Mapping[str, Callable[..., Any]]:
    """Return the functions of a program that runs in other processes; none for other programs."""
    if getattr(_compiler, "is_exporting", bool)():  # available from PyTorch 2.7 on
        return _EXPORTED
    return _TRACED if _jit.is_tracing() else {}


def _layout(x: Array, axis: Any, **vectors: Array | None) -> Layout:
    layout = validate_input(x, axis)
    validate_vectors(layout, **vectors)
    return layout._replace(values=None)


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
    layout = _layout(x, axis, gamma=gamma, beta=beta)
    epilogue = validate_epilogue(layout, x, residual, activation)
    w = weights_of(where, x.ndim)
    return GENERIC.forward(x, w, gamma, beta, eps, layout, epilogue=epilogue)


def _moments(x: Array, *, axis: Any = 1, where: Array | None = None) -> Moments:
    return GENERIC.statistics(x, weights_of(where, x.ndim), _layout(x, axis))


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
    """Normalize, if possible with PyTorch's operators, which exporters recognize."""
    y = _norm(x, mean, var, gamma, beta, axis=axis, eps=eps)
    if residual is not None:
        y = y + residual
    checked = validate_activation(activation)
    if checked is None:
        return y
    function = getattr(_functional, checked.name)
    return function(y, checked.slope) if checked.name == "leaky_relu" else function(y)


def _norm(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: float,
) -> Array:
    channel_axes = validate_axes(axis, x.ndim)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if len(channel_axes) == 1 and x.ndim > 1 and torch.promote_types(mean.dtype, dtype) == dtype:
        vectors: list[Any] = [v if v is None else v.to(dtype) for v in (mean, var, gamma, beta)]
        second = x if channel_axes == (1,) else x.movedim(channel_axes[0], 1)
        y = _functional.batch_norm(second, *vectors, training=False, eps=eps)
        return y if second is x else y.movedim(1, channel_axes[0])
    place = tuple(slice(None) if i in channel_axes else None for i in range(x.ndim))
    mean = mean[place].to(torch.promote_types(mean.dtype, dtype))  # (C)
    m, rstd = mean.to(dtype), torch.rsqrt(var[place] + eps)  # (C), (C)
    a = rstd if gamma is None else gamma[place] * rstd  # (C)
    b = (m - mean) * a  # (C): m - mean is the rounding error of m
    b = b if beta is None else b + beta[place]  # (C)
    return ((x.to(dtype) - m) * a.to(dtype) + b.to(dtype)).to(x.dtype)


_EXPORTED: dict[str, Callable[..., Any]] = {
    "batch_norm": _compiler.allow_in_graph(_batch_norm),
    "moments": _compiler.allow_in_graph(_moments),
    "normalize": _compiler.allow_in_graph(_normalize),
}
# A shape that Python reads is a constant of a trace. Only inference reads none.
_TRACED = {"normalize": _normalize}
