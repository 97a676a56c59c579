"""PyTorch: derivatives through degenerate channels and batch renormalization."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data

torch = pytest.importorskip("torch")

SHIFT = {"degenerate": "shift"}


def tensor(shape, seed=0, dtype=torch.float64, mean=0.0):
    return torch.from_numpy(data.batch(shape, "float64", mean=mean, seed=seed)).to(dtype)


def lonely(kind):
    where = torch.ones(6, 4, 2, dtype=torch.bool)
    where[:, :2] = False
    where[2, 1, 1] = True
    where[3, 2] = False
    return (
        where if kind == "mask" else where * torch.from_numpy(data.weights((6, 4, 2), "weights") + 0.5)
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_gradients_through_degenerate_channels(kind, activation):
    where = lonely(kind)

    def f(x, gamma, beta, z):
        named = {"where": where, "activation": activation, **SHIFT}
        return bn.batch_norm(x, gamma, beta, residual=z, **named)[0]

    given = [tensor(s, i).requires_grad_() for i, s in enumerate([(6, 4, 2), (4,), (4,), (6, 4, 2)])]
    assert torch.autograd.gradcheck(f, given)
    dy = tensor((6, 4, 2), 9)
    f(*given).backward(dy)
    x, gamma, beta, z = given
    assert torch.all(x.grad[:, :2] == 0)
    assert torch.all(gamma.grad[:2] == 0)
    named = {"where": where, "activation": activation, **SHIFT}
    with torch.no_grad():
        y, stats = bn.batch_norm(x, gamma, beta, residual=z, **named)
        grads = bn.batch_norm_backward(dy, x, stats, gamma, beta, residual=z, **named)
    assert not y.requires_grad
    for ours, theirs in zip(grads, (x.grad, gamma.grad, beta.grad, z.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nan_in_what_is_left_out_has_no_gradient():
    where = lonely("mask")
    x = tensor((6, 4, 2)).masked_fill(~where, torch.nan).requires_grad_()
    gamma, beta = (tensor((4,), i).requires_grad_() for i in (1, 2))
    y, stats = bn.batch_norm(x, gamma, beta, where=where, **SHIFT)
    kept = torch.where(where, y, torch.zeros_like(y))
    (kept * tensor((6, 4, 2), 5)).sum().backward()
    assert torch.all(x.grad[~where] == 0)
    for v in (x.grad, gamma.grad, beta.grad):
        assert torch.all(torch.isfinite(v))
    assert stats.count.tolist()[:2] == [0, 0]


@pytest.mark.parametrize("shape", [(1, 4), (0, 4)])
def test_one_value_per_channel_and_none(shape):
    x = tensor(shape).requires_grad_()
    gamma, beta = (tensor((4,), i).requires_grad_() for i in (1, 2))
    y, _ = bn.batch_norm(x, gamma, beta, **SHIFT)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), beta.detach().expand(shape))
    assert torch.all(x.grad == 0)
    assert torch.all(gamma.grad == 0)
    torch.testing.assert_close(beta.grad, torch.full((4,), float(shape[0]), dtype=torch.float64))


def test_one_value_per_channel_without_parameters():
    """Layers before this one may be trained all the same."""
    x = tensor((1, 4)).requires_grad_()
    y, _ = bn.batch_norm(x, **SHIFT)
    y.sum().backward()
    assert torch.all(x.grad == 0)


@pytest.mark.parametrize("limits", [(1.3, 0.5), (1, 0), (None, None)])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("where", [None, "mask"])
def test_gradients_of_renormalization(limits, activation, where):
    """Against autograd through the formula, with r and d held; and against the backward pass."""
    x, z = (tensor((8, 3, 2), i, mean=1.0).requires_grad_() for i in (0, 1))
    gamma, beta = (tensor((3,), i).requires_grad_() for i in (2, 3))
    mean, var = (torch.from_numpy(v).double() for v in data.statistics((3,)))
    dy, mask = tensor((8, 3, 2), 9), None
    w = torch.ones(8, 3, 2, dtype=torch.float64)
    if where is not None:
        mask = torch.from_numpy(data.weights((8, 3, 2), "mask"))
        w = mask.double()
    named = {"r_max": limits[0], "d_max": limits[1], "residual": z, "activation": activation}
    named |= {"where": mask}

    y, stats = bn.batch_renorm(x, mean, var, gamma, beta, **named)
    ours = torch.autograd.grad(y, (x, gamma, beta, z), dy)

    def by(v):
        return v[None, :, None]

    n = w.sum(dim=(0, 2))
    mu = (w * x).sum(dim=(0, 2)) / n
    batch_var = (w * (x - by(mu)) ** 2).sum(dim=(0, 2)) / n
    std = torch.sqrt(batch_var + 1e-5)
    r, d = (std / torch.sqrt(var + 1e-5)).detach(), ((mu - mean) / torch.sqrt(var + 1e-5)).detach()
    r = r if limits[0] is None else r.clip(1 / limits[0], limits[0])
    d = d if limits[1] is None else d.clip(-limits[1], limits[1])
    h = by(gamma) * ((x - by(mu)) / by(std) * by(r) + by(d)) + by(beta) + z
    right = torch.nn.functional.silu(h) if activation else h
    torch.testing.assert_close(y, right)
    theirs = torch.autograd.grad(right, (x, gamma, beta, z), dy)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        plain, own = bn.batch_renorm(x, mean, var, gamma, beta, **named)
        grads = bn.batch_renorm_backward(dy, x, own, mean, var, gamma, beta, **named)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, y.detach())
    torch.testing.assert_close(grads, theirs)
    torch.testing.assert_close(own.mean, stats.mean.detach())


def test_gradcheck_of_renormalization_within_narrow_limits():
    """At limits that hold everywhere r and d are constants, so that differences see no more."""
    mean, var = torch.full((3,), 50.0).double(), torch.full((3,), 90.0).double()

    def f(x, gamma, beta):
        return bn.batch_renorm(x, mean, var, gamma, beta, r_max=1.1, d_max=0.1)[0]

    given = tensor((6, 3)), tensor((3,), 1), tensor((3,), 2)
    given = [v.requires_grad_() for v in given]
    assert torch.autograd.gradcheck(f, given)
    assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.parametrize("settings", [{"renorm": (1.5, 1)}, {"virtual_batch_size": 5}, SHIFT])
def test_layers_under_autograd(settings):
    """What autograd gives is what the layer's own backward pass gives; statistics are detached."""
    x, dy = tensor((12, 4), mean=2.0), tensor((12, 4), 5)
    layer, other = bn.BatchNorm(4, **settings), bn.BatchNorm(4, **settings)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        layer.update()
        other(x)
        dx = other.backward(dy)
        torch.testing.assert_close(leaf.grad, dx)
        torch.testing.assert_close(layer.running_var, other.running_var)
        assert not layer.running_mean.requires_grad


def test_running_statistics_that_require_a_gradient_get_none():
    x = tensor((8, 3)).requires_grad_()
    mean, var = torch.zeros(3).double().requires_grad_(), torch.ones(3).double().requires_grad_()
    y, _ = bn.batch_renorm(x, mean, var)
    y.square().sum().backward()
    assert mean.grad is None
    assert var.grad is None
    assert np.all(np.isfinite(x.grad.numpy()))
