"""Layouts of arrays: channel axes, and the dtypes in which they are processed.

A kernel needs the arrays of a call, and the `Layout` of x.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import array_api_compat as compat

Array = Any
DType = Any

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Layout(NamedTuple):
    """Channels, reduced axes and dtypes of one call."""

    name: str
    """The name of x in error messages."""
    xp: ModuleType
    """The array API namespace of x."""
    device: Any
    """The device of x; None if it is unknown, as for a traced array."""
    channel_axes: tuple[int, ...]
    """The channel axes, non-negative, increasing."""
    reduced_axes: tuple[int, ...]
    """All other axes."""
    channels: tuple[int, ...]
    """The shape of gamma, beta, mean and var."""
    broadcast: tuple[int, ...]
    """The shape of gamma with a 1 for each reduced axis, which broadcasts against x."""
    values: int | None
    """The number of values per channel; None if the shape of x is unknown."""
    compute: DType
    """The dtype of elementwise arithmetic: float64 for float64 data, otherwise float32."""
    wide: DType
    """The dtype of sums and per-channel vectors: float64 if the device has it, otherwise float32."""

    def vector(self, v: Any) -> Array:
        """Return a per-channel vector, or one number for all, in the wide dtype and broadcast shape."""
        if not hasattr(v, "dtype"):
            return self.xp.full(self.broadcast, float(v), dtype=self.wide, device=self.device)
        if v.dtype != self.wide:
            v = self.xp.astype(v, self.wide)
        if v.ndim < len(self.channels):
            return v
        if self.values is not None:  # all lengths are known
            return self.xp.reshape(v, self.broadcast)
        return v[
            tuple(slice(None) if i in self.channel_axes else None for i in range(len(self.broadcast)))
        ]

    def squeeze(self, v: Array) -> Array:
        """Return a vector of broadcast shape in the shape of gamma."""
        return self.xp.squeeze(v, axis=self.reduced_axes) if self.reduced_axes else v


def float_name(xp: ModuleType, dtype: DType) -> str | None:
    """Return the name of a dtype that can be normalized, or None for any other dtype."""
    try:
        return _float_name(xp, dtype)
    except TypeError:  # a dtype that cannot be hashed
        return _float_name.__wrapped__(xp, dtype)


@functools.lru_cache(maxsize=256)
def _float_name(xp: ModuleType, dtype: DType) -> str | None:
    for name in FLOATS:
        known = getattr(xp, name, None)  # NumPy has no bfloat16; that of ml_dtypes has its name
        if (known is not None and dtype == known) or str(dtype) == name:
            return name
    return None


def has_float64(xp: ModuleType, device: Any) -> bool:
    """Return whether a device has float64; JAX has it only with x64."""
    if compat.is_torch_namespace(xp):  # the query below makes a tensor, which tracers record
        return getattr(device, "type", "cpu") != "mps"
    info = getattr(xp, "__array_namespace_info__", None)
    if info is None:
        return hasattr(xp, "float64")
    return "float64" in info().dtypes(device=device, kind="real floating")


def layout_of(name: str, xp: ModuleType, x: Array, channel_axes: tuple[int, ...], device: Any) -> Layout:
    """Return the layout of a validated array."""
    shape = tuple(x.shape)
    reduced = tuple(i for i in range(len(shape)) if i not in channel_axes)
    known = all(isinstance(n, int) for n in shape)
    wide = xp.float64 if has_float64(xp, device) else xp.float32
    return Layout(
        name=name,
        xp=xp,
        device=device,
        channel_axes=channel_axes,
        reduced_axes=reduced,
        channels=tuple(shape[i] for i in channel_axes),
        broadcast=tuple(n if i in channel_axes else 1 for i, n in enumerate(shape)),
        values=math.prod(shape[i] for i in reduced) if known else None,
        compute=xp.float64 if float_name(xp, x.dtype) == "float64" else xp.float32,
        wide=wide,
    )


def definite(xp: ModuleType, v: Array) -> Array:
    """Return v, rounded to its dtype in the same way wherever it is used.

    A compiler may compute v twice, or contract its last product into the subtraction that uses it; XLA
    does both. ``x - v`` is then relative to another v than the one that is returned, which caused an
    error of 160,000 eps for float32 data with a mean of 1e6. The result of a sort is computed once, so
    this function sorts v and v. (XLA drops its own optimization barrier before it fuses.) PyTorch's
    compilers do not recompute sums, and its exporters do not support sort.
    """
    if compat.is_torch_namespace(xp):
        return v
    return xp.sort(xp.stack((v, v)), axis=0)[0, ...]


def two_parts(xp: ModuleType, high: Array, low: Array) -> tuple[Array, Array]:
    """Return the rounded sum of two numbers, and its rounding error (Dekker 1971, Fast2Sum)."""
    rounded = definite(xp, high + low)
    return rounded, low - (rounded - high)
