"""Results of the demo, and their picture: accuracy, and inputs of a unit as in Figure 1 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLOURS = {"without batch norm": "tab:orange", "with batch norm": "tab:blue"}

GOAL = 0.90  # a test accuracy


class Curve(NamedTuple):
    """Measurements of one network during training."""

    steps: list[int]
    accuracy: list[float]
    percentiles: list[np.ndarray]
    seconds: float

    @property
    def steps_to_goal(self) -> int | None:
        """The first measured step at which the goal was reached, or None."""
        return next((s for s, a in zip(self.steps, self.accuracy, strict=True) if a >= GOAL), None)


def draw(curves: Mapping[str, Curve], output: Path) -> None:
    """Draw both networks' curves and write them to a file."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    accuracy, *inputs = figure.subplots(1, 1 + len(curves))
    for name, curve in curves.items():
        accuracy.plot(curve.steps, curve.accuracy, color=COLOURS[name], label=name)
    accuracy.set(title="Test accuracy", xlabel="training steps", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend(loc="lower right")
    accuracy.grid(alpha=0.3)

    for axes, (name, curve) in zip(inputs, curves.items(), strict=True):
        low, middle, high = np.asarray(curve.percentiles).T
        axes.fill_between(curve.steps, low, high, color=COLOURS[name], alpha=0.25)
        axes.plot(curve.steps, middle, color=COLOURS[name])
        axes.set(title=f"Input of one last-layer sigmoid,\n{name}", xlabel="training steps")
        axes.grid(alpha=0.3)
    inputs[0].set_ylabel("15th, 50th, 85th percentile")
    for axes in inputs[1:]:
        axes.sharey(inputs[0])
    figure.savefig(output, dpi=120)
