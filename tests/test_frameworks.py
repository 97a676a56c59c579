"""Running statistics and values equal those of the frameworks whose settings `like` takes over."""

import os
import re

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.presets import PRESETS
from batchnorm.testing import data

os.environ.setdefault("KERAS_BACKEND", "jax")
STEPS = 100


def batches(channels_last):
    for step in range(STEPS):
        x = data.batch((8, 5, 6), mean=3.0, std=2.0, seed=step)
        yield np.ascontiguousarray(np.moveaxis(x, 1, -1)) if channels_last else x


def run_ours(framework, **settings):
    layer = bn.BatchNorm.like(framework, 5, **settings)
    for x in batches(layer.axis == -1):
        y = layer(x)
        layer.update()
    return layer, y


def close(actual, expected):
    """To the float32 in which the frameworks keep their statistics, over 100 roundings."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_pytorch(momentum):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(5, momentum=momentum)
    for x in batches(channels_last=False):
        y = theirs(torch.from_numpy(x))
    ours, our_y = run_ours("pytorch", momentum=momentum)
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)
    close(our_y, y.detach())
    x = data.batch((8, 5, 6), seed=1000)
    close(ours.eval()(x), theirs.eval()(torch.from_numpy(x)).detach())


def test_pytorch_with_torch_tensors_and_gradients():
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.BatchNorm2d(4), bn.BatchNorm.like("pytorch", 4)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict({**ours.state_dict(), "gamma": theirs.weight.detach().numpy()})
    x = torch.from_numpy(data.batch((6, 4, 3, 5), mean=1.0)).requires_grad_()
    dy = torch.from_numpy(data.batch((6, 4, 3, 5), seed=5))
    theirs(x).backward(dy)
    ours(x.detach())
    dx = ours.backward(dy)
    close(dx, x.grad)
    close(ours.gamma_grad, theirs.weight.grad)
    close(ours.beta_grad, theirs.bias.grad)
    close(ours.running_var, theirs.running_var)


@pytest.mark.filterwarnings("ignore")  # of Keras's own code
def test_keras():
    keras = pytest.importorskip("keras")
    theirs = keras.layers.BatchNormalization()
    for x in batches(channels_last=True):
        y = theirs(x, training=True)
    ours, our_y = run_ours("keras")
    close(ours.running_mean, theirs.moving_mean)
    close(ours.running_var, theirs.moving_variance)
    close(our_y, y)
    x = np.moveaxis(data.batch((8, 5, 6), seed=1000), 1, -1)
    close(ours.eval()(x), theirs(x, training=False))


@pytest.mark.filterwarnings("ignore")
def test_flax():
    nnx = pytest.importorskip("flax.nnx")
    theirs = nnx.BatchNorm(5, use_fast_variance=False, rngs=nnx.Rngs(0))
    for x in batches(channels_last=True):
        y = theirs(x)
    ours, our_y = run_ours("flax")
    close(ours.running_mean, theirs.mean[...])
    close(ours.running_var, theirs.var[...])
    close(our_y, y)


def test_onnx():
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    vector = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(
        "BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "mean", "var"], training_mode=1
    )
    names = {"x": [8, 5, 6], "s": [5], "b": [5], "m": [5], "v": [5]}
    inputs = [vector(n, onnx.TensorProto.FLOAT, shape) for n, shape in names.items()]
    outputs = [vector(n, onnx.TensorProto.FLOAT, None) for n in ("y", "mean", "var")]
    graph = onnx.helper.make_graph([node], "batch_norm", inputs, outputs)
    opset = onnx.helper.make_opsetid("", 15)
    session = reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset]))
    one, zero = np.ones(5, np.float32), np.zeros(5, np.float32)
    mean, var = zero, one
    for x in batches(channels_last=False):
        y, mean, var = session.run(None, {"x": x, "s": one, "b": zero, "m": mean, "v": var})
    ours, our_y = run_ours("onnx")
    close(ours.running_mean, mean)
    close(ours.running_var, var)
    close(our_y, y)


def test_chainer_by_its_documented_rule():
    """Chainer is retired and does not install: decay 0.9, eps 2e-5, unbiased by n / max(n - 1, 1)."""
    mean, var = np.zeros(5), np.ones(5)
    for x in batches(channels_last=False):
        n = x.size // 5
        wide = x.astype(np.float64)
        mean = 0.9 * mean + 0.1 * wide.mean(axis=(0, 2))
        var = 0.9 * var + 0.1 * wide.var(axis=(0, 2)) * n / max(n - 1, 1)
    ours, _ = run_ours("chainer")
    assert ours.eps == 2e-5
    close(ours.running_mean, mean)
    close(ours.running_var, var)


def test_an_unknown_framework():
    with pytest.raises(ValueError, match=r"framework: got 'tf', expected one of 'pytorch', 'keras'"):
        bn.BatchNorm.like("tf", 5)


def test_presets_take_further_settings():
    assert bn.BatchNorm.like("keras", 5, axis=1).axis == 1


def test_the_docstring_lists_all_presets():
    (listed,) = re.findall(r"framework : \{(.*?)\}", bn.BatchNorm.like.__doc__, re.DOTALL)
    assert re.findall(r'"(\w+)"', listed) == list(PRESETS)
