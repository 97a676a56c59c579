"""Validation of the memory of `out`."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import array_api_compat as compat

from batchnorm.errors import fail
from batchnorm.tracing import traced

Array = Any


def validate_no_overlap(out: Array | None, **given: Array | None) -> None:
    """Check that the elements of `out` share no memory with each other or with another argument.

    `out` may be x, dy or the residual of a forward pass itself, because each element is read before it
    is written, but not another view of their memory. The result must not be cached, because memory
    differs from call to call.
    """
    if out is None:
        return
    np: Any = importlib.import_module("numpy")
    target = _memory_of(out)
    if target is None:
        return
    if not target.flags.forc and _overlaps_itself(target):
        fail(ValueError, "out", "values that share memory", "a place of its own for each")
    for argument, a in given.items():
        itself = argument in ("x", "dy", "residual")
        other = None if a is None or (itself and a is out) else _memory_of(a)
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
            own = "the residual itself" if argument == "residual" else "x or dy itself"
            fail(ValueError, "out", got, f"{own}, or memory of its own")


def same_memory(out: Array | None, x: Array) -> bool:
    """Return whether `out` and x are the same array in memory, element by element."""
    if out is None or out is x:
        return out is x
    target, other = _memory_of(out), _memory_of(x)
    known = target is not None and other is not None
    return known and out.dtype == x.dtype and _same_place(target, other)


def _same_place(a: Array, b: Array) -> bool:
    return bool((a.ctypes.data, a.strides) == (b.ctypes.data, b.strides))


def _overlaps_itself(a: Array) -> bool:
    """Return whether elements of an array may share memory, as those of a broadcast array do."""
    extent = a.itemsize
    strides = ((abs(stride), n) for stride, n in zip(a.strides, a.shape, strict=True) if n > 1)
    for stride, n in sorted(strides):
        if stride < extent:
            return bool(a.size)
        extent += stride * (n - 1)
    return False


def _memory_of(a: Array) -> Array | None:
    """Return a NumPy array with the address and strides of an array; None if these are unknown.

    The address may be that of a device, so the values must not be read.
    """
    import numpy as np

    if isinstance(a, np.ndarray):
        return a
    if compat.is_torch_array(a):
        torch = sys.modules["torch"]
        if type(a) not in (torch.Tensor, torch.nn.Parameter) or a.layout != torch.strided or traced():
            return None
        size, address = a.element_size(), a.data_ptr()
        strides = tuple(stride * size for stride in a.stride())
    elif compat.is_cupy_array(a):
        size, address, strides = a.itemsize, a.data.ptr, a.strides
    else:
        return None
    interface = {"shape": tuple(a.shape), "typestr": f"|V{size}", "data": (address, False)}
    return np.asarray(
        SimpleNamespace(__array_interface__=interface | {"strides": strides, "version": 3})
    )
