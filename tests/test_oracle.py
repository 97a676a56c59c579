"""The oracle is right: against NumPy's own functions, and against finite differences in 50 digits."""

import decimal
import subprocess
import sys

import numpy as np
import pytest

from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem, decimals, precise

H = decimal.Decimal("1e-15")


def test_forward_is_the_textbook_formula():
    x = data.batch((50, 3, 4), "float64", mean=2.0)
    gamma, beta = data.parameters((3,), "float64")
    mean, var = x.mean(axis=(0, 2), keepdims=True), x.var(axis=(0, 2), keepdims=True)
    expected = gamma[:, None] * (x - mean) / np.sqrt(var + 1e-5) + beta[:, None]
    np.testing.assert_allclose(Problem(x, gamma, beta).y.astype(float), expected, rtol=1e-12)


def test_the_import_leaves_the_decimal_context_alone():
    program = """
import decimal
before = repr(decimal.getcontext()), repr(decimal.DefaultContext)
import batchnorm.testing.oracle
assert (repr(decimal.getcontext()), repr(decimal.DefaultContext)) == before
assert decimal.getcontext().prec == 28
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("digits", [5, 28, 80])
def test_digits_do_not_depend_on_the_decimal_context(digits):
    def digits_of(problem):
        gradients = problem.backward(data.batch((5, 3), seed=5))
        found = (problem.y, problem.mean, problem.var, problem.size, *gradients)
        return [str(v) for array in found for v in np.ravel(array)]

    x, where = data.batch((5, 3), mean=1e4), data.weights((5, 3), "weights")
    with decimal.localcontext(decimal.Context(prec=50)):
        expected = digits_of(Problem(x, where=where))
    with decimal.localcontext(decimal.Context(prec=digits)) as context:
        assert digits_of(Problem(x, where=where)) == expected
        assert decimal.getcontext() is context
        assert context.prec == digits
    assert max(map(len, expected)) > 50


@pytest.mark.parametrize("kind", ["plain", "mask", "weights", "given"])
@precise()
def test_gradients_are_slopes(kind):
    shape = (5, 3, 2)
    x, dy = data.batch(shape, "float64"), data.batch(shape, "float64", mean=0.5, seed=5)
    gamma, beta = data.parameters((3,), "float64")
    where = data.weights(shape, kind) if kind in ("mask", "weights") else None
    given = dict(zip(("mean", "var"), data.statistics((3,)), strict=True)) if kind == "given" else {}
    gradients = Problem(x, gamma, beta, where=where, **given).backward(dy)

    def loss(**moved):
        """Sum of dy * y, with one of the arguments moved by H in one entry."""
        arguments = {"x": x, "gamma": gamma, "beta": beta, "where": where, **given}
        return np.sum(decimals(dy) * Problem(**{**arguments, **moved}).y)

    for name, start, slope in (
        ("x", x, gradients.dx),
        ("gamma", gamma, gradients.dgamma),
        ("beta", beta, gradients.dbeta),
        *((n, given[n], getattr(gradients, f"d{n}")) for n in given),
    ):
        for index in [(0,) * start.ndim, tuple(n - 1 for n in start.shape)]:
            there, back = decimals(start), decimals(start)
            there[index] += H
            back[index] -= H
            expected = (loss(**{name: there}) - loss(**{name: back})) / (2 * H)
            assert abs(float(expected - slope[index])) < 1e-18 + 1e-18 * abs(float(slope[index])), name


def test_a_verdict_can_fail():
    x = data.batch((50, 3))
    problem = Problem(x)
    right = problem.y.astype(np.float32)
    verdict.forward(right, problem, "float32")
    with pytest.raises(AssertionError, match="y: off by"):
        verdict.forward(right + np.float32(1e-6), problem, "float32")
    with pytest.raises(AssertionError, match="y: got float64, expected float32"):
        verdict.forward(right.astype(np.float64), problem, "float32")
    half = problem.y.astype(np.float16)
    verdict.forward(half, problem, "float16")
    with pytest.raises(AssertionError, match="units in the last place"):
        verdict.forward(np.nextafter(np.nextafter(half, half + 1), half + 1), problem, "float16")
