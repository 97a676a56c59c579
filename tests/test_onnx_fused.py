"""Layers with the residual and the activation of the nodes after a BatchNormalization."""

import numpy as np
import pytest

import batchnorm as bn

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
helper = pytest.importorskip("onnx.helper")
bn_onnx = pytest.importorskip("batchnorm.onnx")

KINDS = ["relu", "relu6", ("leaky_relu", 0.25), "silu"]


def vectors():
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(3), rng.standard_normal(3), rng.standard_normal(3), rng.random(3) + 0.5]
    return [v.astype(np.float32) for v in drawn]


def model(*nodes, outputs=("y",), constants=()):
    """A model of a batch norm from x to n, and nodes after it; z is a second input."""
    names = ["s", "b", "m", "v"]
    arrays = [*zip(names, vectors(), strict=True), *constants]
    tensors = [onnx.numpy_helper.from_array(v, name) for name, v in arrays]
    norm = helper.make_node("BatchNormalization", ["x", *names], ["n"], name="bn")
    shape = ["N", 3, "L"]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in group]
        for group in (("x", "z"), outputs)
    ]
    graph = helper.make_graph([norm, *nodes], "g", *ends, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(made, **inputs):
    session = runtime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    return session.run(None, {name: v for name, v in inputs.items() if name in wanted})


def arrays():
    rng = np.random.default_rng(1)
    return [(3 * rng.standard_normal((4, 3, 5))).astype(np.float32) for _ in range(2)]


def node(op, inputs, output, **settings):
    return helper.make_node(op, inputs, [output], **settings)


BOUNDS = (("low", np.float32(0)), ("high", np.float32(6)))
FUSED = {
    "Relu": ([node("Relu", ["n"], "y")], None, "relu", ()),
    "Add": ([node("Add", ["n", "z"], "y")], "z", None, ()),
    "Add, Relu": ([node("Add", ["z", "n"], "a"), node("Relu", ["a"], "y")], "z", "relu", ()),
    "LeakyRelu": ([node("LeakyRelu", ["n"], "y", alpha=0.3)], None, ("leaky_relu", 0.3), ()),
    "Clip": ([node("Clip", ["n", "low", "high"], "y")], None, "relu6", BOUNDS),
    "Sigmoid, Mul": ([node("Sigmoid", ["n"], "g"), node("Mul", ["n", "g"], "y")], None, "silu", ()),
}


@pytest.mark.parametrize("case", FUSED)
def test_nodes_that_are_fused(case):
    nodes, residual, activation, constants = FUSED[case]
    made = model(*nodes, constants=constants)
    found = bn_onnx.from_onnx(made, fuse=True)["bn"]
    assert found[1:] == (residual, "y")
    assert found.layer.activation == bn.BatchNorm(3, activation=activation).activation
    x, z = arrays()
    y = found.layer(x, residual=z if residual else None)
    np.testing.assert_allclose(y, run(made, x=x, z=z)[0], rtol=1e-5, atol=1e-5)


LEFT = {
    "an output too": ([node("Relu", ["n"], "y")], ("y", "n"), ()),
    "two users": ([node("Relu", ["n"], "r"), node("Add", ["r", "n"], "y")], ("y",), ()),
    "another operator": ([node("Tanh", ["n"], "y")], ("y",), ()),
    "a bias": ([node("Add", ["n", "c"], "y")], ("y",), (("c", np.ones((3, 1), np.float32)),)),
    "doubled": ([node("Add", ["n", "n"], "y")], ("y",), ()),
    "a Clip to 5": (
        [node("Clip", ["n", "low", "high"], "y")],
        ("y",),
        (("low", np.float32(0)), ("high", np.float32(5))),
    ),
    "a gate of something else": (
        [node("Sigmoid", ["z"], "g"), node("Mul", ["n", "g"], "y")],
        ("y",),
        (),
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_nodes_that_are_not(case):
    nodes, outputs, constants = LEFT[case]
    found = bn_onnx.from_onnx(model(*nodes, outputs=outputs, constants=constants), fuse=True)["bn"]
    assert found[1:] == (None, "n")
    assert found.layer.activation is None


def test_without_the_option_there_are_layers():
    found = bn_onnx.from_onnx(model(node("Relu", ["n"], "y")))["bn"]
    assert isinstance(found, bn.BatchNorm)
    assert found.activation is None


@pytest.mark.parametrize("activation", KINDS, ids=str)
def test_a_layer_is_exported_with_its_activation(activation):
    layer = bn.BatchNorm(3, activation=activation)
    state = dict(zip(("gamma", "beta", "running_mean", "running_var"), vectors(), strict=True))
    layer.load_state_dict({**state, "num_batches_tracked": 1})
    made = bn_onnx.to_onnx(layer.eval(), ndim=3)
    x, _ = arrays()
    np.testing.assert_allclose(run(made, x=x)[0], layer(x), rtol=1e-5, atol=1e-5)
    again = bn_onnx.from_onnx(made, fuse=True)["bn"]
    assert again.layer.activation == layer.activation
    np.testing.assert_allclose(again.layer(x), layer(x), rtol=1e-6, atol=1e-6)
