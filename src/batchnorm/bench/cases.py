"""Cases of the benchmark: shapes of real networks, layouts and passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = Any

# Channels second, as PyTorch writes them. Every distinct batch norm of ResNet-50 (He et al. 2016) at a
# batch of 32, two of DenseNet-121 (Huang et al. 2017), and layers of other kinds.
SHAPES = {
    "ResNet-50 stem": (32, 64, 112, 112),
    "ResNet-50 stage 1": (32, 64, 56, 56),
    "ResNet-50 stage 1 out": (32, 256, 56, 56),
    "ResNet-50 stage 2 in": (32, 128, 56, 56),
    "ResNet-50 stage 2": (32, 128, 28, 28),
    "ResNet-50 stage 2 out": (32, 512, 28, 28),
    "ResNet-50 stage 3 in": (32, 256, 28, 28),
    "ResNet-50 stage 3": (32, 256, 14, 14),
    "ResNet-50 stage 3 out": (32, 1024, 14, 14),
    "ResNet-50 stage 4 in": (32, 512, 14, 14),
    "ResNet-50 stage 4": (32, 512, 7, 7),
    "ResNet-50 stage 4 out": (32, 2048, 7, 7),
    "DenseNet block 1": (32, 192, 56, 56),
    "DenseNet block 4": (32, 992, 7, 7),
    "MLP": (256, 1024),
    "MLP, small": (64, 100),
    "sequence": (32, 512, 256),
    "3-D": (2, 32, 16, 112, 112),
}

# The shapes of `python -m batchnorm bench` without `--all`: one of each kind and size.
FEW = (
    "ResNet-50 stem",
    "ResNet-50 stage 1",
    "ResNet-50 stage 4 out",
    "MLP",
    "MLP, small",
    "sequence",
)

LAYOUTS = ("second", "last")
PASSES = ("forward", "backward", "inference")


class Case(NamedTuple):
    """NumPy arrays to normalize, contiguous in their layout."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    axis: int
    z: Array | None = None
    """A residual, which is added before a ReLU; None for the norm alone."""

    @property
    def last(self) -> bool:
        """Whether channels are last in memory."""
        return self.axis == -1


def case(
    shape: tuple[int, ...], layout: str, dtype: Any = np.float32, seed: int = 0, *, fused: bool = False
) -> Case:
    """Return normally distributed data with a mean of 3; with `fused`, a residual too."""
    rng = np.random.default_rng(seed)
    x, dy, z = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    x += 3
    channels = shape[1]
    if layout == "last":
        order = (0, *range(2, len(shape)), 1)
        x, dy, z = (np.ascontiguousarray(a.transpose(order)) for a in (x, dy, z))
    gamma, beta = rng.uniform(0.5, 2, channels), rng.standard_normal(channels)
    given = (gamma, beta, np.full(channels, 3.0), np.ones(channels))
    vectors: list[Array] = [v.astype(np.float32) for v in given]
    axis = 1 if layout == "second" else -1
    gamma, beta, mean, var = vectors
    x, dy, z = (a.astype(dtype) for a in (x, dy, z))
    return Case(x, dy, gamma, beta, mean, var, axis, z if fused else None)
