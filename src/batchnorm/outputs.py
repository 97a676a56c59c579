"""A pool of memory for large outputs.

The operating system zeroes each page of new memory at the first write, which for an output of 100 MB
takes as long as the rest of a forward pass. Memory of an output is therefore returned to the pool when
nothing refers to the output or to a view of it, and the next output of the same size uses it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any, TypeAlias

from batchnorm.arguments import int_from_environment, validate_int

Array = Any
Memory: TypeAlias = tuple[Array, int]

VARIABLE = "BATCHNORM_OUTPUT_POOL"
DEFAULT_BYTES = 256 * 2**20
# Smaller arrays are allocated by NumPy: the allocator keeps their pages.
SMALLEST = 2**20
ALIGNMENT = 64  # a cache line, and the widest vector


@functools.lru_cache(maxsize=256)
def _lease(size: int) -> Any:
    """Return a class of buffers of a size, one of which is the base of each output.

    A buffer of ctypes remains the base of all views: NumPy replaces a base only if it is an array.
    """

    class Lease(ctypes.c_char * size):  # type: ignore[misc]
        memory: Memory

        def __del__(self) -> None:
            if release is not None:  # None when the interpreter exits
                release(self.memory)

    return Lease


_lock = threading.Lock()
_limit: int | None = None
_free: list[Memory] = []  # in the order in which it was returned


def set_output_pool(max_bytes: int | None) -> None:
    """Set the limit of the memory of past outputs that is kept for later ones.

    Memory is kept for NumPy arrays and PyTorch CPU tensors of at least one MiB. It is reused for an
    output of the same size, after nothing refers to the earlier output any more.

    Parameters
    ----------
    max_bytes : int or None
        The limit in bytes; 0 frees all memory that is kept. None for the default: the environment
        variable ``BATCHNORM_OUTPUT_POOL``, or 256 MiB.

    Raises
    ------
    TypeError, ValueError
        `max_bytes` is not a whole number of at least 0.
    """
    global _limit
    max_bytes = None if max_bytes is None else validate_int("max_bytes", max_bytes, 0)
    with _lock:
        _limit = max_bytes
        dropped = _trim()
    del dropped  # freed after the lock is released


def get_output_pool() -> int:
    """Return the limit of the memory of past outputs that is kept, in bytes.

    Returns
    -------
    int
        The limit set with `set_output_pool`, or the default.

    Raises
    ------
    ValueError
        ``BATCHNORM_OUTPUT_POOL`` is not a whole number.
    """
    global _limit
    if _limit is None:
        given = int_from_environment(VARIABLE, 0, "a whole number of bytes")
        _limit = DEFAULT_BYTES if given is None else given
    return _limit


def empty_like(x: Array) -> Array:
    """Return an uninitialized array of the shape, dtype and order of axes of x."""
    import numpy as np  # here, not above: `import batchnorm` loads no array library

    if x.nbytes < SMALLEST:
        return np.empty_like(x, subok=False)
    memory = lease(x.nbytes)
    if x.flags.c_contiguous:
        return np.ndarray(x.shape, x.dtype, memory)
    # Largest stride first, as NumPy orders the axes of an elementwise result.
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    return np.ndarray([x.shape[i] for i in order], x.dtype, memory).transpose(np.argsort(order))


def lease(size: int) -> Any:
    """Return a buffer of so many bytes, aligned, whose memory returns to the pool."""
    memory, address = _take(size)
    found = _lease(size).from_address(address)
    found.memory = memory, address
    return found


def _take(size: int) -> Memory:
    """Return memory and its aligned address, from the pool if possible."""
    get_output_pool()  # raises for an invalid setting, which a finalizer cannot
    with _lock:
        for i in range(len(_free) - 1, -1, -1):
            if _free[i][0].size == size + ALIGNMENT:
                return _free.pop(i)
    import numpy as np

    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    address = raw.ctypes.data
    return raw, address + -address % ALIGNMENT


def release(memory: Memory) -> None:
    """Return memory to the pool. Finalizers call this at any time and on any thread."""
    # If the lock is held, perhaps by this thread further up its stack, the memory is freed.
    if memory[0].size > get_output_pool() or not _lock.acquire(blocking=False):
        return
    try:
        _free.append(memory)
        dropped = _trim()
    finally:
        _lock.release()
    del dropped


def _trim() -> list[Memory]:
    """Remove the oldest memory from the pool until it is within its limit, and return it."""
    limit, kept = get_output_pool(), sum(raw.size for raw, _ in _free)
    dropped = []
    while kept > limit:
        dropped.append(_free.pop(0))
        kept -= dropped[-1][0].size
    return dropped


def _reset_after_fork() -> None:
    """Reset a forked child: its lock may be held, and its pages are shared with the parent."""
    global _lock
    _lock = threading.Lock()
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
