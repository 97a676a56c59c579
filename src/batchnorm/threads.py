"""The threads that kernels run on: as many as the process may use, started when first needed.

A kernel cuts its work into tiles that do not depend on the number of threads, and lets every thread
take the next tile until none is left. The caller is always one of the threads: where no other is free
(many callers at once, a forked child, an interpreter that is ending) it does all of the work alone.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from batchnorm import checks

VARIABLE = "BATCHNORM_NUM_THREADS"

Bells: TypeAlias = tuple[ctypes.c_int64, ...]
Task: TypeAlias = Callable[[int, Bells], None]

_lock = threading.Lock()
_chosen: int | None = None
_helpers: list[_Helper] = []


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
        _chosen = checks.from_environment(VARIABLE, 1, "a whole number >= 1") or usable_cpus()
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


def run(task: Task, count: int) -> None:
    """Run task(0, bells) here and task(i, ()) for i up to count - 1 on helpers, as far as they are free.

    A task takes tiles until none is left, its own share first: what no helper began is done here.
    The first one rings the bells (adds 1 to each of these numbers) when it does not need the
    interpreter any more, which the helpers who hear them need to begin.
    """
    if count == 1:
        task(0, ())
        return
    shares = [_Share(task, i) for i in range(1, count)]
    # Always the same share to the same helper, who has its data in cache. Where there are fewer
    # (another thread has just changed their number), the rest is left to the caller.
    helpers = _get_helpers()[: len(shares)]
    for helper, share in zip(helpers, shares, strict=False):
        helper.shares.put(share)
    try:
        task(0, tuple(helper.bell for helper in helpers))
    finally:
        # What no helper has begun has nothing left to do; what one has must end before arrays go.
        for share, helper in itertools.zip_longest(shares, helpers):
            share.cancel_or_wait(helper)
    for share in shares:
        if share.error is not None:
            raise share.error


class _Share:
    """A helper's part of a call: begun by whoever takes `begin` first, over when `end` is free.

    Two bare locks, and a queue in C: half of the time of an executor's future, which is what
    decides from which size on a second thread pays.
    """

    def __init__(self, task: Task, number: int) -> None:
        self.task, self.number = task, number
        self.error: BaseException | None = None
        self.begin, self.end = threading.Lock(), threading.Lock()
        self.end.acquire()

    def run(self) -> None:
        """Run the task, unless its caller has done without."""
        if self.begin.acquire(blocking=False):
            try:
                self.task(self.number, ())
            except BaseException as error:
                self.error = error
            finally:
                self.end.release()

    def cancel_or_wait(self, helper: _Helper | None) -> None:
        """See that the task does not run any more."""
        if not self.begin.acquire(blocking=False):
            if helper is not None:
                helper.watch_end(self)
            self.end.acquire()


class _Helper:
    """A thread that waits for shares: for a moment awake, then asleep.

    To wake a sleeping thread takes longer than to normalize an array of a few hundred KB, and calls
    come in rows. So both sides first watch a number for some `AWAKE` reads, in compiled code and
    without the interpreter; only where such code is there (`watch` is set by who has it). A number
    changes when its writer has let go of the interpreter: to wait for that takes as long again.
    """

    def __init__(self) -> None:
        self.shares: queue.SimpleQueue[_Share | None] = queue.SimpleQueue()
        self.bell, self.done = ctypes.c_int64(0), ctypes.c_int64(0)
        # A daemon: one that waits must not keep the interpreter from ending.
        threading.Thread(target=self._help, name="batchnorm", daemon=True).start()

    def watch_end(self, share: _Share) -> None:
        """Watch for a moment whether a share ends."""
        known = self.done.value
        if watch is not None and share.end.locked():
            watch(0, ctypes.addressof(self.done), known, AWAKE)

    def _help(self) -> None:
        bell, done = ctypes.addressof(self.bell), ctypes.addressof(self.done)
        while (share := self.shares.get()) is not None:
            known = self.bell.value
            share.run()
            del share  # its arrays are not the helper's to keep
            if watch is not None and self.shares.empty():
                watch(done, bell, known, AWAKE)


# Adds 1 to the number at the first address (0 for none), and waits until the number at the second is
# not the third any more, for at most so many reads.
watch: Callable[[int, int, int, int], None] | None = None
AWAKE = 100_000


def _get_helpers() -> list[_Helper]:
    """The helpers, who are started when first needed."""
    if not _helpers:
        with _lock:
            for _ in range(len(_helpers), get_num_threads() - 1):
                try:
                    _helpers.append(_Helper())
                except RuntimeError:  # no more threads for this process, or the interpreter is ending
                    break
    return _helpers


def _dismiss() -> None:
    """Send the helpers home. Shares that are still queued are left to their callers."""
    with _lock:
        for helper in _helpers:
            helper.shares.put(None)
        _helpers.clear()


def _forget_after_fork() -> None:
    """A forked child has none of its parent's threads, and perhaps its lock as it was held."""
    global _lock
    _lock = threading.Lock()
    _helpers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
