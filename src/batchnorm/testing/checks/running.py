"""Checks of running statistics, and of inference by them."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm.testing import data
from batchnorm.testing.checks.implementation import Implementation
from batchnorm.testing.oracle import Problem
from batchnorm.testing.verdict import EPS, worst

Array = Any


def _twenty_steps(impl: Implementation, which: int, dtype: str, mean: float) -> float:
    vectors = list(impl.parameters(4, dtype))
    vectors[2] = vectors[2] + vectors[2].dtype.type(mean)
    right = [v.astype(np.longdouble) for v in vectors[2:]]
    for step in range(20):
        x = data.batch((8, 4, 3), dtype, mean=mean, std=2.0, seed=step)
        _, *vectors[2:] = impl.forward(x, tuple(vectors))
        n = x.size // 4
        wide = x.astype(np.longdouble)
        batch = wide.mean((0, 2)), wide.var((0, 2)) * n / (n - impl.correction)
        right = [v + np.longdouble(0.1) * (b - v) for v, b in zip(right, batch, strict=True)]
    size = np.abs(right[which]) + (np.sqrt(right[1]) if which == 0 else 0)
    return worst(vectors[2 + which], right[which].astype(float), size.astype(float), EPS[dtype])


def running_mean(impl: Implementation, mean: float) -> float:
    """Judge the running mean of twenty steps: which momentum is whose."""
    return _twenty_steps(impl, 0, "float32", mean)


def running_variance(impl: Implementation, mean: float) -> float:
    """Judge the running variance of twenty steps: with Bessel's correction, or without."""
    return _twenty_steps(impl, 1, "float32", mean)


def running_mean_of_float64(impl: Implementation) -> float:
    """Judge the running mean of float64 data with a mean of 1e8."""
    return _twenty_steps(impl, 0, "float64", 1e8)


def running_statistics_of_float16(impl: Implementation) -> float:
    """Judge the running mean of float16 data, in a dtype that holds its running statistics."""
    x, vectors = data.batch((64, 4, 40), "float16", mean=3.0), impl.parameters(4, "float16")
    _, mean, _ = impl.forward(x, vectors)
    right = Problem(x)
    expected = right.flat(right.mean).astype(float) * 0.1
    dtype = "float32" if "mixed" in impl.features else mean.dtype.name
    return worst(mean, expected, np.abs(expected) + 1, EPS[dtype])


def start_of_running_statistics(impl: Implementation) -> float:
    """Judge inference of a new layer, which is the identity but for gamma, beta and eps."""
    x, (gamma, beta, _, _) = data.batch((16, 6, 5)), impl.parameters(6)
    y = impl.forward(x, (gamma, beta, None, None), training=False)[0]
    right = Problem(x, gamma, beta, mean=np.zeros(6), var=np.ones(6))
    return worst(y, right.y, right.size, EPS["float32"])


def first_batch(impl: Implementation) -> float:
    """Judge the running statistics after one batch: blended with 0 and 1, or the batch's own."""
    x, (gamma, beta, _, _) = data.batch((16, 6, 5), mean=3.0, std=2.0), impl.parameters(6)
    _, mean, var = impl.forward(x, (gamma, beta, None, None))
    right, n = Problem(x), x.size // 6
    m, v = (right.flat(s).astype(float) for s in (right.mean, right.var))
    v = v * n / (n - impl.correction)
    blended, own = (0.1 * m, 0.9 + 0.1 * v), (m, v)
    return min(
        max(worst(mean, a, np.abs(m), EPS["float32"]), worst(var, b, np.abs(v), EPS["float32"]))
        for a, b in (blended, own)
    )


def inference_by_running_statistics(impl: Implementation, mean: float) -> float:
    """Judge y by statistics that are given, which are not the batch's."""
    x, (gamma, beta, _, _) = data.batch((16, 6, 50), mean=mean), impl.parameters(6)
    running = np.full(6, mean + 0.5, np.float32), np.full(6, 2.0, np.float32)
    y = impl.forward(x, (gamma, beta, *running), training=False)[0]
    right = Problem(x, gamma, beta, mean=running[0], var=running[1])
    return worst(y, right.y, right.size, EPS["float32"])


def inference_updates_nothing(impl: Implementation) -> float:
    """Compare running statistics before and after inference."""
    vectors = impl.parameters(6)
    _, *after = impl.forward(data.batch((16, 6, 5), mean=3.0), vectors, training=False)
    for v, before in zip(after, vectors[2:], strict=True):
        assert v is None or np.array_equal(v, before), "inference changed a running statistic"
    return 0.0
