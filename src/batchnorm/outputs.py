"""Memory for large outputs, kept for the next one.

A fresh output of 100 MB costs as much as the rest of a forward pass: the system zeroes each page when
it is first written to. So an output's memory comes back here once nothing refers to the output or
to a view of it, and the next output of the same size takes it.
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
# Smaller arrays are left to NumPy: the allocator keeps their pages anyway.
SMALLEST = 2**20
ALIGNMENT = 64  # a cache line, and the widest vector


@functools.lru_cache(maxsize=256)
def _lease(size: int) -> Any:
    """A class whose instances lend memory of a size: what NumPy keeps as the base of an output.

    NumPy shortens chains of bases, but only those of arrays; this is a buffer of ctypes.
    """

    class Lease(ctypes.c_char * size):  # type: ignore[misc]
        memory: Memory

        def __del__(self) -> None:
            if give_back is not None:  # None when the interpreter ends
                give_back(self.memory)

    return Lease


_lock = threading.Lock()
_limit: int | None = None
_free: list[Memory] = []  # the most recently returned one last


def set_output_pool(max_bytes: int | None) -> None:
    """Set how much memory of past outputs is kept for the next ones.

    Only NumPy arrays and PyTorch's CPU tensors of a MiB and more take part. Memory is reused for
    an output of the same size, and only when nothing refers to the earlier output any more.

    Parameters
    ----------
    max_bytes : int or None
        The most that is kept, in bytes; 0 keeps nothing and frees what was kept. None for the default:
        the environment variable ``BATCHNORM_OUTPUT_POOL``, or 256 MiB.

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
    del dropped  # outside of the lock


def get_output_pool() -> int:
    """How much memory of past outputs is kept at most, in bytes.

    Returns
    -------
    int
        What `set_output_pool` set, or its default.

    Raises
    ------
    ValueError
        ``BATCHNORM_OUTPUT_POOL`` is set to something else than a whole number.
    """
    global _limit
    if _limit is None:
        given = int_from_environment(VARIABLE, 0, "a whole number of bytes")
        _limit = DEFAULT_BYTES if given is None else given
    return _limit


def empty_like(x: Array) -> Array:
    """An array of the shape, dtype and order of axes of x, with any values."""
    import numpy as np  # here, not above: `import batchnorm` loads no array library

    if x.nbytes < SMALLEST:
        return np.empty_like(x, subok=False)
    memory, address = _take(x.nbytes)
    lease = _lease(x.nbytes).from_address(address)
    lease.memory = memory, address
    if x.flags.c_contiguous:
        return np.ndarray(x.shape, x.dtype, lease)
    # Largest stride first, as NumPy orders the axes of an elementwise result.
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    return np.ndarray([x.shape[i] for i in order], x.dtype, lease).transpose(np.argsort(order))


def _take(size: int) -> Memory:
    """Aligned memory, and its address: some that came back, or new."""
    get_output_pool()  # a wrong setting is an error here, not in a finalizer
    with _lock:
        for i in range(len(_free) - 1, -1, -1):
            if _free[i][0].size == size + ALIGNMENT:
                return _free.pop(i)
    import numpy as np

    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    address = raw.ctypes.data
    return raw, address + -address % ALIGNMENT


def give_back(memory: Memory) -> None:
    """Keep memory for the next output. Called by finalizers: at any time, on any thread."""
    # Where the lock is held (perhaps further up in this very thread) the memory is simply freed.
    if memory[0].size > get_output_pool() or not _lock.acquire(blocking=False):
        return
    try:
        _free.append(memory)
        dropped = _trim()
    finally:
        _lock.release()
    del dropped


def _trim() -> list[Memory]:
    """Take out the oldest until the rest is within the limit."""
    limit, kept = get_output_pool(), sum(raw.size for raw, _ in _free)
    dropped = []
    while kept > limit:
        dropped.append(_free.pop(0))
        kept -= dropped[-1][0].size
    return dropped


def _forget_after_fork() -> None:
    """A forked child's lock may be held for ever, and the pages are the parent's."""
    global _lock
    _lock = threading.Lock()
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
