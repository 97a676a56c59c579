"""Public functions are entered once per call: what runs below them validates nothing again."""

import sys

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import core, optimistic, validation
from batchnorm.backends import dispatch
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
    monkeypatch.setattr(optimistic, "calls", {})
    monkeypatch.setattr(optimistic, "find", lambda kind: optimistic.NOTHING)
    return seen


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
    """In general: a layer checks its input, and calls functions that do."""
    layer, x = bn.BatchNorm(3), data.batch((20, 3, 5))
    layer.backward(layer(x))
    del validations[:]
    layer.backward(layer(x))
    assert validations == [x.shape, x.shape, layer.running_mean.shape, x.shape]
    assert np.isfinite(layer.running_mean).all()


@pytest.mark.skipif(core.missing() is not None, reason="the compiled core is not there")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_whole_calls_are_not_validated(validations, monkeypatch, library):
    """The compiled core reads the arguments itself; what it declines is checked as ever."""
    monkeypatch.setattr(optimistic, "calls", {})
    monkeypatch.setattr(optimistic, "find", dispatch._whole_calls)
    x = data.batch((20, 3, 5))
    if library == "torch":
        x = pytest.importorskip("torch").from_numpy(x)
    layer = bn.BatchNorm(3)

    def step():
        passes(x)
        layer.backward(layer(x))
        layer.eval()(x)
        layer.train()
        bn.update_running(*bn.batch_norm(x)[1][1:3], bn.batch_norm(x)[1])

    step()
    del validations[:]
    step()
    assert len(validations) == 1  # `normalize_backward`
    with pytest.raises(ValueError, match="eps: got -1"):
        bn.batch_norm(x, eps=-1)
    with pytest.raises(ValueError, match="x: got shape"):
        layer(x[:, :2])
