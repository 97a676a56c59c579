"""ONNX: its own backend cases, its checker and its runtime are the judges."""

import sys
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
    assert model.opset_import[0].version == opset or opset is None
    loaded = from_onnx(onnx.load_from_string(model.SerializeToString()))
    assert list(loaded) == ["block.bn"]
    back = loaded["block.bn"]
    assert (back.momentum, back.eps, back.correction, back.axis) == (0.25, 1e-3, 0, 1)
    x = data.batch((7, 4, 6), mean=3.0)
    expected = layer(x)
    tolerance = 2 * 2.0**-23 * abs(expected).max()
    np.testing.assert_allclose(back(x), expected, rtol=0, atol=tolerance)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, expected, rtol=0, atol=4 * tolerance)


def test_the_newest_opset_that_the_runtime_runs(monkeypatch):
    """One that it refuses is not taken; without a runtime, the newest that onnx knows is."""
    from batchnorm import onnx as module

    newest = onnx.defs.onnx_opset_version()
    try:
        module._newest_opset.cache_clear()
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert to_onnx(trained()).opset_import[0].version == newest
        module._newest_opset.cache_clear()

        class Old:
            """A runtime that knows nothing after opset 19."""

            def InferenceSession(self, model, providers):  # noqa: N802
                assert onnx.load_from_string(model).opset_import[0].version <= 19

        monkeypatch.setitem(sys.modules, "onnxruntime", Old())
        assert to_onnx(trained()).opset_import[0].version == 19
    finally:
        module._newest_opset.cache_clear()


def test_parameters_behind_identity_and_cast():
    """As optimizers and exporters leave them: shared between nodes, or kept in another dtype."""
    helper = onnx.helper
    values = {"s": [2.0, 3.0], "b": [1.0, 0.0], "m": [0.5, 0.25], "v": [4.0, 9.0]}
    tensors = [onnx.numpy_helper.from_array(np.asarray(v, np.float16), n) for n, v in values.items()]
    nodes = [helper.make_node("Cast", [n], [f"{n}32"], to=onnx.TensorProto.FLOAT) for n in values]
    nodes += [helper.make_node("Identity", ["v32"], ["v_same"])]
    inputs = ["x", "s32", "b32", "m32", "v_same"]
    nodes += [helper.make_node("BatchNormalization", inputs, ["y"], name="bn")]
    ends = [helper.make_tensor_value_info(end, 1, [2, 2, 3]) for end in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    layer = from_onnx(helper.make_model(graph))["bn"]
    for name, v in zip(("gamma", "beta", "running_mean", "running_var"), values.values(), strict=True):
        np.testing.assert_array_equal(layer.state_dict()[name], v)


def test_a_model_with_constants_subgraphs_and_training():
    helper, arrays = onnx.helper, onnx.numpy_helper
    names = ("s", "b", "m", "v")
    values = [np.full(3, k, np.float32) for k in (2, 1, 0.5, 4)]
    constants = [
        helper.make_node("Constant", [], [n], value=arrays.from_array(v, n))
        for n, v in zip(names, values, strict=True)
    ]
    branches = []
    for name in ("inner", "other"):
        node = helper.make_node("BatchNormalization", ["x", *names], [f"z_{name}"], name=name)
        ends = [helper.make_tensor_value_info(f"z_{name}", 1, None)]
        branches.append(helper.make_graph([node], "branch", [], ends))
    outer = helper.make_node(
        "BatchNormalization", ["x", *names], ["y", "m2", "v2"], training_mode=1, momentum=0.8
    )
    value = helper.make_tensor_value_info
    then, other = branches
    condition = helper.make_node("If", ["c"], ["w"], then_branch=then, else_branch=other)
    inputs = [value("x", 1, [2, 3, 4]), value("c", 9, [])]
    graph = helper.make_graph(
        [*constants, outer, condition], "g", inputs, [value("y", 1, None), value("w", 1, None)]
    )
    found = from_onnx(helper.make_model(graph))
    assert list(found) == ["y", "other", "inner"], "the helper sorts the branches by name"
    assert found["y"].batch_statistics
    assert not found["inner"].batch_statistics
    assert found["y"].momentum == 0.2
    x = data.batch((2, 3, 4))
    np.testing.assert_allclose(found["inner"](x), 2 * (x - 0.5) / np.sqrt(4 + 1e-5) + 1, rtol=1e-5)


def test_errors():
    layer = trained()
    with pytest.raises(TypeError, match="model: got an int, expected an onnx.ModelProto"):
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
    with pytest.raises(ValueError, match="opset: got 999, expected an integer from 15 to"):
        to_onnx(layer, opset=999)
    with pytest.raises(TypeError, match="name: got 3, expected a name"):
        to_onnx(layer, name=3)
    with pytest.raises(ValueError, match="name: got '', expected a name"):
        to_onnx(layer, name="")
    with pytest.raises(TypeError, match="node: got Relu, expected a BatchNormalization node"):
        run(onnx.helper.make_node("Relu", ["x"], ["y"]), *[np.ones(3)] * 5)
    with pytest.raises(ValueError, match=r"mean: got shape \(4,\), expected \(3,\)"):
        run(a_node(training_mode=1), np.ones((2, 3)), *[np.ones(3)] * 2, np.ones(4), np.ones(3))
    model = a_model([a_node()])
    model.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(ValueError, match=r"model: got 's' of node 'bn', which cannot be read \("):
        from_onnx(model)


def test_a_cast_of_what_is_no_number_is_nobody_s_business():
    cast = onnx.helper.make_node("Cast", ["words"], ["numbers"], to=onnx.TensorProto.FLOAT)
    model = a_model([cast, a_node()])
    model.graph.initializer.append(
        onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [1], [b"a"])
    )
    np.testing.assert_array_equal(from_onnx(model)["bn"].gamma, VALUES["s"])


VALUES = {name: np.full(3, k, np.float32) for name, k in zip("sbmv", (2, 1, 0.5, 4), strict=True)}


def a_node(outputs=("y",), name="bn", inputs=("x", *VALUES), **attributes):
    return onnx.helper.make_node("BatchNormalization", inputs, outputs, name=name, **attributes)


def a_model(nodes, opset=15, functions=(), initializers=VALUES):
    helper = onnx.helper
    tensors = [onnx.numpy_helper.from_array(v, name) for name, v in initializers.items()]
    ends = [helper.make_tensor_value_info(end, 1, [2, 3]) for end in ("x", nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (bn.BatchNorm(4), np.float32),
        (bn.BatchNorm(4, affine=False), np.float32),
        (bn.BatchNorm(4, dtype=np.float64), np.float64),
    ],
    ids=["fresh", "without parameters", "float64"],
)
def test_dtypes_of_a_model(layer, dtype):
    model = to_onnx(layer)
    assert {onnx.numpy_helper.to_array(t).dtype for t in model.graph.initializer} == {np.dtype(dtype)}
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert model.graph.input[0].type.tensor_type.elem_type == element


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_dtype_comes_back(dtype):
    values = {name: np.asarray([0.1, 0.2, 0.3], dtype) for name in "sbmv"}
    layer = from_onnx(a_model([a_node()], initializers=values))["bn"]
    for tensor in to_onnx(layer).graph.initializer:
        found = onnx.numpy_helper.to_array(tensor)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values["s"])


def test_nodes_that_share_a_name_go_by_their_outputs():
    second = a_node(["y"], inputs=["y1", "b", "s", "m", "v"])
    found = from_onnx(a_model([a_node(["y1"]), second]))
    assert list(found) == ["y1", "y"]
    np.testing.assert_array_equal(found["y1"].gamma, VALUES["s"])
    np.testing.assert_array_equal(found["y"].gamma, VALUES["b"])


def test_nodes_that_share_name_and_output_are_refused():
    branch = onnx.helper.make_graph(
        [a_node(["z"])], "branch", [], [onnx.helper.make_tensor_value_info("z", 1, None)]
    )
    both = onnx.helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    with pytest.raises(ValueError, match="model: got two nodes 'z', expected nodes that differ in"):
        from_onnx(a_model([both]))


def a_function(opset=15):
    helper = onnx.helper
    inner = a_node(name="inner")
    reference = onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT)
    inner.attribute.append(reference)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function("mine", "Norm", ["x", *VALUES], ["y"], [inner], opsets, ["eps"])


def calls():
    make = onnx.helper.make_node
    return [
        make("Norm", ["x", *VALUES], ["y1"], domain="mine", eps=0.5),
        make("Norm", ["y1", "b", "s", "m", "v"], ["y2"], domain="mine", eps=0.25),
    ]


def test_nodes_in_functions_are_found_at_each_call():
    model = a_model(calls(), functions=[a_function()])
    onnx.checker.check_model(model)
    first, second = from_onnx(model).values()
    assert (first.eps, second.eps) == (0.5, 0.25)
    np.testing.assert_array_equal(first.gamma, VALUES["s"])
    np.testing.assert_array_equal(second.gamma, VALUES["b"])
    assert len(model.functions) == 1, "the model is as it was"


def test_a_function_of_another_opset_is_refused():
    with pytest.raises(ValueError, match="model: got batch norm in the function 'Norm', which"):
        from_onnx(a_model(calls(), functions=[a_function(opset=9)]))


def test_constants_of_numbers():
    constants = [
        onnx.helper.make_node("Constant", [], [name], value_floats=v.tolist())
        for name, v in VALUES.items()
    ]
    layer = from_onnx(a_model([*constants, a_node()], initializers={}))["bn"]
    np.testing.assert_array_equal(layer.running_var, VALUES["v"])
    assert to_onnx(layer).graph.initializer[0].data_type == onnx.TensorProto.FLOAT
    alone = onnx.helper.make_node("Constant", [], ["s"], value_float=2.0)
    rest = {name: v for name, v in VALUES.items() if name != "s"}
    with pytest.raises(ValueError, match=r"scale: got shape \(\), expected \(3,\)"):
        from_onnx(a_model([alone, a_node()], initializers=rest))


FIVE = ("y", "m2", "v2", "m3", "v3")
NODES = {
    "6, as it is": (6, a_node(), True),
    "6, is_test=0": (6, a_node(FIVE, is_test=0), True),
    "6, is_test=1": (6, a_node(is_test=1), False),
    "9, one output": (9, a_node(), False),
    "9, five outputs": (9, a_node(FIVE), True),
    "9, outputs left out": (9, a_node(("y", "", "")), False),
    "14, as it is": (14, a_node(), False),
    "14, training_mode=1": (14, a_node(training_mode=1), True),
}


@pytest.mark.parametrize("which", NODES)
def test_training_before_there_was_a_training_mode(which):
    opset, node, training = NODES[which]
    layer = from_onnx(a_model([node], opset))["bn"]
    assert layer.batch_statistics is training
    assert layer.update_statistics is training


def test_nodes_that_are_no_batch_norm_by_channel():
    node = a_node(spatial=0)
    with pytest.raises(ValueError, match="model: got node 'bn' with spatial=0, expected spatial=1"):
        from_onnx(a_model([node], 7))
    with pytest.raises(ValueError, match="node: got node 'bn' with spatial=0, expected spatial=1"):
        run(node, *[np.ones(3)] * 5)
    for node in (a_node(FIVE), a_node(is_test=0)):
        with pytest.raises(ValueError, match="node: got node 'bn' in training as before opset 14"):
            run(node, *[np.ones(3)] * 5)
    x = data.batch((4, 3))
    (y,) = run(a_node(is_test=1, spatial=1), x, *VALUES.values())
    np.testing.assert_allclose(y, 2 * (x - 0.5) / np.sqrt(4 + 1e-5) + 1, rtol=1e-5, atol=1e-6)
