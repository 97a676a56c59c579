"""Batch renormalization: values, gradients with r and d held constant, running statistics."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem, decimals, precise

pytestmark = pytest.mark.operation("renorm")

LIMITS = [(None, None), (1.5, 0.5), (1.0, 0.0), (3, None), (None, 5)]


@precise()
def corrections(plain, mean, var, limits):
    """Return r and d as the paper has them, in 50 digits (Ioffe 2017, Algorithm 1)."""
    r_max, d_max = limits
    std = np.sqrt(decimals(var) + decimals(np.asarray(1e-5))[()])
    batch_std = np.reshape(plain.std, plain.channels)
    r, d = batch_std / std, (np.reshape(plain.mean, plain.channels) - decimals(mean)) / std
    r, d = np.asarray(r, object), np.asarray(d, object)
    if r_max is not None:
        low, high = (decimals(np.full(r.shape, v)) for v in (1, r_max))
        r = np.minimum(np.maximum(r, low / high), high)
    if d_max is not None:
        high = decimals(np.full(d.shape, d_max))
        d = np.minimum(np.maximum(d, -high), high)
    return r, d


@precise()
def expected(x, gamma, beta, mean, var, limits, **options):
    """Return the problem of gamma·r and beta + gamma·d, and r and d: what batch renormalization is."""
    x = np.where(np.isnan(x), np.zeros_like(x), x)  # what is left out
    plain = Problem(x, **{k: v for k, v in options.items() if k in ("axis", "where")})
    r, d = corrections(plain, mean, var, limits)
    gamma = decimals(np.ones(r.shape) if gamma is None else gamma)
    beta = decimals(np.zeros(r.shape) if beta is None else beta)
    scale, shift = np.asarray(gamma * r, object), np.asarray(beta + gamma * d, object)
    problem = Problem(x, scale, shift, **options)
    # y is a sum of gamma·r·x̂, gamma·d and beta.
    shift = abs(gamma * d) + abs(beta)
    one = decimals(np.ones(()))[()]
    terms = abs(problem.gamma * problem.x_hat) + np.reshape(shift, problem.vector)
    if problem.added:
        terms = terms + abs(decimals(options["residual"]))
    problem.size = np.maximum(one, terms)
    return problem, r, d


@precise()
def gradients(problem, r, d, dy, y=None):
    """Return right gradients: dgamma is r·Σg·x̂ + d·Σg."""
    right = problem.backward(dy, y)
    return right._replace(
        dgamma=r * right.dgamma + d * right.dbeta,
        dgamma_size=r * right.dgamma_size + abs(d) * right.dbeta_size,
    )


def inputs(shape, axis=1, dtype="float32", mean=3.0, parameters="float32"):
    x, dy = data.batch(shape, dtype, mean=mean), data.batch(shape, dtype, mean=0.5, seed=5)
    z = data.batch(shape, dtype, mean=1.0, std=3.0, seed=4)
    channels = data.channels(shape, axis)
    gamma, beta = data.parameters(channels, parameters)
    running_mean, running_var = data.statistics(channels)
    return x, z, dy, gamma, beta, np.asarray(running_mean + np.float32(mean)), running_var


def judge(
    target, given, limits, dtype="float32", *, axis=1, where=None, activation=None, added=False, way="z"
):
    """Check a forward and a backward pass against the oracle."""
    x, z, dy, gamma, beta, mean, var = given
    options = {"axis": axis, "activation": activation}
    named = {**options, "where": where, "residual": z if added else None}
    problem, r, d = expected(x, gamma, beta, mean, var, limits, **named)
    left_out = np.isnan(x)
    dy = np.where(problem.near_a_kink(dtype) | left_out, np.zeros_like(dy), dy)

    def both(x, z, dy, gamma, beta, mean, var, where):
        named = {**options, "where": where, "r_max": limits[0], "d_max": limits[1]}
        z = z if added else None
        y, stats = bn.batch_renorm(x, mean, var, gamma, beta, residual=z, **named)
        back = {"residual": z} if way == "z" else {"residual": added, "y": y}
        grads = bn.batch_renorm_backward(dy, x, stats, mean, var, gamma, beta, **back, **named)
        return y, stats, grads

    y, stats, grads = target.call(both, x, z, dy, gamma, beta, mean, var, where)
    kept = ~left_out
    if np.all(kept):
        verdict.forward(y, problem, dtype)
    else:
        verdict.assert_close(y[kept], problem.y[kept], problem.size[kept], dtype, 4, "y")
    verdict.moments(stats, problem, dtype)
    right = gradients(problem, r, d, dy, y if way == "y" else None)
    parameters = (mean if gamma is None else gamma).dtype.name
    verdict.backward(grads[:3], right, dtype, parameters)
    assert len(grads) == 3 + added
    if added:
        verdict.dresidual(grads[3], right, dtype)


@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 3, 4), 1), ((6, 4, 5), -1), ((2, 4, 3, 3), (1, 3)), ((37,), ())]
)
def test_shapes(target, shape, axis):
    judge(target, inputs(shape, axis), (1.5, 0.5), axis=axis)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits(target, limits):
    judge(target, inputs((9, 12)), limits)


def test_dtypes(target, dtype):
    parameters = "float64" if dtype == "float64" else "float32"
    given = inputs((40, 3, 7), 1, dtype, 2.0, parameters)
    judge(target, given, (1.5, 0.5), dtype, activation="relu", added=True)


@pytest.mark.dtypes("float16", "bfloat16")
def test_parameters_of_16_bits(target, dtype):
    """Neither gamma·r nor beta + gamma·d is rounded to them, nor the terms of dgamma."""
    judge(target, inputs((40, 3), dtype=dtype, parameters=dtype), (1.5, 0.5), dtype)
    x, z, dy, *_ = inputs((40, 3))
    given = inputs((40, 3), dtype=dtype, parameters=dtype)
    judge(target, (x, z, dy, *given[3:]), (1.5, 0.5))


@pytest.mark.parametrize(("activation", "way"), [("relu", "y"), ("silu", "z")])
def test_epilogue(target, activation, way):
    judge(target, inputs((17, 5)), (1.2, 2), activation=activation, added=True, way=way)


@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_where_with_nan_in_what_is_left_out(target, kind):
    x, *given = inputs((12, 5))
    where = data.weights((12, 5), kind)
    x[where == 0] = np.nan
    judge(target, (x, *given), (1.5, 0.5), where=where)


def test_mean_of_a_million(target):
    """The distance to the running mean is not lost in the mean."""
    judge(target, inputs((400, 3), mean=1e6), (3, 5))


def test_no_parameters(target):
    x, z, dy, _, _, mean, var = inputs((12, 5))
    judge(target, (x, z, dy, None, None, mean, var), (1.5, 0.5))


def test_within_the_limits_it_is_batch_norm_to_the_bit(target):
    x, z, dy, gamma, beta, mean, var = inputs((12, 5))

    def all_of(x, z, dy, gamma, beta, mean, var):
        named = {"residual": z, "activation": "silu"}
        y, stats = bn.batch_norm(x, gamma, beta, **named)
        grads = bn.batch_norm_backward(dy, x, stats, gamma, beta, **named)
        named |= {"r_max": 1.0, "d_max": 0.0}
        again, own = bn.batch_renorm(x, mean, var, gamma, beta, **named)
        others = bn.batch_renorm_backward(dy, x, own, mean, var, gamma, beta, **named)
        return (y, *grads, *stats), (again, *others, *own)

    for a, b in zip(*target.call(all_of, x, z, dy, gamma, beta, mean, var), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_update(target, momentum):
    """The mean and the standard deviation move; a channel without values stays."""
    x = data.batch((9, 4), mean=3.0)
    where = np.ones((9, 4), bool)
    where[:, 1] = False
    mean, var = data.statistics((4,))

    def step(x, where, mean, var):
        return bn.update_renorm(mean, var, bn.moments(x, where=where), momentum=momentum, eps=1e-3)

    new_mean, new_var = target.call(step, x, where, mean, var)
    wide = x.astype(float)
    std = (1 - momentum) * np.sqrt(var + 1e-3) + momentum * np.sqrt(wide.var(axis=0) + 1e-3)
    right = np.where(where[0], (1 - momentum) * mean + momentum * wide.mean(axis=0), mean)
    verdict.assert_close(new_mean, right, abs(right) + 1, "float32", 2, "mean")
    right = np.where(where[0], std * std - 1e-3, var)
    verdict.assert_close(new_var, right, right + 1e-3, "float32", 4, "var")


def test_update_of_variances_of_different_size(target):
    """Neither loses the other's digits."""
    mean, var = np.zeros(4, np.float32), np.asarray([1e6, 1e-2, 1e-8, 0], np.float32)
    x = np.asarray([[1, 1000, 1, 1e-4], [-1, -1000, -1, -1e-4]], np.float32) * np.float32(0.1)

    def step(x, mean, var):
        return bn.update_renorm(mean, var, bn.moments(x), momentum=0.99)[1]

    own = np.square(x[0].astype(float))
    std = 0.01 * np.sqrt(var + np.float64(1e-5)) + 0.99 * np.sqrt(own + 1e-5)
    right = std * std - 1e-5
    verdict.assert_close(target.call(step, x, mean, var), right, right, "float32", 8, "var")


@pytest.mark.parametrize("schedule", [False, True])
def test_layer(target, schedule):
    x, _, dy, gamma, beta, mean, var = inputs((12, 5))
    limits = (lambda k: 1 + 0.25 * k, lambda k: 0.5 * k) if schedule else (1.5, 1)

    def run(x, dy, gamma, beta, mean, var):
        layer = bn.BatchNorm(5, renorm=limits)
        names = ("gamma", "beta", "running_mean", "running_var")
        state = dict(zip(names, (gamma, beta, mean, var), strict=True))
        layer.load_state_dict({**state, "num_batches_tracked": 2})
        y = layer(x)
        layer.update()  # what goes back is compared with the running statistics before
        dx = layer.backward(dy)
        return y, (dx, layer.gamma_grad, layer.beta_grad), layer.state_dict()

    y, grads, after = target.call(run, x, dy, gamma, beta, mean, var)
    problem, r, d = expected(x, gamma, beta, mean, var, (1.5, 1.0))
    verdict.forward(y, problem, "float32")
    verdict.backward(grads, gradients(problem, r, d, dy), "float32", "float32")
    wide = x.astype(float)
    std = 0.9 * np.sqrt(var.astype(float) + 1e-5) + 0.1 * np.sqrt(wide.var(axis=0) + 1e-5)
    right = std * std - 1e-5
    verdict.assert_close(after["running_var"], right, right, "float32", 8, "running var")
    right = 0.9 * mean + 0.1 * wide.mean(axis=0)
    verdict.assert_close(after["running_mean"], right, abs(right) + 1, "float32", 4, "running mean")
    assert after["num_batches_tracked"] == 3


@pytest.mark.operation("out")
def test_out(target):
    x, _, dy, gamma, beta, mean, var = inputs((12, 5))
    named = {"r_max": 1.5, "d_max": 0.5}

    def into(x, dy, gamma, beta, mean, var):
        y, g = target.xp.zeros_like(x), target.xp.zeros_like(dy)
        y[...], g[...] = x, dy
        found, stats = bn.batch_renorm(y, mean, var, gamma, beta, out=y, **named)
        assert found is y
        dx, *_ = bn.batch_renorm_backward(g, x, stats, mean, var, gamma, beta, out=g, **named)
        assert dx is g
        return y, dx

    y, dx = target.call(into, x, dy, gamma, beta, mean, var)
    problem, r, d = expected(x, gamma, beta, mean, var, (1.5, 0.5))
    verdict.forward(y, problem, "float32")
    right = gradients(problem, r, d, dy)
    verdict.assert_close(dx, right.dx, right.dx_size, "float32", 16, "dx")


@pytest.mark.operation("errors")
def test_errors(target):
    x = data.batch((6, 4))
    mean, var = data.statistics((4,))

    def wrong(kind, match, **named):
        for update in (False, True):

            def f(x, mean, var, update=update):
                named_ = {"running_mean": mean, "running_var": var, **named}
                if update:
                    return bn.batch_renorm_backward(x, x, bn.moments(x), **named_)
                return bn.batch_renorm(x, **named_)

            with pytest.raises(kind, match=match):
                target.call(f, x, mean, var)

    wrong(ValueError, "r_max: got 0.5, expected a number >= 1", r_max=0.5)
    wrong(ValueError, "r_max: got nan", r_max=float("nan"))
    wrong(TypeError, "r_max: got 'a'", r_max="a")
    wrong(ValueError, "d_max: got -1, expected a number >= 0", d_max=-1)
    wrong(TypeError, "d_max: got True", d_max=True)
    wrong(TypeError, "running_mean: got None", running_mean=None)
    wrong(TypeError, "running_var: got None", running_var=None)
    wrong(TypeError, "running_var: got a str", running_var="v")
    wrong(ValueError, "eps: got -1", eps=-1)


def test_shape_errors(target):
    x = data.batch((6, 4))
    mean, var = data.statistics((5,))
    for f in (
        lambda x, mean, var: bn.batch_renorm(x, mean, var),
        lambda x, mean, var: bn.batch_renorm_backward(x, x, bn.moments(x), mean, var),
    ):
        with pytest.raises(ValueError, match="running_mean: got shape"):
            target.call(f, x, mean, var)
