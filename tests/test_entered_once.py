"""Public functions are entered once per call: what runs below them validates nothing again."""

import sys

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import validation
from batchnorm.testing import data


@pytest.fixture
def validations(monkeypatch):
    """The shapes of all inputs that were validated, by whichever module."""
    seen = []
    own = validation.validate_input

    def counted(x, *arguments):
        seen.append(tuple(getattr(x, "shape", ())))
        return own(x, *arguments)

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "batchnorm" and hasattr(module, "validate_input"):
            monkeypatch.setattr(module, "validate_input", counted)
    validation._passed.clear()
    yield seen
    validation._passed.clear()


class Alone:
    """A group of one member."""

    rank, size = 0, 1

    def all_reduce(self, array):
        return array


def passes(x, **options):
    """Each public pass once, on arrays of a library."""
    y, stats = bn.batch_norm(x, **options)
    bn.batch_norm_backward(y, x, stats, **options)
    mean, var = stats.mean, stats.var
    return [y, bn.normalize(x, mean, var), bn.normalize_backward(y, x, mean, var)[0]]


def test_numpy_and_groups(validations):
    x = data.batch((20, 3, 5))
    passes(x)
    passes(x[:10], group=Alone(), where=x[:10] > 0)
    assert len(validations) == 8


@pytest.mark.parametrize("mode", ["plain", "recorded", "generic", "transformed"])
def test_torch(validations, mode):
    """Operators, autograd rules and torch.func run below the functions."""
    torch = pytest.importorskip("torch")
    import batchnorm.torch  # noqa: F401

    x = torch.from_numpy(data.batch((20, 3, 5)))
    if mode == "transformed":
        torch.func.grad(lambda v: bn.batch_norm(v)[0].pow(3).sum())(x)
        assert len(validations) == 1
        return
    bn.set_kernels("generic" if mode == "generic" else None)
    try:
        x.requires_grad_(mode == "recorded")
        y, _ = bn.batch_norm(x)
        if mode == "recorded":
            (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            torch.autograd.grad(dx.pow(2).sum(), x)
        assert len(validations) == 1
        if mode == "recorded":  # rules through the statistics, and of given ones to the second order
            stats = bn.moments(x)
            torch.autograd.grad((stats.mean + stats.var).sum(), x)
            mean, var = stats.mean.detach(), stats.var.detach()
            (dx,) = torch.autograd.grad(bn.normalize(x, mean, var).pow(3).sum(), x, create_graph=True)
            torch.autograd.grad(dx.pow(2).sum(), x)
            assert len(validations) == 3
            del validations[1:]
        x = x.detach()
        passes(torch.cat((x, x)))
    finally:
        bn.set_kernels(None)
    assert len(validations) == 5


def test_torch_group(validations):
    """The autograd rule of a group's batch, forward and backward."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(data.batch((20, 3, 5))).requires_grad_()
    y, _ = bn.batch_norm(x, group=Alone())
    y.pow(3).sum().backward()
    assert len(validations) == 1


def test_jax(validations):
    """JAX's rule calls the derivative below the public one, to the second order."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(data.batch((20, 3, 5)))

    def loss(x):
        return (bn.batch_norm(x)[0] ** 3).sum()

    jax.grad(loss)(x)
    assert len(validations) == 1
    jax.jvp(jax.grad(loss), (x,), (x,))
    assert len(validations) == 2


def test_dask(validations):
    """Workers validate no chunk."""
    da = pytest.importorskip("dask.array")
    x = da.from_array(data.batch((20, 3, 5)), chunks=(7, 3, 5))
    results = passes(x)
    assert len(validations) == 4
    for a in results:
        a.compute(scheduler="synchronous")
    assert len(validations) == 4


def test_layer(validations):
    """A layer checks its input, `update_running` what it moves; a known call is not checked again."""
    layer, x = bn.BatchNorm(3), data.batch((20, 3, 5))
    layer.backward(layer(x))
    del validations[:]
    layer.backward(layer(x))
    assert validations == [x.shape, layer.running_mean.shape]
    assert np.isfinite(layer.running_mean).all()
