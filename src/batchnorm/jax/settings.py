"""What of a pass is not an array: the parameters of JAX's primitives."""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.epilogue import Activation


class Settings(NamedTuple):
    """The parameters of a pass, which JAX compares and hashes."""

    axes: tuple[int, ...]
    """The channel axes of x, non-negative and increasing."""
    eps: float = 0.0
    activation: Activation | None = None
    gradient: bool = False
    """Whether a backward pass returns the gradient to the residual."""
