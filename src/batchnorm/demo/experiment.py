"""Training of the two networks, and a table of the results."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_compat as compat
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.arrays import on_host
from batchnorm.demo import network
from batchnorm.demo.digits import batches, digits
from batchnorm.demo.network import Settings
from batchnorm.demo.picture import GOAL, Curve, draw

Array = Any

BATCH = 60
UNIT = 0  # the unit of the last hidden layer whose input is drawn

# The learning rate of each network is the best of 0.1, 0.3, 1, 3 and 10 by test accuracy over seeds 0
# and 1; the documentation has the table.
NETWORKS = {
    "without batch norm": Settings(batch_norm=False, learning_rate=3.0),
    "with batch norm": Settings(batch_norm=True, learning_rate=1.0),
}


def run(library: str, steps: int, seed: int, output: Path) -> int:
    """Train, print the table, and write the picture."""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[accuracy]}"), console=console) as progress:
        tasks = {name: progress.add_task(name, total=steps, accuracy="") for name in NETWORKS}
        curves = {}
        for name, settings in NETWORKS.items():
            report = functools.partial(_report, progress, tasks[name])
            curves[name] = train(settings, library, steps, seed, report)
    console.print(table(curves, library))
    draw(curves, output)
    console.print(f"picture: {output}", soft_wrap=True)
    return 0


def train(
    settings: Settings, library: str, steps: int, seed: int, report: Callable[[int, float], None]
) -> Curve:
    """Train one network with the arrays of a library."""
    train_x, test_x, train_y, test_y = digits()
    array, compiled = _library(library)
    train_images = array(train_x.astype(np.float32))
    train_labels = array(np.eye(10, dtype=np.float32)[train_y])
    test_images = array(test_x.astype(np.float32))
    state = {k: array(v) for k, v in network.initial(settings, train_x.shape[1], 10, seed).items()}
    step = compiled(functools.partial(network.step, settings=settings))
    predict = compiled(functools.partial(network.predict, settings=settings))
    xp = compat.array_namespace(train_images)

    every = max(1, min(10, steps // 10))
    curve = Curve([], [], [], 0.0)
    order = batches(len(train_x), BATCH, seed)
    seconds = 0.0
    for i in range(steps + 1):
        if i % every == 0 or i == steps:
            scores, entering = (on_host(a) for a in predict(state, test_images))
            curve.steps.append(i)
            curve.accuracy.append(float(np.mean(scores.argmax(axis=1) == test_y)))
            curve.percentiles.append(np.percentile(entering[:, UNIT], (15, 50, 85)))
            report(i, curve.accuracy[-1])
        if i < steps:
            started = time.perf_counter()
            chosen = array(next(order))
            images, labels = (xp.take(a, chosen, axis=0) for a in (train_images, train_labels))
            state = step(state, images, labels)
            seconds += time.perf_counter() - started
    return curve._replace(seconds=seconds)


def table(curves: dict[str, Curve], library: str) -> Table:
    """Return a table of the steps to the goal, the best test accuracy and the training time."""
    rows = Table(title=f"1,797 handwritten digits, batches of {BATCH}, {library} arrays")
    for heading in ("network", f"steps to {GOAL:.0%}", "best test accuracy", "training time"):
        rows.add_column(heading, justify="left" if heading == "network" else "right")
    for name, curve in curves.items():
        reached = curve.steps_to_goal
        rows.add_row(
            name,
            "never" if reached is None else f"{reached:,}",
            f"{max(curve.accuracy):.1%}",
            f"{curve.seconds:.1f} s",
        )
    return rows


def _library(name: str) -> tuple[Callable[[np.ndarray], Array], Callable[..., Any]]:
    """Return functions that make arrays of a library, and that compile a function of them."""
    module = importlib.import_module("jax.numpy" if name == "jax" else name)
    if name == "jax":
        return module.asarray, importlib.import_module("jax").jit
    return module.asarray, lambda f: f


def _report(progress: Progress, task: Any, done: int, accuracy: float) -> None:
    progress.update(task, completed=done, accuracy=f"test accuracy {accuracy:.1%}")
