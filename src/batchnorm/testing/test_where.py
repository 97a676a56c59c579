"""Masks and weights: what they weigh in the statistics, forward and back."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("where")


@pytest.mark.parametrize("kind", ["mask", "weights"])
@pytest.mark.parametrize(("shape", "axis"), data.SHAPES, ids=data.IDS)
def test_values(target, shape, axis, kind):
    x, dy = data.batch(shape, mean=3.0), data.batch(shape, mean=0.5, seed=5)
    gamma, beta = data.parameters(data.channels(shape, axis))
    where = data.weights(shape, kind)

    def both(x, dy, gamma, beta, where):
        y, stats = bn.batch_norm(x, gamma, beta, axis=axis, where=where)
        return y, stats, bn.batch_norm_backward(dy, x, stats, gamma, axis=axis, where=where)

    y, stats, grads = target.call(both, x, dy, gamma, beta, where)
    expected = Problem(x, gamma, beta, axis=axis, where=where)
    verdict.forward(y, expected, "float32")
    verdict.moments(stats, expected)
    verdict.backward(grads, expected.backward(dy), "float32", "float32")


@pytest.mark.parametrize("shape", [(7, 1, 5), (1, 3, 5), (5,), (3, 1)])
def test_broadcasting(target, shape):
    x = data.batch((7, 3, 5))
    where = data.weights(shape, "weights") + np.float32(0.25)
    y, stats = target.call(lambda x, where: bn.batch_norm(x, where=where), x, where)
    expected = Problem(x, where=where)
    verdict.forward(y, expected, "float32")
    verdict.moments(stats, expected)


def test_padding_may_hold_nan(target):
    """A ragged batch: elements of zero weight may be anything, and change no other."""
    x, dy = data.batch((8, 3, 6)), data.batch((8, 3, 6), seed=5)
    where = np.ones((8, 1, 6), dtype=bool)
    where[4:, :, 3:] = False
    padding = np.broadcast_to(~where, x.shape)
    x[padding], dy[padding] = np.nan, 0

    def both(x, dy, where):
        y, stats = bn.batch_norm(x, where=where)
        return y, bn.batch_norm_backward(dy, x, stats, where=where)

    y, (dx, dgamma, dbeta) = target.call(both, x, dy, where)
    expected = Problem(x, where=where)
    grads = expected.backward(dy)
    kept = ~padding
    verdict.assert_close(y[kept], expected.y[kept], expected.size[kept], "float32", 4, "y")
    verdict.backward((dx, dgamma, dbeta), grads, "float32", "float32")
    assert np.all(dx[padding] == 0)


def test_integers_are_weights_too(target):
    x, dy = data.batch((9, 4, 3), mean=3.0), data.batch((9, 4, 3), seed=5)
    where = data.weights((9, 4, 3), "integers")

    def both(x, dy, where):
        y, stats = bn.batch_norm(x, where=where)
        return y, stats, bn.batch_norm_backward(dy, x, stats, where=where)

    y, stats, grads = target.call(both, x, dy, where)
    expected = Problem(x, where=where)
    verdict.forward(y, expected, "float32")
    verdict.moments(stats, expected)
    verdict.backward(grads, expected.backward(dy), "float32", "float32")


def test_all_true_is_no_mask(target):
    x = data.batch((9, 4))
    y, stats = target.call(lambda x, w: bn.batch_norm(x, where=w), x, np.ones((9, 4), dtype=bool))
    verdict.forward(y, Problem(x), "float32")
    assert np.all(stats.count == 9)


def test_weights_are_repetitions(target):
    """A weight of 2 is the value twice, in the running variance's correction too."""
    x = data.batch((6, 4))
    times = np.asarray([1, 2, 3, 1, 2, 1])
    where = times.astype(np.float32).reshape(6, 1)
    mean, var = data.statistics((4,))

    def step(x, where, mean, var):
        return bn.update_running(mean, var, bn.moments(x, where=where), momentum=1.0)

    mean, var = target.call(step, x, where, mean, var)
    repeated = np.repeat(x, times, axis=0).astype(float)
    verdict.assert_close(mean, repeated.mean(axis=0), 1, "float32", 2, "mean")
    verdict.assert_close(var, repeated.var(axis=0, ddof=1), 1, "float32", 4, "var")
