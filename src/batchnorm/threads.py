"""The threads that kernels run on: as many as the process may use, started when first needed.

A kernel cuts its work into tiles that do not depend on the number of threads, and lets every thread
take the next tile until none is left. The caller is always one of the threads: where no other is free
(many callers at once, a forked child, an interpreter that is ending) it does all of the work alone.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from batchnorm import checks

VARIABLE = "BATCHNORM_NUM_THREADS"

_lock = threading.Lock()
_chosen: int | None = None
_queue: queue.SimpleQueue[_Share | None] | None = None


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
    global _chosen
    n = None if n is None else checks.whole("n", n, 1)
    _dismiss()
    _chosen = n


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
        text = os.environ.get(VARIABLE, "")
        if text and not (text.isdecimal() and int(text) >= 1):
            checks.fail(ValueError, VARIABLE, repr(text), "a whole number >= 1")
        _chosen = int(text) if text else usable_cpus()
    return _chosen


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, or its container's quota where that is less."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    try:  # "max 100000" or "200000 100000": microseconds of CPU in each period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cpus)


def run(task: Callable[[], None], tiles: int) -> None:
    """Run a task on up to as many threads as it has tiles; it takes tiles until none is left."""
    shares = [_Share(task) for _ in range(min(get_num_threads(), tiles) - 1)]
    if shares:
        helpers = _helpers()
        for share in shares:
            helpers.put(share)
    try:
        task()
    finally:
        # What no helper has begun has nothing left to do; what one has must end before arrays go.
        for share in shares:
            share.cancel_or_wait()
    for share in shares:
        if share.error is not None:
            raise share.error


class _Share:
    """A helper's part of a call: begun by whoever takes `begin` first, over when `end` is free.

    Two bare locks, and below a queue in C: half of the time of an executor's future, which is what
    decides from which size on a second thread pays.
    """

    def __init__(self, task: Callable[[], None]) -> None:
        self.task = task
        self.error: BaseException | None = None
        self.begin, self.end = threading.Lock(), threading.Lock()
        self.end.acquire()

    def run(self) -> None:
        """Run the task, unless its caller has done without."""
        if self.begin.acquire(blocking=False):
            try:
                self.task()
            except BaseException as error:
                self.error = error
            finally:
                self.end.release()

    def cancel_or_wait(self) -> None:
        """See that the task does not run any more."""
        if not self.begin.acquire(blocking=False):
            self.end.acquire()


def _helpers() -> queue.SimpleQueue[_Share | None]:
    """The queue of the helpers, who are started when first needed."""
    global _queue
    with _lock:
        if _queue is None:
            _queue = queue.SimpleQueue()
            for _ in range(get_num_threads() - 1):
                # Daemons: one that waits must not keep the interpreter from ending.
                helper = threading.Thread(target=_help, args=(_queue,), name="batchnorm", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # no more threads for this process, or the interpreter is ending
                    break
        return _queue


def _help(shares: queue.SimpleQueue[_Share | None]) -> None:
    while (share := shares.get()) is not None:
        share.run()


def _dismiss() -> None:
    """Send the helpers home. Shares that are still queued are left to their callers."""
    global _queue
    with _lock:
        if _queue is not None:
            for _ in range(get_num_threads() - 1):
                _queue.put(None)
        _queue = None


def _forget_after_fork() -> None:
    """A forked child has none of its parent's threads, and perhaps its lock as it was held."""
    global _lock, _queue
    _lock, _queue = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
