"""Schemas of the operators, and shapes and dtypes of their results for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batchnorm.backends.tensors import empty_result
from batchnorm.epilogue import gradient_dtype, validate_residual
from batchnorm.layout import Layout
from batchnorm.validation import validate_input, validate_vectors

Array = Any

STATS = "Tensor n, Tensor mean, Tensor var, Tensor mean_lo"
LAYOUT = "int[] axis, float eps"
EPILOGUE = "Tensor? residual=None, str activation='', float slope=0.0"
SCHEMAS = {
    "batch_norm": f"(Tensor x, Tensor? gamma, Tensor? beta, Tensor? where, {LAYOUT}, {EPILOGUE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "batch_norm_backward": f"(Tensor dy, Tensor x, {STATS}, Tensor? gamma, Tensor? where, {LAYOUT})"
    " -> (Tensor, Tensor, Tensor)",
    "batch_norm_double_backward": "(Tensor? ddx, Tensor? ddgamma, Tensor? ddbeta, Tensor dy, Tensor x,"
    f" {STATS}, Tensor? gamma, Tensor? where, {LAYOUT}) -> (Tensor, Tensor, Tensor)",
    "normalize": "(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta,"
    f" {LAYOUT}, {EPILOGUE}) -> Tensor",
    "normalize_backward": f"(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? gamma, {LAYOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "activation_gradient": "(Tensor dy, Tensor x, Tensor? n, Tensor mean, Tensor var, Tensor? mean_lo,"
    " Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? y, Tensor? where, int[] axis, float eps,"
    " str activation, float slope) -> Tensor",
    "moments": "(Tensor x, Tensor? where, int[] axis) -> (Tensor, Tensor, Tensor, Tensor)",
}


def plain_axis(axis: Sequence[int]) -> int | tuple[int, ...]:
    """Return the axis of an operator as an argument of the functions."""
    return axis[0] if len(axis) == 1 else tuple(axis)


def _validate(x: Array, axis: Sequence[int], **vectors: Array | None) -> Layout:
    layout = validate_input(x, plain_axis(axis))
    validate_vectors(layout, **vectors)
    return layout


def _vectors(layout: Layout, dtype: Any, count: int) -> list[Array]:
    return [torch.empty(layout.channels, dtype=dtype, device=layout.device) for _ in range(count)]


def batch_norm(  # type: ignore[no-untyped-def]
    x, gamma, beta, where, axis, eps, residual=None, activation="", slope=0.0
):
    """Return y, and count, mean, variance and low part of the mean."""
    layout = _validate(x, axis, gamma=gamma, beta=beta)
    validate_residual(layout, x, residual)
    return empty_result(x), *_vectors(layout, layout.wide, 4)


def batch_norm_backward(dy, x, n, mean, var, mean_lo, gamma, where, axis, eps):  # type: ignore[no-untyped-def]
    """Return dx, dgamma and dbeta."""
    layout = _validate(x, axis, gamma=gamma)
    dtype = layout.compute if gamma is None else gamma.dtype
    return empty_result(x), *_vectors(layout, dtype, 2)


def batch_norm_double_backward(  # type: ignore[no-untyped-def]
    ddx, ddgamma, ddbeta, dy, x, n, mean, var, mean_lo, gamma, where, axis, eps
):
    """Return the gradients of dy, x and gamma."""
    layout = _validate(x, axis, gamma=gamma)
    dtype = layout.compute if gamma is None else gamma.dtype
    return empty_result(dy), empty_result(x), *_vectors(layout, dtype, 1)


def normalize(  # type: ignore[no-untyped-def]
    x, mean, var, gamma, beta, axis, eps, residual=None, activation="", slope=0.0
):
    """Return y."""
    validate_residual(_validate(x, axis, mean=mean, var=var, gamma=gamma, beta=beta), x, residual)
    return empty_result(x)


def normalize_backward(dy, x, mean, var, gamma, axis, eps):  # type: ignore[no-untyped-def]
    """Return dx, dgamma, dbeta, dmean and dvar."""
    layout = _validate(x, axis, mean=mean, var=var, gamma=gamma)
    dtype = layout.compute if gamma is None else gamma.dtype
    grads = _vectors(layout, dtype, 2)
    return empty_result(x), *grads, torch.empty_like(mean), torch.empty_like(var)


def activation_gradient(  # type: ignore[no-untyped-def]
    dy,
    x,
    n,
    mean,
    var,
    mean_lo,
    gamma,
    beta,
    residual,
    y,
    where,
    axis,
    eps,
    activation,
    slope,
):
    """Return the gradient to the result of the norm."""
    layout = _validate(x, axis, mean=mean, var=var, gamma=gamma, beta=beta)
    validate_residual(layout, x, residual)
    validate_residual(layout, x, y, "y")
    return torch.empty_like(empty_result(dy), dtype=gradient_dtype(layout, dy))


def moments(x, where, axis):  # type: ignore[no-untyped-def]
    """Return count, mean, variance and low part of the mean."""
    layout = _validate(x, axis)
    return tuple(_vectors(layout, layout.wide, 4))
