"""At home in JAX: every transformation, and a Flax module; judged by JAX and Flax."""

import functools

import numpy as np
import pytest

import batchnorm as bn

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402


@pytest.fixture(autouse=True, params=[None, pytest.param("jax", marks=pytest.mark.slow)])
def kernels(request):
    """The compiled core where it can run, and array code."""
    bn.set_kernels(request.param)
    with jax.enable_x64(True):
        yield request.param
    bn.set_kernels(None)


def arrays(shape=(4, 3, 5), channels=3, seed=0):
    rng = np.random.default_rng(seed)
    x, gamma, beta = (rng.standard_normal(s) for s in (shape, channels, channels))
    return jnp.asarray(x), jnp.asarray(gamma), jnp.asarray(beta)


def weights(shape, kind):
    if kind is None:
        return None
    w = np.random.default_rng(7).uniform(size=shape)
    w[0, :, 1] = 0
    return jnp.asarray(w > 0.3 if kind == "mask" else w)


def formula(x, gamma, beta, w=None):
    """The textbook's, for JAX to differentiate."""
    w = jnp.ones(x.shape) if w is None else w.astype(x.dtype)
    n = w.sum((0, 2), keepdims=True)
    mean = (w * x).sum((0, 2), keepdims=True) / n
    var = (w * (x - mean) ** 2).sum((0, 2), keepdims=True) / n
    return gamma[:, None] * (x - mean) / jnp.sqrt(var + 1e-5) + beta[:, None]


@pytest.mark.parametrize(
    "kind", ["mask", *(pytest.param(k, marks=pytest.mark.slow) for k in (None, "weights"))]
)
def test_gradients_of_batch_norm(kind):
    """Order 2, forward and backward, against differences."""
    given = arrays()
    where = weights(given[0].shape, kind)

    def f(*arrays):  # differences come as NumPy's
        y, stats = bn.batch_norm(*map(jnp.asarray, arrays), where=where)
        return y, stats.mean, stats.var

    check_grads(f, given, order=2)


def test_numpy_s_arrays_and_tangents_in_transformations():
    x, gamma, beta = map(np.asarray, arrays())
    along = np.random.default_rng(3).standard_normal(x.shape)

    def loss(f):
        return lambda *a: (f(*a) ** 3).sum()

    def f(*given):
        return bn.batch_norm(*given)[0]

    for own, right in (
        (
            jax.jvp(f, (x, gamma, beta), (along, gamma, beta)),
            jax.jvp(formula, *[(x, gamma, beta), (along, gamma, beta)]),
        ),
        (jax.vjp(f, x, gamma, beta)[1](along), jax.vjp(formula, x, gamma, beta)[1](along)),
        (
            jax.grad(loss(f), (0, 1, 2))(x, gamma, beta),
            jax.grad(loss(formula), (0, 1, 2))(x, gamma, beta),
        ),
    ):
        for a, b in zip(own, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_of_normalize():
    x, gamma, beta = arrays()
    mean, var = arrays(seed=1)[1], jnp.abs(arrays(seed=2)[1]) + 0.5
    normalize = lambda *given: bn.normalize(*map(jnp.asarray, given))  # noqa: E731
    check_grads(normalize, (x, mean, var, gamma, beta), order=2)


def test_cotangents_that_are_not_uniform():
    given = arrays()
    _, pullback = jax.vjp(lambda *a: bn.batch_norm(*a)[0], *given)
    dy = arrays(seed=3)[0]
    _, stats = bn.batch_norm(*given)
    expected = bn.batch_norm_backward(dy, given[0], stats, given[1])
    for mine, right in zip(pullback(dy), expected, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-12, atol=1e-12)


LOSSES = {
    "grad": lambda f: jax.grad(lambda x, g, b: (f(x, g, b) ** 3).sum(), argnums=(0, 1, 2)),
    "jit": jax.jit,
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x, g, b: (f(x, g, b) ** 3).sum())),
    "grad of grad": lambda f: jax.grad(
        lambda x, g, b: (jax.grad(lambda x: (f(x, g, b) ** 3).sum())(x) ** 2).sum()
    ),
    "hessian": lambda f: jax.hessian(lambda x, g, b: (f(x, g, b) ** 3).sum()),
    "jvp": lambda f: lambda x, g, b: jax.jvp(f, (x, g, b), (jnp.cos(x), g, 2 * b)),
    "linearize": lambda f: lambda x, g, b: jax.linearize(f, x, g, b)[1](jnp.cos(x), g, b),
    "vmap": lambda f: lambda x, g, b: jax.vmap(f, (0, None, None))(jnp.stack([x, 2 * x, x + 1]), g, b),
    "vmap of grad": lambda f: (
        lambda x, g, b: jax.vmap(jax.grad(lambda x, g, b: (f(x, g, b) ** 3).sum()), (0, 0, None))(
            jnp.stack([x, 2 * x]), jnp.stack([g, 3 * g]), b
        )
    ),
    "checkpoint": lambda f: jax.grad(
        lambda x, g, b: (jax.checkpoint(f)(x, g, b) ** 3).sum(), argnums=(0, 1, 2)
    ),
}


@pytest.mark.parametrize("kind", [None, pytest.param("weights", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("hessian", "vmap of grad") else ())
        for n in LOSSES
    ],
)
def test_transformations(name, kind):
    given = arrays()
    where = weights(given[0].shape, kind)
    mine = LOSSES[name](lambda *a: bn.batch_norm(*a, where=where)[0])(*given)
    right = LOSSES[name](functools.partial(formula, w=where))(*given)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("nothing", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_what_a_mask_leaves_out_may_be_anything(nothing, order):
    """Gradients are those beside a finite value, where the loss does not look at it either."""
    x, gamma, beta = arrays((6, 3))
    mask = jnp.ones((6, 1), bool).at[4:].set(False)

    def loss(x, gamma, beta):
        y, _ = bn.batch_norm(x, gamma, beta, where=mask)
        return (jnp.where(mask, y, 0.0) ** 3).sum()

    def formula(x, gamma, beta):
        y = gamma * (x[:4] - x[:4].mean(0)) / jnp.sqrt(x[:4].var(0) + 1e-5) + beta
        return (y**3).sum()

    def derivative(f):
        first = jax.grad(f, argnums=(0, 1, 2))
        if order == 1:
            return first
        return jax.grad(lambda *a: sum((v**2).sum() for v in first(*a)), argnums=(0, 1, 2))

    mine = derivative(loss)(x.at[4:].set(nothing), gamma, beta)
    right = derivative(formula)(x, gamma, beta)
    for a, b in zip(mine, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_a_gradient_of_the_backward_pass_beside_nan():
    """To x, gamma and dy, where what weighs nothing is NaN."""
    x, gamma, _ = arrays((6, 3))
    dy = arrays((6, 3), seed=5)[0].at[4:].set(0.0)
    mask = jnp.ones((6, 1), bool).at[4:].set(False)

    def loss(x, gamma, dy, where, *, of):
        stats = bn.moments(x, where=where)
        dx, dgamma, _ = bn.batch_norm_backward(dy, x, stats, gamma, where=where)
        return (dx[of] ** 3).sum() + (dgamma**2).sum()

    gradient = jax.grad(functools.partial(loss, of=slice(4)), argnums=(0, 1, 2))
    mine = gradient(x.at[4:].set(jnp.nan), gamma, dy, mask)
    right = gradient(x[:4], gamma, dy[:4], None)
    for a, b in zip(mine, right, strict=True):
        np.testing.assert_allclose(a[:4], b[:4], rtol=1e-9, atol=1e-9)


def test_which_kernels_run(kernels):
    """Those with rules, eager and traced; JAX's own derivative for gradients to weights and eps."""
    x, expected = arrays()[0], kernels or "native"
    assert bn.kernels_for(x).name == expected
    seen = []
    jax.grad(lambda x: (seen.append(bn.kernels_for(x).name), x.sum())[1])(x)
    jax.jit(lambda x: (seen.append(bn.kernels_for(x).name), x)[1])(x)
    assert seen == [expected, expected]
    w = weights(x.shape, "weights") + 0.5
    check_grads(lambda w: bn.batch_norm(x, where=jnp.asarray(w))[0], (w,), order=1)
    check_grads(lambda eps: bn.batch_norm(x, eps=jnp.asarray(eps))[0], (jnp.asarray(0.1),), order=1)


def test_shapes_without_values():
    given = arrays()
    y, stats = jax.eval_shape(bn.batch_norm, *given)
    assert (y.shape, y.dtype) == (given[0].shape, given[0].dtype)
    assert isinstance(stats, bn.Moments)
    assert stats.var.shape == (3,)


def test_moments_and_state_are_trees():
    x = arrays()[0]
    stats = jax.jit(bn.moments)(x)
    assert isinstance(stats, bn.Moments)
    doubled = jax.tree.map(lambda v: 2 * v, stats)
    np.testing.assert_allclose(doubled.mean, 2 * stats.mean)
    layer = bn.BatchNorm(3, xp=jnp, dtype=jnp.float64)

    @jax.jit
    def step(state, x):
        layer = bn.BatchNorm(3, xp=jnp, dtype=jnp.float64)
        layer.load_state_dict(state)
        y = layer(x)
        layer.update()
        return y, layer.state_dict()

    y, state = step(layer.state_dict(), x)
    layer.load_state_dict(state)
    _, stats = bn.batch_norm(x)
    np.testing.assert_allclose(state["running_mean"], 0.1 * stats.mean)
    np.testing.assert_allclose(y, formula(x, jnp.ones(3), jnp.zeros(3)))


OUTSIDE = r"BatchNorm: got a training pass that JAX traces, of a layer that was made outside, expected"


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
@pytest.mark.parametrize("seen", [True, False])
def test_a_layer_made_outside_says_what_to_do(transform, seen):
    """And is as it was: nothing that is traced stays in it."""
    layer, x = bn.BatchNorm(3), arrays()[0]
    if seen:
        layer(x)
        layer.update()
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=OUTSIDE):
        transform(lambda x: layer(x).sum())(x[None] if transform is jax.vmap else x)
    after = layer.state_dict()
    assert all(after[name] is before[name] for name in before)
    layer.update()
    np.testing.assert_allclose(layer(x), formula(x, jnp.ones(3), jnp.zeros(3)), rtol=1e-9, atol=1e-9)
    layer.update()
    inferred = transform(lambda x: layer.eval()(x).sum())(x[None] if transform is jax.vmap else x)
    assert np.all(np.isfinite(inferred))
    with jax.checking_leaks():
        transform(lambda x: layer(x).sum())(x[None] if transform is jax.vmap else x)
    with pytest.raises(RuntimeError, match="backward: got no forward pass to go back from"):
        layer.backward(x)


def test_a_layer_made_outside_takes_its_state_inside():
    layer, x = bn.BatchNorm(3), arrays()[0]

    @jax.jit
    def step(state, x):
        layer.load_state_dict(state)
        y = layer(x)
        layer.update()
        return y, layer.state_dict()

    state = bn.BatchNorm(3, xp=jnp, dtype=jnp.float64).state_dict()
    for _ in range(2):
        y, state = step(state, x)
    np.testing.assert_allclose(y, formula(x, jnp.ones(3), jnp.zeros(3)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(state["running_mean"], 0.19 * np.asarray(x).mean((0, 2)))


LOADED = """
import pathlib, sys
import jax, jax.export, jax.numpy as jnp
import batchnorm.jax
loaded = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
y, stats = loaded.call(jnp.arange(24.0, dtype=jnp.float32).reshape(8, 3))
assert type(stats).__name__ == "Moments", stats
assert stats.mean.tolist() == [10.5, 11.5, 12.5], stats
"""


def test_an_exported_function_returns_moments(tmp_path):
    import subprocess
    import sys

    import jax.export

    with jax.enable_x64(False):
        exported = jax.export.export(jax.jit(bn.batch_norm))(jnp.ones((8, 3), jnp.float32))
        (tmp_path / "exported").write_bytes(exported.serialize())
    subprocess.run([sys.executable, "-c", LOADED, tmp_path / "exported"], check=True)


# The Flax module.

nnx = pytest.importorskip("flax.nnx")
from batchnorm.flax import BatchNorm  # noqa: E402

OPTIONS = [
    {},
    {"epsilon": 1e-3, "momentum": 0.7},
    {"use_scale": False},
    {"use_bias": False},
    {"axis": 1},
    {"dtype": jnp.bfloat16},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [pytest.param(o, marks=pytest.mark.slow if o else ()) for o in OPTIONS], ids=str
)
def test_the_module_does_what_flax_s_does(options):
    """Three steps of training with gradients, then inference."""
    modules = [kind(5, rngs=nnx.Rngs(0), **options) for kind in (BatchNorm, nnx.BatchNorm)]
    assert isinstance(modules[0], nnx.BatchNorm)
    close = {"rtol": 1e-2, "atol": 3e-2} if "dtype" in options else {"rtol": 2e-5, "atol": 2e-5}

    def loss(module, x):
        return (module(x).astype(jnp.float32) ** 3).sum()

    for step in range(3):
        x = np.random.default_rng(step).standard_normal((6, 5, 5)).astype(np.float32) + step
        outputs = [module(x) for module in modules]
        assert outputs[0].dtype == outputs[1].dtype
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in outputs), **close)
        grads = [nnx.jit(nnx.grad(loss))(module, x) for module in modules]
        for a, b in zip(*(jax.tree.leaves(g) for g in grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=close["rtol"], atol=10 * close["atol"])
        for name in ("mean", "var"):
            np.testing.assert_allclose(*(getattr(m, name)[...] for m in modules), **close)
    outputs = [np.asarray(module(x, use_running_average=True), np.float32) for module in modules]
    np.testing.assert_allclose(*outputs, **close)


@pytest.mark.filterwarnings("ignore")
def test_the_module_takes_a_mask():
    modules = [kind(3, rngs=nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm)]
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    mask = np.random.default_rng(1).uniform(size=(6, 4, 1)) < 0.7
    outputs = [module(x, mask=jnp.asarray(mask)) for module in modules]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*(m.var[...] for m in modules), rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["relu", "silu", ("leaky_relu", 0.2), None], ids=str)
def test_the_module_adds_a_residual_and_activates(activation):
    plain = {"relu": jax.nn.relu, "silu": jax.nn.silu, None: lambda h: h}
    act = plain.get(activation, lambda h: jax.nn.leaky_relu(h, 0.2))
    rng = np.random.default_rng(0)
    x, z, weights = (jnp.asarray(rng.standard_normal((8, 4, 3)), jnp.float32) for _ in range(3))
    ours = BatchNorm(3, activation=activation, rngs=nnx.Rngs(0))
    theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def our_loss(module, x, z):
        return jnp.sum(weights * module(x, False, residual=z))

    def their_loss(module, x, z):
        return jnp.sum(weights * act(module(x, False) + z))

    our_grads = nnx.jit(nnx.grad(our_loss, argnums=(1, 2)))(ours, x, z)
    their_grads = nnx.jit(nnx.grad(their_loss, argnums=(1, 2)))(theirs, x, z)
    for mine, right in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours(x, True, residual=z), act(theirs(x, True) + z), rtol=1e-5, atol=1e-5)


def test_the_module_is_right_where_flax_s_is_not():
    """float32 with mean 1e4 and std 1: Flax's default gives NaN or errors of thousands of std."""
    x = (np.random.default_rng(0).standard_normal((1000, 3)) + 1e4).astype(np.float32)
    y = np.asarray(BatchNorm(3, rngs=nnx.Rngs(0))(x))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=4 * 2.0**-23 * abs(expected).max())


@pytest.mark.filterwarnings("ignore")
def test_the_module_says_what_is_missing():
    module = BatchNorm(3, rngs=nnx.Rngs(0), use_running_average=None)
    with pytest.raises(ValueError, match="use_running_average: got None, expected True or False"):
        module(jnp.ones((4, 3)))


@pytest.mark.filterwarnings("ignore")
def test_the_module_says_what_to_do_under_a_plain_jit():
    module, x = BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((4, 3)) * jnp.arange(4.0)[:, None]
    with pytest.raises(Exception, match="Cannot mutate") as raised:
        jax.jit(lambda x: module(x))(x)
    assert "expected nnx.jit (or nnx.split before and nnx.merge inside)" in raised.value.__notes__[0]
    np.testing.assert_array_equal(module.mean[...], np.zeros(3))
    graph, state = nnx.split(module)

    @jax.jit
    def step(state, x):
        module = nnx.merge(graph, state)
        return module(x), nnx.state(module)

    _, state = step(state, x)
    np.testing.assert_allclose(nnx.merge(graph, state).mean[...], 0.015 * np.ones(3), rtol=1e-5)
