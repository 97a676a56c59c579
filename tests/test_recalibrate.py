"""Recalibration: exact population statistics, from a network written out in float64."""

import copy

import numpy as np
import pytest
from test_group import Threads, on_each

import batchnorm as bn
from batchnorm.testing import data

EPS = 1e-5
WEIGHTS = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)


def network(seed=0):
    first, second = bn.BatchNorm(6), bn.BatchNorm(4, correction=0)
    first.gamma, first.beta = data.parameters((6,), seed=seed)
    # As any training leaves them; also what cannot be mended by averaging.
    first.running_mean, second.running_var = np.full(6, np.nan), np.full(4, 7.0)

    def forward(x):
        return second(np.maximum(first(x), 0) @ WEIGHTS)

    return [first, second], forward


def expected(layers, batches):
    """Inputs of both layers in float64; their mean, and variance with Bessel's correction or without."""
    first, _ = layers
    inputs = [[], []]
    for x in batches:
        x = x.astype(float)
        y = first.gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + EPS) + first.beta
        inputs[0].append(x)
        inputs[1].append(np.maximum(y, 0) @ WEIGHTS.astype(float))
    x, h = (np.concatenate(v) for v in inputs)
    return [(x.mean(0), x.var(0, ddof=1)), (h.mean(0), h.var(0))]


def batches_of(sizes, mean=3.0):
    return [data.batch((n, 6), mean=mean + i, seed=i) for i, n in enumerate(sizes)]


def judge(layers, batches, count):
    for layer, (mean, var) in zip(layers, expected(layers, batches), strict=True):
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-5)
        assert layer.num_batches_tracked == count


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("sizes", [(8,), (8, 5, 13), (4,) * 11])
def test_population_statistics(sizes, progress):
    layers, forward = network()
    layers[0].eval()
    bn.recalibrate(layers, forward, batches_of(sizes), progress=progress)
    judge(layers, batches_of(sizes), len(sizes))
    assert not layers[0].batch_statistics
    assert layers[1].batch_statistics


def test_a_layer_that_is_called_twice():
    layer = bn.BatchNorm(6)
    x, y = batches_of((8, 9))
    bn.recalibrate(layer, lambda pair: [layer(v) for v in pair], iter([(x, y)]))
    both = np.concatenate([x, y]).astype(float)
    np.testing.assert_allclose(layer.running_mean, both.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, both.var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_changes_nothing(error):
    layers, forward = network()
    x = batches_of((8,))[0]
    layers[0](x)  # of which a backward pass is still to come
    before = [copy.copy(vars(layer)) for layer in layers]

    def batches():
        yield from batches_of((8, 8))
        raise error

    with pytest.raises(error):
        bn.recalibrate(layers, forward, batches())
    for layer, state in zip(layers, before, strict=True):
        assert vars(layer).keys() == state.keys()
        assert all(vars(layer)[name] is state[name] for name in state)
    layers[0].backward(x)


def test_between_the_members_of_a_group():
    """Each with batches of its own, as many as it has, or none."""
    members = [network() for _ in range(3)]
    batches = batches_of((8, 5, 13, 4, 6))
    parts = [batches[:4], [], batches[4:]]
    group = Threads(3)

    def member(made, part):
        layers, forward = made
        bn.recalibrate(layers, forward, part, group=group, progress=False)
        return layers

    found = on_each(member, members, parts)
    for layers in found:
        judge(layers, batches, 5)
        for mine, other in zip(layers, found[0], strict=True):
            np.testing.assert_array_equal(mine.running_mean, other.running_mean)
            np.testing.assert_array_equal(mine.running_var, other.running_var)


def test_on_dask():
    da = pytest.importorskip("dask.array")
    layer = bn.BatchNorm(6)
    x = data.batch((40, 6), mean=3.0)
    bn.recalibrate(layer, layer, [da.from_array(x[:24], chunks=(7, 4)), da.from_array(x[24:])])
    np.testing.assert_allclose(layer.running_mean, x.astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, x.astype(float).var(0, ddof=1), rtol=1e-6)
    y = layer.eval()(da.from_array(x))
    wanted = (x - x.astype(float).mean(0)) / np.sqrt(x.astype(float).var(0, ddof=1) + EPS)
    np.testing.assert_allclose(y.compute(), wanted, atol=2e-6)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    layer = bn.BatchNorm(6)
    x = data.batch((40, 6), mean=3.0)
    bn.recalibrate(layer, layer, torch.from_numpy(x).split(16))
    np.testing.assert_allclose(layer.running_mean.numpy(), x.astype(float).mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("layers", "batches", "error", "message"),
    [
        ([], [1], ValueError, "layers: got none, expected at least one BatchNorm"),
        ([3], [1], TypeError, r"layers\[0\]: got an int, expected a BatchNorm"),
        (
            [bn.BatchNorm(3, track_running_stats=False)],
            [1],
            ValueError,
            r"layers\[0\]: got a layer with track_running_stats=False, expected one with",
        ),
        ([bn.BatchNorm(3)], [], ValueError, "batches: got none, expected at least one"),
        (
            [bn.BatchNorm(3)],
            [1],
            ValueError,
            r"layers\[0\]: got no input from any batch, expected a layer that `forward` calls",
        ),
    ],
)
def test_errors(layers, batches, error, message):
    with pytest.raises(error, match=message):
        bn.recalibrate(layers, lambda batch: None, batches, progress=False)
