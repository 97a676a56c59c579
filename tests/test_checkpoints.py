"""Layers in and out of frameworks and files; the frameworks' own layers are the judges."""

import os

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.formats import FORMATS
from batchnorm.testing import data

os.environ.setdefault("KERAS_BACKEND", "jax")


def trained(channels=6, seed=0, **settings):
    """A layer with parameters and statistics of its own."""
    layer = bn.BatchNorm(channels, **settings)
    rng = np.random.default_rng(seed)
    if layer.affine:
        layer.gamma = rng.uniform(0.5, 2, channels).astype(np.float32)
        layer.beta = rng.standard_normal(channels).astype(np.float32)
    for step in range(3):
        shape = (8, channels, 5) if layer.axis == 1 else (8, 5, channels)
        x = (rng.standard_normal(shape) * 2 + 3).astype(np.float32)
        layer(x)
        layer.update()
        del step
    return layer.eval()


def in_torch(layer, x):
    torch = pytest.importorskip("torch")
    state = bn.to_state(layer, "torch")
    module = torch.nn.BatchNorm1d(**state.settings).eval()
    module.load_state_dict({name: torch.from_numpy(v) for name, v in state.arrays.items()})
    with torch.no_grad():
        y = module(torch.from_numpy(x)).numpy()
    settings = {name: getattr(module, name) for name in state.settings}
    return y, bn.from_state({n: v.numpy() for n, v in module.state_dict().items()}, "torch", settings)


def in_keras(layer, x):
    keras = pytest.importorskip("keras")
    state = bn.to_state(layer, "keras")
    module = keras.layers.BatchNormalization(**state.settings)
    module.build(x.shape)
    for weight in module.weights:
        weight.assign(state.arrays[weight.name])
    y = keras.ops.convert_to_numpy(module(x, training=False))
    config = module.get_config()
    settings = {name: config[name] for name in state.settings}
    found = {w.name: keras.ops.convert_to_numpy(w) for w in module.weights}
    return y, bn.from_state(found, "keras", settings)


def in_flax(layer, x):
    nnx = pytest.importorskip("flax.nnx")
    state = bn.to_state(layer, "flax")
    module = nnx.BatchNorm(**state.settings, rngs=nnx.Rngs(0), use_running_average=True)
    for name, v in state.arrays.items():
        getattr(module, name)[...] = v
    y = np.asarray(module(x))
    found = {name: np.asarray(getattr(module, name)[...]) for name in state.arrays}
    settings = {name: getattr(module, name) for name in state.settings if name != "num_features"}
    return y, bn.from_state(found, "flax", settings)


def in_onnx(layer, x):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    state = bn.to_state(layer, "onnx")
    found = state.arrays
    node = onnx.helper.make_node("BatchNormalization", ["x", *found], ["y"], **state.settings)
    tensors = [onnx.numpy_helper.from_array(v, name) for name, v in found.items()]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "bn", [value("x", 1, x.shape)], [value("y", 1, x.shape)], tensors
    )
    opsets = [onnx.helper.make_opsetid("", 15)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return y, bn.from_state(found, "onnx", settings)


JUDGES = {"torch": in_torch, "keras": in_keras, "flax": in_flax, "onnx": in_onnx}


@pytest.mark.filterwarnings("ignore")  # of the frameworks
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("framework", FORMATS)
def test_a_framework_s_own_layer_agrees(framework, affine):
    """Out of ours into theirs: the same outputs; back again: the same layer."""
    axis = -1 if FORMATS[framework].has_axis else 1
    layer = trained(axis=axis, momentum=0.25, eps=1e-3, affine=affine)
    x = data.batch((7, 6, 4) if axis == 1 else (7, 4, 6), mean=3.0)
    y, back = JUDGES[framework](layer, x)
    ours = layer(x)
    size = np.maximum(1, abs(ours)).max()
    np.testing.assert_allclose(y, ours, rtol=0, atol=8 * 2.0**-23 * size)
    assert back.momentum == pytest.approx(0.25, abs=1e-7)
    assert back.eps == pytest.approx(1e-3, rel=1e-7)
    assert back.correction == {"torch": 1}.get(framework, 0)
    np.testing.assert_allclose(back(x), ours, rtol=0, atol=2 * 2.0**-23 * size)


@pytest.mark.filterwarnings("ignore")
def test_round_trip_through_all():
    """torch -> keras -> flax -> onnx and back: inference is the same to 2 eps."""
    layer = trained()
    x = data.batch((7, 6, 4), mean=3.0)
    expected = layer(x)
    for framework in ("torch", "keras", "flax", "onnx", "flax", "keras", "torch"):
        state = bn.to_state(layer, framework)
        layer = bn.from_state(state.arrays, framework, dict(state.settings))
        np.testing.assert_allclose(layer(x), expected, rtol=0, atol=2 * 2.0**-23 * abs(expected).max())
    assert (layer.momentum, layer.eps, layer.correction) == (0.1, 1e-5, 1)


def test_settings_are_in_the_framework_s_words():
    layer = trained(momentum=0.01, eps=1e-3)
    assert bn.to_state(layer, "torch").settings == {
        "eps": 1e-3,
        "momentum": 0.01,
        "affine": True,
        "num_features": 6,
    }
    keras = {"epsilon": 1e-3, "momentum": 0.99, "scale": True, "center": True, "axis": 1}
    assert bn.to_state(layer, "keras").settings == keras
    assert bn.to_state(layer, "onnx").settings == {"epsilon": 1e-3, "momentum": 0.99}
    assert bn.from_state(bn.to_state(layer, "keras").arrays, "keras").eps == 1e-3


def test_one_parameter_is_enough():
    arrays = {"beta": np.ones(3, np.float32), "moving_mean": np.zeros(3), "moving_variance": np.ones(3)}
    layer = bn.from_state(arrays, "keras", {"epsilon": 0.0, "axis": 1})
    np.testing.assert_array_equal(layer.gamma, np.ones(3))
    np.testing.assert_array_equal(layer(np.zeros((2, 3), np.float32)), np.ones((2, 3)))


def trained_arrays(prefix=""):
    """A saved layer under PyTorch's names."""
    return {prefix + name: v for name, v in bn.to_state(trained(), "torch").arrays.items()}


def test_errors(tmp_path):
    layer = trained()
    with pytest.raises(ValueError, match="framework: got 'mxnet', expected one of 'torch', 'keras'"):
        bn.to_state(layer, "mxnet")
    with pytest.raises(TypeError, match="layer: got an int, expected a BatchNorm"):
        bn.to_state(3, "torch")
    with pytest.raises(ValueError, match="layer: got one without running statistics"):
        bn.to_state(bn.BatchNorm(3, track_running_stats=False), "torch")
    with pytest.raises(ValueError, match="layer: got momentum None"):
        bn.to_state(bn.BatchNorm(3, momentum=None), "keras")
    with pytest.raises(ValueError, match="arrays: got names"):
        bn.from_state({"mean": np.ones(3)}, "flax")
    with pytest.raises(ValueError, match="settings: got \\['eps'\\], expected some of"):
        bn.from_state(bn.to_state(layer, "keras").arrays, "keras", {"eps": 1})
    with pytest.raises(ValueError, match=r"path: got .*model.h5, expected a file that ends in .npz or"):
        bn.save(tmp_path / "model.h5", layer)
    with pytest.raises(FileNotFoundError):
        bn.load(tmp_path / "nothing.npz", layer)


DYADIC = np.asarray([0.5, 1.25, -3.0])  # exact in bfloat16


def a_bfloat16_layer(library):
    xp = pytest.importorskip(library)
    layer = bn.BatchNorm(3, xp=xp, dtype=xp.bfloat16)
    layer.gamma = xp.asarray(DYADIC, dtype=xp.bfloat16)
    return layer


def test_from_bfloat16_of_pytorch():
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(DYADIC))
        module.running_var.copy_(torch.from_numpy(abs(DYADIC)))
    layer = bn.from_state(module.bfloat16().state_dict(), "torch")
    np.testing.assert_array_equal(layer.gamma, DYADIC)
    np.testing.assert_array_equal(layer.running_var, abs(DYADIC))


def settled(dtype, **settings):
    layer = bn.BatchNorm(3, **settings)
    layer(np.random.default_rng(0).normal(size=(5, 3)).astype(dtype))
    layer.update()
    return layer


def read(dtype):
    arrays = {n: np.asarray([0.1, 0.2, 0.3], dtype) for n in FORMATS["keras"].names}
    return bn.from_state(arrays, "keras")


DTYPES = {
    "fresh": (lambda: bn.BatchNorm(3), np.float32),
    "fresh without parameters": (lambda: bn.BatchNorm(3, affine=False), np.float32),
    "to be float64": (lambda: bn.BatchNorm(3, dtype=np.float64), np.float64),
    "to be float64, without parameters": (
        lambda: bn.BatchNorm(3, dtype="double", affine=False),
        np.float64,
    ),
    "settled in float16": (lambda: settled(np.float16), np.float32),
    "settled in float32": (lambda: settled(np.float32), np.float32),
    "settled in float64": (lambda: settled(np.float64), np.float64),
    "from float32": (lambda: read(np.float32), np.float32),
    "from float64": (lambda: read(np.float64), np.float64),
}


@pytest.mark.parametrize("which", DTYPES)
@pytest.mark.parametrize("framework", FORMATS)
def test_dtypes_are_those_of_the_framework_s_layer(which, framework):
    make, dtype = DTYPES[which]
    arrays = bn.to_state(make(), framework).arrays
    assert {v.dtype for v in arrays.values() if v.dtype.kind == "f"} == {np.dtype(dtype)}


def test_a_dtype_of_another_library_counts():
    torch = pytest.importorskip("torch")
    arrays = bn.to_state(bn.BatchNorm(3, dtype=torch.float64), "keras").arrays
    assert arrays["gamma"].dtype == np.float64


def test_statistics_beyond_float32_are_refused():
    layer = settled(np.float32)
    layer.running_var = np.asarray([1.0, 1e39, 1.0])
    with pytest.raises(
        ValueError, match="running_var: got numbers out of the range of float32, expected"
    ):
        bn.to_state(layer, "torch")


def test_a_state_is_a_copy():
    layer = settled(np.float32)
    state = bn.to_state(layer, "torch")
    layer.gamma[...] = 7
    layer.running_mean[...] = 7
    np.testing.assert_array_equal(state.arrays["weight"], np.ones(3))
    assert (state.arrays["running_mean"] != 7).all()
    state.arrays["bias"][...] = 5
    np.testing.assert_array_equal(layer.beta, np.zeros(3))


def test_big_endian_arrays(tmp_path):
    arrays = trained_arrays()
    big = {name: v.astype(v.dtype.newbyteorder(">")) for name, v in arrays.items()}
    np.savez(tmp_path / "model.npz", **big)
    layer = bn.BatchNorm(6)
    bn.load(tmp_path / "model.npz", layer)
    for found in (layer, bn.from_state(big, "torch")):
        np.testing.assert_array_equal(found.gamma, arrays["weight"])
        np.testing.assert_array_equal(found.running_var, arrays["running_var"])
        assert found.num_batches_tracked == 3


COUNTS = {
    "(1,)": (np.asarray([3]), r"shape \(1,\)"),
    "NaN": (np.asarray(np.nan), "nan"),
    "infinity": (np.asarray(np.inf), "inf"),
    "a string": (np.asarray("3"), "'3'"),
    "a part": (np.asarray(5.7), r"5\.7"),
    "negative": (np.asarray(-2), "-2"),
    "a truth": (np.asarray(True), "True"),
}


@pytest.mark.parametrize("what", COUNTS)
def test_a_number_of_batches_that_is_none(tmp_path, what):
    count, got = COUNTS[what]
    message = f"num_batches_tracked: got {got}, expected a whole number >= 0"
    arrays = trained_arrays() | {"num_batches_tracked": count}
    with pytest.raises(ValueError, match=f"^{message}"):
        bn.from_state(arrays, "torch")
    np.savez(tmp_path / "model.npz", **{f"bn.{name}": v for name, v in arrays.items()})
    layer = bn.BatchNorm(6)
    with pytest.raises(ValueError, match=f"^bn.num_batches_tracked: got {got}, expected"):
        bn.load(tmp_path / "model.npz", {"bn": layer})
    np.testing.assert_array_equal(layer.gamma, np.ones(6))


def test_a_number_of_batches_in_a_file_of_floats():
    arrays = {name: v.astype(np.float16) for name, v in trained_arrays().items()}
    layer = bn.from_state(arrays, "torch")
    assert layer.num_batches_tracked == 3
    assert type(layer.num_batches_tracked) is int


def test_an_axis_in_a_list():
    """As Keras has it in a config."""
    layer = read(np.float32)
    state = bn.to_state(layer, "keras")
    back = bn.from_state(state.arrays, "keras", {**state.settings, "axis": [3]})
    assert back.axis == 3
    assert back(np.zeros((2, 4, 4, 3), np.float32)).shape == (2, 4, 4, 3)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("layout", data.VECTOR_LAYOUTS)
def test_arrays_however_they_lie_in_memory(tmp_path, layout, shape):
    """From a framework's state into a layer, out of it, and through both kinds of file."""
    given = [data.VECTOR_LAYOUTS[layout](v) for v in (*data.parameters(shape), *data.statistics(shape))]
    axis = tuple(range(1, 1 + len(shape)))
    names = FORMATS["keras"].names
    layer = bn.from_state(dict(zip(names, given, strict=True)), "keras", {"axis": list(axis)})
    layer.gamma, layer.running_var = given[0], given[3]  # as a user may assign them
    ways = [bn.to_state(layer, "keras").arrays]
    for suffix in (".npz", ".safetensors"):
        bn.save(tmp_path / f"model{suffix}", layer)
        other = bn.BatchNorm(shape, axis=axis)
        bn.load(tmp_path / f"model{suffix}", other)
        ways.append(bn.to_state(other, "keras").arrays)
    for found in ways:
        for name, v in zip(names, given, strict=True):
            np.testing.assert_array_equal(found[name], v)
