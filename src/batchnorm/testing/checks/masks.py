"""Checks of masks, and of a batch in parts that are normalized together."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm.testing import data
from batchnorm.testing.checks.implementation import Implementation, or_an_error
from batchnorm.testing.checks.values import judge_y
from batchnorm.testing.oracle import Problem
from batchnorm.testing.verdict import EPS, worst

Array = Any


def mask() -> Array:
    """Return a mask of which the halves of a batch of 8 keep 24 values and 12."""
    kept = np.ones((8, 1, 6), bool)
    kept[4:, :, 3:] = False
    return kept


def masked_y(impl: Implementation, **shards: int) -> float:
    """Judge y where a mask leaves values out of the mean, the variance and their count."""
    return judge_y(impl, data.batch((8, 3, 6), mean=2.0), "float32", where=mask(), **shards)


def masked_nan(impl: Implementation) -> float:
    """Judge y where what is left out is NaN."""
    x, kept = data.batch((8, 3, 6)), mask()
    x[~np.broadcast_to(kept, x.shape)] = np.nan
    return judge_y(impl, x, "float32", where=kept)


def masked_running_variance(impl: Implementation, **shards: int) -> float:
    """Judge the running variance under a mask: Bessel's correction counts what is left."""
    x, kept = data.batch((8, 3, 6)), mask()
    got = impl.forward(x, impl.parameters(3), where=kept, **shards)[2]
    right = Problem(x, where=kept)
    n, var = (right.flat(v).astype(float) for v in (right.n, right.var))
    expected = 0.9 + 0.1 * var * n / (n - impl.correction)
    return worst(got, expected, expected, EPS["float32"])


def fully_masked(impl: Implementation) -> float:
    """Expect an error, or numbers: a mask that leaves nothing has no mean."""
    x, nothing = data.batch((8, 3, 6)), np.zeros((8, 1, 6), bool)
    found = or_an_error(lambda: impl.forward(x, impl.parameters(3), where=nothing))
    for name, v in zip(("y", "running mean", "running var"), found or (), strict=False):
        assert v is None or np.all(np.isfinite(v)), f"{name} is not finite, and nothing is said"
    return 0.0


def sharded_y(impl: Implementation, mean: float) -> float:
    """Judge y of a batch in two parts of different means, which have one mean and variance."""
    x = data.batch((8, 3, 6), mean=mean)
    x[4:] += np.float32(2)
    return judge_y(impl, x, "float32", shards=2)
