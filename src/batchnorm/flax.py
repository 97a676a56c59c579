"""A Flax module with the interface of `flax.nnx.BatchNorm` and the implementation of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

import batchnorm as bn
from batchnorm.arguments import validate_choice
from batchnorm.degenerate import CHOICES
from batchnorm.distributed import jax as jax_group
from batchnorm.epilogue import validate_activation
from batchnorm.errors import fail
from batchnorm.training import validate_renorm, validate_together

Array = Any


class BatchNorm(nnx.BatchNorm):
    """A subclass of `flax.nnx.BatchNorm` that computes with this package.

    It has the same arguments and variables (`scale`, `bias`, `mean`, `var`). Statistics are exact for
    data of any mean, and `use_fast_variance` has no effect. A `mask` excludes values; devices along
    `axis_name` are weighted by the number of their values. The `activation` and `degenerate` (of the
    module) and the `residual` (of a call, cast to the dtype of x) are those of `batchnorm.batch_norm`;
    ``renorm=(r_max, d_max)`` has the limits of `batchnorm.batch_renorm`, numbers or None, and may be
    assigned to from step to step.

    Raises
    ------
    TypeError, ValueError
        As `nnx.BatchNorm` and `batchnorm.batch_norm`.
    """

    def __init__(
        self,
        *args: Any,
        activation: Any = None,
        degenerate: str = "raise",
        renorm: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> None:
        if renorm is not None and any(map(callable, validate_renorm(renorm) or ())):
            fail(TypeError, "renorm", "a function", "numbers: a module of Flax counts no batches")
        super().__init__(*args, **settings)
        self.activation = validate_activation(activation)
        self.degenerate = validate_choice("degenerate", degenerate, CHOICES)
        self.renorm = renorm
        validate_together(renorm, None, degenerate, None)

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
        settings |= {"where": mask, "group": group}
        momentum = 1 - self.momentum
        if self.renorm is None:
            y, stats = bn.batch_norm(x, gamma, beta, degenerate=self.degenerate, **settings)
            mean, var = bn.update_running(mean, var, stats, momentum=momentum, correction=0)
        else:
            limits = dict(zip(("r_max", "d_max"), self.renorm, strict=True))
            y, stats = bn.batch_renorm(x, mean, var, gamma, beta, **limits, **settings)
            mean, var = bn.update_renorm(mean, var, stats, momentum=momentum, eps=self.epsilon)
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
