"""Per-channel arguments of every function, however they lie in memory; one and several channel axes."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, oracle, verdict
from batchnorm.testing.oracle import Problem

SHAPES = [((5, 6), 1), ((5, 3, 4), (1, 2)), ((3, 2, 3, 4), (0, 2, 3))]
case = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=lambda v: str(v).replace(" ", ""))


def vectors(shape, axis, layout):
    """Gamma, beta, mean and variance, and how to lay out more of their kind."""
    vector, lay = data.channels(shape, axis), data.VECTOR_LAYOUTS[layout]
    return [lay(v) for v in (*data.parameters(vector), *data.statistics(vector))], lay


def moments_of(x, axis):
    """Moments in float32, the mean in two parts, as NumPy arrays in C order."""
    problem = Problem(x, axis=axis)
    count, mean, var = (problem.flat(v) for v in (problem.n, problem.mean, problem.var))
    high = mean.astype(np.float32)
    low = (mean - oracle.decimals(high)).astype(np.float32)
    return bn.Moments(count.astype(np.float32), high, var.astype(np.float32), low)


@case
@pytest.mark.operation("forward")
def test_batch_norm(target, vector_layout, shape, axis):
    x = data.batch(shape, mean=3.0)
    (gamma, beta, *_), _ = vectors(shape, axis, vector_layout)
    y, _ = target.call(lambda *a: bn.batch_norm(*a, axis=axis), x, gamma, beta)
    verdict.forward(y, Problem(x, gamma, beta, axis=axis), "float32")


@case
@pytest.mark.operation("backward")
def test_batch_norm_backward(target, vector_layout, shape, axis):
    x, dy = data.batch(shape, mean=3.0), data.batch(shape, mean=0.5, seed=5)
    (gamma, *_), lay = vectors(shape, axis, vector_layout)
    stats = moments_of(x, axis)
    if vector_layout != "broadcast":  # which would make it the moments of something else
        stats = bn.Moments(*map(lay, stats))
    grads = target.call(lambda *a: bn.batch_norm_backward(*a, axis=axis), dy, x, stats, gamma)
    verdict.backward(grads, Problem(x, gamma, axis=axis).backward(dy), "float32", "float32")


@case
@pytest.mark.operation("inference")
def test_given_statistics(target, vector_layout, shape, axis):
    x, dy = data.batch(shape), data.batch(shape, seed=5)
    (gamma, beta, mean, var), _ = vectors(shape, axis, vector_layout)

    def both(x, dy, mean, var, gamma, beta):
        y = bn.normalize(x, mean, var, gamma, beta, axis=axis)
        return y, bn.normalize_backward(dy, x, mean, var, gamma, axis=axis, stats_grad=True)

    y, grads = target.call(both, x, dy, mean, var, gamma, beta)
    problem = Problem(x, gamma, beta, axis=axis, mean=mean, var=var)
    verdict.forward(y, problem, "float32")
    verdict.backward(grads, problem.backward(dy), "float32", "float32")


@case
@pytest.mark.operation("moments")
def test_moments(target, vector_layout, shape, axis):
    x = data.batch(shape, mean=3.0)
    (_, _, mean, var), lay = vectors(shape, axis, vector_layout)
    whole = moments_of(x, axis)
    # Two equal halves, of which the merged moments are as those of the one.
    other, one = bn.Moments(*map(lay, whole)), bn.Moments(*map(lay, whole))

    def both(mean, var, one, other):
        return bn.Moments.merge(one, other), bn.update_running(mean, var, one)

    merged, moved = target.call(both, mean, var, one, other)
    n = one.count.astype(float)
    np.testing.assert_array_equal(merged.count, 2 * n)
    verdict.assert_close(merged.mean, one.mean, abs(one.mean) + 1, "float32", 2, "merged mean")
    verdict.assert_close(merged.var, one.var, one.var, "float32", 4, "merged variance")
    wanted = 0.9 * mean.astype(float) + 0.1 * one.mean
    verdict.assert_close(moved[0], wanted, abs(wanted) + 1, "float32", 2, "running mean")
    wanted = 0.9 * var.astype(float) + 0.1 * one.var * n / (n - 1)
    verdict.assert_close(moved[1], wanted, wanted, "float32", 4, "running variance")


@case
@pytest.mark.operation("fold")
def test_fold(target, vector_layout, shape, axis):
    (gamma, beta, mean, var), lay = vectors(shape, axis, vector_layout)
    weight = lay(data.batch((6, 4), seed=9))  # for the norm of an outermost axis of 6
    folds = [lay(v) for v in (data.batch((6,), seed=10), *data.parameters((6,)), *data.statistics((6,)))]

    def both(mean, var, gamma, beta, weight, bias, *of_weight):
        g, b, m, v = of_weight
        return bn.fold(mean, var, gamma, beta), bn.fold_linear(weight, bias, m, v, g, b)

    (scale, shift), folded = target.call(both, mean, var, gamma, beta, weight, *folds)
    wanted = gamma / np.sqrt(var.astype(float) + 1e-5)
    verdict.assert_close(scale, wanted, abs(wanted), "float32", 2, "scale")
    size = abs(beta) + abs(mean * wanted)
    verdict.assert_close(shift, beta - mean * wanted, size, "float32", 2, "shift")
    bias, gamma, beta, mean, var = (v.astype(float) for v in folds)
    scale = gamma / np.sqrt(var + 1e-5)
    verdict.assert_close(folded[0], scale[:, None] * weight, abs(scale[:, None] * weight), "float32", 2)
    size = abs(beta) + abs(scale) * (abs(bias) + abs(mean))
    verdict.assert_close(folded[1], (bias - mean) * scale + beta, size, "float32", 2, "bias")


@case
@pytest.mark.operation("layer")
def test_layer(target, vector_layout, shape, axis):
    x, dy = data.batch(shape, mean=3.0), data.batch(shape, mean=0.5, seed=5)
    given, _ = vectors(shape, axis, vector_layout)
    names = ("gamma", "beta", "running_mean", "running_var")

    def steps(x, dy, *given):
        layer = bn.BatchNorm(data.channels(shape, axis), axis=axis)
        state = dict(zip(names, given, strict=True))
        layer.load_state_dict({**state, "num_batches_tracked": 3})
        inferred = layer.eval()(x)
        y = layer.train()(x)
        dx = layer.backward(dy)
        return inferred, y, (dx, layer.gamma_grad, layer.beta_grad), layer.state_dict()

    inferred, y, grads, after = target.call(steps, x, dy, *given)
    gamma, beta, mean, var = given
    problem = Problem(x, gamma, beta, axis=axis)
    verdict.forward(inferred, Problem(x, gamma, beta, axis=axis, mean=mean, var=var), "float32")
    verdict.forward(y, problem, "float32")
    verdict.backward(grads, problem.backward(dy), "float32", "float32")
    moved = oracle.running(mean.astype(float), var.astype(float), [problem], 0.1, 1)
    verdict.assert_close(after["running_mean"], moved[0], abs(moved[0]) + 1, "float32", 2, "mean")
    verdict.assert_close(after["running_var"], moved[1], moved[1], "float32", 4, "variance")


@case
@pytest.mark.operation("where")
def test_weights(target, array_layout, shape, axis):
    x, dy = data.batch(shape, mean=3.0), data.batch(shape, mean=0.5, seed=5)
    (gamma, *_), lay = vectors(shape, axis, array_layout)
    where = lay(data.weights(shape, "weights") + np.float32(0.25))

    def both(x, dy, gamma, where):
        y, stats = bn.batch_norm(x, gamma, axis=axis, where=where)
        return y, stats, bn.batch_norm_backward(dy, x, stats, gamma, axis=axis, where=where)

    y, stats, grads = target.call(both, x, dy, gamma, where)
    expected = Problem(x, gamma, axis=axis, where=where)
    verdict.forward(y, expected, "float32")
    verdict.moments(stats, expected)
    verdict.backward(grads, expected.backward(dy), "float32", "float32")
