"""What asv measured over a series of commits: points in their order, and the steps between."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from asv.results import iter_results
from asv.step_detect import detect_steps

RESULTS = Path(__file__).parent / "results"
SUBJECTS = RESULTS.parent / "commits.json"
"""The first line of each measured commit's message, with parents before their children."""
BENCHMARK = "gate.Gate.track_copies"
FEWEST = 3
"""Commits of a series; fewer are not shown."""
THRESHOLD = 1.25
"""The ratio from which a step is told: the factor of the gate."""


class Point(NamedTuple):
    """A commit and what was measured on it."""

    commit: str
    value: float


class Step(NamedTuple):
    """The first commit of another speed, and the levels before and from it."""

    commit: str
    before: float
    after: float

    @property
    def verdict(self) -> str:
        """What happened, in a word."""
        return "slower" if self.after > self.before else "faster"

    @property
    def ratio(self) -> float:
        """How many times slower or faster."""
        return max(self.after / self.before, self.before / self.after)


Series = dict[tuple[str, ...], list[Point]]


def values_of(run: Any, benchmark: str) -> dict[tuple[str, ...], float]:
    """Return what a run has measured, by combinations of parameters, and not what failed."""
    parameters = [[v.strip("'") for v in values] for values in run.get_result_params(benchmark)]
    values = run.get_result_value(benchmark, run.get_result_params(benchmark))
    each = zip(itertools.product(*parameters), values, strict=True)
    return {case: v for case, v in each if v is not None and v == v}


def measured(folder: Path = RESULTS, benchmark: str = BENCHMARK) -> dict[str, Series]:
    """Return for each machine (and environment) the points of each combination of parameters."""
    found: dict[str, Series] = {}
    order = {commit: i for i, commit in enumerate(subjects())}
    runs = iter_results(str(folder))
    for run in sorted(runs, key=lambda run: (order.get(run.commit_hash, len(order)), run.date)):
        if benchmark not in run.get_all_result_keys():
            continue
        pure = run.env_name.endswith("BATCHNORM_NATIVE0")
        machine = run.params["machine"] + (", without the core" if pure else "")
        for case, value in values_of(run, benchmark).items():
            found.setdefault(machine, {}).setdefault(case, []).append(Point(run.commit_hash, value))
    return {
        machine: {case: points for case, points in series.items() if len(points) >= FEWEST}
        for machine, series in found.items()
        if any(len(points) >= FEWEST for points in series.values())
    }


def steps(points: list[Point]) -> list[Step]:
    """Return where asv detects that the level changes, by the threshold at least."""
    levels = detect_steps([point.value for point in points])
    found = [
        Step(points[end].commit, before, after)
        for (_, end, before, *_), (_, _, after, *_) in itertools.pairwise(levels)
    ]
    return [step for step in found if step.ratio >= THRESHOLD]


def subjects() -> dict[str, str]:
    """Return the subjects of commits that `history` has measured."""
    found: dict[str, str] = json.loads(SUBJECTS.read_text()) if SUBJECTS.exists() else {}
    return found
