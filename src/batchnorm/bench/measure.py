"""Measurement: medians of several turns of each contestant."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import batchnorm as bn
from batchnorm.bench.cases import LAYOUTS, PASSES, SHAPES, Case, case
from batchnorm.bench.contestants import Contestant

# Each contestant has three turns of three rounds, so that a slow second affects all contestants.
TURNS, ROUNDS = 3, 3
# The minimum duration of a round, because of the resolution of the clock.
ROUND_SECONDS = 1e-3
# The pause before a turn, in which idle threads of the previous library stop spinning.
PAUSE_SECONDS = 2e-2


class Time(NamedTuple):
    """The result of one measurement."""

    shape: str
    layout: str
    which: str
    contestant: str
    seconds: float
    megabytes: float


def times(
    shapes: tuple[str, ...], contestants: dict[str, Contestant], *, fused: bool = False
) -> Iterator[list[Time]]:
    """Measure all shapes, layouts and passes; yield the results of each combination.

    With `fused`, a residual is added and a ReLU applied after each norm.
    """
    for name in shapes:
        for layout in LAYOUTS:
            arrays = case(SHAPES[name], layout, fused=fused)
            for which in PASSES:
                medians = race(arrays, which, contestants)
                size = arrays.x.nbytes / 1e6
                yield [Time(name, layout, which, who, s, size) for who, s in medians.items()]


def steps(shapes: tuple[str, ...]) -> int:
    """Return the number of lists that `times` yields."""
    return len(shapes) * len(LAYOUTS) * len(PASSES)


def race(arrays: Case, which: str, contestants: dict[str, Contestant]) -> dict[str, float]:
    """Return the median seconds of each contestant."""
    selected = bn.get_kernels()
    ready: dict[str, Any] = {}
    try:
        for name, contestant in contestants.items():
            bn.set_kernels(contestant.kernels)
            timed = contestant.prepare(arrays, which)
            if timed is None:
                continue
            for _ in range(2):  # compile, fill caches and pools
                timed()
            once = _seconds(timed, 1)
            ready[name] = timed, max(1, round(ROUND_SECONDS / max(once, 1e-7))), []
        for _ in range(TURNS):
            for name, (timed, repeats, seconds) in ready.items():
                bn.set_kernels(contestants[name].kernels)
                time.sleep(PAUSE_SECONDS)
                timed()  # fills the caches with its own data
                seconds += [_seconds(timed, repeats) for _ in range(ROUNDS)]
    finally:
        bn.set_kernels(selected)
    return {name: statistics.median(seconds) for name, (_, _, seconds) in ready.items()}


def _seconds(timed: Any, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        timed()
    return (time.perf_counter() - begin) / repeats
