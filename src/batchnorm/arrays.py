"""What is asked of an array of any library: its namespace, its device, its values where known."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import array_api_compat as compat

from batchnorm.errors import describe_type, fail
from batchnorm.tracing import recorded, traced, transformed

Array = Any


def namespace(argument: str, x: Array) -> ModuleType:
    """The array API namespace of an array."""
    # Sums of a masked array would honour its mask, counts would not; products of a matrix are others.
    inner = type(getattr(x, "_meta", x))  # of Dask's chunks
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
    """The name by which users know an array API namespace."""
    return xp.__name__.removeprefix("array_api_compat.")


def known_false(truth: Array) -> bool:
    """Whether a condition is false, as far as one can see: a lazy value cannot be looked at."""
    if is_hidden(truth):
        return False
    try:
        return not bool(truth)
    except (TypeError, RuntimeError):  # a traced array of JAX, a transformed one of PyTorch
        return False


def is_hidden(x: Array) -> bool:
    """Whether values cannot be looked at without running a graph. JAX's can, unless it is tracing."""
    if compat.is_cupy_array(x):
        return bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())
    if compat.is_torch_array(x):
        if x.device.type == "cuda" and sys.modules["torch"].cuda.is_current_stream_capturing():
            return True
        return traced()
    return bool(compat.is_lazy_array(x) and not compat.is_jax_array(x))


def is_eager_on_host(x: Array) -> bool:
    """Whether operations on an array are carried out at once, on a CPU, and nothing records them."""
    if compat.is_torch_array(x):
        return x.device.type == "cpu" and transformed() is None and recorded((x,)) is None
    return not (compat.is_cupy_array(x) or compat.is_lazy_array(x))


def device_of(x: Array) -> Any:
    """Where per-channel vectors of x are made: on its device, or on each of several."""
    device = compat.device(x)
    if not is_spread(device):
        return device
    sharding = sys.modules["jax"].sharding
    if not isinstance(device, sharding.NamedSharding):
        return None  # JAX then brings vectors to where x is
    return sharding.NamedSharding(device.mesh, sharding.PartitionSpec(), memory_kind=device.memory_kind)


def is_spread(device: Any) -> bool:
    """Whether a device is JAX's word for several."""
    return "Sharding" in type(device).__name__


def same_shape(got: Any, expected: Any) -> bool:
    """Whether shapes agree, where both are known."""
    return len(got) == len(expected) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(got, expected, strict=True)
    )


def on_host(a: Array) -> Array:
    """Return the values of an eager array as a NumPy array; NumPy's own as it is."""
    import numpy as np

    if compat.is_torch_array(a):
        return a.detach().cpu().numpy()
    return a.get() if compat.is_cupy_array(a) else np.asarray(a)
