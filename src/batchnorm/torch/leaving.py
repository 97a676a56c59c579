"""Functions of `batchnorm` in programs that leave this process, and run where this package is not.

These are what `torch.export` makes (and what builds on it, ONNX's exporter among them) and, in
inference, what `torch.jit.trace` makes. Their operators are PyTorch's own, for a batch of any size: no
shape of x is a constant of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from batchnorm.arguments import validate_axes
from batchnorm.backends.generic import GENERIC
from batchnorm.coefficients import weights_of
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import validate_input, validate_vectors

Array = Any

_compiler: Any = torch.compiler
_jit: Any = torch.jit
_functional: Any = torch.nn.functional


def leaves() -> bool:
    """Whether what is followed leaves this process, and so cannot change what it has read."""
    return bool(functions())


def functions() -> Mapping[str, Callable[..., Any]]:
    """The functions of a program that leaves this process; none where it does not."""
    if getattr(_compiler, "is_exporting", bool)():  # which PyTorch has had since 2.7
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
) -> tuple[Array, Moments]:
    layout = _layout(x, axis, gamma=gamma, beta=beta)
    return GENERIC.forward(x, weights_of(where, x.ndim), gamma, beta, eps, layout)


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
) -> Array:
    """PyTorch's batch norm where it has one for the axis and the mean: exporters know it by its name."""
    kept = validate_axes(axis, x.ndim)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if len(kept) == 1 and x.ndim > 1 and torch.promote_types(mean.dtype, dtype) == dtype:
        vectors: list[Any] = [v if v is None else v.to(dtype) for v in (mean, var, gamma, beta)]
        second = x if kept == (1,) else x.movedim(kept[0], 1)
        y = _functional.batch_norm(second, *vectors, training=False, eps=eps)
        return y if second is x else y.movedim(1, kept[0])
    place = tuple(slice(None) if i in kept else None for i in range(x.ndim))
    mean = mean[place].to(torch.promote_types(mean.dtype, dtype))  # (C)
    m, rstd = mean.to(dtype), torch.rsqrt(var[place] + eps)  # (C), (C)
    a = rstd if gamma is None else gamma[place] * rstd  # (C)
    b = (m - mean) * a  # (C): what m has rounded away
    b = b if beta is None else b + beta[place]  # (C)
    return ((x.to(dtype) - m) * a.to(dtype) + b.to(dtype)).to(x.dtype)


_EXPORTED: dict[str, Callable[..., Any]] = {
    "batch_norm": _compiler.allow_in_graph(_batch_norm),
    "moments": _compiler.allow_in_graph(_moments),
    "normalize": _compiler.allow_in_graph(_normalize),
}
# A trace takes the shapes that Python looks at for constants; only inference looks at none.
_TRACED = {"normalize": _normalize}
