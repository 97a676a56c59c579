"""A Flax module with the interface of `flax.nnx.BatchNorm` and the implementation of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

import batchnorm as bn
from batchnorm.distributed import jax as jax_group
from batchnorm.epilogue import validate_activation
from batchnorm.errors import fail

Array = Any


class BatchNorm(nnx.BatchNorm):
    """A subclass of `flax.nnx.BatchNorm` that computes with this package.

    It has the same arguments and variables (`scale`, `bias`, `mean`, `var`). Statistics are exact for
    data of any mean, and `use_fast_variance` has no effect. A `mask` excludes values; devices along
    `axis_name` are weighted by the number of their values. The `activation` (of the module) and the
    `residual` (of a call, cast to the dtype of x) are those of `batchnorm.batch_norm`.

    Raises
    ------
    TypeError, ValueError
        As `nnx.BatchNorm` and `batchnorm.batch_norm`.
    """

    def __init__(self, *args: Any, activation: Any = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.activation = validate_activation(activation)

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalize; if the statistics of the batch are used, update the running statistics."""
        frozen = self.use_running_average if use_running_average is None else use_running_average
        if frozen is None:
            fail(ValueError, "use_running_average", "None", "True or False, here or in the module")
        axes = _channel_axes(self.axis, x.ndim)
        gamma = self.scale[...] if self.scale is not None else None
        beta = self.bias[...] if self.bias is not None else None
        mean, var = self.mean[...], self.var[...]
        x, _, _, gamma, beta = self.promote_dtype((x, mean, var, gamma, beta), dtype=self.dtype)
        settings: dict[str, Any] = {"axis": axes[0] if len(axes) == 1 else axes, "eps": self.epsilon}
        settings |= {"activation": self.activation}
        if residual is not None:
            settings |= {"residual": residual.astype(x.dtype)}
        if frozen:
            return bn.normalize(x, mean, var, gamma, beta, **settings)
        group = None if self.axis_name is None else jax_group(self.axis_name, self.axis_index_groups)
        y, stats = bn.batch_norm(x, gamma, beta, where=mask, group=group, **settings)
        mean, var = bn.update_running(mean, var, stats, momentum=1 - self.momentum, correction=0)
        try:
            self.mean.set_value(jax.lax.stop_gradient(mean))
            self.var.set_value(jax.lax.stop_gradient(var))
        except TraceContextError as error:
            error.add_note(
                "BatchNorm: got a training pass that JAX traces, of a module that was made outside,"
                " expected nnx.jit (or nnx.split before and nnx.merge inside) in the place of jax.jit,"
                " or use_running_average=True"
            )
            raise
        return y


def _channel_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(sorted(a % ndim for a in (axis if isinstance(axis, Sequence) else (axis,))))
