"""The CUDA kernels on CuPy arrays and PyTorch CUDA tensors, compiled and launched by CuPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from batchnorm.backends.cuda.arrangement import Device
from batchnorm.backends.cuda.backend import Cuda
from batchnorm.backends.cuda.launches import THREADS, Limits
from batchnorm.backends.cuda.running import source

Array = Any
Arrays = tuple[Array | None, ...]


@functools.cache
def unusable() -> str | None:
    """Return why CuPy cannot run the kernels here, or None."""
    try:
        cupy = importlib.import_module("cupy")
        if cupy.cuda.runtime.is_hip:
            return "CuPy is built for ROCm, for which there are no kernels"
        cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return "CuPy is not installed: pip install 'batchnorm[cupy-cuda13x]'"
    except Exception as error:  # for example an installation without a driver
        return f"CuPy cannot be used: {type(error).__name__}: {error}"
    return None


def on_arrays(arrays: Arrays) -> Cuda:
    """Return the backend for CuPy arrays, on their device and CuPy's current stream."""
    return _on_arrays(arrays[0].device.id)  # type: ignore[union-attr]


def on_tensors(arrays: Arrays) -> Cuda:
    """Return the backend for PyTorch tensors, on their device and PyTorch's current stream."""
    return _on_tensors(arrays[0].device.index)  # type: ignore[union-attr]


@functools.cache
def _on_arrays(index: int) -> Cuda:
    cupy = importlib.import_module("cupy")

    def active() -> Any:
        is_current = cupy.cuda.runtime.getDevice() == index
        return contextlib.nullcontext() if is_current else cupy.cuda.Device(index)

    device = Device(
        _limits(index),
        active,
        address=lambda a: int(a.data.ptr),
        strides=lambda a: tuple(stride // a.itemsize for stride in a.strides),
        contiguous=cupy.ascontiguousarray,
        capturing=lambda: bool(cupy.cuda.get_current_stream().is_capturing()),
        launch=functools.partial(_launch, cupy.cuda.get_current_stream),
    )
    return Cuda("CUDA kernels, launched by CuPy", device)


@functools.cache
def _on_tensors(index: int) -> Cuda:
    torch = sys.modules["torch"]

    def active() -> Any:
        is_current = torch.cuda.current_device() == index
        return contextlib.nullcontext() if is_current else torch.cuda.device(index)

    def stream() -> Any:
        return _Stream(torch.cuda.current_stream(index).cuda_stream)

    device = Device(
        _limits(index),
        active,
        address=lambda a: int(a.data_ptr()),
        strides=lambda a: tuple(a.stride()),
        contiguous=lambda a: a.contiguous(),
        capturing=lambda: False,  # PyTorch keeps the memory of its graphs
        launch=functools.partial(_launch, stream),
    )
    return Cuda("CUDA kernels, launched by CuPy on PyTorch's stream", device)


def _limits(index: int) -> Limits:
    attributes = importlib.import_module("cupy").cuda.Device(index).attributes
    return Limits(attributes["MultiProcessorCount"], attributes["L2CacheSize"])


@functools.cache
def _kernel(name: str) -> Any:
    """Return a kernel by its name in C++. CuPy compiles it at its first launch on each device."""
    module = importlib.import_module("cupy").RawModule(
        code=source(), options=("-std=c++17",), name_expressions=(name,)
    )
    return module.get_function(name)


class _Stream(NamedTuple):
    """The stream of another library, in the form that CuPy's launches take."""

    ptr: int


def _launch(
    stream: Callable[[], Any],
    name: str,
    params: bytes,
    blocks: int,
    zero_address: int,
    zero_bytes: int,
) -> None:
    """Set memory to zero and run a kernel, both on the current stream."""
    current = stream()
    if zero_bytes:
        sys.modules["cupy"].cuda.runtime.memsetAsync(zero_address, 0, zero_bytes, current.ptr)
    # CuPy passes an array of one element by value, as a kernel takes a struct.
    argument = np.frombuffer(params, f"V{len(params)}")
    _kernel(name)((blocks,), (THREADS,), (argument,), stream=current)
