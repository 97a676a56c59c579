"""How close is close enough: the bounds that this package promises, in units of eps."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np

from batchnorm.testing.oracle import Gradients, Problem, decimals

Array = Any

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

UNSEEN = decimal.Decimal("1e-80")  # of a squared mean: nothing, but to the oracle

BLOCK = 2**16  # values that are compared at a time

FORWARD = 4  # eps of max(1, |gamma * x_hat| + |beta|)
BACKWARD = 16  # eps of max|gamma / std| * max|dy|, or of the sum of the terms' sizes


def forward(y: Array, expected: Problem, dtype: str) -> None:
    """Check y and its dtype."""
    assert y.dtype.name == dtype, f"y: got {y.dtype}, expected {dtype}"
    _close_or_rounded(y, expected.y, expected.size, dtype, FORWARD, "y")


def backward(grads: tuple[Array, ...], expected: Gradients, dtype: str, parameters: str) -> None:
    """Check dx, dgamma and dbeta (and dmean and dvar, where they are there), and their dtypes."""
    dx, dgamma, dbeta = grads[:3]
    assert dx.dtype.name == dtype, f"dx: got {dx.dtype}, expected {dtype}"
    _close_or_rounded(dx, expected.dx, expected.dx_size, dtype, BACKWARD, "dx")
    vectors = {"dgamma": dgamma, "dbeta": dbeta, **dict(zip(("dmean", "dvar"), grads[3:], strict=False))}
    for name, v in vectors.items():
        size = getattr(expected, f"{name}_size")
        assert v.dtype.name == parameters, f"{name}: got {v.dtype}, expected {parameters}"
        _close_or_rounded(v, getattr(expected, name), size, parameters, BACKWARD, name)


def dresidual(actual: Array, expected: Gradients, dtype: str) -> None:
    """Check the gradient to a residual."""
    assert actual.dtype.name == dtype, f"dresidual: got {actual.dtype}, expected {dtype}"
    size = expected.dresidual_size
    _close_or_rounded(actual, expected.dresidual, size, dtype, BACKWARD, "dresidual")


def moments(stats: Any, expected: Problem, data: str = "float64") -> None:
    """Check count, mean and variance to a few eps of the dtype that they came in.

    Statistics of a forward pass are not better than y needs: for `data` of float32 and less, the mean is
    within half a float32 eps of a standard deviation, and the variance within one float32 eps.
    """
    dtype = stats.var.dtype.name
    n, mean, var = (expected.flat(v) for v in (expected.n, expected.mean, expected.var))
    assert_close(stats.count, n, n, dtype, 2, "count")
    # Where the mean has no end in decimals, a variance of 0 is one of 1e-98 in 50 digits.
    std, size = np.sqrt(var), var + mean * mean * UNSEEN if var.dtype == object else var
    if data != "float64":
        coarse = int(EPS["float32"] / EPS[dtype])  # eps of the statistics in one of the data
        assert_close(stats.mean, mean, 2 * abs(mean) + (2 + coarse // 2) * std, dtype, 1, "mean")
        assert_close(stats.var, var, (4 + coarse) * size, dtype, 1, "var")
        return
    assert_close(stats.mean, mean, abs(mean) + std, dtype, 2, "mean")
    assert_close(stats.var, var, size, dtype, 4, "var")


def _close_or_rounded(
    actual: Array, expected: Array, size: Array, dtype: str, units: float, what: str
) -> None:
    if dtype in ("float32", "float64"):
        assert_close(actual, expected, size, dtype, units, what)
        return
    # A 16-bit result is right to one unit in its last place; where terms cancel, that place is finer
    # than float32, in which the terms were added, and the float32 bound counts.
    digits, lowest = {"float16": (11, 2.0**-24), "bfloat16": (8, 2.0**-133)}[dtype]
    expected = np.asarray(expected, dtype=np.float64)
    if dtype == "float16":  # what its largest number, 65504, is not the nearest to
        expected = np.where(abs(expected) >= 65520, np.copysign(np.inf, expected), expected)
    _, exponent = np.frexp(np.abs(expected))
    ulp = np.maximum(np.ldexp(1.0, exponent - digits), lowest)
    unit = np.maximum(ulp, units * EPS["float32"] * np.asarray(size, dtype=np.float64))
    error = worst(actual, expected, unit, 1.0)
    assert error <= 1, f"{what}: off by {error:.3g} {dtype} units in the last place, expected 1"


def worst(actual: Array, expected: Array, size: Array | float, eps: float) -> float:
    """Return the largest error in units of ``eps * size``; NaN counts as equal to NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    size = np.broadcast_to(np.asarray(size), expected.shape)
    if expected.size > BLOCK and len(expected) > 1:  # part by part, each within a processor's cache
        rows = max(1, BLOCK * len(expected) // expected.size)
        parts = [slice(i, i + rows) for i in range(0, len(expected), rows)]
        return max(worst(actual[part], expected[part], size[part], eps) for part in parts)
    if expected.dtype == object:
        actual = decimals(actual)
        wrong = actual != expected
    else:
        actual = actual.astype(np.float64)
        wrong = (actual != expected) & ~(np.isnan(actual) & np.isnan(expected))
    if not np.any(wrong):
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        error = abs(actual[wrong] - expected[wrong]).astype(float) / size[wrong].astype(float)
    return float(np.max(error)) / eps


def assert_close(
    actual: Array, expected: Array, size: Array | float, dtype: str, units: float, what: str = ""
) -> None:
    """Fail unless every error is within ``units * eps(dtype) * size``."""
    error = worst(actual, expected, size, EPS[dtype])
    assert error <= units, f"{what}: off by {error:.3g} {dtype} eps, expected at most {units:g}"
