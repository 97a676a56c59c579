"""Checks of the arrays of a call: dtypes, shapes, libraries, devices and, where known, values.

Every function here raises, or returns what its caller needs next; none changes anything.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import array_api_compat as compat

from batchnorm.arguments import validate_axes, validate_number
from batchnorm.arrays import (
    cut_along,
    device_of,
    is_hidden,
    is_spread,
    known_false,
    library_name,
    namespace,
    same_shape,
)
from batchnorm.errors import describe_type, fail, fail_on_all_members
from batchnorm.layout import FLOATS, Layout, float_name, layout_of
from batchnorm.tracing import is_jax_tracer

Array = Any

_TWO_VALUES = "at least 2 values per channel to normalize by their own statistics"
# Per-channel arguments that have no default.
REQUIRED = ("mean", "var", "stats.mean", "stats.var")


def validate_real(argument: str, xp: ModuleType, a: Array) -> None:
    """Check that an array holds numbers, or truths, of kinds that some argument takes."""
    if float_name(xp, a.dtype) is None and not _is_integral(xp, a.dtype):
        fail(TypeError, argument, f"dtype {a.dtype}", f"one of {', '.join(FLOATS)}, or weights")


def _is_integral(xp: ModuleType, dtype: Any) -> bool:
    """Return whether a dtype is boolean or integral, as a mask or weights may be."""
    try:
        return bool(xp.isdtype(dtype, ("bool", "integral")))
    except TypeError:  # a dtype that is none of the standard's
        return False


def validate_input(x: Array, axis: int | tuple[int, ...], argument: str = "x") -> Layout:
    """Check the array to be normalized and its channel axis."""
    xp = namespace(argument, x)
    _validate_floating(xp, argument, x)
    if any(n != n for n in x.shape):  # Dask's word for what it has not computed
        got = f"chunks of unknown size (shape {tuple(x.shape)})"
        fail(ValueError, argument, got, "known ones: call compute_chunk_sizes() on it first")
    return layout_of(argument, xp, x, validate_axes(axis, x.ndim, argument), device_of(x))


def validate_same_shape(layout: Layout, x: Array, argument: str, other: Array) -> None:
    """Check an array of the shape of x: dy or out."""
    _validate_compatible(layout.xp, layout.device, argument, other, layout.name)
    if not same_shape(other.shape, x.shape):
        fail(ValueError, argument, f"shape {tuple(other.shape)}", f"{tuple(x.shape)}, as x")


def validate_vectors(layout: Layout, **given: Any) -> None:
    """Check per-channel arguments: library, device, dtype and shape."""
    for argument, v in given.items():
        if v is None and argument not in REQUIRED:
            continue
        _validate_compatible(layout.xp, layout.device, argument, v, layout.name)
        if not same_shape(v.shape, layout.channels):
            axis = layout.channel_axes[0] if len(layout.channel_axes) == 1 else layout.channel_axes
            fail(
                ValueError,
                argument,
                f"shape {tuple(v.shape)}",
                f"{layout.channels}, the channels of {layout.name} at axis {axis}",
            )


def validate_stats(layout: Layout, stats: Any) -> None:
    """Check the `stats` that batch_norm returned."""
    if not _is_moments(stats):
        fail(TypeError, "stats", describe_type(stats), "the Moments that batch_norm returned")
    validate_vectors(
        layout, **{"stats.mean": stats.mean, "stats.var": stats.var, "stats.mean_lo": stats.mean_lo}
    )
    if getattr(stats.count, "shape", ()) != ():
        validate_vectors(layout, **{"stats.count": stats.count})
    elif not hasattr(stats.count, "dtype"):
        validate_number("stats.count", stats.count, 0)


def validate_parts(parts: tuple[Any, ...]) -> ModuleType:
    """Check that moments can be merged; their library."""
    for i, part in enumerate(parts):
        if not _is_moments(part):
            fail(TypeError, f"parts[{i}]", describe_type(part), "Moments")
    first = parts[0].mean
    xp, device = namespace("parts[0].mean", first), device_of(first)
    _validate_floating(xp, "parts[0].mean", first)
    for i, part in enumerate(parts):
        for field, v in zip(part._fields, part, strict=True):
            if field == "mean_lo" and v is None:
                continue
            if field == "count" and not hasattr(v, "dtype"):
                validate_number(f"parts[{i}].count", v, 0)
                continue
            _validate_compatible(xp, device, f"parts[{i}].{field}", v, "parts[0].mean")
            if not same_shape(v.shape, first.shape) and (field != "count" or v.shape != ()):
                got, expected = f"shape {tuple(v.shape)}", f"{tuple(first.shape)}, as parts[0].mean"
                fail(ValueError, f"parts[{i}].{field}", got, expected)
    return xp


def validate_weights(layout: Layout, x: Array, where: Array | None) -> None:
    """Check a mask or weights, and their values where the library is not lazy."""
    if where is None:
        return
    _validate_library(layout.xp, "where", where, "x")
    _validate_device(layout.device, "where", where, "x")
    dtype = where.dtype
    if float_name(layout.xp, dtype) is None and not _is_integral(layout.xp, dtype):
        fail(TypeError, "where", f"dtype {dtype}", "a boolean mask or real weights")
    trailing = tuple(x.shape)[x.ndim - where.ndim :] if where.ndim <= x.ndim else None
    if trailing is None or not all(
        w == 1 or same_shape((w,), (n,)) for w, n in zip(where.shape, trailing, strict=True)
    ):
        got, expected = f"shape {tuple(where.shape)}", f"one that broadcasts to {tuple(x.shape)}, as x"
        fail(ValueError, "where", got, expected)
    if dtype != layout.xp.bool and 0 not in where.shape and not is_hidden(where):
        valid = layout.xp.min(where) >= 0  # the least is NaN, if there is one
        if float_name(layout.xp, dtype) is not None:
            valid = valid & (layout.xp.max(where) < float("inf"))
        if known_false(valid):
            fail(ValueError, "where", "a weight that is negative, infinite or NaN", "weights >= 0")


def validate_count(layout: Layout, x: Array, where: Array | None) -> None:
    """Check that each channel has two values, as far as that can be told before a pass over x.

    The elements of a mask are counted in that pass: see `validate_mask_count`.
    """
    got = f"shape {tuple(x.shape)}"
    if layout.values == 0:
        fail(ValueError, "x", f"an empty batch of {got}", _TWO_VALUES)
    if layout.values == 1:
        fail(ValueError, "x", f"{got} with one value per channel", _TWO_VALUES)
    if (
        where is not None
        and where.dtype != layout.xp.bool
        and not (is_hidden(where) or is_jax_tracer(where))
    ):
        _validate_counts(layout, count_positive(layout, x, where))


def validate_mask_count(layout: Layout, w: Array | None, count: Array) -> None:
    """Check that each channel has two elements of a mask, given its counts by the pass over x."""
    if w is not None and w.dtype == layout.xp.bool:
        _validate_counts(layout, count)


def _validate_counts(layout: Layout, count: Array) -> None:
    if known_false(layout.xp.all(count >= 2)):
        fail(ValueError, "where", "a channel with fewer than 2 values of weight > 0", _TWO_VALUES)


def count_positive(layout: Layout, x: Array, where: Array) -> Array:
    """Return how many elements of positive weight each channel has, (C).

    Weights are read in pieces along their longest axis, so that no other array is as large as they are.
    """
    xp, ndim = layout.xp, len(layout.broadcast)
    w = xp.reshape(where, (1,) * (ndim - where.ndim) + tuple(where.shape))
    axis = max(range(ndim), key=lambda i: w.shape[i])
    pieces = (w[cut] for cut in cut_along(tuple(w.shape), axis))
    positive = (xp.astype(p if p.dtype == xp.bool else p > 0, layout.wide) for p in pieces)
    counts = [xp.sum(piece, axis=layout.reduced_axes, keepdims=True) for piece in positive]
    count = xp.concat(counts, axis=axis)
    if axis in layout.reduced_axes:
        count = xp.sum(count, axis=axis, keepdims=True)
    return count * math.prod(x.shape[i] for i in layout.reduced_axes if w.shape[i] == 1)


def validate_out(layout: Layout, x: Array, out: Array | None) -> None:
    """Check that a result of x's shape and dtype can be written to `out`."""
    if out is None:
        return
    validate_same_shape(layout, x, "out", out)
    if out.dtype != x.dtype:
        fail(TypeError, "out", f"dtype {out.dtype}", f"{x.dtype}, as x")
    if compat.is_lazy_array(out) or not hasattr(type(out), "__setitem__"):  # JAX's count as lazy
        fail(
            TypeError, "out", f"an array of {library_name(layout.xp)}", "an array that can be written to"
        )
    if not _writable(out):
        fail(ValueError, "out", "a read-only array", "one that can be written to")


def _writable(out: Array) -> bool:
    return bool(getattr(getattr(out, "flags", None), "writeable", True))


def validate_group_count(layout: Layout, stats: Any, where: Array | None) -> None:
    """Check that the members of a group have enough values between them; all find the same."""
    enough = stats.count >= 2 if where is None else stats.count > 0
    if known_false(layout.xp.all(enough)):
        got = "a channel with fewer than 2 values" if where is None else "a channel without any weight"
        fail_on_all_members(
            ValueError, "x", f"{got} in the whole group", "enough values to normalize by"
        )


def _is_moments(value: Any) -> bool:
    return getattr(value, "_fields", None) == ("count", "mean", "var", "mean_lo")


def _validate_floating(xp: ModuleType, argument: str, x: Array) -> None:
    if float_name(xp, x.dtype) is None:
        fail(TypeError, argument, f"dtype {x.dtype}", f"one of {', '.join(FLOATS)}")


def _validate_compatible(xp: ModuleType, device: Any, argument: str, v: Array, name: str) -> None:
    _validate_library(xp, argument, v, name)
    _validate_device(device, argument, v, name)
    _validate_floating(xp, argument, v)


def _validate_library(xp: ModuleType, argument: str, v: Array, name: str) -> None:
    other = namespace(argument, v)
    if other is not xp:
        fail(
            TypeError,
            argument,
            f"an array of {library_name(other)}",
            f"one of {library_name(xp)}, as {name}",
        )


def _validate_device(device: Any, argument: str, v: Array, name: str) -> None:
    other = device_of(v)
    # Unknown for a traced array; and what is spread over several devices is JAX's own affair.
    if device is None or other is None or type(device) is not type(other):
        return
    if device != other and not is_spread(device):
        fail(ValueError, argument, f"an array on device {other}", f"one on {device}, as {name}")
