"""Degenerate channels and batch renormalization in the modules of PyTorch and Flax."""

import numpy as np
import pytest

import batchnorm as bn

torch = pytest.importorskip("torch")
from batchnorm.torch import BatchNorm1d, BatchNorm2d, BatchNormAct2d  # noqa: E402

SCHEDULE = (lambda k: 1 + k, lambda k: k / 2)


def renorm(x, gamma, beta, mean, var, r_max, d_max, eps=1e-5):
    """y of batch renormalization, r and d in longdouble (Ioffe 2017, Algorithm 1)."""
    x = x.astype(np.longdouble)
    axes, shape = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    m, s = x.mean(axes), np.sqrt(x.var(axes) + eps)
    running = np.sqrt(var.astype(np.longdouble) + eps)
    r, d = np.clip(s / running, 1 / r_max, r_max), np.clip((m - mean) / running, -d_max, d_max)
    m, s, r, d, gamma, beta = (np.reshape(v, shape) for v in (m, s, r, d, gamma, beta))
    return gamma * ((x - m) / s * r + d) + beta


def moved(mean, var, x, momentum=0.1, eps=1e-5):
    """Running statistics after a batch: the mean, and the standard deviation."""
    x = x.astype(np.longdouble)
    axes = (0, *range(2, x.ndim))
    std = (1 - momentum) * np.sqrt(var + eps) + momentum * np.sqrt(x.var(axes) + eps)
    return (1 - momentum) * mean + momentum * x.mean(axes), std * std - eps


def test_a_module_with_one_value():
    module = BatchNorm1d(3, degenerate="shift")
    with torch.no_grad():
        module.weight.copy_(torch.tensor([2.0, -1.0, 0.5]))
        module.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.tensor([[3.0, 4.0, 5.0]], requires_grad=True)
    y = module(x)
    y.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(y.detach()[0], module.bias.detach())
    np.testing.assert_array_equal(x.grad, 0)
    np.testing.assert_array_equal(module.weight.grad, 0)
    np.testing.assert_array_equal(module.bias.grad, [1, 2, 3])
    np.testing.assert_array_equal(module.running_mean, 0)
    np.testing.assert_array_equal(module.running_var, 1)
    assert int(module.num_batches_tracked) == 1
    with pytest.raises(ValueError, match="at least 2 values"):
        BatchNorm1d(3)(x)


def test_a_module_with_enough_values_is_as_before():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3), np.float32))
    module, plain = BatchNorm1d(3, degenerate="shift"), torch.nn.BatchNorm1d(3)
    np.testing.assert_allclose(module(x).detach(), plain(x).detach(), atol=1e-6)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(module, name), getattr(plain, name), rtol=1e-6)


@pytest.mark.parametrize("kind", [BatchNorm2d, BatchNormAct2d])
def test_renorm_in_a_module(kind):
    rng = np.random.default_rng(0)
    module = kind(3, renorm=SCHEDULE)
    mean, var = np.zeros(3), np.ones(3)
    for step in range(4):
        x = (rng.standard_normal((4, 3, 5, 5)) * 2 + 1).astype(np.float32)
        limits = 1 + step, step / 2
        expected = renorm(x, np.ones(3), np.zeros(3), mean, var, *limits)
        if kind is BatchNormAct2d:
            expected = np.maximum(expected, 0)
        np.testing.assert_allclose(
            module(torch.from_numpy(x)).detach(), expected.astype(float), atol=4e-6
        )
        mean, var = moved(mean, var, x)
        np.testing.assert_allclose(module.running_mean, mean.astype(float), rtol=1e-5)
        np.testing.assert_allclose(module.running_var, var.astype(float), rtol=1e-5)


def test_gradients_of_renorm_take_the_corrections_as_constants():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((6, 3, 4)) * 2 + 1).requires_grad_()
    module = BatchNorm1d(3, renorm=(1.5, 0.5), dtype=torch.float64)
    given = x.detach().numpy()
    axes, shape, eps = (0, 2), (1, 3, 1), 1e-5
    m, s = given.mean(axes), np.sqrt(given.var(axes) + eps)
    r = np.clip(s / np.sqrt(1 + eps), 1 / 1.5, 1.5).reshape(shape)
    d = np.clip(m / np.sqrt(1 + eps), -0.5, 0.5).reshape(shape)
    dy = rng.standard_normal(x.shape)
    module(x).backward(torch.from_numpy(dy))

    def loss(x):
        m, v = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return np.sum(dy * ((x - m) / np.sqrt(v + eps) * r + d))

    step = 1e-6
    for i in [(0, 0, 0), (3, 1, 2), (5, 2, 3)]:
        e = np.zeros(given.shape)
        e[i] = step
        slope = (loss(given + e) - loss(given - e)) / (2 * step)
        np.testing.assert_allclose(x.grad[i], slope, rtol=1e-6, atol=1e-8)
    hat = (given - m.reshape(shape)) / s.reshape(shape)
    np.testing.assert_allclose(module.weight.grad, np.sum(dy * (hat * r + d), axes), rtol=1e-12)


def test_compiled():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 5, 5), np.float32) * 2)
    eager, module = BatchNorm2d(3, renorm=(1.5, 0.5)), BatchNorm2d(3, renorm=(1.5, 0.5))
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    np.testing.assert_allclose(y.detach(), eager(x).detach(), atol=1e-6)
    np.testing.assert_allclose(module.running_var, eager.running_var, rtol=1e-6)


WRONG = {
    "r_max": ({"renorm": (0.5, 1)}, ValueError),
    "d_max": ({"renorm": (2.0, -1.0)}, ValueError),
    "renorm": ({"renorm": 3}, TypeError),
    "renorm ": ({"renorm": (1, 0), "track_running_stats": False}, ValueError),
    "renorm  ": ({"renorm": (1, 0), "degenerate": "shift"}, ValueError),
    "degenerate": ({"degenerate": "beta"}, ValueError),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments(argument):
    settings, kind = WRONG[argument]
    with pytest.raises(kind, match=f"^{argument.strip()}: got .*, expected "):
        BatchNorm2d(3, **settings)


def test_scripts_have_neither():
    for settings in ({"renorm": (1.0, 0.0)}, {"degenerate": "shift"}):
        with pytest.raises(TypeError, match=r"torch.jit.script: got a module with"):
            BatchNorm2d(3, **settings).__prepare_scriptable__()
    BatchNorm2d(3).__prepare_scriptable__()


def test_flax():
    pytest.importorskip("flax")
    import jax
    from flax import nnx

    from batchnorm.flax import BatchNorm

    rng = np.random.default_rng(0)
    module = BatchNorm(3, renorm=(1.5, 0.5), rngs=nnx.Rngs(0))
    mean, var = np.zeros(3), np.ones(3)
    step = nnx.jit(lambda module, x: module(x))
    for _ in range(3):
        x = (rng.standard_normal((6, 4, 3)) * 2 + 1).astype(np.float32)
        expected = renorm(np.moveaxis(x, -1, 1), np.ones(3), np.zeros(3), mean, var, 1.5, 0.5)
        np.testing.assert_allclose(
            np.moveaxis(step(module, x), -1, 1), expected.astype(float), atol=4e-6
        )
        mean, var = moved(mean, var, np.moveaxis(x, -1, 1), momentum=0.01)
        np.testing.assert_allclose(module.var[...], var.astype(float), rtol=1e-5)

    module = BatchNorm(3, degenerate="shift", rngs=nnx.Rngs(0))
    module.bias[...] = jax.numpy.arange(3.0)
    mask = np.zeros((6, 4, 1), bool)
    mask[0, 0] = True
    for call in (lambda m, x, k: m(x, mask=k), nnx.jit(lambda m, x, k: m(x, mask=k))):
        y = call(module, jax.numpy.asarray(x), jax.numpy.asarray(mask))
        np.testing.assert_array_equal(y, np.broadcast_to(np.arange(3.0, dtype=np.float32), y.shape))
        np.testing.assert_array_equal(module.mean[...], 0)
        np.testing.assert_array_equal(module.var[...], 1)
    with pytest.raises(TypeError, match="^renorm: got a function, expected numbers"):
        BatchNorm(3, renorm=SCHEDULE, rngs=nnx.Rngs(0))


def test_kernels_of_the_core_and_others_agree():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((6, 3, 40)) * 3 + 100).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 3)).astype(np.float32)
    mean, var = np.array([99.0, 100.0, 101.0]), np.array([1.0, 9.0, 80.0])
    expected = renorm(x, gamma, beta, mean, var, 1.5, 0.25).astype(float)
    for kernels in ("native", "numpy", "generic"):
        bn.set_kernels(kernels)
        try:
            y, _ = bn.batch_renorm(x, mean, var, gamma, beta, r_max=1.5, d_max=0.25)
            same, _ = bn.batch_renorm(x, mean, var, gamma, beta, r_max=1, d_max=0)
            np.testing.assert_array_equal(same, bn.batch_norm(x, gamma, beta)[0])
        finally:
            bn.set_kernels(None)
        np.testing.assert_allclose(y, expected, atol=4e-6)
