"""The number of threads of a call, and a thread pool for tasks of Python functions.

A task is divided into tiles that do not depend on the number of threads; each thread processes the next
tile until none is left. The caller is always one of the threads: if no other is available (with many
concurrent callers, in a forked child, or when the interpreter exits), it processes all tiles itself.
The compiled core has a thread pool of its own, in `src/native/threads.cc`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from batchnorm.arguments import int_from_environment, validate_int

VARIABLE = "BATCHNORM_NUM_THREADS"

_lock = threading.RLock()  # reentrant, because a finalizer may call a kernel at any point
_chosen: int | None = None
_pool: ThreadPoolExecutor | None = None
_watching: list[Callable[[int], Any]] = []


def set_num_threads(n: int | None) -> None:
    """Set how many threads a call may run on.

    Results are identical to the bit for any number. Small arrays are processed on one thread.

    Parameters
    ----------
    n : int or None
        At least 1. None for the default: the environment variable ``BATCHNORM_NUM_THREADS``, or the
        number of CPUs that this process may use by its CPU affinity and its container's quota.

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
        old.shutdown(wait=False)  # callers process what it has not begun
    for tell in _watching:
        tell(_default() if n is None else n)


def watch(tell: Callable[[int], Any]) -> None:
    """Tell the number of threads, now and whenever it changes, to code that cannot ask."""
    tell(get_num_threads())
    _watching.append(tell)


def _default() -> int:
    return int_from_environment(VARIABLE, 1, "a whole number >= 1") or usable_cpus()


def get_num_threads() -> int:
    """Return the number of threads that a call may run on.

    Returns
    -------
    int
        The number set with `set_num_threads`, or the default.

    Raises
    ------
    ValueError
        ``BATCHNORM_NUM_THREADS`` is not a whole number of at least 1.
    """
    global _chosen
    if _chosen is None:
        _chosen = _default()
        for tell in _watching:
            tell(_chosen)
    return _chosen


def usable_cpus() -> int:
    """Return the number of CPUs that the affinity and the container's quota of this process allow."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    try:  # "max 100000" or "200000 100000": microseconds of CPU in each period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cpus)


def show_to_threadpoolctl() -> None:
    """Let `threadpoolctl`, where it is loaded, limit the threads of the compiled core, and tell them."""
    threadpoolctl: Any = sys.modules.get("threadpoolctl")
    if threadpoolctl is None:
        return

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        """The thread pool of batchnorm."""

        user_api = internal_api = "batchnorm"
        filename_prefixes = ("_core",)
        check_symbols = ("batchnorm_core",)

        def get_num_threads(self) -> int:
            """Return the number of threads that a call may run on."""
            return get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            """Set how many threads a call may run on."""
            set_num_threads(num_threads)

        def get_version(self) -> None:
            """Return None: the library has no version of its own."""

    threadpoolctl.register(Controller)


def count(tiles: int) -> int:
    """Return the number of threads for a number of tiles."""
    return max(1, min(get_num_threads(), tiles))


def run(task: Callable[[int], None], count: int) -> None:
    """Run task(0) on this thread, and task(i) for i < count on other threads that are available.

    A task processes tiles until none is left, so task(0) processes those of tasks that were not begun.
    """
    begun: list[Future[None]] = []
    try:
        if count > 1:
            _submit(task, count, begun)
        task(0)
    finally:
        # Tasks that were not begun have nothing left to do. All others must end before arrays are freed.
        errors = [future.exception() for future in begun if not future.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _submit(task: Callable[[int], None], count: int, begun: list[Future[None]]) -> None:
    """Submit tasks to the pool, and append their futures to `begun`."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), thread_name_prefix="batchnorm")
        try:
            for i in range(1, count):
                begun.append(_pool.submit(task, i))
        except RuntimeError:  # no more threads can be started, or the interpreter exits
            pass


def _reset_after_fork() -> None:
    """Reset a forked child, which has no threads of its parent, and whose lock may be held."""
    global _lock, _pool
    _lock, _pool = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
