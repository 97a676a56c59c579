"""Virtual batches: each part of a batch is a batch of its own."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, oracle, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("virtual")


def along(shape, axis):
    """Return the axis of examples: the first that is not a channel axis."""
    kept = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
    return next(i for i in range(len(shape)) if i not in kept)


def pieces(v, n, size, axis):
    """Return the parts of an array of n examples; of weights without that axis, the same ones."""
    if v is None or v.shape[axis] != n:
        return [v] * -(-n // size)
    return np.split(v, range(size, n, size), axis=axis)


def judge(target, shape, axis, size, dtype="float32", where=None, activation=None, **settings):
    """Check a pass of a layer, back and forth, against the oracle of each part."""
    x, dy = data.batch(shape, dtype, mean=3.0), data.batch(shape, dtype, mean=0.5, seed=5)
    z = None if activation is None else data.batch(shape, dtype, mean=1.0, std=3.0, seed=4)
    channels = data.channels(shape, axis)
    gamma, beta = data.parameters(channels, "float64" if dtype == "float64" else "float32")
    mean, var = data.statistics(channels)
    i = along(shape, axis)
    n = shape[i]
    full = None if where is None else where[(None,) * (len(shape) - where.ndim)]
    options = {"axis": axis, "activation": activation}
    cut = [pieces(v, n, size, i) for v in (x, full, z)]
    problems = [
        Problem(a, gamma, beta, where=w, residual=b, **options) for a, w, b in zip(*cut, strict=True)
    ]
    near = np.concatenate([p.near_a_kink(dtype) for p in problems], axis=i)
    dy = np.where(near, np.zeros_like(dy), dy)

    def step(x, z, dy, gamma, beta, mean, var, where):
        layer = bn.BatchNorm(channels, axis=axis if isinstance(axis, tuple) else (axis,),
                             virtual_batch_size=size, activation=activation, **settings)  # fmt: skip
        names = ("gamma", "beta", "running_mean", "running_var")
        state = dict(zip(names, (gamma, beta, mean, var), strict=True))
        layer.load_state_dict({**state, "num_batches_tracked": 0})
        y = layer(x, where=where, residual=z)
        dx = layer.backward(dy)
        dx, dz = dx if z is not None else (dx, None)
        return y, dx, dz, layer.gamma_grad, layer.beta_grad, layer.state_dict()

    y, dx, dz, dgamma, dbeta, after = target.call(step, x, z, dy, gamma, beta, mean, var, where)
    right = [p.backward(g) for p, g in zip(problems, pieces(dy, n, size, i), strict=True)]
    for j, problem in enumerate(problems):
        verdict.forward(pieces(y, n, size, i)[j], problem, dtype)
        zero = np.zeros_like(dgamma)
        vectors = {k: 0 * getattr(right[j], k) for k in ("dgamma", "dbeta")}
        part = right[j]._replace(**vectors)
        verdict.backward((pieces(dx, n, size, i)[j], zero, zero), part, dtype, dgamma.dtype.name)
        if dz is not None:
            verdict.dresidual(pieces(dz, n, size, i)[j], right[j], dtype)
    for name, v in (("dgamma", dgamma), ("dbeta", dbeta)):
        expected = sum(getattr(g, name) for g in right)
        bound = sum(getattr(g, f"{name}_size") for g in right)
        verdict.assert_close(v, expected, bound, v.dtype.name, 16, name)
    whole = Problem(x, axis=axis, where=full)
    moved = oracle.running(mean, var, [whole], 0.1, 1)
    verdict.assert_close(
        after["running_mean"], moved[0], 1 + abs(moved[0]), "float32", 4, "running mean"
    )
    verdict.assert_close(after["running_var"], moved[1], moved[1], "float32", 8, "running var")
    assert after["num_batches_tracked"] == 1


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [
        ((12, 5), 1, 4),
        ((11, 3, 4), 1, 4),
        ((7, 4, 3), -1, 2),
        ((5, 10), 0, 4),
        ((3, 8, 2, 4), (0, 3), 3),
        ((6, 3), 1, 6),
        ((6, 3), 1, 100),
    ],
)
def test_shapes(target, shape, axis, size):
    judge(target, shape, axis, size)


def test_dtypes(target, dtype):
    judge(target, (9, 3, 4), 1, 4, dtype, activation="relu")


def test_activation(target):
    judge(target, (11, 3, 2), 1, 4, activation="silu")


@pytest.mark.parametrize("shape", [(11, 3, 4), (1, 3, 4), (3, 4), (11, 1, 1)])
def test_weights(target, shape):
    where = data.weights(shape, "weights") + np.float32(0.25)
    judge(target, (11, 3, 4), 1, 4, where=where)


def test_a_last_part_of_one_example(target):
    where = data.weights((1, 3, 6), "mask")
    judge(target, (9, 3, 6), 1, 4, where=where)


def test_last_part_of_one_value(target):
    """It is degenerate: constants, and statistics of nothing."""
    x, dy = data.batch((9, 3), mean=3.0), data.batch((9, 3), seed=5)

    def step(x, dy):
        layer = bn.BatchNorm(3, virtual_batch_size=4, degenerate="shift", momentum=1.0)
        y = layer(x)
        return y, layer.backward(dy), layer.gamma_grad, layer.beta_grad, layer.state_dict()

    y, dx, dgamma, dbeta, after = target.call(step, x, dy)
    parts = [Problem(x[:4]), Problem(x[4:8])]
    right = [p.backward(g) for p, g in zip(parts, (dy[:4], dy[4:8]), strict=True)]
    for j, problem in enumerate(parts):
        part = slice(4 * j, 4 * j + 4)
        verdict.forward(y[part], problem, "float32")
        verdict.assert_close(dx[part], right[j].dx, right[j].dx_size, "float32", 16, "dx")
    assert np.all(y[8] == 0)
    assert np.all(dx[8] == 0)
    size = sum(g.dgamma_size for g in right)
    verdict.assert_close(dgamma, sum(g.dgamma for g in right), size, "float32", 16, "dgamma")
    expected = dy.astype(float).sum(axis=0)
    verdict.assert_close(dbeta, expected, abs(dy).sum(axis=0), "float32", 16, "dbeta")
    wide = x[:8].astype(float)
    var = wide.var(axis=0, ddof=1)
    verdict.assert_close(after["running_mean"], wide.mean(axis=0), 4.0, "float32", 2, "mean")
    verdict.assert_close(after["running_var"], var, var, "float32", 4, "var")


@pytest.mark.operation("out")
@pytest.mark.parametrize("itself", [False, True])
def test_out(target, itself):
    x = data.batch((11, 3), mean=3.0)

    def into(x):
        layer = bn.BatchNorm(3, virtual_batch_size=4)
        out = target.xp.zeros_like(x)
        source = out if itself else x
        if itself:
            out[...] = x
        assert layer(source, out=out) is out
        return out

    y = target.call(into, x)
    for part in (slice(0, 4), slice(4, 8), slice(8, 11)):
        verdict.forward(y[part], Problem(x[part]), "float32")
