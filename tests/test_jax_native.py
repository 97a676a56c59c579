"""JAX through the compiled core: handlers for XLA, and the rules around them."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import core
from batchnorm.testing.oracle import Problem

pytest.importorskip("jax")
if core.missing() is not None:
    pytest.skip(core.missing(), allow_module_level=True)

import jax
import jax.export
import jax.numpy as jnp

HERE = Path(__file__).parent
CALL = "batchnorm."  # what names of handlers begin with


@pytest.fixture
def _x64():
    with jax.enable_x64(True):
        yield


def arrays(shape=(6, 4, 5), channels=4, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x, dy, z = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    gamma, beta = (rng.standard_normal(channels).astype(dtype) for _ in range(2))
    return x, gamma, beta, z, dy


def norm(x, gamma, beta, z=None, w=None, activation=None):
    return bn.batch_norm(x, gamma, beta, where=w, residual=z, activation=activation)[0]


def both(x, gamma, beta, dy):
    y, pullback = jax.vjp(norm, x, gamma, beta)
    return y, *pullback(dy)


def close(found, right, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


def calls(function, *given):
    """How often a compiled function calls the handlers."""
    return jax.jit(function).lower(*given).compile().as_text().count(f'custom_call_target="{CALL}')


# Which runs.


def test_who_runs_and_why():
    x = jnp.ones((4, 3))
    found = bn.kernels_for(x)
    assert (found.name, found.why) == ("native", "the compiled core, called by XLA on the CPU")
    program = "import jax.numpy as jnp, batchnorm as bn; print(bn.kernels_for(jnp.ones((4, 3))))"
    env = {"PATH": "/usr/bin:/bin", "BATCHNORM_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert "backend jax" in done.stdout, done.stderr
    assert "the compiled core is not there: BATCHNORM_NATIVE=0" in done.stdout


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize(
    ("name", "function", "count"),
    [
        ("forward", lambda x, g, b, dy: norm(x, g, b), 1),
        ("both", both, 2),
        ("inference", lambda x, g, b, dy: bn.normalize(x, g, b * b + 1, g, b), 1),
        ("moments", lambda x, g, b, dy: bn.moments(x).mean, 1),
        ("backward", lambda x, g, b, dy: bn.batch_norm_backward(dy, x, bn.moments(x), g)[0], 2),
        ("remat", lambda *a: both_of(jax.checkpoint(lambda *b: norm(*b)), *a), 3),
        ("vmap", lambda x, g, b, dy: jax.vmap(norm, (0, None, None))(jnp.stack([x, dy]), g, b), 1),
    ],
)
def test_handlers_are_called(name, function, count):
    x, gamma, beta, _, dy = arrays()
    found = calls(function, x, gamma, beta, dy)
    assert found == count or (name == "remat" and found in (2, 3)), found  # XLA may merge two calls
    bn.set_kernels("jax")
    try:
        assert calls(lambda *a: function(*a), x, gamma, beta, dy) == 0
    finally:
        bn.set_kernels(None)


def both_of(function, x, gamma, beta, dy):
    y, pullback = jax.vjp(function, x, gamma, beta)
    return y, *pullback(dy)


def test_traced_arrays_of_another_device_have_array_code(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seen = []
    jax.eval_shape(lambda x: (seen.append(bn.kernels_for(x)), x)[1], jnp.ones((4, 3)))
    assert seen[0].name == "jax"
    assert "traced arrays are computed on the default device, a gpu" in seen[0].why


def test_what_is_lowered_for_a_gpu_is_array_code():
    x, gamma, beta, _, dy = arrays(dtype=np.float32)
    for platform in ("cuda", "tpu"):
        text = jax.jit(both).trace(x, gamma, beta, dy).lower(lowering_platforms=(platform,)).as_text()
        assert CALL not in text


# Values, each argument of each pass by itself, where no suite goes: rules and dtypes.


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("w", "activation", "residual"),
    [
        ("mask", "relu", True),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                (None, None, False),
                (None, None, True),
                (None, "silu", True),
                ("mask", ("leaky_relu", 0.1), False),
                ("mask", "silu", False),
                ("weights", "relu", True),
                ("weights", None, False),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_x64")
def test_derivatives_are_those_of_array_code(w, activation, residual):
    """First order in both modes and second order, along everything that moves."""
    x, gamma, beta, z, dy = arrays()
    weights = None if w is None else np.random.default_rng(9).uniform(size=(6, 1, 5)) > 0.3
    weights = None if w is None else jnp.asarray(weights * 1.5 if w == "weights" else weights)
    moving = (x, gamma, beta, *([z] if residual else []))

    def f(*moving):
        return norm(*moving, **{"w": weights, "activation": activation})

    def derivatives():
        y, pullback = jax.vjp(lambda *a: f(*a), *moving)
        along = tuple(np.cos(3 * v) for v in moving)
        forward = jax.jvp(lambda *a: f(*a), moving, along)

        def loss(*a):
            return (jax.vjp(lambda *a: f(*a), *a)[1](jnp.asarray(dy))[0] ** 2).sum() + (f(*a) ** 3).sum()

        second = jax.grad(loss, argnums=tuple(range(len(moving))))(*map(jnp.asarray, moving))
        return y, pullback(jnp.asarray(dy)), forward, second

    found = derivatives()
    bn.set_kernels("generic")
    try:
        right = derivatives()
    finally:
        bn.set_kernels(None)
    close(found, right, 1e-8)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("parameters", [jnp.float16, jnp.float32])
def test_dtypes_of_parameters(dtype, parameters):
    x, gamma, beta, _, dy = arrays()
    given = (jnp.asarray(x, dtype), jnp.asarray(gamma, parameters), jnp.asarray(beta, parameters))
    y, pullback = jax.vjp(norm, *given)
    dx, dgamma, dbeta = pullback(jnp.asarray(dy, dtype))
    assert [v.dtype for v in (y, dx, dgamma, dbeta)] == [dtype, dtype, parameters, parameters]
    wide = [np.asarray(v, np.float64) for v in (*given, jnp.asarray(dy, dtype))]
    right = Problem(*wide[:3])
    found = right.backward(wide[3])
    eps = float(max(jnp.finfo(dtype).eps, jnp.finfo(parameters).eps))
    exact = [np.asarray(v, np.float64) for v in (right.y, found.dx, found.dgamma, found.dbeta)]
    close((y, dx, dgamma, dbeta), exact, 32 * eps)


AXES = [
    axes
    for axes in itertools.product((0, 2, None), (0, 1, None), (0, None), (1, None), (0, None))
    if any(a is not None for a in axes)
]


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("axes", AXES[::9], ids=str)
def test_vmap_is_a_loop(axes):
    """Any axis of any argument; with a residual, a mask and an activation; both passes."""
    rng = np.random.default_rng(3)
    single = [*arrays()[:4], rng.uniform(size=(6, 4, 5)) > 0.3]
    many = [
        v if a is None else np.stack([v, v[::-1] * (1 if v.dtype == bool else 2), v], a)
        for v, a in zip(single, axes, strict=True)
    ]
    dy = jnp.asarray(arrays(seed=4)[4])

    def passes(x, gamma, beta, z, w):
        y, pullback = jax.vjp(lambda *a: norm(*a, w=w, activation="relu"), x, gamma, beta, z)
        return y, *pullback(dy)

    found = jax.vmap(passes, axes)(*map(jnp.asarray, many))
    for i in range(3):
        one = [v if a is None else np.take(v, i, a) for v, a in zip(many, axes, strict=True)]
        close([v[i] for v in found], passes(*map(jnp.asarray, one)), 1e-12)


@pytest.mark.usefixtures("_x64")
def test_vmap_of_vmap_and_of_second_order():
    x, gamma, beta, _, _ = map(jnp.asarray, arrays())
    xs = jnp.stack([jnp.stack([x, 2 * x]), jnp.stack([x + 1, -x])])
    found = jax.vmap(jax.vmap(norm, (0, None, None)), (0, None, None))(xs, gamma, beta)
    assert calls(jax.vmap(jax.vmap(norm, (0, None, None)), (0, None, None)), xs, gamma, beta) == 1
    close(found, np.stack([[norm(v, gamma, beta) for v in row] for row in xs]), 1e-12)

    def second(x):
        return jax.grad(lambda x: (jax.grad(lambda x: (norm(x, gamma, beta) ** 3).sum())(x) ** 2).sum())(
            x
        )

    close(jax.vmap(second)(xs[0]), np.stack([second(v) for v in xs[0]]), 1e-9)


def test_gradients_through_the_statistics():
    x, gamma, beta, _, _ = (v.astype(np.float32) for v in arrays())

    def loss(f, *a):
        y, stats = f(*a)
        return (y**3).sum() + (stats.mean**2).sum() + (stats.var**3).sum()

    def formula(x, gamma, beta):
        mean, var = x.mean((0, 2)), x.var((0, 2))
        y = gamma[:, None] * (x - mean[:, None]) / jnp.sqrt(var[:, None] + 1e-5) + beta[:, None]
        return y, bn.Moments(0, mean, var)

    given = tuple(map(jnp.asarray, (x, gamma, beta)))
    found = jax.grad(functools.partial(loss, bn.batch_norm), argnums=(0, 1, 2))(*given)
    right = jax.grad(functools.partial(loss, formula), argnums=(0, 1, 2))(*given)
    close(found, [np.asarray(v, np.float64) for v in right], 2e-4)
    alone = jax.grad(lambda x: (bn.moments(x).var ** 2).sum())(given[0])
    close(alone, np.asarray(jax.grad(lambda x: (x.var((0, 2)) ** 2).sum())(given[0]), np.float64), 1e-5)


def test_a_constant_channel_has_a_gradient():
    x = jnp.ones((4, 2)).at[:, 1].set(jnp.arange(4.0))
    found = jax.grad(lambda x: bn.moments(x).var.sum() + bn.moments(x).mean.sum())(x)
    np.testing.assert_allclose(found, 0.25 + 0.5 * (x - x.mean(0)))


def test_without_jit():
    x, gamma, beta, _, dy = (v.astype(np.float32) for v in arrays())
    with jax.disable_jit():
        found = both(*map(jnp.asarray, (x, gamma, beta, dy)))
    y, stats = bn.batch_norm(x, gamma, beta)
    close(found, (y, *bn.batch_norm_backward(dy, x, stats, gamma)), 1e-5)


def test_donated_arrays():
    x, gamma, beta, _, _ = (v.astype(np.float32) for v in arrays((8, 4, 100)))
    right, _ = bn.batch_norm(x, gamma, beta)
    given = jnp.array(x)
    y = jax.jit(norm, donate_argnums=0)(given, gamma, beta)
    assert given.is_deleted()
    np.testing.assert_allclose(y, right, rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_channel():
    x, gamma, beta, _, dy = (v.astype(np.float32) for v in arrays((32, 4, 50)))
    x[3, 1, 7] = np.nan
    for found in jax.jit(both)(*map(jnp.asarray, (x, gamma, beta, dy)))[:2]:
        assert np.isnan(found[:, 1]).all()
        assert np.isfinite(found[:, [0, 2, 3]]).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 5), (2, 3, 0)])
def test_no_values(shape):
    x = jnp.zeros(shape)
    stats = bn.moments(x)
    assert (np.asarray(stats.count) == 0).all()
    y = bn.normalize(x, jnp.zeros(shape[1]), jnp.ones(shape[1]))
    assert y.shape == shape


def test_bits_do_not_depend_on_the_number_of_threads():
    x, gamma, beta, _, dy = (v.astype(np.float32) for v in arrays((32, 4, 56, 56)))
    step = jax.jit(both)
    found = []
    for n in (1, 2, 3):
        bn.set_num_threads(n)
        found.append([np.asarray(v) for v in step(x, gamma, beta, dy)])
    bn.set_num_threads(None)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


# Exported programs.


def exported(function, *given, name=None):
    from batchnorm.jax.handlers import target

    checks = [] if name is None else [jax.export.DisabledSafetyCheck.custom_call(target(name))]
    return jax.export.export(jax.jit(function), disabled_checks=checks)(*given)


def test_what_is_exported_is_array_code():
    """It runs where this package is not, and for any batch."""
    x, gamma, beta, _, _ = (v.astype(np.float32) for v in arrays())
    (batch,) = jax.export.symbolic_shape("batch")
    program = exported(norm, jax.ShapeDtypeStruct((batch, 4, 5), np.float32), gamma, beta)
    assert CALL not in program.mlir_module()
    close(program.call(x, gamma, beta), bn.batch_norm(x, gamma, beta)[0], 1e-5)


def test_handlers_are_exported_where_they_are_asked_for(tmp_path):
    x, gamma, beta, _, _ = (v.astype(np.float32) for v in arrays())
    bn.set_kernels("native")
    try:
        with pytest.raises(ValueError, match=r"batchnorm\.forward \(import batchnorm\.jax\)"):
            exported(lambda *a: norm(*a), x, gamma, beta)
        program = exported(lambda *a: norm(*a), x, gamma, beta, name="forward")
    finally:
        bn.set_kernels(None)
    np.savez(tmp_path / "given.npz", x=x, gamma=gamma, beta=beta, y=bn.batch_norm(x, gamma, beta)[0])
    (tmp_path / "program").write_bytes(program.serialize())
    code = """
import numpy as np, jax.export, pathlib
program = jax.export.deserialize(bytearray(pathlib.Path("program").read_bytes()))
given = np.load("given.npz")
y = program.call(given["x"], given["gamma"], given["beta"])
np.testing.assert_allclose(y, given["y"], rtol=1e-5, atol=1e-5)
"""
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    missing = run([sys.executable, "-c", code])
    assert "batchnorm.forward (import batchnorm.jax)" in missing.stderr
    done = run([sys.executable, "-c", f"import batchnorm.jax\n{code}"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": 0}, "more arguments"),
        ({"given": 6 | 16}, "no array as argument 3"),
        ({"axes": 1}, "a vector of 4 numbers, expected 6"),
        ({"axes": 1 << 5}, "axes or a dtype"),
        ({"eps": -1.0}, "eps: expected at least 0"),
        ({"activation": 9}, "an unknown activation"),
        ({"slope": 1}, "no attribute slope of the expected type"),
    ],
    ids=str,
)
def test_a_handler_checks_what_it_is_given(change, message):
    """A call may be anybody's, as of an exported program."""
    from batchnorm.jax.handlers import register, target

    register()
    x, gamma, beta, _, _ = (jnp.asarray(v, jnp.float32) for v in arrays())
    vector = jax.ShapeDtypeStruct((4,), np.float32)
    call = jax.ffi.ffi_call(
        target("forward"), [jax.ShapeDtypeStruct(x.shape, np.float32), *[vector] * 4]
    )
    settings = {"given": 6, "axes": 2, "eps": 1e-5, "activation": 0, "slope": 0.0, **change}
    typed = {k: np.float64(v) if isinstance(v, float) else np.int64(v) for k, v in settings.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"batchnorm: .*{message}"):
        jax.block_until_ready(call(x, gamma, beta, **typed))


# Several devices, threads and processes.


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["threads", "fork", "late"])
def test_nothing_hangs(fault):
    """24 threads and a program on four devices; a fork; the end of the interpreter."""
    done = subprocess.run(
        [sys.executable, HERE / "jax_faults.py", fault], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout


def test_several_devices():
    """Where XLA cuts arrays it gets array code; mapped by hand, each device calls the handlers."""
    done = subprocess.run(
        [sys.executable, HERE / "members" / "jax_native.py"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
