"""How many threads a call may run on, and threads for work that Python cuts into tiles.

A kernel cuts its work into tiles that do not depend on the number of threads, and lets every thread
take the next tile until none is left. The caller is always one of the threads: where no other is free
(many callers at once, a forked child, an interpreter that is ending) it does all of the work alone.
Compiled loops have helpers of their own, in `kernels/crew.py`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from batchnorm.arguments import int_from_environment, validate_int

VARIABLE = "BATCHNORM_NUM_THREADS"

_lock = threading.RLock()  # a finalizer may call a kernel wherever this thread is
_chosen: int | None = None
_pool: ThreadPoolExecutor | None = None


def set_num_threads(n: int | None) -> None:
    """Set how many threads a call may run on.

    Results are the same to the bit for any number. Small arrays are left to one thread.

    Parameters
    ----------
    n : int or None
        At least 1; None for the default: the environment variable ``BATCHNORM_NUM_THREADS``, or as
        many as this process may use (by its CPU affinity and its container's quota).

    Raises
    ------
    TypeError, ValueError
        `n` is not a whole number of at least 1.
    """
    global _chosen, _pool
    n = None if n is None else validate_int("n", n, 1)
    with _lock:
        _chosen, old, _pool = n, _pool, None
    if old is not None:
        old.shutdown(wait=False)  # shares that it has not begun are left to their callers


def get_num_threads() -> int:
    """How many threads a call may run on.

    Returns
    -------
    int
        What `set_num_threads` set, or its default.

    Raises
    ------
    ValueError
        ``BATCHNORM_NUM_THREADS`` is set to something else than a whole number of at least 1.
    """
    global _chosen
    if _chosen is None:
        _chosen = int_from_environment(VARIABLE, 1, "a whole number >= 1") or usable_cpus()
    return _chosen


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, or its container's quota where that is less."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    try:  # "max 100000" or "200000 100000": microseconds of CPU in each period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cpus)


def count(tiles: int) -> int:
    """How many threads to run on that many tiles."""
    return max(1, min(get_num_threads(), tiles))


def run(task: Callable[[int], None], count: int) -> None:
    """Run task(0) here and task(i) for i up to count - 1 on other threads, as far as they are free.

    A task takes tiles until none is left, its own share first: what no other began is done here.
    """
    begun: list[Future[None]] = []
    try:
        if count > 1:
            _submit(task, count, begun)
        task(0)
    finally:
        # What nobody has begun has nothing left to do; what somebody has must end before arrays go.
        errors = [share.exception() for share in begun if not share.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _submit(task: Callable[[int], None], count: int, begun: list[Future[None]]) -> None:
    """Hand out shares, as far as there are threads, and note them in `begun`."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), thread_name_prefix="batchnorm")
        try:
            for i in range(1, count):
                begun.append(_pool.submit(task, i))
        except RuntimeError:  # no more threads for this process, or the interpreter is ending
            pass


def _forget_after_fork() -> None:
    """A forked child has none of its parent's threads, and perhaps its lock as it was held."""
    global _lock, _pool
    _lock, _pool = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
