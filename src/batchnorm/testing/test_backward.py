"""Gradients: against the chain rule in more digits, and against finite differences."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("backward")


@pytest.mark.parametrize(("shape", "axis"), data.SHAPES, ids=data.IDS)
def test_values(target, shape, axis):
    x, dy = data.batch(shape, mean=3.0), data.batch(shape, mean=0.5, seed=5)
    gamma, _ = data.parameters(data.channels(shape, axis))

    def gradients(x, dy, gamma):
        _, stats = bn.batch_norm(x, gamma, axis=axis)
        return bn.batch_norm_backward(dy, x, stats, gamma, axis=axis)

    grads = target.call(gradients, x, dy, gamma)
    verdict.backward(grads, Problem(x, gamma, axis=axis).backward(dy), "float32", "float32")


def test_dtypes(target, dtype):
    x, dy = data.batch((40, 3, 7), dtype, mean=2.0), data.batch((40, 3, 7), dtype, seed=5)
    parameters = "float64" if dtype == "float64" else "float32"
    gamma, _ = data.parameters((3,), parameters)

    def gradients(x, dy, gamma):
        _, stats = bn.batch_norm(x, gamma)
        return bn.batch_norm_backward(dy, x, stats, gamma)

    grads = target.call(gradients, x, dy, gamma)
    verdict.backward(grads, Problem(x, gamma).backward(dy), dtype, parameters)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layouts(target, array_layout, axis):
    x, dy = data.batch((40, 7, 6), mean=5.0), data.batch((40, 7, 6), seed=5)
    x, dy = np.asfortranarray(x), data.LAYOUTS[array_layout](dy)

    def gradients(x, dy):
        return bn.batch_norm_backward(dy, x, bn.moments(x, axis=axis), axis=axis)

    grads = target.call(gradients, x, dy)
    verdict.backward(grads, Problem(x, axis=axis).backward(dy), "float32", "float32")


@pytest.mark.parametrize(("shape", "axis"), data.SHAPES[:4], ids=data.IDS[:4])
def test_given_statistics(target, shape, axis):
    x, dy = data.batch(shape), data.batch(shape, seed=5)
    vector = data.channels(shape, axis)
    gamma, _ = data.parameters(vector)
    mean, var = data.statistics(vector)
    grads = target.call(
        lambda *a: bn.normalize_backward(*a, axis=axis, stats_grad=True), dy, x, mean, var, gamma
    )
    expected = Problem(x, gamma, axis=axis, mean=mean, var=var).backward(dy)
    assert len(grads) == 5
    verdict.backward(grads, expected, "float32", "float32")


@pytest.mark.operation("out")
def test_into_dy(target):
    x, dy = data.batch((12, 5)), data.batch((12, 5), seed=5)

    def gradients(x, dy):
        buffer = target.xp.zeros_like(dy)
        buffer[...] = dy
        grads = bn.batch_norm_backward(buffer, x, bn.moments(x), out=buffer)
        assert grads[0] is buffer
        return grads

    grads = target.call(gradients, x, dy)
    verdict.backward(grads, Problem(x).backward(dy), "float32", "float32")


@pytest.mark.parametrize("kind", ["plain", "mask", "weights", "given"])
@pytest.mark.dtypes("float64")
def test_finite_differences(target, dtype, kind):
    """The package's gradient is the slope of the package's own forward pass."""
    shape, h = (6, 3, 4), 1e-6
    x, dy = data.batch(shape, dtype), data.batch(shape, dtype, mean=0.5, seed=5)
    gamma, beta = data.parameters((3,), dtype)
    where = data.weights(shape, kind) if kind in ("mask", "weights") else None
    mean, var = (v.astype(dtype) for v in data.statistics((3,)))

    def forward(x, gamma, beta):
        if kind == "given":
            return bn.normalize(x, mean_there, var_there, gamma, beta)
        return bn.batch_norm(x, gamma, beta, where=where_there)[0]

    def slopes(x, dy, gamma, beta, where, mean, var, *directions):
        nonlocal where_there, mean_there, var_there
        where_there, mean_there, var_there = where, mean, var
        if kind == "given":
            dx, dgamma, dbeta = bn.normalize_backward(dy, x, mean, var, gamma)
        else:
            _, stats = bn.batch_norm(x, gamma, beta, where=where)
            dx, dgamma, dbeta = bn.batch_norm_backward(dy, x, stats, gamma, where=where)
        u, v, w = directions
        total = target.xp.sum
        there = forward(x + h * u, gamma + h * v, beta + h * w)
        back = forward(x - h * u, gamma - h * v, beta - h * w)
        slope = total(dy * (there - back)) / (2 * h)
        return slope, total(dx * u) + total(dgamma * v) + total(dbeta * w)

    where_there = mean_there = var_there = None
    directions = [data.batch(s, dtype, seed=7) for s in (shape, (3,), (3,))]
    slope, gradient = target.call(slopes, x, dy, gamma, beta, where, mean, var, *directions)
    np.testing.assert_allclose(gradient, slope, rtol=1e-7, atol=1e-7)
