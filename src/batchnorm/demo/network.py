"""A network with three hidden layers of 100 sigmoid units, and a step of SGD, in array API code.

A step takes the state as an argument and returns the new one, so that `jax.jit` can compile it. Shapes
in comments: N images, D = 64 pixels, H = 100 units, K = 10 digits.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

import batchnorm as bn

Array = Any
State = dict[str, Array]

HIDDEN = 3
WIDTH = 100
EPS = 1e-5


class Settings(NamedTuple):
    """Settings of the training of a network."""

    batch_norm: bool
    learning_rate: float


def initial(settings: Settings, pixels: int, digits: int, seed: int) -> dict[str, np.ndarray]:
    """Return small Gaussian weights, as in the paper, the same with and without batch norm."""
    rng = np.random.default_rng(seed)
    widths = [pixels] + [WIDTH] * HIDDEN + [digits]
    state: dict[str, np.ndarray] = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(widths)):
        state[f"weight{i}"] = rng.standard_normal((rows, columns)) / np.sqrt(rows)
        if i < HIDDEN and settings.batch_norm:  # beta replaces the bias
            for name, value in (("gamma", 1.0), ("beta", 0.0), ("mean", 0.0), ("var", 1.0)):
                state[f"{name}{i}"] = np.full(columns, value)
        else:
            state[f"bias{i}"] = np.zeros(columns)
    return {name: value.astype(np.float32) for name, value in state.items()}


def sigmoid(z: Array) -> Array:
    """Compute the logistic function from tanh, which does not overflow."""
    return 0.5 * (1 + array_namespace(z).tanh(0.5 * z))


def step(state: State, images: Array, labels: Array, settings: Settings) -> State:
    """Make one step of gradient descent on the cross-entropy of a batch.

    Parameters
    ----------
    state : dict of arrays
        The state, as returned by `initial`.
    images : array, shape (N, D)
        Pixels.
    labels : array, shape (N, K)
        One-hot labels.
    settings : Settings
        Static settings.

    Returns
    -------
    dict of arrays
        The new state.
    """
    xp = array_namespace(images)
    new = dict(state)
    inputs, normalized = [images], []  # of each linear layer (N, D or H); and of each norm
    for i in range(HIDDEN):
        z = xp.matmul(inputs[-1], state[f"weight{i}"])  # (N, H)
        if settings.batch_norm:
            y, stats = bn.batch_norm(z, state[f"gamma{i}"], state[f"beta{i}"], eps=EPS)  # (N, H)
            normalized.append((z, stats))
            new[f"mean{i}"], new[f"var{i}"] = bn.update_running(
                state[f"mean{i}"], state[f"var{i}"], stats
            )
        else:
            y = z + state[f"bias{i}"]  # (N, H)
        inputs.append(sigmoid(y))
    logits = xp.matmul(inputs[-1], state[f"weight{HIDDEN}"]) + state[f"bias{HIDDEN}"]  # (N, K)

    gradients: State = {}
    dz = (_softmax(logits) - labels) / images.shape[0]  # (N, K)
    gradients[f"bias{HIDDEN}"] = xp.sum(dz, axis=0)  # (K,)
    for i in reversed(range(HIDDEN + 1)):
        gradients[f"weight{i}"] = xp.matmul(xp.matrix_transpose(inputs[i]), dz)  # (D or H, H or K)
        if i == 0:
            break
        da = xp.matmul(dz, xp.matrix_transpose(state[f"weight{i}"]))  # (N, H)
        dy = da * inputs[i] * (1 - inputs[i])  # (N, H), through the sigmoid
        if settings.batch_norm:
            z, stats = normalized[i - 1]
            dz, dgamma, dbeta = bn.batch_norm_backward(dy, z, stats, state[f"gamma{i - 1}"], eps=EPS)
            gradients[f"gamma{i - 1}"], gradients[f"beta{i - 1}"] = dgamma, dbeta  # (H,), (H,)
        else:
            dz = dy
            gradients[f"bias{i - 1}"] = xp.sum(dz, axis=0)  # (H,)

    for name, gradient in gradients.items():
        new[name] = state[name] - settings.learning_rate * gradient
    return new


def predict(state: State, images: Array, settings: Settings) -> tuple[Array, Array]:
    """Return the scores of the digits (N, K), and the input of the last sigmoids (N, H)."""
    xp = array_namespace(images)
    a = images
    for i in range(HIDDEN):
        z = xp.matmul(a, state[f"weight{i}"])
        if settings.batch_norm:
            mean, var = state[f"mean{i}"], state[f"var{i}"]
            y = bn.normalize(z, mean, var, state[f"gamma{i}"], state[f"beta{i}"], eps=EPS)
        else:
            y = z + state[f"bias{i}"]
        a = sigmoid(y)
    return xp.matmul(a, state[f"weight{HIDDEN}"]) + state[f"bias{HIDDEN}"], y


def _softmax(logits: Array) -> Array:
    xp = array_namespace(logits)
    e = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))  # (N, K)
    return e / xp.sum(e, axis=1, keepdims=True)
