"""Errors of batch norms on float32 data with std 1 and a large mean, against a float64 oracle."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
import torch
from flax import nnx

import batchnorm as bn

MEANS = (0.0, 1e2, 1e4, 1e6)
SHAPE = (390_625, 64)  # channels last: 25 million values
EPS = 1e-5


def oracle(x):
    """Two passes in float64."""
    wide = x.astype(np.float64)
    d = wide - wide.mean(axis=0)
    return d / np.sqrt((d * d).mean(axis=0) + EPS)


def ours(convert, compiled=lambda f: f):
    """This package, on the arrays of some library."""
    normalize = compiled(lambda x: bn.batch_norm(x, axis=-1, eps=EPS)[0])
    return lambda x: np.asarray(normalize(convert(x)))


def torch_last(x):
    """PyTorch, channels last."""
    image = torch.from_numpy(x).reshape(625, 625, 1, 64).permute(0, 3, 1, 2)
    y = torch.nn.functional.batch_norm(image, None, None, training=True, eps=EPS)
    return y.permute(0, 2, 3, 1).reshape(SHAPE).numpy()


def torch_first(x):
    """PyTorch, channels second."""
    image = torch.from_numpy(np.ascontiguousarray(x.T)).reshape(1, 64, 625, 625)
    y = torch.nn.functional.batch_norm(image, None, None, training=True, eps=EPS)
    return y.reshape(64, -1).T.numpy()


def flax(fast):
    """Flax, with its default variance or the other one."""
    layer = nnx.BatchNorm(64, epsilon=EPS, use_fast_variance=fast, rngs=nnx.Rngs(0))
    return lambda x: np.asarray(layer(x))


def keras_layer(x):
    """Keras on JAX."""
    return np.asarray(keras.layers.BatchNormalization(epsilon=EPS)(x, training=True))


NORMS = {
    "batchnorm, NumPy": ours(np.asarray),
    "batchnorm, PyTorch": ours(torch.from_numpy),
    "batchnorm, JAX without float64": ours(jax.numpy.asarray, jax.jit),
    "PyTorch, channels last": torch_last,
    "PyTorch, channels second": torch_first,
    "Flax, its default": flax(True),
    "Flax, use_fast_variance=False": flax(False),
    "Keras on JAX": keras_layer,
}

print("largest error, in standard deviations of the output, at a mean of")
print(f"{'':32}" + "".join(f"{mean:>10g}" for mean in MEANS))
errors = {name: [] for name in NORMS}
for mean in MEANS:
    x = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32) + np.float32(mean)
    expected = oracle(x)
    for name, norm in NORMS.items():
        errors[name].append(np.max(np.abs(norm(x) - expected)))
for name, row in errors.items():
    print(f"{name:32}" + "".join(f"{error:>10.1e}" for error in row))
