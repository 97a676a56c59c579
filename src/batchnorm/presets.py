"""Default settings of batch norm in other frameworks, in the conventions of this package.

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


OLD = "the old value's weight"
NEW = "the new batch's weight"

PRESETS = {
    "pytorch": Preset(1, 1e-5, 0.1, 1, "torch.nn.BatchNorm2d", f"momentum=0.1, {NEW}"),
    "keras": Preset(-1, 1e-3, 0.01, 0, "BatchNormalization", f"momentum=0.99, {OLD}"),
    "flax": Preset(-1, 1e-5, 0.01, 0, "nnx.BatchNorm", f"momentum=0.99, {OLD}"),
    "chainer": Preset(1, 2e-5, 0.1, 1, "links.BatchNormalization", f"decay=0.9, {OLD}"),
    "onnx": Preset(1, 1e-5, 0.1, 0, "BatchNormalization", f"momentum=0.9, {OLD}"),
    # Haiku's decay_rate has no default. This is that of its ResNet and of its documentation's examples.
    "haiku": Preset(-1, 1e-5, 0.1, 0, "hk.BatchNorm", f"decay_rate=0.9 (its ResNet's), {OLD}"),
    "equinox": Preset(1, 1e-5, 0.01, 0, 'eqx.nn.BatchNorm, mode="batch"', f"momentum=0.99, {OLD}"),
    # Not of tf.nn.fused_batch_norm, which returns the unbiased variance.
    "tensorflow": Preset(
        -1, 1e-3, 0.01, 0, "tf.keras.layers.BatchNormalization", f"momentum=0.99, {OLD}"
    ),
    # Not of cuDNN, which MXNet may use on a GPU, and which adds the unbiased variance.
    "mxnet": Preset(1, 1e-5, 0.1, 0, "gluon.nn.BatchNorm", f"momentum=0.9, {OLD}"),
    "mlx": Preset(-1, 1e-5, 0.1, 1, "mlx.nn.BatchNorm", f"momentum=0.1, {NEW}"),
    "tinygrad": Preset(1, 1e-5, 0.1, 1, "tinygrad.nn.BatchNorm", f"momentum=0.1, {NEW}"),
}
