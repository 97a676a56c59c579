"""Networks of the gallery: chains of layers, each of which has a forward and a backward pass.

All arrays are NumPy arrays. Shapes in comments: N examples in a batch, D inputs and H outputs of a
layer, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.demo import network

Array = npt.NDArray[Any]

PARAMETERS = ("weight", "bias", "gamma", "beta")


class Linear:
    """Linear layer y = x·W + b, with W drawn from a Gaussian of standard deviation scale/√D."""

    def __init__(
        self, inputs: int, outputs: int, rng: np.random.Generator, scale: float = 1.0, bias: bool = True
    ) -> None:
        self.weight = rng.standard_normal((inputs, outputs)) * scale / np.sqrt(inputs)  # (D, H)
        self.bias = np.zeros(outputs) if bias else None  # (H,)

    def __call__(self, x: Array) -> Array:
        """Return y (N, H)."""
        self.x = x  # (N, D)
        y: Array = x @ self.weight  # (N, H)
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        """Return the gradient of x, and store those of W and b."""
        self.weight_grad = self.x.T @ dy  # (D, H)
        self.bias_grad = np.sum(dy, axis=0)  # (H,)
        dx: Array = dy @ self.weight.T  # (N, D)
        return dx


class Activation:
    """Elementwise function y = f(x) whose derivative is given by `slope`, a function of y."""

    def __init__(self, function: Callable[[Array], Array], slope: Callable[[Array], Array]) -> None:
        self.function, self.slope = function, slope

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self.y = self.function(x)
        return self.y

    def backward(self, dy: Array) -> Array:
        """Return the gradient of x."""
        return dy * self.slope(self.y)


def sigmoid() -> Activation:
    """Return a layer of the logistic function."""
    return Activation(network.sigmoid, lambda y: y * (1 - y))


class Chain(list[Any]):
    """Sequence of layers. A layer, such as `BatchNorm`, is a callable with a method `backward`."""

    def __call__(self, x: Array) -> Array:
        """Return the output of the last layer."""
        for layer in self:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Return the gradient of the input; the layers store those of their parameters."""
        for layer in reversed(self):
            dy = layer.backward(dy)
        return dy

    def gradients(self) -> Iterable[tuple[Any, str, Array]]:
        """Yield each layer, the name of each of its parameters, and the gradient of the parameter."""
        for layer in self:
            for name in PARAMETERS:
                if getattr(layer, name, None) is not None:
                    yield layer, name, getattr(layer, f"{name}_grad")

    def descend(self, rate: float) -> None:
        """Make one step of gradient descent with the gradients of the last `backward`."""
        for layer, name, gradient in self.gradients():
            setattr(layer, name, getattr(layer, name) - rate * gradient)


def cross_entropy(scores: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean cross-entropy (nats) of scores (N, K) and classes (N,), and its gradient."""
    shifted = scores - scores.max(axis=1, keepdims=True)  # (N, K)
    logs = shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))  # (N, K)
    rows = np.arange(len(labels))
    gradient = np.exp(logs)
    gradient[rows, labels] -= 1
    return -float(np.mean(logs[rows, labels])), gradient / len(labels)


def accuracy(scores: Array, labels: Array) -> float:
    """Return the fraction of rows (N, K) whose highest score is that of their class (N,)."""
    return float(np.mean(scores.argmax(axis=1) == labels))
