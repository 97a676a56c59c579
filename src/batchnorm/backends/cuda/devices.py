"""The CUDA kernels on CuPy's arrays and on PyTorch's CUDA tensors, compiled and launched by CuPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from batchnorm.backends.cuda.backend import Cuda, Device, source
from batchnorm.backends.cuda.launches import THREADS, Limits
from batchnorm.errors import describe_type

Array = Any
Arrays = tuple[Array | None, ...]


@functools.cache
def unusable() -> str | None:
    """Why CuPy cannot run kernels here, or None."""
    try:
        cupy = importlib.import_module("cupy")
        if cupy.cuda.runtime.is_hip:
            return "CuPy is built for ROCm, for which there are no kernels"
        cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return "CuPy is not installed: pip install 'batchnorm[cupy-cuda13x]'"
    except Exception as error:  # an installation without a driver, say
        return f"CuPy cannot be used: {type(error).__name__}: {error}"
    return None


def refuses_arrays(arrays: Arrays) -> str | None:
    """Return why the kernels cannot run on CuPy's arrays, or None."""
    return unusable()


def refuses_tensors(arrays: Arrays) -> str | None:
    """Return why the kernels cannot run on PyTorch's tensors, or None."""
    torch = sys.modules["torch"]
    for a in arrays:
        if a is None:
            continue
        if a.device.type != "cuda":
            return ""
        if type(a) not in (torch.Tensor, torch.nn.Parameter):
            return f"the tensors include {describe_type(a)}"
        if a.layout is not torch.strided:
            return "the tensors are not strided memory"
        if a.is_neg():  # a view whose sign PyTorch changes as it reads
            return "the tensors include a negated view"
    return unusable()


def on_arrays(arrays: Arrays) -> Cuda:
    """Return the kernels for CuPy's arrays on their device, on CuPy's current stream."""
    return _on_arrays(arrays[0].device.id)  # type: ignore[union-attr]


def on_tensors(arrays: Arrays) -> Cuda:
    """Return the kernels for PyTorch's tensors on their device, on PyTorch's current stream."""
    return _on_tensors(arrays[0].device.index)  # type: ignore[union-attr]


@functools.cache
def _on_arrays(index: int) -> Cuda:
    cupy = importlib.import_module("cupy")

    def active() -> Any:
        on_it = cupy.cuda.runtime.getDevice() == index
        return contextlib.nullcontext() if on_it else cupy.cuda.Device(index)

    device = Device(
        _limits(index),
        active,
        address=lambda a: int(a.data.ptr),
        steps=lambda a: tuple(step // a.itemsize for step in a.strides),
        contiguous=cupy.ascontiguousarray,
        capturing=lambda: bool(cupy.cuda.get_current_stream().is_capturing()),
        launch=functools.partial(_launch, cupy.cuda.get_current_stream),
    )
    return Cuda("CUDA kernels, launched by CuPy", device)


@functools.cache
def _on_tensors(index: int) -> Cuda:
    torch = sys.modules["torch"]

    def active() -> Any:
        on_it = torch.cuda.current_device() == index
        return contextlib.nullcontext() if on_it else torch.cuda.device(index)

    def stream() -> Any:
        return _Stream(torch.cuda.current_stream(index).cuda_stream)

    device = Device(
        _limits(index),
        active,
        address=lambda a: int(a.data_ptr()),
        steps=lambda a: tuple(a.stride()),
        contiguous=lambda a: a.contiguous(),
        capturing=lambda: False,  # PyTorch keeps the memory of a graph for it
        launch=functools.partial(_launch, stream),
    )
    return Cuda("CUDA kernels, launched by CuPy on PyTorch's stream", device)


def _limits(index: int) -> Limits:
    attributes = importlib.import_module("cupy").cuda.Device(index).attributes
    return Limits(attributes["MultiProcessorCount"], attributes["L2CacheSize"])


@functools.cache
def _kernel(name: str) -> Any:
    """A kernel by its name in C++, compiled by CuPy for each device at its first launch there."""
    module = importlib.import_module("cupy").RawModule(
        code=source(), options=("-std=c++17",), name_expressions=(name,)
    )
    return module.get_function(name)


class _Stream(NamedTuple):
    """Another library's stream, as CuPy's launches take one."""

    ptr: int


def _launch(
    stream: Callable[[], Any], name: str, job: bytes, blocks: int, zero_at: int, zero_bytes: int
) -> None:
    """Zero some bytes and run a kernel."""
    on = stream()
    if zero_bytes:
        sys.modules["cupy"].cuda.runtime.memsetAsync(zero_at, 0, zero_bytes, on.ptr)
    # CuPy passes an array of one value by value: the struct.
    _kernel(name)((blocks,), (THREADS,), (np.frombuffer(job, f"V{len(job)}"),), stream=on)
