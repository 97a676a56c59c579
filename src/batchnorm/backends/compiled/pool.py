"""The helper threads of compiled loops: when they start and end. How they work is in `compiled/crew`."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading

import numpy as np
import numpy.typing as npt

from batchnorm import threads
from batchnorm.backends.compiled import crew

_lock = threading.Lock()
_boxes = np.zeros((0, crew.BOX // 8), np.int64)
_crew = (0, 0)  # their address and number: read by callers at any time
_wanted = 0  # how many were asked for: there are fewer where threads could not be started
_threads: list[threading.Thread] = []
_former: list[npt.NDArray[np.int64]] = []  # kept: a caller on another thread may still read them
_closed = False


def boxes(wanted: int) -> tuple[int, int]:
    """The address of the helpers' boxes, and how many there are: the wanted number, or fewer."""
    if _wanted < wanted:
        _hire(threads.get_num_threads() - 1)
    address, count = _crew
    return address, min(wanted, count)


def _hire(count: int) -> None:
    """Start that many helpers in the place of those there are."""
    # Where somebody is about it, perhaps further up in this very thread, a call does without.
    if not _lock.acquire(blocking=False):
        return
    try:
        if _closed:
            return
        _leave()
        boxes = _box_memory(count)
        for box in boxes:
            box[crew.BED // 8], box[crew.CHAIR // 8] = _taken_lock(), _taken_lock()
        for i in range(count):
            # A daemon: one that waits must not keep the interpreter from ending.
            at = (boxes.ctypes.data + i * crew.BOX,)
            helper = threading.Thread(target=crew.serve, args=at, name="batchnorm", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # no more threads for this process, or the interpreter is ending
                boxes = boxes[:i]
                break
            _threads.append(helper)
        _use(boxes, count)
    finally:
        _lock.release()


def _use(boxes: npt.NDArray[np.int64], wanted: int) -> None:
    global _boxes, _crew, _wanted
    _former.append(boxes)
    _boxes, _crew, _wanted = boxes, (boxes.ctypes.data, len(boxes)), wanted


def _box_memory(count: int) -> npt.NDArray[np.int64]:
    """Boxes that share no cache line with anything else."""
    raw = np.zeros((count + 1) * crew.BOX, np.uint8)
    first = -raw.ctypes.data % crew.BOX
    boxes = raw[first : first + count * crew.BOX].view(np.int64)
    return boxes.reshape(count, crew.BOX // 8)


def _taken_lock() -> int:
    """A bare lock of Python's C interface, taken. It is never freed: a helper may lie on it."""
    api = ctypes.pythonapi
    api.PyThread_allocate_lock.restype = ctypes.c_void_p
    api.PyThread_acquire_lock.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lock: int = api.PyThread_allocate_lock()
    api.PyThread_acquire_lock(lock, 1)
    return lock


def _leave() -> None:
    """Send the helpers home. What they have not begun is left to its callers."""
    for box in _boxes:
        box[crew.DISMISSED // 8] = 1
        # Also when it does not sleep: it wakes once too often then, which does no harm.
        ctypes.pythonapi.PyThread_release_lock(ctypes.c_void_p(int(box[crew.BED // 8])))
    for helper in _threads:
        helper.join()
    _threads.clear()


def _close() -> None:
    """Leave before compiled code is unloaded; from here on, callers do all of the work themselves."""
    global _closed
    with _lock:
        _closed = True
        _leave()
        _use(_boxes[:0], 0)


def _forget_after_fork() -> None:
    """A forked child has none of its parent's threads, and perhaps its lock as it was held."""
    global _lock
    _lock = threading.Lock()
    _threads.clear()
    _use(_boxes[:0], 0)


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
