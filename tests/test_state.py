"""Whose an array is after it went into a layer's state."""

import numpy as np
import pytest

import batchnorm as bn


def test_a_loaded_parameter_is_trained_as_the_one_before():
    torch = pytest.importorskip("torch")
    a, b = (bn.BatchNorm(3, xp=torch) for _ in range(2))
    a.gamma.requires_grad_()
    b.gamma.requires_grad_()
    b.load_state_dict(a.state_dict())
    assert b.gamma.is_leaf
    assert b.gamma.requires_grad
    assert not b.beta.requires_grad
    assert b.gamma.data_ptr() != a.gamma.data_ptr()
    b(torch.randn(4, 3)).square().sum().backward()
    assert b.gamma.grad is not None
    assert a.gamma.grad is None


def test_a_parameter_from_numpy_is_trained_as_the_one_before():
    torch = pytest.importorskip("torch")
    layer = bn.BatchNorm(3, xp=torch)
    layer.gamma.requires_grad_()
    layer.load_state_dict(bn.BatchNorm(3).state_dict())
    assert layer.gamma.is_leaf
    assert layer.gamma.requires_grad
    assert not layer.running_mean.requires_grad


def test_a_frozen_layer_stays_frozen():
    torch = pytest.importorskip("torch")
    source, layer = (bn.BatchNorm(3, xp=torch) for _ in range(2))
    source.gamma.requires_grad_()
    layer.load_state_dict(source.state_dict())
    assert not layer.gamma.requires_grad


def test_a_count_of_jax_is_whole():
    jnp = pytest.importorskip("jax.numpy")
    layer = bn.BatchNorm(3)
    state = layer.state_dict()
    layer.load_state_dict({**state, "num_batches_tracked": jnp.asarray(3)})
    assert layer.num_batches_tracked == 3
    with pytest.raises(ValueError, match="num_batches_tracked: got .*2.5.*, expected a whole number"):
        layer.load_state_dict({**state, "num_batches_tracked": np.float64(2.5) + jnp.asarray(0.0)})
