"""Checks of the memory of arguments: what a result may be written to."""

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
