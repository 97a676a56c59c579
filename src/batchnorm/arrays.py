"""Properties of arrays of any library: namespace, device, and values if they are known."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import array_api_compat as compat

from batchnorm.errors import describe_type, fail
from batchnorm.tracing import recorded, traced, transformed

Array = Any

# Values of a piece that stays in cache: 1 MiB in float64.
PIECE = 2**17


def namespace(argument: str, x: Array) -> ModuleType:
    """Return the array API namespace of an array."""
    # Sums of a masked array use its mask, but counts do not; `*` is not elementwise for a matrix.
    inner = type(getattr(x, "_meta", x))  # the class of the chunks of a Dask array
    if inner.__name__ in ("MaskedArray", "MaskedTensor"):
        got = describe_type(x) if inner is type(x) else f"an array of {inner.__name__} chunks"
        fail(TypeError, argument, got, "a plain array, and its mask inverted as `where`")
    if inner.__name__ == "matrix":
        fail(TypeError, argument, "a matrix", "a plain array: np.asarray(…) gives one")
    if compat.is_torch_array(x) and (x.is_nested or x.layout != sys.modules["torch"].strided):
        layout = "nested" if x.is_nested else x.layout
        fail(TypeError, argument, f"a tensor of layout {layout}", "a strided one")
    try:
        xp: ModuleType = compat.array_namespace(x)
    except TypeError:
        fail(TypeError, argument, describe_type(x), "an array of an array API library")
    return xp


def library_name(xp: ModuleType) -> str:
    """Return the public name of an array API namespace."""
    return xp.__name__.removeprefix("array_api_compat.")


def known_false(truth: Array) -> bool:
    """Return whether a condition is known to be false; the value of a lazy one is unknown."""
    if is_hidden(truth):
        return False
    try:
        return not bool(truth)
    except (TypeError, RuntimeError):  # a traced array of JAX, a transformed one of PyTorch
        return False


def is_hidden(x: Array) -> bool:
    """Return whether values are unknown until a graph is run; JAX arrays count as known."""
    if compat.is_cupy_array(x):
        return bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())
    if compat.is_torch_array(x):
        if x.device.type == "cuda" and sys.modules["torch"].cuda.is_current_stream_capturing():
            return True
        return traced()
    return bool(compat.is_lazy_array(x) and not compat.is_jax_array(x))


def cut_along(shape: tuple[int, ...], axis: int) -> Iterator[tuple[Any, ...]]:
    """Give indices that cut an array along an axis, into pieces of `PIECE` values or of length 1."""
    n = shape[axis]
    step = max(1, n * PIECE // max(1, math.prod(shape)))
    for i in range(0, n, step):
        yield *(slice(None),) * axis, slice(i, min(n, i + step)), ...


def is_eager_on_host(x: Array) -> bool:
    """Return whether operations on an array run immediately, on a CPU, without being recorded."""
    if compat.is_torch_array(x):
        return x.device.type == "cpu" and transformed() is None and recorded((x,)) is None
    return not (compat.is_cupy_array(x) or compat.is_lazy_array(x))


def device_of(x: Array) -> Any:
    """Return the device for per-channel vectors of x: its device, or all of its devices."""
    device = compat.device(x)
    if not is_spread(device):
        return device
    sharding = sys.modules["jax"].sharding
    if not isinstance(device, sharding.NamedSharding):
        return None  # JAX moves vectors to the devices of x
    return sharding.NamedSharding(device.mesh, sharding.PartitionSpec(), memory_kind=device.memory_kind)


def is_spread(device: Any) -> bool:
    """Return whether a device is a sharding of JAX, for several devices."""
    return "Sharding" in type(device).__name__


def same_shape(got: Any, expected: Any) -> bool:
    """Return whether two shapes agree in the dimensions that are known in both."""
    return len(got) == len(expected) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(got, expected, strict=True)
    )


def on_host(a: Array) -> Array:
    """Return the values of an eager array as a NumPy array; a NumPy array is returned as it is."""
    import numpy as np

    if compat.is_torch_array(a):
        return a.detach().cpu().numpy()
    return a.get() if compat.is_cupy_array(a) else np.asarray(a)


def constant(a: Array) -> Array:
    """Return an array of which nothing is differentiated."""
    if compat.is_jax_array(a):
        return sys.modules["jax"].lax.stop_gradient(a)
    return a.detach() if hasattr(a, "detach") else a
