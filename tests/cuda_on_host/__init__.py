"""The CUDA kernels, built by the host's C++ compiler and run on NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

from batchnorm import optimistic
from batchnorm.backends import dispatch
from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda.arrangement import Device
from batchnorm.backends.cuda.backend import Cuda
from batchnorm.backends.cuda.running import source as kernels_source

HERE = pathlib.Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
# Tiles as on a GPU; and tiles so small that small arrays have many parts, trees of sums, several groups.
LIMITS = {
    "large-tiles": launches.Limits(processors=2, cache=24 * 2**10),
    "small-tiles": launches.Limits(processors=2, cache=6 * 2**10, tile=256),
}
_seed = itertools.count()


def library(names, source=None, options=()):
    """Return a shared library with a function for each kernel. It is cached between runs."""
    lines = ['#include "gpu.h"', source or kernels_source()]
    for i, name in enumerate(names):
        lines.append(
            f'extern "C" int launch_{i}(const Params* params, unsigned blocks, unsigned seed) {{\n'
            f"    return gpu::launch([=] {{ {name}(*params); }}, blocks, THREADS, seed);\n}}"
        )
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    command += ["-Wall", "-Wno-unknown-pragmas", "-Werror", "-Wno-maybe-uninitialized", *options]
    text = "\n".join(lines)
    header = (HERE / "gpu.h").read_text()
    digest = hashlib.sha256("\0".join([text, header, *command]).encode()).hexdigest()[:16]
    folder = pathlib.Path(tempfile.gettempdir()) / f"batchnorm-cuda-on-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    built = folder / f"{digest}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch) / "made.so"
            command += [f"-I{HERE}", "-x", "c++", "-", "-o", str(made)]
            subprocess.run(command, input=text, text=True, check=True, timeout=600)
            made.replace(built)
    return ctypes.CDLL(str(built))


@functools.cache
def functions(dtype, kernel, epilogue, source=None, options=()):
    """Return the instances of a kernel for a dtype, with or without an epilogue, by name."""
    begin, end = f"{kernel}<{launches.TYPES[dtype][0]},", f", {epilogue}>"
    names = [n for n in launches.instances() if n.startswith(begin) and n.endswith(end)]
    built = library(names, source, options)
    return {name: getattr(built, f"launch_{i}") for i, name in enumerate(names)}


class BarrierError(AssertionError):
    """Some threads of a block ended while others waited at a barrier."""


def device(limits, source=None, options=()):
    """Return the host as a `Device` of `backends/cuda`."""
    dtypes = {name: dtype for dtype, (name, _, _) in launches.TYPES.items()}

    def launch(name, params, blocks, zero_address, zero_bytes):
        if zero_bytes:
            ctypes.memset(zero_address, 0, zero_bytes)
        kernel, arguments = name.rstrip(">").split("<")
        dtype, *_, epilogue = arguments.split(", ")
        run = functions(dtypes[dtype], kernel, epilogue, source, options)[name]
        if run(params, blocks, next(_seed)):
            raise BarrierError(name)

    return Device(
        limits,
        active=contextlib.nullcontext,
        address=lambda a: a.ctypes.data,
        strides=lambda a: tuple(stride // a.itemsize for stride in a.strides),
        contiguous=np.ascontiguousarray,
        capturing=lambda: next(_seed) % 2 == 0,  # both cases
        launch=launch,
    )


@contextlib.contextmanager
def active(limits=LIMITS["small-tiles"], source=None, options=()):
    """Run NumPy arrays on the CUDA kernels within this context."""
    found = Cuda("on the host, for tests", device(limits, source, options))
    candidate = dispatch.Candidate(("cupy",), lambda arrays: found)
    table = dispatch._TABLE
    dispatch._TABLE = (("numpy", "ndarray", lambda: (candidate,)),)
    find, optimistic.find = optimistic.find, lambda kind: optimistic.NOTHING
    _forget()
    try:
        yield found
    finally:
        dispatch._TABLE, optimistic.find = table, find
        _forget()


def _forget():
    dispatch._candidates.cache_clear()
    optimistic.calls.clear()
