"""Right to 4 eps whatever the offset of the data, up to 25 million values."""

import functools
import types

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("forward")

MEANS = (0.0, 1e2, 1e4, 1e6)
SIZES = {
    "small": {0: (8, 300), 1: (20, 8, 15), -1: (300, 8)},
    "medium": {0: (16, 4_000), 1: (8, 16, 499), -1: (63, 63, 16)},
    "large": {0: (64, 390_625), 1: (32, 64, 110, 111), -1: (390_625, 64)},
}
AXES = {0: "first", 1: "second", -1: "last"}


def offset_batch(shape, axis, dtype, means, seed=0):
    """Std 1, and one of the means in each channel in turn."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape, dtype="float64" if dtype == "float64" else "float32")
    vector = [1] * len(shape)
    vector[axis] = -1
    x += np.resize(means, shape[axis]).astype(x.dtype).reshape(vector)
    return x


@functools.lru_cache(maxsize=12)
def case(size, axis, dtype, means):
    shape = SIZES[size][axis]
    x = offset_batch(shape, axis, dtype, means)
    dy = offset_batch(shape, axis, dtype, (0.5,), seed=1)
    gamma, beta = data.parameters((shape[axis],), dtype)
    problem = Problem(x, gamma, beta, axis=axis)
    expected = types.SimpleNamespace(y=problem.y, size=problem.size)  # the rest takes gigabytes
    return x, dy, gamma, beta, expected, problem.backward(dy)


@pytest.mark.parametrize("axis", AXES, ids=AXES.values())
@pytest.mark.parametrize("size", ["small", "medium", pytest.param("large", marks=pytest.mark.large)])
def test_float32(target, size, axis):
    _check(target, size, axis, "float32", MEANS)


@pytest.mark.dtypes("float64")
@pytest.mark.parametrize("axis", AXES, ids=AXES.values())
@pytest.mark.parametrize("size", ["small", "medium"])
def test_float64(target, size, axis, dtype):
    _check(target, size, axis, dtype, (0.0, 1e4, 1e8))


def _check(target, size, axis, dtype, means):
    x, dy, gamma, beta, expected, gradients = case(size, axis, dtype, means)

    def both(x, dy, gamma, beta):
        y, stats = bn.batch_norm(x, gamma, beta, axis=axis)
        return y, bn.batch_norm_backward(dy, x, stats, gamma, axis=axis)

    y, grads = target.call(both, x, dy, gamma, beta)
    verdict.forward(y, expected, dtype)
    verdict.backward(grads, gradients, dtype, dtype)
