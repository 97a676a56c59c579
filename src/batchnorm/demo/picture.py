"""The demo's picture: accuracy over steps, and the distribution of a unit's input, as in Figure 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from batchnorm.demo.experiment import Curve

COLOURS = {"without batch norm": "tab:orange", "with batch norm": "tab:blue"}


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
