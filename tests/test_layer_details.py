"""What the layer owes its user beyond numbers: errors, warnings, state in and out of libraries."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data

X = data.batch((6, 4))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"num_features": 0}, ValueError, "num_features: got 0, expected a positive int"),
        ({"num_features": (2, 3)}, ValueError, "axis: got 1 axes, expected 2"),
        ({"num_features": 3, "eps": -1}, ValueError, "eps: got -1, expected a number >= 0"),
        ({"num_features": 3, "momentum": 2.0}, ValueError, r"momentum: got 2\.0, expected a number in"),
        ({"num_features": 3, "momentum": "x"}, TypeError, "momentum: got 'x'"),
        ({"num_features": 3, "correction": -1}, ValueError, "correction: got -1"),
        ({"num_features": 3, "device": "cuda"}, ValueError, "device: got 'cuda', expected xp beside it"),
    ],
)
def test_wrong_settings(settings, error, text):
    with pytest.raises(error, match=text):
        bn.BatchNorm(**settings)


def test_backward_without_forward():
    layer = bn.BatchNorm(4)
    with pytest.raises(RuntimeError, match="backward: got no forward pass to go back"):
        layer.backward(X)
    layer(X)
    layer.backward(X)
    with pytest.raises(RuntimeError, match="backward: got no forward pass to go back"):
        layer.backward(X)


def test_inference_after_training_passes_that_were_never_committed_warns():
    layer = bn.BatchNorm(4)
    layer(X)
    layer.eval()
    with pytest.warns(UserWarning, match="never updated"):
        layer(X)


def test_switches_that_ask_for_statistics_that_are_not_there():
    layer = bn.BatchNorm(4, track_running_stats=False)
    layer.update_statistics = True
    with pytest.raises(ValueError, match="update_statistics: got True, expected a layer with"):
        layer(X)
    layer.update_statistics = layer.batch_statistics = False
    with pytest.raises(ValueError, match="batch_statistics: got False, expected a layer with"):
        layer(X)


def test_the_cumulative_average_is_that_of_all_batches():
    layer = bn.BatchNorm(4, momentum=None)
    batches = [data.batch((9, 4), seed=s) for s in range(7)]
    for x in batches:
        layer(x)
        layer.update()
    expected = np.mean([x.astype(float).mean(axis=0) for x in batches], axis=0)
    np.testing.assert_allclose(layer.running_mean, expected, atol=1e-15)


def test_large_means_survive_from_training_to_inference():
    """Running statistics are float64 beside float32 data: a mean of 1e6 keeps its digits."""
    layer = bn.BatchNorm(4, momentum=1.0, correction=0)
    x = data.batch((1000, 4), mean=1e6)
    y = layer(x)
    layer.update()
    np.testing.assert_allclose(layer.eval()(x), y, atol=1e-6)


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict", "dask.array"])
def test_state_moves_between_libraries(library):
    xp = pytest.importorskip(library)
    source = bn.BatchNorm(4)
    source(X)
    source.update()
    there = bn.BatchNorm(4, xp=xp)
    there.load_state_dict(source.state_dict())
    y = there.eval()(xp.asarray(X))
    np.testing.assert_allclose(_numpy(y), source.eval()(X), atol=1e-6)
    assert there.num_batches_tracked == 1
    with pytest.raises(TypeError, match="gamma: got an array of .*, expected one of numpy"):
        there(X)


def _numpy(a):
    return np.asarray(a.compute() if hasattr(a, "compute") else a)


def test_a_layer_trains_under_jit():
    """State in, state out: the way to use the layer inside of a compiled function."""
    jax = pytest.importorskip("jax")

    @jax.jit
    def step(state, x, dy):
        layer = bn.BatchNorm(4, momentum=None)
        layer.load_state_dict(state)
        layer(x)
        dx = layer.backward(dy)
        return layer.state_dict(), dx

    reference, state = bn.BatchNorm(4, momentum=None), bn.BatchNorm(4, xp=jax.numpy).state_dict()
    for seed in range(3):
        x, dy = data.batch((6, 4), seed=seed), data.batch((6, 4), seed=seed + 10)
        state, dx = step(state, x, dy)
        reference(x)
        np.testing.assert_allclose(np.asarray(dx), reference.backward(dy), atol=1e-5)
    assert state["num_batches_tracked"] == 3
    np.testing.assert_allclose(np.asarray(state["running_var"]), reference.running_var, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "beta"}, ValueError, "state: got keys"),
        (
            lambda s: {**s, "gamma": s["gamma"][:2]},
            ValueError,
            r"gamma: got shape \(2,\), expected \(4,\)",
        ),
        (lambda s: {**s, "gamma": np.arange(4)}, TypeError, "gamma: got dtype int64"),
        (lambda s: {**s, "gamma": [1.0] * 4}, TypeError, "gamma: got a list"),
        (
            lambda s: {**s, "running_var": -s["running_var"]},
            ValueError,
            "running_var: got a variance below",
        ),
        (lambda s: {**s, "num_batches_tracked": -1}, ValueError, "num_batches_tracked: got -1"),
        (lambda s: 3, ValueError, "state: got 3, expected keys"),
    ],
)
def test_a_wrong_state_changes_nothing(change, error, text):
    layer = bn.BatchNorm(4)
    layer(X)
    layer.update()
    before = layer.state_dict()
    with pytest.raises(error, match=text):
        layer.load_state_dict(change(before))
    after = layer.state_dict()
    assert all(after[name] is before[name] for name in before)


def test_arrays_on_two_devices():
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray(X, device=strict.Device("device1"))
    gamma = strict.ones(4, dtype=strict.float32, device=strict.Device("device2"))
    with pytest.raises(ValueError, match="gamma: got an array on device .*device2.*, expected one on"):
        bn.batch_norm(x, gamma)
    layer = bn.BatchNorm(4)
    y = layer(x)
    assert layer.gamma.device == y.device == x.device
    with pytest.raises(ValueError, match="gamma: got an array on device .*device1"):
        layer(strict.asarray(X, device=strict.Device("device2")))
    layer.backward(y)
    assert layer.num_batches_tracked == 1


def test_wider_statistics_and_narrower_parameters():
    layer = bn.BatchNorm(4)
    assert layer(X).dtype == np.float32
    assert layer.gamma.dtype == np.float32
    assert layer.running_mean.dtype == np.float64
    layer = bn.BatchNorm(4)
    layer(X.astype(np.float16))
    assert layer.gamma.dtype == np.float32
    layer = bn.BatchNorm(4)
    layer(X.astype(np.float64))
    assert layer.gamma.dtype == np.float64


def test_several_axes():
    x = data.batch((5, 2, 3, 4))
    layer = bn.BatchNorm((2, 4), axis=(1, 3))
    y = layer(x)
    assert layer.gamma.shape == layer.running_mean.shape == (2, 4)
    np.testing.assert_allclose(y.mean(axis=(0, 2)), 0, atol=1e-6)
    assert repr(layer).startswith("BatchNorm((2, 4), axis=(1, 3), eps=1e-05, momentum=0.1")


def test_detached_from_autograd():
    torch = pytest.importorskip("torch")
    layer = bn.BatchNorm(4)
    for _ in range(2):
        x = torch.from_numpy(X).requires_grad_()
        layer(x).sum().backward()
        layer.update()
    assert not layer.running_mean.requires_grad
    assert not layer.running_var.requires_grad


def test_a_pass_commits_its_own_note_only():
    layer = bn.BatchNorm(4)
    layer(X)
    layer.eval()
    with pytest.warns(UserWarning, match="never updated"):
        layer(X)
    layer.backward(X)
    assert layer.num_batches_tracked == 0
    layer.train()
    layer(X)
    layer.update()
    layer.backward(X)
    assert layer.num_batches_tracked == 1


def test_an_error_in_the_update_leaves_dy_alone():
    layer = bn.BatchNorm(4)
    layer(X)
    dy = X.copy()
    layer.momentum = 5.0
    with pytest.raises(ValueError, match=r"momentum: got 5\.0"):
        layer.backward(dy, out=dy)
    np.testing.assert_array_equal(dy, X)
    layer.momentum = 0.1
    layer.backward(dy, out=dy)
    assert layer.num_batches_tracked == 1


def test_in_place_there_is_no_way_back():
    layer, x = bn.BatchNorm(4), X.copy()
    expected = bn.BatchNorm(4)(X)
    assert layer(x, out=x) is x
    np.testing.assert_array_equal(x, expected)
    with pytest.raises(RuntimeError, match="no forward pass to go back from"):
        layer.backward(X)
    layer.update()
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("count", [np.int64(3), np.asarray(3)])
def test_a_count_from_a_file(count):
    layer = bn.BatchNorm(4)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": count})
    assert layer.num_batches_tracked == 3
    assert type(layer.num_batches_tracked) is int


@pytest.mark.parametrize("count", ["7", None, 2.5, np.asarray([1, 2]), np.int64(-5)])
def test_a_count_that_is_none(count):
    layer = bn.BatchNorm(4)
    with pytest.raises(ValueError, match="num_batches_tracked: got .*, expected a whole number"):
        layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": count})


def test_a_state_moves_to_the_layers_device():
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    layer = bn.BatchNorm(4, xp=strict, device=device)
    layer.load_state_dict(bn.BatchNorm(4, xp=strict).state_dict())
    assert layer.gamma.device == layer.running_mean.device == device


def test_dtypes_of_a_loaded_state_do_not_depend_on_its_order():
    torch = pytest.importorskip("torch")
    state = bn.BatchNorm(4, xp=torch).state_dict()
    layer = bn.BatchNorm(4)
    layer.load_state_dict(dict(reversed(state.items())))
    assert layer.gamma.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float64


def test_arguments_are_checked_in_inference_too():
    layer = bn.BatchNorm(4).eval()
    with pytest.raises(TypeError, match="where: got a str"):
        layer(X, where="garbage")
    with pytest.raises(TypeError, match="group: got an int"):
        layer(X, group=5)
