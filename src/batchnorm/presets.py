"""How five frameworks configure batch norm, in this package's terms.

The documentation prints this table; `BatchNorm.like` reads it.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Defaults of one framework's layer."""

    axis: int
    eps: float
    momentum: float
    """The weight of the new batch, whatever the framework calls it."""
    correction: int
    """1: the running variance is the unbiased one; 0: it is the population variance."""
    layer: str
    """The layer (or operator) that these are the defaults of."""
    theirs: str
    """The framework's own words for our `momentum`."""

    def settings(self) -> dict[str, float]:
        """The arguments of `BatchNorm` that the framework sets."""
        return {name: getattr(self, name) for name in ("axis", "eps", "momentum", "correction")}


PRESETS = {
    "pytorch": Preset(1, 1e-5, 0.1, 1, "torch.nn.BatchNorm2d", "momentum=0.1, the new batch's weight"),
    "keras": Preset(-1, 1e-3, 0.01, 0, "BatchNormalization", "momentum=0.99, the old value's weight"),
    "flax": Preset(-1, 1e-5, 0.01, 0, "nnx.BatchNorm", "momentum=0.99, the old value's weight"),
    "chainer": Preset(1, 2e-5, 0.1, 1, "links.BatchNormalization", "decay=0.9, the old value's weight"),
    "onnx": Preset(1, 1e-5, 0.1, 0, "BatchNormalization", "momentum=0.9, the old value's weight"),
}
