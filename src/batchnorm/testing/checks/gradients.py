"""Checks of first and second derivatives."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np

from batchnorm.testing import data
from batchnorm.testing.checks.implementation import Implementation
from batchnorm.testing.oracle import Problem, decimals, precise
from batchnorm.testing.verdict import EPS, worst

Array = Any
STEP = "1e-20"
"""The step of finite differences in 50 digits: 20 of them are right."""


def _judge(impl: Implementation, which: int, x: Array, dy: Array, gamma: float | None = None) -> float:
    vectors = impl.parameters(x.shape[1])
    if gamma is not None:
        vectors = (np.full_like(vectors[0], gamma), *vectors[1:])
    found = impl.gradients(dy, x, vectors)[which]
    right = Problem(x, *vectors[:2]).backward(dy)
    name = ("dx", "dgamma", "dbeta")[which]
    size = np.maximum(1e-30, np.asarray(getattr(right, f"{name}_size"), float))
    return worst(found, getattr(right, name), size, EPS["float32"])


def _uneven(shape: tuple[int, ...]) -> Array:
    dy = data.batch(shape, mean=0.5, seed=5)
    dy[:4] *= 10  # so that no sum is small by accident
    return dy


def gradient(impl: Implementation, which: int, mean: float) -> float:
    """Judge a gradient: 0 to x, through the mean and the variance; 1 to gamma; 2 to beta."""
    shape = (16, 6, 50)
    return _judge(impl, which, data.batch(shape, mean=mean), _uneven(shape))


def dx(impl: Implementation, mean: float) -> float:
    """Judge the gradient to x, through the mean and the variance."""
    return gradient(impl, 0, mean)


def dgamma(impl: Implementation, mean: float) -> float:
    """Judge the gradient to gamma."""
    return gradient(impl, 1, mean)


def dbeta(impl: Implementation, mean: float) -> float:
    """Judge the gradient to beta."""
    return gradient(impl, 2, mean)


def dgamma_where_gamma_is_0(impl: Implementation) -> float:
    """Judge the gradient to gamma of a channel that is off."""
    shape = (16, 6, 50)
    return _judge(impl, 1, data.batch(shape), _uneven(shape), gamma=0.0)


def dx_of_a_constant_channel(impl: Implementation) -> float:
    """Judge the gradient to x where all values are equal, so that eps alone is under the root."""
    return _judge(impl, 0, np.full((50, 3), 0.5, np.float32), _uneven((50, 3)))


def sums_of_many_gradients(impl: Implementation) -> float:
    """Judge the gradient to beta of 6 million gradients with a mean of 0.5."""
    shape = (32, 16, 111, 110)
    return _judge(impl, 2, data.batch(shape), data.batch(shape, mean=0.5, seed=5))


@precise()
def _second(ddx: Array, dy: Array, x: Array, gamma: Array) -> list[Array]:
    """Return the gradients of sum(ddx * dx) to dy, x and gamma, by central differences."""
    given = [decimals(v) for v in (dy, x, gamma)]
    direction, step = decimals(ddx), decimal.Decimal(STEP)

    def value() -> Any:
        dy, x, gamma = given
        return np.sum(direction * Problem(x, gamma).backward(dy).dx)

    found = []
    for v in given:
        slopes = np.empty_like(v)
        for i in np.ndindex(v.shape):
            here = v[i]
            v[i] = here + step
            above = value()
            v[i] = here - step
            slopes[i] = (above - value()) / (2 * step)
            v[i] = here
        found.append(slopes)
    return found


def second_derivative(impl: Implementation, to: str) -> float:
    """Judge the derivative of dx to dy, x or gamma, as gradient penalties need it."""
    shape, which = (5, 2, 3), ("dy", "x", "gamma").index(to)
    x, dy, ddx = (data.batch(shape, seed=seed) for seed in (0, 5, 6))
    gamma = impl.parameters(2)[0]
    found = impl.second(ddx, dy, x, gamma)[which]
    right = _second(ddx, dy, x, gamma)[which].astype(float)
    size = float(np.max(np.abs(right)))
    assert np.any(found) or not size, "all are 0"
    return worst(found, right, size, EPS["float32"])
