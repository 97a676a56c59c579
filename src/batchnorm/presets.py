"""Default settings of batch norm in five frameworks, in the conventions of this package.

`BatchNorm.like` uses this table, and the documentation contains it.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Default settings of a framework's layer."""

    axis: int
    eps: float
    momentum: float
    """The weight of the new batch, in every framework."""
    correction: int
    """1 if the running variance is unbiased, 0 if it is the population variance."""
    layer: str
    """The layer or operator that has these defaults."""
    theirs: str
    """The framework's own definition of its `momentum`."""

    def settings(self) -> dict[str, float]:
        """Return the arguments of `BatchNorm` that have the framework's defaults."""
        return {name: getattr(self, name) for name in ("axis", "eps", "momentum", "correction")}


PRESETS = {
    "pytorch": Preset(1, 1e-5, 0.1, 1, "torch.nn.BatchNorm2d", "momentum=0.1, the new batch's weight"),
    "keras": Preset(-1, 1e-3, 0.01, 0, "BatchNormalization", "momentum=0.99, the old value's weight"),
    "flax": Preset(-1, 1e-5, 0.01, 0, "nnx.BatchNorm", "momentum=0.99, the old value's weight"),
    "chainer": Preset(1, 2e-5, 0.1, 1, "links.BatchNormalization", "decay=0.9, the old value's weight"),
    "onnx": Preset(1, 1e-5, 0.1, 0, "BatchNormalization", "momentum=0.9, the old value's weight"),
}
