"""Forward mode and second order: against differences of the first order in 50 digits."""

import decimal
import functools

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem, decimals, precise

pytestmark = pytest.mark.operation("derivatives")

STEP = decimal.Decimal("1e-15")  # of central differences: right to some 30 digits
SHAPES = [((7, 3), 1, 3.0), ((2, 3, 4), -1, 1e3), ((2, 2, 3, 2), (1, 3), 0.5), ((9,), (), 1.0)]
UNITS = 32  # eps of the sum of the terms' sizes


def derivative(f, layout, along):
    """The derivative of f at a point along a direction."""
    ahead, behind = f(layout + STEP * along), f(layout - STEP * along)
    return (ahead - behind) / (2 * STEP)


def gradient(f, layout):
    """The gradient of a number."""
    found = np.empty(layout.shape, dtype=object)
    for i in np.ndindex(layout.shape):
        along = decimals(np.zeros(layout.shape))
        along[i] = decimal.Decimal(1)
        found[i] = derivative(f, layout, along)
    return found


def largest(v):
    """The largest size of any value."""
    return max(abs(number) for number in np.ravel(v))


def inputs(shape, axis, dtype, mean, layout="C"):
    vector = data.channels(shape, axis)
    along = [np.asarray(data.batch(vector, dtype, seed=i)) for i in (7, 8)]
    vectors = [*data.parameters(vector, dtype), *along]
    if vector:
        vectors = map(data.VECTOR_LAYOUTS[layout], vectors)
    x, dy, u = (data.batch(shape, dtype, mean=m, seed=i) for i, m in ((1, mean), (2, 0.5), (3, 0.25)))
    return x, dy, u, *vectors


@functools.lru_cache
@precise()
def expected_tangents(shape, axis, dtype, mean, weighted, layout="C"):
    """Tangents of y, mean and variance, each with the size of its terms."""
    x, _, u, gamma, beta, dgamma, dbeta = map(decimals, inputs(shape, axis, dtype, mean, layout))
    where = _weights(shape, weighted)

    def results(t):
        problem = Problem(x + t * u, gamma + t * dgamma, beta + t * dbeta, axis=axis, where=where)
        return np.concatenate([v.ravel() for v in (problem.y, problem.mean, problem.var)])

    found = derivative(results, decimal.Decimal(0), decimal.Decimal(1))
    problem = Problem(x, gamma, axis=axis, where=where)
    through = 3 * largest(problem.gamma / problem.std) * largest(u)
    sizes = (
        through + largest(problem.x_hat) * largest(dgamma) + largest(dbeta),
        largest(u),
        2 * largest(problem.d) * largest(u),
    )
    n, c = x.size, gamma.size
    return (found[:n], found[n : n + c], found[n + c :]), sizes


@pytest.mark.parametrize("weighted", [None, "mask", "weights"])
@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize(("shape", "axis", "mean"), SHAPES)
def test_forward_mode(target, shape, axis, mean, dtype, weighted):
    judge_forward_mode(target, shape, axis, dtype, mean, weighted)


def judge_forward_mode(target, shape, axis, dtype, mean, weighted, layout="C"):
    x, _, u, gamma, _, dgamma, dbeta = inputs(shape, axis, dtype, mean, layout)
    where = _weights(shape, weighted)

    def tangents(u, dgamma, dbeta, x, gamma, *where):
        where = where[0] if where else None
        _, stats = bn.batch_norm(x, gamma, axis=axis, where=where)
        return bn.batch_norm_jvp(u, dgamma, dbeta, x, stats, gamma, axis=axis, where=where)

    given = (u, dgamma, dbeta, x, gamma) + (() if where is None else (where,))
    actual = target.call(tangents, *given)
    assert actual[0].dtype.name == dtype
    expected, sizes = expected_tangents(shape, axis, dtype, mean, weighted, layout)
    for name, mine, right, size in zip(("dy", "dmean", "dvar"), actual, expected, sizes, strict=True):
        verdict.assert_close(mine.ravel(), right, size, dtype, UNITS, name)


@functools.lru_cache
@precise()
def expected_gradients(shape, axis, dtype, mean, weighted, layout="C"):
    """Gradients to dy, x and gamma, each with the size of its terms."""
    x, dy, u, gamma, _, a, b = map(decimals, inputs(shape, axis, dtype, mean, layout))
    where = _weights(shape, weighted)

    def loss(dy, x, gamma):
        found = Problem(x, gamma, axis=axis, where=where).backward(dy)
        return np.sum(u * found.dx) + np.sum(a * found.dgamma) + np.sum(b * found.dbeta)

    found = (
        gradient(lambda v: loss(v, x, gamma), dy),
        gradient(lambda v: loss(dy, v, gamma), x),
        gradient(lambda v: loss(dy, x, v), gamma),
    )
    problem = Problem(x, gamma, axis=axis, where=where)
    x_hat, slope = largest(problem.x_hat), largest(problem.gamma / problem.std)
    through = slope * largest(u) * max(1, x_hat) ** 2
    sizes = (
        3 * through + x_hat * largest(a) + largest(b),
        4 * largest(1 / problem.std) * (through + largest(a)) * largest(dy),
        3 * largest(1 / problem.std) * largest(u) * largest(dy) * largest(problem.n),
    )
    return found, sizes


@pytest.mark.parametrize("weighted", [None, "mask", "weights"])
@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize(("shape", "axis", "mean"), SHAPES)
def test_double_backward(target, shape, axis, mean, dtype, weighted):
    judge_double_backward(target, shape, axis, dtype, mean, weighted)


def judge_double_backward(target, shape, axis, dtype, mean, weighted, layout="C"):
    x, dy, u, gamma, _, a, b = inputs(shape, axis, dtype, mean, layout)
    where = _weights(shape, weighted)

    def gradients(u, a, b, dy, x, gamma, *where):
        where = where[0] if where else None
        _, stats = bn.batch_norm(x, gamma, axis=axis, where=where)
        return bn.batch_norm_double_backward(u, a, b, dy, x, stats, gamma, axis=axis, where=where)

    given = (u, a, b, dy, x, gamma) + (() if where is None else (where,))
    actual = target.call(gradients, *given)
    expected, sizes = expected_gradients(shape, axis, dtype, mean, weighted, layout)
    for name, mine, right, size in zip(("dy", "x", "gamma"), actual, expected, sizes, strict=True):
        assert mine.dtype.name == dtype
        verdict.assert_close(mine, right, size, dtype, UNITS, f"d_{name}")


def test_vectors_however_they_lie_in_memory(target, vector_layout):
    case = ((2, 2, 3, 2), (1, 3), "float32", 0.5, None, vector_layout)
    judge_forward_mode(target, *case)
    judge_double_backward(target, *case)


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
def test_dtypes(target, dtype):
    x, dy, u, gamma, *_ = inputs((6, 5), 1, dtype, 0.5)

    def both(x, dy, u, gamma):
        _, stats = bn.batch_norm(x, gamma)
        second = bn.batch_norm_double_backward(u, None, None, dy, x, stats, gamma)
        return bn.batch_norm_jvp(u, None, None, x, stats, gamma)[0], *second

    dy, *second = target.call(both, x, dy, u, gamma)
    assert [v.dtype.name for v in (dy, *second)] == [dtype] * 4


def test_what_is_left_out_is_zero(target):
    x, dy, _, gamma, _, a, _ = inputs((5, 3), 1, "float32", 3.0)

    def both(dy, x, gamma, a):
        _, stats = bn.batch_norm(x, gamma)
        zero, none = 0 * x, 0 * gamma
        return (
            bn.batch_norm_double_backward(None, a, None, dy, x, stats, gamma),
            bn.batch_norm_double_backward(zero, a, none, dy, x, stats, gamma),
            bn.batch_norm_jvp(None, a, None, x, stats, gamma),
            bn.batch_norm_jvp(zero, a, none, x, stats, gamma),
        )

    left_out, zeros, tangent, tangent_of_zeros = target.call(both, dy, x, gamma, a)
    for mine, other in zip((*left_out, *tangent), (*zeros, *tangent_of_zeros), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.operation("shape-errors")
def test_errors(target):
    x, dy, u, gamma, *_ = inputs((5, 3), 1, "float32", 3.0)

    def wrong(f, message):
        with pytest.raises((TypeError, ValueError), match=message):
            target.call(f, u, dy, x, gamma)

    def stats(x):
        return bn.moments(x)

    wrong(
        lambda u, dy, x, g: bn.batch_norm_double_backward(u[:2, :], None, None, dy, x, stats(x), g),
        "ddx: got shape",
    )
    wrong(
        lambda u, dy, x, g: bn.batch_norm_double_backward(u, g[:2], None, dy, x, stats(x), g),
        "ddgamma: got shape",
    )
    wrong(lambda u, dy, x, g: bn.batch_norm_jvp(u, None, None, x, None, g), "stats: got a NoneType")
    wrong(lambda u, dy, x, g: bn.batch_norm_jvp(u, None, g[:2], x, stats(x), g), "dbeta: got shape")


def _weights(shape, kind):
    return None if kind is None else data.weights(shape, kind)
