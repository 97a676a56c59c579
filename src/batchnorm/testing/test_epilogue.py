"""Residuals and activations: values, gradients, and derivatives of them, of every activation."""

import functools

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.epilogue import ACTIVATIONS
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem, decimals, precise

pytestmark = pytest.mark.operation("epilogue")

KINDS = [*ACTIVATIONS, ("leaky_relu", 0.25), None]
activations = pytest.mark.parametrize("activation", KINDS, ids=lambda v: str(v).replace(" ", ""))
# With a residual each of them, and the kinds of formulas without.
cases = pytest.mark.parametrize(
    ("activation", "added"),
    [*((kind, True) for kind in KINDS), ("relu", False), ("silu", False)],
    ids=lambda v: str(v).replace(" ", ""),
)


def inputs(shape, axis, dtype="float32", mean=3.0, parameters="float32"):
    """Return x, z, dy, gamma and beta; h is spread over all pieces of an activation."""
    x, z = data.batch(shape, dtype, mean=mean), data.batch(shape, dtype, mean=1.0, std=3.0, seed=4)
    dy = data.batch(shape, dtype, mean=0.5, seed=5)
    gamma, beta = data.parameters(data.channels(shape, axis), parameters)
    return x, z, dy, np.asarray(gamma * 3, gamma.dtype), beta


def judge(target, given, activation, added, dtype="float32", *, axis=1, where=None, way="z"):
    """Check a forward and a backward pass against the oracle."""
    x, z, dy, gamma, beta = given
    options = {"axis": axis, "activation": activation}
    problem = Problem(x, gamma, beta, where=where, residual=z if added else None, **options)
    dy = np.where(problem.near_a_kink(dtype), np.zeros_like(dy), dy)

    def both(x, z, dy, gamma, beta, *where):
        named = {**options, "where": where[0] if where else None}
        z = z if added else None
        y, stats = bn.batch_norm(x, gamma, beta, residual=z, **named)
        back = {"residual": z} if way == "z" else {"residual": added, "y": y}
        return y, bn.batch_norm_backward(dy, x, stats, gamma, beta, **back, **named)

    y, grads = target.call(both, x, z, dy, gamma, beta, *([] if where is None else [where]))
    verdict.forward(y, problem, dtype)
    right = problem.backward(dy, y if way == "y" else None)
    verdict.backward(grads[:3], right, dtype, gamma.dtype.name)
    assert len(grads) == 3 + added
    if added:
        verdict.dresidual(grads[3], right, dtype)


@pytest.mark.parametrize(("shape", "axis"), data.SHAPES, ids=data.IDS)
def test_shapes(target, shape, axis):
    judge(target, inputs(shape, axis), "relu", True, axis=axis)


@cases
def test_activations(target, activation, added):
    judge(target, inputs((17, 3, 5), 1), activation, added)


@pytest.mark.parametrize(
    ("activation", "added"), [("relu", True), ("relu6", True), ("leaky_relu", True), ("relu", False)]
)
def test_from_y(target, activation, added):
    judge(target, inputs((17, 3, 5), 1), activation, added, way="y")


@pytest.mark.parametrize(("activation", "way"), [("relu", "y"), ("leaky_relu", "z"), ("silu", "z")])
def test_dtypes(target, dtype, activation, way):
    """16-bit data is rounded once, after the activation."""
    parameters = "float64" if dtype == "float64" else "float32"
    given = inputs((40, 3, 7), 1, dtype, 2.0, parameters)
    judge(target, given, activation, True, dtype, way=way)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layouts(target, array_layout, axis):
    """The residual lies in memory as it likes, and not as x."""
    x, z, dy, gamma, beta = inputs((40, 7, 6), axis)
    lay = data.LAYOUTS[array_layout]
    for given in ((x, lay(z), dy), (lay(x), z, dy)):
        judge(target, (*given, gamma, beta), "relu", True, axis=axis)


def test_large_mean(target):
    judge(target, inputs((400, 3), 1, mean=1e4), "relu", True)


@pytest.mark.parametrize("kind", ["mask", "weights"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_where(target, activation, kind):
    judge(target, inputs((12, 5, 4), 1), activation, True, where=data.weights((12, 5, 4), kind))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_padding_may_hold_nan(target, activation):
    x, z, dy, gamma, beta = inputs((8, 3, 6), 1)
    where = np.ones((8, 1, 6), dtype=bool)
    where[4:, :, 3:] = False
    padding = np.broadcast_to(~where, x.shape)
    x[padding], dy[padding] = np.nan, 0

    def both(x, z, dy, gamma, beta, where):
        named = {"where": where, "residual": z, "activation": activation}
        y, stats = bn.batch_norm(x, gamma, beta, **named)
        return y, bn.batch_norm_backward(dy, x, stats, gamma, beta, **named)

    y, grads = target.call(both, x, z, dy, gamma, beta, where)
    finite = np.where(padding, np.float32(0), x)
    problem = Problem(finite, gamma, beta, where=where, residual=z, activation=activation)
    kept = ~padding
    verdict.assert_close(y[kept], problem.y[kept], problem.size[kept], "float32", 4, "y")
    right = problem.backward(dy)
    verdict.backward(grads[:3], right, "float32", "float32")
    assert np.all(grads[0][padding] == 0)
    assert np.all(grads[3][padding] == 0)


@cases
def test_given_statistics(target, activation, added):
    x, z, dy, gamma, beta = inputs((9, 3, 5), 1, mean=0.0)
    mean, var = data.statistics((3,))
    residual = z if added else None
    problem = Problem(x, gamma, beta, mean=mean, var=var, residual=residual, activation=activation)
    dy = np.where(problem.near_a_kink("float32"), np.zeros_like(dy), dy)

    def both(x, z, dy, mean, var, gamma, beta):
        named = {"residual": z if added else None, "activation": activation}
        y = bn.normalize(x, mean, var, gamma, beta, **named)
        return y, bn.normalize_backward(dy, x, mean, var, gamma, beta, stats_grad=True, **named)

    y, grads = target.call(both, x, z, dy, mean, var, gamma, beta)
    verdict.forward(y, problem, "float32")
    right = problem.backward(dy)
    *before, dmean, dvar = grads
    verdict.backward((*before[:3], dmean, dvar), right, "float32", "float32")
    assert len(before) == 3 + added
    if added:
        verdict.dresidual(before[3], right, "float32")


def test_nan_stays_in_its_channel(target):
    x, z, _, gamma, beta = inputs((20, 3), 1)
    x[4, 1] = np.nan
    for activation in ACTIVATIONS:
        y, _ = target.call(
            lambda *a, act=activation: bn.batch_norm(*a[:3], residual=a[3], activation=act),
            *(x, gamma, beta, z),
        )
        assert np.all(np.isnan(y[:, 1]))
        assert np.all(np.isfinite(y[:, ::2]))


@pytest.mark.operation("out")
def test_out_may_be_the_residual(target):
    x, z, _, gamma, beta = inputs((12, 5), 1)

    def into(x, z, gamma, beta):
        out = target.xp.zeros_like(z)
        out[...] = z
        y, _ = bn.batch_norm(x, gamma, beta, residual=out, activation="relu", out=out)
        assert y is out
        return y

    expected = Problem(x, gamma, beta, residual=z, activation="relu")
    verdict.forward(target.call(into, x, z, gamma, beta), expected, "float32")


# Derivatives of the gradients, by differences of the oracle in 50 digits.

STEP = 1e-12


@functools.lru_cache
@precise()
def second_order(activation):
    """Return the arguments of a case in float64, tangents of y, and gradients of the backward pass."""
    x, z, dy, gamma, beta = inputs((5, 3, 2), 1, "float64", 0.5, "float64")
    along = [data.batch(v.shape, "float64", seed=20 + i) for i, v in enumerate((x, z, dy, gamma, beta))]
    problem = Problem(x, gamma, beta, residual=z, activation=activation)
    dy = np.where(problem.near_a_kink("float32"), np.zeros_like(dy), dy)
    given, directions = [decimals(v) for v in (x, z, dy, gamma, beta)], [decimals(v) for v in along]
    t = decimals(np.asarray(STEP))[()]

    def forward(x, z, _, gamma, beta):
        return Problem(x, gamma, beta, residual=z, activation=activation).y

    def loss(x, z, dy, gamma, beta):
        found = Problem(x, gamma, beta, residual=z, activation=activation).backward(dy)
        u, v, _, a, b = directions
        terms = (u * found.dx, v * found.dresidual, a * found.dgamma, b * found.dbeta)
        return sum(np.sum(term) for term in terms)

    def moved(sign, which=None):
        moves = [sign * t if which in (None, i) else 0 for i in range(5)]
        return [v + move * d for v, move, d in zip(given, moves, directions, strict=True)]

    tangent = (forward(*moved(1)) - forward(*moved(-1))) / (2 * t)
    slopes = [(loss(*moved(1, i)) - loss(*moved(-1, i))) / (2 * t) for i in range(5)]
    return (x, z, dy, gamma, beta), along, tangent.astype(float), [float(s) for s in slopes]


@activations
@pytest.mark.dtypes("float64")
def test_second_order(target, dtype, activation):
    given, along, tangent, slopes = second_order(activation)

    def both(x, z, dy, gamma, beta, dx, dz, ddy, dgamma, dbeta):
        named = {"residual": z, "activation": activation}
        _, stats = bn.batch_norm(x, gamma, beta, **named)
        forward = (dx, dgamma, dbeta, x, stats, gamma, beta)
        second = (dx, dgamma, dbeta, dy, x, stats, gamma, beta)
        return (
            bn.batch_norm_jvp(*forward, dresidual=dz, **named)[0],
            bn.batch_norm_double_backward(*second, ddresidual=dz, **named),
        )

    y_dot, (d_dy, d_x, d_gamma, d_beta, d_z) = target.call(both, *given, *along)
    np.testing.assert_allclose(y_dot, tangent, rtol=1e-10, atol=1e-10)
    found = (d_x, d_z, d_dy, d_gamma, d_beta)
    sums = [np.sum(v * d) for v, d in zip(found, along, strict=True)]
    np.testing.assert_allclose(sums, slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.operation("shape-errors")
def test_errors(target):
    x, z, dy, gamma, beta = inputs((6, 3), 1)

    def wrong(kind, message, f):
        with pytest.raises(kind, match=message):
            target.call(f, x, z, dy, gamma, beta)

    def back(x, z, dy, gamma, beta, **named):
        return bn.batch_norm_backward(dy, x, bn.moments(x), gamma, beta, **named)

    words = "'relu', 'relu6', 'leaky_relu', 'silu'"
    wrong(ValueError, words, lambda x, *_: bn.batch_norm(x, activation="tanh"))
    wrong(TypeError, words, lambda x, *_: bn.batch_norm(x, activation=1))
    wrong(ValueError, "slope", lambda x, *_: bn.batch_norm(x, activation=("leaky_relu", -1)))
    wrong(ValueError, words, lambda x, *_: bn.batch_norm(x, activation=("relu", 0.5)))
    wrong(ValueError, "residual: got shape", lambda x, z, *_: bn.batch_norm(x, residual=z[:2, :]))
    wrong(
        TypeError,
        "residual: got dtype",
        lambda x, z, *_: bn.batch_norm(
            target.xp.astype(x, target.xp.float32), residual=target.xp.astype(z, target.xp.int32)
        ),
    )
    wrong(TypeError, "residual: got", lambda x, *_: bn.batch_norm(x, residual="z"))
    wrong(ValueError, "y: got None", lambda *a: back(*a, residual=True, activation="relu"))
    wrong(ValueError, "residual: got True", lambda *a: back(*a, residual=True, activation="silu"))
    wrong(ValueError, "y: got an array", lambda *a: back(*a, y=a[1], activation="silu"))
    wrong(ValueError, "y: got an array", lambda *a: back(*a, y=a[1]))
    wrong(TypeError, "residual: got", lambda *a: back(*a, residual="z", activation="relu"))
