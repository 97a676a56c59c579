"""The 1,797 handwritten digits of scikit-learn, batches of them, and training."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from batchnorm.demo.chain import Chain, Linear, cross_entropy, sigmoid

Array = npt.NDArray[Any]

WIDTH = 50  # units in a hidden layer


class Digits(NamedTuple):
    """Pixels from 0 to 1 of shapes (1437, 64) and (360, 64), and classes from 0 to 9."""

    train_x: Array
    test_x: Array
    train_y: Array
    test_y: Array


@functools.cache
def digits() -> Digits:
    """Return the digits, with the same split at every call."""
    loaded = load_digits()
    return Digits(*train_test_split(loaded.data / 16, loaded.target, test_size=360, random_state=0))


def batches(count: int, size: int, seed: int) -> Iterator[Array]:
    """Yield indices of batches endlessly; each epoch has a new order and omits an incomplete batch."""
    if not 0 < size <= count:
        raise ValueError(f"size: got {size}, expected 1 to {count}, the number of examples")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from order[: count // size * size].reshape(-1, size)


def reader(
    rng: np.random.Generator, norms: Iterable[Iterable[Any]], scale: float = 1.0, bias: bool = True
) -> Chain:
    """Return a network with hidden layers of 50 sigmoid units and ten scores.

    Each element of `norms` contains the layers before the sigmoids of one hidden layer.
    """
    net, inputs = Chain(), digits().train_x.shape[1]
    for norm in norms:
        net += [Linear(inputs, WIDTH, rng, scale, bias), *norm, sigmoid()]
        inputs = WIDTH
    net.append(Linear(inputs, 10, rng))
    return net


def learn(net: Chain, rate: float, size: int, steps: int, seed: int) -> Iterator[float]:
    """Train on the digits by gradient descent; yield the loss before each step."""
    data = digits()
    order = batches(len(data.train_x), size, seed)
    for _ in range(steps):
        chosen = next(order)
        loss, gradient = cross_entropy(net(data.train_x[chosen]), data.train_y[chosen])
        net.backward(gradient)
        net.descend(rate)
        yield loss
