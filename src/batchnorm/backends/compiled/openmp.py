"""Compiled loops on PyTorch's own threads, for its tensors.

PyTorch's threads watch for work for a while after each of its operators, on the very processors that
helpers of ours would need: beside them a pass takes half as long again. So they are given the job.
They belong to its OpenMP runtime, whose entrance is a C function that runs another on a team.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc

from batchnorm.backends.compiled.crew import share
from batchnorm.backends.compiled.terms import OPTIONS

Run = Callable[[int, int, int], None]

_own = threading.local()
_forked = False


def current() -> Run | None:
    """How this thread's present call is to run loop(job, k) on several threads, if not on helpers."""
    return getattr(_own, "run", None)


def on_torch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose loops run on PyTorch's threads, where those can be reached."""

    @functools.wraps(kernel)
    def call(*arguments: Any, **named: Any) -> Any:
        _own.run = None if _forked else _entrance()
        try:
            return kernel(*arguments, **named)
        finally:
            _own.run = None

    return call


@functools.cache
def _entrance() -> Run | None:
    """Run loops on PyTorch's threads; None on systems where its runtime is another."""
    torch: Any = sys.modules["torch"]
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    if not found:
        return None
    parallel = ctypes.CDLL(str(found[0])).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    compiler: Any = cfunc
    compiled = compiler("void(int64)", **OPTIONS)(share)

    def run(loop: int, job: int, count: int) -> None:
        common = np.array([loop, job, 0], np.int64)
        # As many as PyTorch itself would use: one in the workers of its data loaders, say.
        parallel(compiled.address, common.ctypes.data, min(count, torch.get_num_threads()), 0)

    return run


def _forget_after_fork() -> None:
    """A forked child has no team, and the runtime does not know."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
