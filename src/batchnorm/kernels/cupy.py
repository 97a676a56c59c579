"""The CUDA kernels on CuPy's arrays and on PyTorch's CUDA tensors, compiled and launched by CuPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from typing import Any

import numpy as np

from batchnorm.kernels import KernelSet, cuda
from batchnorm.kernels.launches import THREADS, Limits

Array = Any


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


@functools.cache
def on_arrays(index: int) -> KernelSet:
    """The kernels for CuPy's arrays on a device, on CuPy's current stream."""
    cupy = importlib.import_module("cupy")

    def active() -> Any:
        on_it = cupy.cuda.runtime.getDevice() == index
        return contextlib.nullcontext() if on_it else cupy.cuda.Device(index)

    device = cuda.Device(
        _limits(index),
        active,
        address=lambda a: int(a.data.ptr),
        steps=lambda a: tuple(step // a.itemsize for step in a.strides),
        contiguous=cupy.ascontiguousarray,
        capturing=lambda: bool(cupy.cuda.get_current_stream().is_capturing()),
        launch=_launch,
    )
    return cuda.kernel_set("cupy", "CUDA kernels, launched by CuPy", device)


@functools.cache
def on_tensors(index: int) -> KernelSet:
    """The kernels for PyTorch's CUDA tensors on a device, on PyTorch's current stream."""
    torch, cupy = sys.modules["torch"], importlib.import_module("cupy")

    def active() -> Any:
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index)
        if torch.cuda.current_device() == index:
            return stream
        both = contextlib.ExitStack()
        both.enter_context(torch.cuda.device(index))
        both.enter_context(stream)
        return both

    device = cuda.Device(
        _limits(index),
        active,
        address=lambda a: int(a.data_ptr()),
        steps=lambda a: tuple(a.stride()),
        contiguous=lambda a: a.contiguous(),
        capturing=lambda: False,  # PyTorch keeps the memory of a graph for it
        launch=_launch,
    )
    return cuda.kernel_set("cupy", "CUDA kernels, launched by CuPy on PyTorch's stream", device)


def _limits(index: int) -> Limits:
    attributes = importlib.import_module("cupy").cuda.Device(index).attributes
    return Limits(attributes["MultiProcessorCount"], attributes["L2CacheSize"])


@functools.cache
def _kernel(name: str) -> Any:
    """A kernel by its name in C++, compiled by CuPy for each device at its first launch there."""
    module = importlib.import_module("cupy").RawModule(
        code=cuda.source(), options=("-std=c++17",), name_expressions=(name,)
    )
    return module.get_function(name)


def _launch(name: str, job: bytes, blocks: int, zero_at: int, zero_bytes: int) -> None:
    """Zero some bytes and run a kernel, on CuPy's current stream."""
    if zero_bytes:
        cuda_module = sys.modules["cupy"].cuda
        cuda_module.runtime.memsetAsync(zero_at, 0, zero_bytes, cuda_module.get_current_stream().ptr)
    # CuPy passes an array of one value by value: the struct.
    _kernel(name)((blocks,), (THREADS,), (np.frombuffer(job, f"V{len(job)}"),))
