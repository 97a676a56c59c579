"""ONNX: its own backend cases, its checker and its runtime are the judges."""

import warnings

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data

onnx = pytest.importorskip("onnx")
from batchnorm.onnx import from_onnx, run, to_onnx  # noqa: E402


def cases():
    """ONNX's backend test cases for the operator."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(action="ignore"):  # it makes the cases of all operators
        return [c for c in collect_testcases("BatchNormalization") if c.kind == "node"]


CASES = cases()


def test_there_are_cases():
    assert len(CASES) >= 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_onnx_s_own_cases(case):
    nodes = [n for n in case.model.graph.node if n.op_type == "BatchNormalization"]
    if not nodes:
        pytest.skip("the expanded form, without the operator")
    (node,) = nodes
    for inputs, outputs in case.data_sets:
        found = run(node, *inputs)
        assert len(found) == len(outputs)
        for mine, right in zip(found, outputs, strict=True):
            assert mine.dtype == right.dtype
            np.testing.assert_allclose(mine, right, rtol=case.rtol, atol=case.atol)


def trained(**settings):
    layer = bn.BatchNorm(4, momentum=0.25, eps=1e-3, **settings)
    rng = np.random.default_rng(0)
    layer.gamma = rng.uniform(0.5, 2, 4).astype(np.float32)
    layer.beta = rng.standard_normal(4).astype(np.float32)
    layer(data.batch((9, 4, 5), mean=3.0))
    layer.update()
    return layer.eval()


@pytest.mark.parametrize("opset", [None, 15])
def test_a_layer_goes_out_and_comes_back(opset):
    layer = trained()
    model = to_onnx(layer, ndim=3, name="block.bn", opset=opset)
    onnx.checker.check_model(model, full_check=True)
    newest = onnx.defs.onnx_opset_version()
    assert model.opset_import[0].version == (opset or newest)
    loaded = from_onnx(onnx.load_from_string(model.SerializeToString()))
    assert list(loaded) == ["block.bn"]
    back = loaded["block.bn"]
    assert (back.momentum, back.eps, back.correction, back.axis) == (0.25, 1e-3, 0, 1)
    x = data.batch((7, 4, 6), mean=3.0)
    expected = layer(x)
    tolerance = 2 * 2.0**-23 * abs(expected).max()
    np.testing.assert_allclose(back(x), expected, rtol=0, atol=tolerance)
    if opset is not None:  # a runtime does not know every new opset
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": x})
        np.testing.assert_allclose(y, expected, rtol=0, atol=4 * tolerance)


def test_a_model_with_constants_subgraphs_and_training():
    helper, arrays = onnx.helper, onnx.numpy_helper
    names = ("s", "b", "m", "v")
    values = [np.full(3, k, np.float32) for k in (2, 1, 0.5, 4)]
    constants = [
        helper.make_node("Constant", [], [n], value=arrays.from_array(v, n))
        for n, v in zip(names, values, strict=True)
    ]
    inner = helper.make_node("BatchNormalization", ["x", *names], ["z"], name="inner")
    outer = helper.make_node(
        "BatchNormalization", ["x", *names], ["y", "m2", "v2"], training_mode=1, momentum=0.8
    )
    value = helper.make_tensor_value_info
    branch = helper.make_graph([inner], "branch", [], [value("z", 1, None)])
    condition = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    inputs = [value("x", 1, [2, 3, 4]), value("c", 9, [])]
    graph = helper.make_graph(
        [*constants, outer, condition], "g", inputs, [value("y", 1, None), value("w", 1, None)]
    )
    found = from_onnx(helper.make_model(graph))
    assert list(found) == ["y", "inner"]
    assert found["y"].batch_statistics
    assert not found["inner"].batch_statistics
    assert found["y"].momentum == 0.2
    x = data.batch((2, 3, 4))
    np.testing.assert_allclose(found["inner"](x), 2 * (x - 0.5) / np.sqrt(4 + 1e-5) + 1, rtol=1e-5)


def test_errors():
    layer = trained()
    with pytest.raises(TypeError, match="model: got a int, expected an onnx.ModelProto"):
        from_onnx(3)
    model = to_onnx(layer)
    del model.graph.initializer[2]
    with pytest.raises(ValueError, match=r"model: got node 'bn' with \['bn.input_mean'\] not in"):
        from_onnx(model)
    with pytest.raises(ValueError, match="layer: got one with channels at axis -1"):
        to_onnx(bn.BatchNorm(4, axis=-1))
    with pytest.raises(ValueError, match="ndim: got 1, expected a whole number >= 2"):
        to_onnx(layer, ndim=1)
    with pytest.raises(ValueError, match="opset: got 9"):
        to_onnx(layer, opset=9)
    with pytest.raises(TypeError, match="node: got Relu, expected a BatchNormalization node"):
        run(onnx.helper.make_node("Relu", ["x"], ["y"]), *[np.ones(3)] * 5)
