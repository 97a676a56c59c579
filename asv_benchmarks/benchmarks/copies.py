"""Times as multiples of a copy of the same bytes, which machines and their slow moments have in common.

Nothing here depends on the package, so that any commit of it can be measured.
"""

import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def copier(nbytes):
    """A copy of so many bytes on all processors, to memory that has been written to before."""
    source, target = (np.ones(nbytes // 4, np.float32) for _ in range(2))
    if nbytes < 2**20:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(THREADS)
    cuts = [source.size * i // THREADS for i in range(THREADS + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def copy():
        for done in [pool.submit(np.copyto, target[part], source[part]) for part in parts]:
            done.result()

    return copy


def medians(*calls, rounds=9):
    """Median seconds of calls that take turns, so that a slow moment of the machine hits all."""
    seconds = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        repeats.append(max(1, round(5e-3 / max(1e-7, time.perf_counter() - begin))))
    for _ in range(rounds):
        for call, repeat, mine in zip(calls, repeats, seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            mine.append((time.perf_counter() - begin) / repeat)
    return [statistics.median(mine) for mine in seconds]


def in_copies(prepare, nbytes, rounds=11):
    """How many times as long as a copy a call takes that `prepare` returns."""
    mine, limit = medians(prepare(), copier(nbytes), rounds=rounds)
    return mine / limit


def in_processes(function, arguments, count):
    """The median over processes: where memory lies, and which threads share a processor, differ."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return statistics.median(pool.starmap(function, [arguments] * count, chunksize=1))
