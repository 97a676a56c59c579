"""One training step with the settings of each framework, against numbers recorded from the frameworks.

A framework that is installed makes the step too, in a process of its own: its numbers have to be the
recorded ones. `python tests/test_presets.py NAME` is that process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.presets import PRESETS

# Means 4 and 1/16; population variances 5 and 6/4096, the second as small as an eps.
X = np.asarray([[1, 2 / 64], [3, 2 / 64], [5, 8 / 64], [7, 4 / 64]], np.float32)  # (N, C)


class Step(NamedTuple):
    """What a framework has after one training step on X from a mean of 0 and a variance of 1."""

    mean: tuple[float, float]
    var: tuple[float, float]
    y: tuple[float, float]
    """The first row of the output."""


FAST, SLOW = (0.4, 0.00625), (0.04, 0.000625)  # means, with a weight of the new batch of 0.1 or 0.01
EPS_1E5, EPS_1E3 = (-1.341639, -0.8137238), (-1.341507, -0.6294415)
RECORDED = {
    "pytorch": Step(FAST, (1.566667, 0.9001953), EPS_1E5),
    "keras": Step(SLOW, (1.04, 0.9900146), EPS_1E3),
    "flax": Step(SLOW, (1.04, 0.9900146), EPS_1E5),
    "chainer": Step(FAST, (1.566667, 0.9001953), (-1.341638, -0.8109791)),  # by its documentation
    "onnx": Step(FAST, (1.4, 0.9001465), EPS_1E5),
    # Its state starts at a variance of 0, and is divided by 1 - 0.9^k when it is used.
    "haiku": Step(FAST, (0.5, 0.0001464844), EPS_1E5),
    "equinox": Step(SLOW, (1.04, 0.9900146), EPS_1E5),
    "tensorflow": Step(SLOW, (1.04, 0.9900146), EPS_1E3),
    "mxnet": Step(FAST, (1.4, 0.9001465), EPS_1E5),  # by the source of its operator for CPUs
    "mlx": Step(FAST, (1.566667, 0.9001953), EPS_1E5),
    "tinygrad": Step(FAST, (1.566667, 0.9001953), EPS_1E5),
}
START = {"haiku": 0.0}  # the running variance before the first step, where it is not 1


def haiku():
    import haiku as hk
    import jax

    def network(x):
        return hk.BatchNorm(True, True, 1 - PRESETS["haiku"].momentum)(x, is_training=True)

    made = hk.transform_with_state(network)
    parameters, state = made.init(jax.random.PRNGKey(0), X)
    y, state = made.apply(parameters, state, None, X)
    found = [state[f"batch_norm/~/{name}_ema"] for name in ("mean", "var")]
    for (average, hidden), batch in zip(
        ((v["average"], v["hidden"]) for v in found), (X.mean(0), X.var(0)), strict=True
    ):
        np.testing.assert_allclose(average, hidden / 0.1, rtol=1e-5)  # after one step
        np.testing.assert_allclose(average[0], batch, rtol=1e-5)
    return found[0]["hidden"][0], found[1]["hidden"][0], y


def equinox():
    import equinox as eqx
    import jax

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, axis_name="batch", mode="batch")
    axes = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    y, state = jax.vmap(layer, **axes)(X, state)
    mean, var = state.get(layer.batch_state_index)
    z, _ = jax.vmap(eqx.nn.inference_mode(layer), **axes)(X, state)
    divided = bn.normalize(X, np.asarray(mean / 0.01), np.asarray(var / 0.01))
    np.testing.assert_allclose(z, divided, rtol=1e-4, atol=1e-6)  # as docs/conventions.md says
    return mean, var, y


def tensorflow():
    import tensorflow as tf

    layer = tf.keras.layers.BatchNormalization()
    y = layer(X.reshape(2, 2, 1, 2), training=True)  # of the rank for which there is a fused kernel
    ones, zeros = tf.ones(2), tf.zeros(2)
    fused = tf.compat.v1.nn.fused_batch_norm(X.reshape(2, 2, 1, 2), ones, zeros, is_training=True)
    np.testing.assert_allclose(fused[2], X.var(0, ddof=1), rtol=1e-5)  # which the preset does not follow
    return layer.moving_mean.numpy(), layer.moving_variance.numpy(), y.numpy().reshape(4, 2)


def mlx():
    import mlx.core as mx
    import mlx.nn

    layer = mlx.nn.BatchNorm(2)
    y = layer(mx.array(X))
    return layer.running_mean, layer.running_var, y


def tinygrad():
    from tinygrad import Tensor, nn
    from tinygrad.helpers import Context

    layer = nn.BatchNorm(2)
    with Context(TRAINING=1):
        y = layer(Tensor(X)).numpy()
    return layer.running_mean.numpy(), layer.running_var.numpy(), y


FRAMEWORKS = {f.__name__: f for f in (haiku, equinox, tensorflow, mlx, tinygrad)}
# Keras on TensorFlow; and tinygrad's interpreter, which needs no compiler.
ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
    "DEV": "PYTHON",
}


def is_recorded(name, mean, var, y):
    for found, recorded in zip((mean, var, y), RECORDED[name], strict=True):
        np.testing.assert_allclose(found, recorded, rtol=2e-6)


def test_each_preset_has_a_record():
    assert set(RECORDED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_our_step_is_the_recorded_one(name):
    layer = bn.BatchNorm.like(name, 2)
    if name in START:
        layer.running_var = np.full(2, START[name])
    x = X if layer.axis == -1 else X.T.reshape(1, 2, 4)  # channels last or second
    y = layer(x)
    layer.update()
    is_recorded(
        name, layer.running_mean, layer.running_var, np.moveaxis(y, layer.axis, -1).reshape(4, 2)[0]
    )


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_framework_s_step_is_the_recorded_one(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, __file__, name],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    is_recorded(name, *json.loads(done.stdout.splitlines()[-1]))


def test_haiku_s_averages_from_ours():
    """Haiku's averages after k steps are ours from 0, divided by 1 - 0.9^k."""
    layer = bn.BatchNorm.like("haiku", 2)
    layer.running_var = np.zeros(2)
    weights = []
    for k in range(1, 6):
        layer(X * k)
        layer.update()
        weights = [0.9 * w for w in weights] + [0.1]
        average = sum(w * (X * i).mean(0) for i, w in enumerate(weights, 1)) / sum(weights)
        np.testing.assert_allclose(layer.running_mean / (1 - 0.9**k), average, rtol=1e-6)


if __name__ == "__main__":
    mean, var, y = (np.asarray(v) for v in FRAMEWORKS[sys.argv[1]]())
    print(json.dumps([mean.tolist(), var.tolist(), y[0].tolist()]))
