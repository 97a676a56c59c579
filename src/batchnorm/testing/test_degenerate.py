"""Channels with fewer than two values: constants forward, zeros back, and statistics of nothing."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("degenerate")

SHIFT = {"degenerate": "shift"}


def lonely(shape, kind, axis=1):
    """Return a mask or weights: channel 0 has none, channel 1 has one value, others have many."""
    where = data.weights(shape, kind)
    by_channel = np.moveaxis(where, axis, 0)  # a view
    by_channel[:2] = 0
    by_channel[(1, *(-1,) * (len(shape) - 1))] = 1
    return where


def gradients(problem, dy, degenerate):
    """Return right gradients: none goes through degenerate channels, nor has it a part in their size."""
    right = problem.backward(dy)
    rest = np.ones(problem.channels, bool)
    rest[degenerate] = False
    scale = (abs(problem.flat(problem.gamma)) / problem.flat(problem.std))[rest]
    size = float(np.max(scale, initial=0)) * float(np.max(abs(dy)))
    through = np.reshape(rest, problem.vector)
    return right._replace(dx=np.where(through, right.dx, 0 * right.dx), dx_size=np.full(dy.shape, size))


def judge(target, given, where, dtype="float32", axis=1, activation=None, degenerate=(0, 1), way="z"):
    """Check a forward and a backward pass: degenerate channels are those of zeros which all count."""
    x, z, dy, gamma, beta = given
    degenerate = list(degenerate)
    plain, weights = np.array(x), None
    if where is not None:
        weights = np.array(np.broadcast_to(where, x.shape))
        weights = np.where(np.isnan(x), np.zeros_like(weights), weights)
        np.moveaxis(weights, axis, 0)[degenerate] = 1
    np.moveaxis(plain, axis, 0)[degenerate] = 0
    plain = np.where(np.isnan(plain), np.zeros_like(plain), plain)
    options = {"axis": axis, "activation": activation}
    problem = Problem(plain, gamma, beta, where=weights, residual=z, **options)
    left_out = np.isnan(x)
    np.moveaxis(left_out, axis, 0)[degenerate] = False
    dy = np.where(problem.near_a_kink(dtype) | left_out, np.zeros_like(dy), dy)

    def both(x, z, dy, gamma, beta, where):
        named = {**options, **SHIFT, "where": where}
        y, stats = bn.batch_norm(x, gamma, beta, residual=z, **named)
        back = {"residual": z} if way == "z" else {"residual": z is not None, "y": y}
        return y, stats, bn.batch_norm_backward(dy, x, stats, gamma, beta, **back, **named)

    y, stats, grads = target.call(both, x, z, dy, gamma, beta, where)
    kept = ~left_out
    assert y.dtype == x.dtype
    units = 4 if dtype in ("float32", "float64") else 1
    verdict.assert_close(y[kept], problem.y[kept], problem.size[kept], dtype, units, "y")
    right = gradients(problem, dy, degenerate)
    verdict.backward(grads[:3], right, dtype, gamma.dtype.name)
    assert np.all(np.moveaxis(grads[0], axis, 0)[degenerate] == 0)
    assert np.all(grads[1][degenerate] == 0)
    if z is not None:
        verdict.dresidual(grads[3], right, dtype)
    counts = np.array(stats.count)
    assert np.all(counts[degenerate] == 0)
    rest = np.delete(np.arange(counts.size), degenerate)
    expected = problem.flat(problem.n).astype(float)
    np.testing.assert_allclose(counts[rest], expected[rest], rtol=1e-6)
    assert np.all(np.isfinite(stats.mean))
    assert np.all(np.isfinite(stats.var))
    return stats


def inputs(shape, axis=1, dtype="float32", mean=3.0, residual=True, parameters="float32"):
    x, dy = data.batch(shape, dtype, mean=mean), data.batch(shape, dtype, mean=0.5, seed=5)
    z = data.batch(shape, dtype, mean=1.0, std=3.0, seed=4) if residual else None
    return x, z, dy, *data.parameters(data.channels(shape, axis), parameters)


@pytest.mark.parametrize("kind", ["mask", "weights", "integers"])
@pytest.mark.parametrize(("shape", "axis"), [((7, 4, 5), 1), ((6, 5, 4), -1)])
def test_kinds_of_weights(target, shape, axis, kind):
    given = inputs(shape, axis, residual=False)
    judge(target, given, lonely(shape, kind, axis), axis=axis)


def test_dtypes(target, dtype):
    parameters = "float64" if dtype == "float64" else "float32"
    given = inputs((9, 3, 4), 1, dtype, parameters=parameters)
    judge(target, given, lonely((9, 3, 4), "mask"), dtype, activation="relu")


@pytest.mark.parametrize(("activation", "way"), [("relu", "y"), ("silu", "z")])
def test_epilogue_of_means_of_a_million(target, activation, way):
    given = inputs((40, 4), mean=1e6)
    judge(target, given, lonely((40, 4), "weights"), activation=activation, way=way)


def test_nan_in_what_is_left_out(target):
    """A channel of which all is left out may hold anything; so may any value of zero weight."""
    x, z, dy, gamma, beta = inputs((8, 4, 3), residual=False)
    where = lonely((8, 4, 3), "mask")
    x[~where] = np.nan
    judge(target, (x, z, dy, gamma, beta), where)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4, 1), (1, 1)])
def test_weights_of_fewer_dimensions(target, shape):
    """Channel 0 is left out, or all are; the batch is none of the mask's axes, or one of length 1."""
    given = inputs((6, 4, 3))
    where = np.ones(shape, np.float32)
    where.reshape(-1)[0] = 0
    judge(target, given, where, degenerate=range(4) if shape == (1, 1) else [0])


@pytest.mark.parametrize(("shape", "axis"), [((1, 5), 1), ((0, 3, 4), 1), ((3, 4), (0, 1))])
def test_too_few_values_of_all_channels(target, shape, axis):
    """One value per channel, no value, or no axis of values: y is that of zeros, and nothing moves."""
    x, z, dy, gamma, beta = inputs(shape, axis)
    mean, var = data.statistics(gamma.shape)

    def step(x, z, dy, gamma, beta, mean, var):
        named = {"axis": axis, "residual": z, "activation": "relu", **SHIFT}
        y, stats = bn.batch_norm(x, gamma, beta, **named)
        grads = bn.batch_norm_backward(dy, x, stats, gamma, beta, **named)
        moved = bn.update_running(mean, var, stats), bn.update_renorm(mean, var, stats)
        return y, stats, grads, moved

    y, stats, (dx, dgamma, dbeta, dz), moved = target.call(step, x, z, dy, gamma, beta, mean, var)
    b = beta.reshape([n if i in (axis if isinstance(axis, tuple) else (axis,)) else 1
                      for i, n in enumerate(shape)])  # fmt: skip
    h = b + z
    np.testing.assert_allclose(y, np.maximum(h, 0), rtol=1e-6, atol=1e-6)
    g = np.where(h > 0, dy, 0)
    np.testing.assert_array_equal(dz, g)
    np.testing.assert_array_equal(dx, np.zeros_like(x))
    np.testing.assert_array_equal(dgamma, np.zeros_like(gamma))
    expected = g if isinstance(axis, tuple) else g.sum(axis=tuple(i for i in range(g.ndim) if i != axis))
    np.testing.assert_allclose(dbeta, expected, rtol=1e-6, atol=1e-6)
    assert np.all(stats.count == 0)
    for after in moved:
        np.testing.assert_array_equal(after[0], mean)
        np.testing.assert_allclose(after[1], var, rtol=2e-7)


def test_nothing_is_shifted_without_need(target):
    """With values enough, both choices give the same numbers."""
    x, _, dy, gamma, beta = inputs((12, 5), residual=False)
    where = data.weights((12, 5), "weights")

    def both(x, dy, gamma, beta, where):
        found = []
        for choice in ("raise", "shift"):
            named = {"where": where, "degenerate": choice}
            y, stats = bn.batch_norm(x, gamma, beta, **named)
            found.append((y, stats, bn.batch_norm_backward(dy, x, stats, gamma, **named)))
        return tuple(found)

    (y, stats, grads), other = target.call(both, x, dy, gamma, beta, where)
    np.testing.assert_array_equal(other[0], y)
    for a, b in zip((*stats, *grads), (*other[1], *other[2]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layer(target):
    """Running statistics of degenerate channels stay, those of the others move."""
    x, _, dy, gamma, beta = inputs((12, 4))
    where = lonely((12, 4), "mask")
    x[~where] = np.nan
    mean, var = data.statistics((4,))

    def run(x, dy, where, gamma, beta, mean, var):
        layer = bn.BatchNorm(4, **SHIFT)
        names = ("gamma", "beta", "running_mean", "running_var")
        state = dict(zip(names, (gamma, beta, mean, var), strict=True))
        layer.load_state_dict({**state, "num_batches_tracked": 0})
        y = layer(x, where=where)
        dx = layer.backward(dy)
        return y, dx, layer.gamma_grad, layer.beta_grad, layer.state_dict()

    dy = np.where(where | (np.arange(4) < 2), dy, np.float32(0))
    y, dx, dgamma, dbeta, after = target.call(run, x, dy, where, gamma, beta, mean, var)
    np.testing.assert_array_equal(y[:, :2], np.broadcast_to(beta[:2], (12, 2)))
    assert np.all(dx[:, :2] == 0)
    assert np.all(dgamma[:2] == 0)
    np.testing.assert_allclose(dbeta, dy.astype(float).sum(axis=0), rtol=1e-5, atol=1e-5)
    for name, before in (("running_mean", mean), ("running_var", var)):
        np.testing.assert_array_equal(after[name][:2], before[:2])
        assert np.all(after[name][2:] != before[2:])
    assert after["num_batches_tracked"] == 1


def test_without_eps(target):
    given = inputs((12, 4), residual=False)
    x, _, dy, gamma, beta = given
    where = lonely((12, 4), "mask")
    named = {"eps": 0, **SHIFT}

    def both(x, dy, gamma, beta, where):
        y, stats = bn.batch_norm(x, gamma, beta, where=where, **named)
        return y, bn.batch_norm_backward(dy, x, stats, gamma, beta, where=where, **named)

    with np.errstate(divide="ignore", invalid="ignore"):  # as of any channel of one value
        y, (dx, dgamma, _) = target.call(both, x, dy, gamma, beta, where)
    np.testing.assert_array_equal(y[:, :2], np.broadcast_to(beta[:2], (12, 2)))
    assert np.all(dx[:, :2] == 0)
    assert np.all(dgamma[:2] == 0)
    rest = Problem(x[:, 2:], gamma[2:], beta[2:], where=where[:, 2:], eps=0.0)
    verdict.forward(y[:, 2:], rest, "float32")


@pytest.mark.operation("out")
def test_out(target):
    x, _, dy, gamma, beta = inputs((12, 4))
    where = lonely((12, 4), "mask")

    def into(x, dy, gamma, beta, where):
        y, g = target.xp.zeros_like(x), target.xp.zeros_like(dy)
        y[...], g[...] = x, dy
        found, stats = bn.batch_norm(y, gamma, beta, where=where, out=y, **SHIFT)
        assert found is y
        dx, *_ = bn.batch_norm_backward(g, x, stats, gamma, where=where, out=g, **SHIFT)
        assert dx is g
        apart, stats = bn.batch_norm(x, gamma, beta, where=where, **SHIFT)
        dx, *_ = bn.batch_norm_backward(dy, x, stats, gamma, where=where, **SHIFT)
        return y, apart, g, dx

    y, apart, g, dx = target.call(into, x, dy, gamma, beta, where)
    np.testing.assert_array_equal(y, apart)
    np.testing.assert_array_equal(g, dx)


@pytest.mark.operation("errors")
def test_errors(target):
    x = data.batch((6, 4))
    for word, kind in (("drop", ValueError), (None, TypeError), (True, TypeError)):
        for wrong in (
            lambda x, word=word: bn.batch_norm(x, degenerate=word),
            lambda x, word=word: bn.batch_norm_backward(x, x, bn.moments(x), degenerate=word),
            lambda x, word=word: bn.BatchNorm(4, degenerate=word),
        ):
            with pytest.raises(kind, match=r"degenerate: got .*, expected one of 'raise', 'shift'"):
                target.call(wrong, x)
