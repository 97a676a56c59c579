"""The demo's two networks at five learning rates: best test accuracy, and steps to 90 %."""

import statistics

from batchnorm.demo import experiment
from batchnorm.demo.network import Settings

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (0, 1)
STEPS = 4000


def describe(curves):
    """Mean of the best accuracies; mean of the steps, if all got there."""
    best = statistics.mean(max(curve.accuracy) for curve in curves)
    steps = [curve.steps_to_goal for curve in curves]
    reached = "never" if None in steps else f"{statistics.mean(steps):.0f}"
    return f"{best:.1%} {reached:>6}"


print("learning rate   without: best, steps to 90%   with: best, steps to 90%")
for rate in RATES:
    row = []
    for batch_norm in (False, True):
        settings = Settings(batch_norm, rate)
        curves = [experiment.train(settings, "numpy", STEPS, s, lambda *_: None) for s in SEEDS]
        row.append(describe(curves))
    print(f"{rate:<13g}{row[0]:>26}{row[1]:>27}", flush=True)
