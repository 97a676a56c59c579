"""What cannot be normalized, and how we say so.

Every function here raises or returns what its caller needs next; none changes anything. A message
names the argument, what it got and what was expected, in that order.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import numbers
import operator
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import array_api_compat as compat

from batchnorm.layout import FLOATS, Layout, float_name, layout
from batchnorm.tracing import traced

Array = Any

# Per-channel arguments that have no default.
REQUIRED = ("mean", "var", "stats.mean", "stats.var")


def fail(error: type[Exception], argument: str, got: object, expected: str) -> NoReturn:
    """Raise an error in the one form that all of ours have: one line."""
    raise error(" ".join(f"{argument}: got {got}, expected {expected}".split()))


def fail_alike(error: type[Exception], argument: str, got: object, expected: str) -> NoReturn:
    """Raise an error that all members of a group find by themselves: nobody has to be told."""
    try:
        fail(error, argument, got, expected)
    except error as raised:
        raised.on_all_members = True  # type: ignore[attr-defined]
        raise


def kind(value: Any) -> str:
    """The class of an argument, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def shown(value: Any) -> str:
    """What an argument is, in a few words."""
    what = kind(value)
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"{what} of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:  # a number of NumPy's without its class
        text = " ".join((str if isinstance(value, numbers.Real) else repr)(value).split())
    except Exception:  # an object that cannot tell what it is
        return what
    return text if len(text) <= 80 else what


def namespace(argument: str, x: Array) -> ModuleType:
    """The array API namespace of an array."""
    # Sums of a masked array would honour its mask, counts would not; products of a matrix are others.
    inner = type(getattr(x, "_meta", x))  # of Dask's chunks
    if inner.__name__ in ("MaskedArray", "MaskedTensor"):
        got = kind(x) if inner is type(x) else f"an array of {inner.__name__} chunks"
        fail(TypeError, argument, got, "a plain array, and its mask inverted as `where`")
    if inner.__name__ == "matrix":
        fail(TypeError, argument, "a matrix", "a plain array: np.asarray(…) gives one")
    if compat.is_torch_array(x) and (x.is_nested or x.layout != sys.modules["torch"].strided):
        layout = "nested" if x.is_nested else x.layout
        fail(TypeError, argument, f"a tensor of layout {layout}", "a strided one")
    try:
        xp: ModuleType = compat.array_namespace(x)
    except TypeError:
        fail(TypeError, argument, kind(x), "an array of an array API library")
    return xp


def real(argument: str, xp: ModuleType, a: Array) -> None:
    """Check that an array holds numbers, or truths, of kinds that some argument takes."""
    if float_name(xp, a.dtype) is None and not _counts(xp, a.dtype):
        fail(TypeError, argument, f"dtype {a.dtype}", f"one of {', '.join(FLOATS)}, or weights")


def _counts(xp: ModuleType, dtype: Any) -> bool:
    """Whether a dtype is boolean or integral, as a mask or weights may be."""
    try:
        return bool(xp.isdtype(dtype, ("bool", "integral")))
    except TypeError:  # a dtype that is none of the standard's
        return False


def library(xp: ModuleType) -> str:
    """The name by which users know an array API namespace."""
    return xp.__name__.removeprefix("array_api_compat.")


def subject(x: Array, axis: int | tuple[int, ...], argument: str = "x") -> Layout:
    """Check the array to be normalized and its channel axis."""
    xp = namespace(argument, x)
    _floating(xp, argument, x)
    if any(n != n for n in x.shape):  # Dask's word for what it has not computed
        got = f"chunks of unknown size (shape {tuple(x.shape)})"
        fail(ValueError, argument, got, "known ones: call compute_chunk_sizes() on it first")
    return layout(argument, xp, x, axes(axis, x.ndim, argument), _device(x))


# Layouts of calls that passed, by what decides whether a call passes. Most calls are like the last.
_passed: dict[Any, Layout] = {}
_PLAIN = {
    ("numpy", "ndarray"),
    ("cupy", "ndarray"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}
_plain: dict[type, bool] = {}


def key(call: str, axis: Any, out: Array | None, *arrays: Array | None) -> Any:
    """What decides whether a call passes, or None where that is more than shapes, dtypes, devices."""
    if type(axis) is not int or not (out is None or any(out is a for a in arrays[:2])):
        return None
    parts: list[Any] = [call, axis, out is None or _writable(out)]
    for a in (out, *arrays):
        if a is None:
            parts.append(None)
            continue
        cls = type(a)
        plain = _plain.get(cls)
        if plain is None:
            plain = _plain[cls] = (cls.__module__, cls.__name__) in _PLAIN
        if not plain:
            return None
        device = a.device
        try:
            parts.append((cls, a.shape, a.dtype, getattr(device, "id", device)))  # CuPy's has no hash
        except RuntimeError:  # a nested tensor, which has no shape
            return None
    return tuple(parts)


def passed(key: Any) -> Layout | None:
    """The layout of an earlier call that passed with the same key."""
    return None if key is None else _passed.get(key)


def remember(key: Any, at: Layout) -> None:
    """Keep the layout of a call that passed."""
    if key is not None:
        if len(_passed) >= 4096:
            _passed.clear()
        _passed[key] = at


def like(at: Layout, x: Array, argument: str, other: Array) -> None:
    """Check an array of the shape of x: dy or out."""
    _beside(at.xp, at.device, argument, other, at.name)
    if not same_shape(other.shape, x.shape):
        fail(ValueError, argument, f"shape {tuple(other.shape)}", f"{tuple(x.shape)}, as x")


def vectors(at: Layout, **given: Any) -> None:
    """Check per-channel arguments: library, device, dtype and shape."""
    for argument, v in given.items():
        if v is None and argument not in REQUIRED:
            continue
        _beside(at.xp, at.device, argument, v, at.name)
        if not same_shape(v.shape, at.channels):
            axis = at.kept[0] if len(at.kept) == 1 else at.kept
            fail(
                ValueError,
                argument,
                f"shape {tuple(v.shape)}",
                f"{at.channels}, the channels of {at.name} at axis {axis}",
            )


def statistics(at: Layout, stats: Any) -> None:
    """Check the `stats` that batch_norm returned."""
    if not _is_moments(stats):
        fail(TypeError, "stats", kind(stats), "the Moments that batch_norm returned")
    vectors(at, **{"stats.mean": stats.mean, "stats.var": stats.var, "stats.mean_lo": stats.mean_lo})
    if getattr(stats.count, "shape", ()) != ():
        vectors(at, **{"stats.count": stats.count})
    elif not hasattr(stats.count, "dtype"):
        scalar("stats.count", stats.count, 0)


def mergeable(parts: tuple[Any, ...]) -> ModuleType:
    """Check that moments can be merged; their library."""
    for i, part in enumerate(parts):
        if not _is_moments(part):
            fail(TypeError, f"parts[{i}]", kind(part), "Moments")
    first = parts[0].mean
    xp, device = namespace("parts[0].mean", first), _device(first)
    _floating(xp, "parts[0].mean", first)
    for i, part in enumerate(parts):
        for field, v in zip(part._fields, part, strict=True):
            if field == "mean_lo" and v is None:
                continue
            if field == "count" and not hasattr(v, "dtype"):
                scalar(f"parts[{i}].count", v, 0)
                continue
            _beside(xp, device, f"parts[{i}].{field}", v, "parts[0].mean")
            if not same_shape(v.shape, first.shape) and (field != "count" or v.shape != ()):
                got, expected = f"shape {tuple(v.shape)}", f"{tuple(first.shape)}, as parts[0].mean"
                fail(ValueError, f"parts[{i}].{field}", got, expected)
    return xp


def weights(at: Layout, x: Array, where: Array | None) -> None:
    """Check a mask or weights, and their values where the library is not lazy."""
    if where is None:
        return
    _same_library(at.xp, "where", where, "x")
    _same_device(at.device, "where", where, "x")
    dtype = where.dtype
    if float_name(at.xp, dtype) is None and not _counts(at.xp, dtype):
        fail(TypeError, "where", f"dtype {dtype}", "a boolean mask or real weights")
    trailing = tuple(x.shape)[x.ndim - where.ndim :] if where.ndim <= x.ndim else None
    if trailing is None or not all(
        w == 1 or same_shape((w,), (n,)) for w, n in zip(where.shape, trailing, strict=True)
    ):
        got, expected = f"shape {tuple(where.shape)}", f"one that broadcasts to {tuple(x.shape)}, as x"
        fail(ValueError, "where", got, expected)
    if not _hidden(where):
        real = at.xp.astype(where, at.wide)
        if seen_false(at.xp.all((real >= 0) & (real < float("inf")))):
            fail(ValueError, "where", "a weight that is negative, infinite or NaN", "weights >= 0")


def enough_values(at: Layout, x: Array, where: Array | None) -> None:
    """Check that each channel has the two values that a spread needs."""
    expected = "at least 2 values per channel to normalize by their own statistics"
    got = f"shape {tuple(x.shape)}"
    if at.values == 0:
        fail(ValueError, "x", f"an empty batch of {got}", expected)
    if at.values == 1:
        fail(ValueError, "x", f"{got} with one value per channel", expected)
    if where is not None and not _hidden(where):
        weighs, _ = at.xp.broadcast_arrays(at.xp.astype(where, at.wide), x)
        values = at.xp.sum(at.xp.astype(weighs > 0, at.wide), axis=at.reduced)
        if seen_false(at.xp.all(values >= 2)):
            fail(ValueError, "where", "a channel with fewer than 2 values of weight > 0", expected)


def group(group: Any) -> None:
    """Check that a group can sum over its members."""
    if group is not None and not callable(getattr(group, "all_reduce", None)):
        fail(TypeError, "group", kind(group), "an object with all_reduce(array)")


def output(at: Layout, x: Array, out: Array | None) -> None:
    """Check that a result of x's shape and dtype can be written to `out`."""
    if out is None:
        return
    like(at, x, "out", out)
    if out.dtype != x.dtype:
        fail(TypeError, "out", f"dtype {out.dtype}", f"{x.dtype}, as x")
    if compat.is_lazy_array(out) or not hasattr(type(out), "__setitem__"):  # JAX's count as lazy
        fail(TypeError, "out", f"an array of {library(at.xp)}", "an array that can be written to")
    if not _writable(out):
        fail(ValueError, "out", "a read-only array", "one that can be written to")


def apart(out: Array | None, **given: Array | None) -> None:
    """Check that writing to `out` changes no argument that is still to be read, nor `out` itself.

    It may be x or dy itself, which are read where they are written; not another view of their memory.
    Where arrays lie differs from call to call, so this is not to be remembered.
    """
    if out is None:
        return
    np: Any = importlib.import_module("numpy")
    target = _placed(out)
    if target is None:
        return
    if not target.flags.forc and _overlaps_itself(target):
        fail(ValueError, "out", "values that share memory", "a place of its own for each")
    for argument, a in given.items():
        itself = argument in ("x", "dy")
        other = None if a is None or (itself and a is out) else _placed(a)
        if a is None or other is None or not np.may_share_memory(target, other):
            continue
        if itself and out.dtype == a.dtype and _same_place(target, other):
            continue
        try:
            shared = np.shares_memory(target, other, max_work=10**6)
        except np.exceptions.TooHardError:
            shared = True
        if shared:
            got = f"memory that it shares with {argument}"
            fail(ValueError, "out", got, "x or dy itself, or memory of its own")


def same_memory(out: Array | None, x: Array) -> bool:
    """Whether to write to `out` is to write to x, value for value."""
    if out is None or out is x:
        return out is x
    target, other = _placed(out), _placed(x)
    known = target is not None and other is not None
    return known and out.dtype == x.dtype and _same_place(target, other)


def _same_place(a: Array, b: Array) -> bool:
    return bool((a.ctypes.data, a.strides) == (b.ctypes.data, b.strides))


def _overlaps_itself(a: Array) -> bool:
    """Whether an array may have values in the same place, as one that is broadcast has."""
    reached = a.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if step < reached:
            return bool(a.size)
        reached += step * (n - 1)
    return False


def _placed(a: Array) -> Array | None:
    """Give a NumPy array that is where an array is, maybe on a device; None where nobody can tell."""
    import numpy as np

    if isinstance(a, np.ndarray):
        return a
    if compat.is_torch_array(a):
        torch = sys.modules["torch"]
        if type(a) not in (torch.Tensor, torch.nn.Parameter) or a.layout != torch.strided or traced():
            return None
        size, address = a.element_size(), a.data_ptr()
        strides = tuple(step * size for step in a.stride())
    elif compat.is_cupy_array(a):
        size, address, strides = a.itemsize, a.data.ptr, a.strides
    else:
        return None
    place = {"shape": tuple(a.shape), "typestr": f"|V{size}", "data": (address, False)}
    return np.asarray(SimpleNamespace(__array_interface__=place | {"strides": strides, "version": 3}))


def _writable(out: Array) -> bool:
    return bool(getattr(getattr(out, "flags", None), "writeable", True))


def scalar(argument: str, value: Any, low: float, high: float = float("inf")) -> Any:
    """Check a number with bounds, and return it as a float; or a 0-d array (a traced one, say)."""
    if type(value) is float and low <= value <= high and value != float("inf"):
        return value
    interval = f"a number >= {low:g}" if high == float("inf") else f"a number in [{low:g}, {high:g}]"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if not low <= number <= high or number == float("inf"):
            fail(ValueError, argument, shown(value), interval)
        return number
    if (
        getattr(value, "shape", None) != ()
        or float_name(namespace(argument, value), value.dtype) is None
    ):
        fail(TypeError, argument, shown(value), interval)
    if seen_false((value >= low) & (value <= high) & (value < float("inf"))):
        fail(ValueError, argument, shown(value), interval)
    return value


def whole(argument: str, value: Any, low: int) -> int:
    """Check a whole number with a lower bound."""
    expected = f"a whole number >= {low}"
    try:
        number = operator.index(value)
    except TypeError:
        fail(TypeError, argument, shown(value), expected)
    if isinstance(value, bool) or number < low:
        fail(ValueError, argument, shown(value), expected)
    return number


def flag(argument: str, value: Any) -> bool:
    """Check a switch, and return it as a bool."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # NumPy's
        fail(TypeError, argument, shown(value), "True or False")
    return bool(value)


def one_of(argument: str, value: Any, names: Iterable[str], more: str = "") -> str:
    """Check a name."""
    expected = f"one of {', '.join(map(repr, names))}{more}"
    if not isinstance(value, str):
        fail(TypeError, argument, shown(value), expected)
    if value not in names:
        fail(ValueError, argument, shown(value), expected)
    return value


def function(argument: str, value: Any, what: str = "a function") -> None:
    """Check something that is called."""
    if not callable(value):
        fail(TypeError, argument, shown(value), what)


def iterable(argument: str, value: Any, what: str) -> None:
    """Check something that is gone through."""
    if not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        fail(TypeError, argument, shown(value), what)


def path(argument: str, value: Any) -> Path:
    """Check a path."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        fail(TypeError, argument, shown(value), "a path")
    return Path(value)


def channel_axes(axis: Any, expected: str = "an int, or a tuple of ints") -> tuple[int, ...]:
    """Check that an axis is one, or a tuple of them, as far as that goes without an array."""
    given = axis if isinstance(axis, tuple) else (axis,)
    if any(isinstance(a, bool) or getattr(a, "shape", ()) != () for a in given):
        fail(TypeError, "axis", shown(axis), expected)
    try:
        return tuple(operator.index(a) for a in given)
    except TypeError:
        fail(TypeError, "axis", shown(axis), expected)


def floating(argument: str, dtype: Any) -> str:
    """Check a dtype of any library, or its name; which of ours it is."""
    if dtype is float or isinstance(dtype, str):  # as NumPy understands it
        with contextlib.suppress(TypeError):
            dtype = importlib.import_module("numpy").dtype(dtype)
    named = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    name = (named if isinstance(named, str) else shown(dtype).strip("'")).rpartition(".")[2]
    if not isinstance(dtype, str):
        name = name.lower()  # ndonnx's are classes: Float32
    if name not in FLOATS:
        fail(TypeError, argument, shown(dtype), f"one of {', '.join(FLOATS)}")
    return name


def from_environment(variable: str, low: int, expected: str) -> int | None:
    """A whole number with a lower bound from an environment variable; None where it is not set."""
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and int(text) >= low):
        fail(ValueError, variable, repr(text), expected)
    return int(text) if text else None


def joined(at: Layout, stats: Any, where: Array | None) -> None:
    """Check that the members of a group have enough values between them; all find the same."""
    enough = stats.count >= 2 if where is None else stats.count > 0
    if seen_false(at.xp.all(enough)):
        got = "a channel with fewer than 2 values" if where is None else "a channel without any weight"
        fail_alike(ValueError, "x", f"{got} in the whole group", "enough values to normalize by")


def seen_false(truth: Array) -> bool:
    """Whether a condition is false, as far as one can see: a lazy value cannot be looked at."""
    if _hidden(truth):
        return False
    try:
        return not bool(truth)
    except (TypeError, RuntimeError):  # a traced array of JAX, a transformed one of PyTorch
        return False


def _hidden(x: Array) -> bool:
    """Whether values cannot be looked at without running a graph. JAX's can, unless it is tracing."""
    if compat.is_cupy_array(x):
        return bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())
    if compat.is_torch_array(x):
        if x.device.type == "cuda" and sys.modules["torch"].cuda.is_current_stream_capturing():
            return True
        return traced()
    return bool(compat.is_lazy_array(x) and not compat.is_jax_array(x))


def _is_moments(value: Any) -> bool:
    return getattr(value, "_fields", None) == ("count", "mean", "var", "mean_lo")


def _floating(xp: ModuleType, argument: str, x: Array) -> None:
    if float_name(xp, x.dtype) is None:
        fail(TypeError, argument, f"dtype {x.dtype}", f"one of {', '.join(FLOATS)}")


def _beside(xp: ModuleType, device: Any, argument: str, v: Array, name: str) -> None:
    _same_library(xp, argument, v, name)
    _same_device(device, argument, v, name)
    _floating(xp, argument, v)


def _same_library(xp: ModuleType, argument: str, v: Array, name: str) -> None:
    other = namespace(argument, v)
    if other is not xp:
        fail(TypeError, argument, f"an array of {library(other)}", f"one of {library(xp)}, as {name}")


def _same_device(device: Any, argument: str, v: Array, name: str) -> None:
    other = _device(v)
    # Unknown for a traced array; and what is spread over several devices is JAX's own affair.
    if device is None or other is None or type(device) is not type(other):
        return
    if device != other and not _is_spread(device):
        fail(ValueError, argument, f"an array on device {other}", f"one on {device}, as {name}")


def _device(x: Array) -> Any:
    """Where per-channel vectors of x are made: on its device, or on each of several."""
    device = compat.device(x)
    if not _is_spread(device):
        return device
    sharding = sys.modules["jax"].sharding
    if not isinstance(device, sharding.NamedSharding):
        return None  # JAX then brings vectors to where x is
    return sharding.NamedSharding(device.mesh, sharding.PartitionSpec(), memory_kind=device.memory_kind)


def _is_spread(device: Any) -> bool:
    """Whether a device is JAX's word for several."""
    return "Sharding" in type(device).__name__


def axes(axis: int | tuple[int, ...], ndim: int, name: str = "x") -> tuple[int, ...]:
    """The channel axes as non-negative, increasing numbers."""
    expected = f"an int, or a tuple of increasing ints, in [{-ndim}, {ndim - 1}] for {ndim}-d {name}"
    if ndim == 0:
        expected = f"() for 0-d {name}, which has no axis"
    given = channel_axes(axis, expected)
    kept = tuple(a + ndim if a < 0 else a for a in given)
    increasing = all(a < b for a, b in itertools.pairwise(kept))
    if not increasing or not all(0 <= a < ndim for a in kept):
        fail(ValueError, "axis", shown(axis), expected)
    return kept


def same_shape(got: Any, expected: Any) -> bool:
    """Whether shapes agree, where both are known."""
    return len(got) == len(expected) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(got, expected, strict=True)
    )
