"""Layers in and out of frameworks and files; the frameworks' own layers are the judges."""

import os

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.checkpoints import FORMATS
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


def arrays_of(state):
    return {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in state.arrays.items()}


def in_torch(layer, x):
    torch = pytest.importorskip("torch")
    state = bn.to_state(layer, "torch")
    module = torch.nn.BatchNorm1d(**state.settings).eval()
    module.load_state_dict({name: torch.from_numpy(v) for name, v in arrays_of(state).items()})
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
    settings["axis"] = settings["axis"] if isinstance(settings["axis"], int) else settings["axis"][0]
    found = {w.name: keras.ops.convert_to_numpy(w) for w in module.weights}
    return y, bn.from_state(found, "keras", settings)


def in_flax(layer, x):
    nnx = pytest.importorskip("flax.nnx")
    state = bn.to_state(layer, "flax")
    module = nnx.BatchNorm(**state.settings, rngs=nnx.Rngs(0), use_running_average=True)
    for name, v in state.arrays.items():
        getattr(module, name)[...] = v.astype(np.float32)
    y = np.asarray(module(x))
    found = {name: np.asarray(getattr(module, name)[...]) for name in state.arrays}
    settings = {name: getattr(module, name) for name in state.settings if name != "num_features"}
    return y, bn.from_state(found, "flax", settings)


def in_onnx(layer, x):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    state = bn.to_state(layer, "onnx")
    found = arrays_of(state)
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
    axis = -1 if FORMATS[framework].axis else 1
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
        settings = dict(state.settings)
        layer = bn.from_state(arrays_of(state), framework, settings)
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


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("affine", [True, False])
def test_files(tmp_path, suffix, affine):
    layers = {f"layer{i}.bn": trained(4 + i, seed=i, affine=affine) for i in range(3)}
    bn.save(tmp_path / f"model{suffix}", layers)
    others = {name: bn.BatchNorm(layer.num_features, affine=affine) for name, layer in layers.items()}
    bn.load(tmp_path / f"model{suffix}", others)
    for name, layer in layers.items():
        for key, v in layer.state_dict().items():
            np.testing.assert_array_equal(others[name].state_dict()[key], v)
    assert [p.name for p in tmp_path.iterdir()] == [f"model{suffix}"], "nothing else is left there"
    bn.save(tmp_path / f"one{suffix}", layers["layer0.bn"])
    bn.load(tmp_path / f"one{suffix}", others["layer0.bn"])


def test_a_model_of_pytorch_loads_by_prefix(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    model(torch.randn(4, 3, 9, 9))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    layer = bn.BatchNorm(6)
    bn.load(tmp_path / "model.safetensors", {"1": layer})
    x = torch.randn(4, 6, 5, 5)
    model.eval(), layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(layer(x.numpy())), model[1](x))
    bn.save(tmp_path / "back.safetensors", {"1": layer})
    from safetensors.torch import load_file

    model[1].load_state_dict(
        {name.removeprefix("1."): v for name, v in load_file(tmp_path / "back.safetensors").items()}
    )


def broken(name, change):
    """A saved layer with one array changed, added or left out."""
    found = {f"bn.{n}": v for n, v in bn.to_state(trained(), "torch").arrays.items()}
    if change is None:
        del found[name]
    else:
        found[name] = change(found.get(name))
    return found


BREAKS = {
    "a wrong shape": ("bn.weight", lambda v: v[:3], "bn.weight: got shape"),
    "a wrong dtype": ("bn.weight", lambda v: v.astype(int), "bn.weight: got dtype int64"),
    "a negative variance": ("bn.running_var", lambda v: -v, "bn.running_var: got a variance below"),
    "not a number": ("bn.running_mean", lambda v: v * np.nan, "bn.running_mean: got a number that is"),
    "a name too few": ("bn.bias", None, "layers: got names"),
    "a name too many": ("bn.scale", lambda _: np.ones(6), "layers: got names"),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("what", BREAKS)
def test_what_cannot_be_loaded_changes_nothing(tmp_path, what, suffix):
    name, change, message = BREAKS[what]
    path = tmp_path / f"broken{suffix}"
    found = broken(name, change)
    found |= {n.replace("bn.", "good."): v for n, v in broken("bn.weight", lambda v: v).items()}
    if suffix == ".npz":
        np.savez(path, **found)
    else:
        pytest.importorskip("safetensors.numpy").save_file(found, path)
    layers = {"good": trained(seed=5), "bn": trained(seed=6)}
    before = {n: {k: np.copy(v) for k, v in x.state_dict().items()} for n, x in layers.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        bn.load(path, layers)
    for n, layer in layers.items():
        for k, v in layer.state_dict().items():
            np.testing.assert_array_equal(v, before[n][k])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_cut(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    bn.save(path, trained())
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: got .*, which cannot be read \(.*expected a whole"):
            bn.load(path, bn.BatchNorm(6))


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "model.npz", weight=np.array([object()]))
    with pytest.raises(ValueError, match="which cannot be read"):
        bn.load(tmp_path / "model.npz", bn.BatchNorm(6))


def test_without_safetensors_it_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"not installed, expected it: pip install 'batchnorm\[safe"):
        bn.save(tmp_path / "model.safetensors", trained())
    assert not list(tmp_path.iterdir())


def test_errors(tmp_path):
    layer = trained()
    with pytest.raises(ValueError, match="framework: got 'mxnet', expected one of torch, keras"):
        bn.to_state(layer, "mxnet")
    with pytest.raises(TypeError, match="layer: got a int, expected a BatchNorm"):
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
