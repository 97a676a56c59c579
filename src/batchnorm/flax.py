"""A Flax module on this package's passes: `flax.nnx.BatchNorm`'s arguments, variables and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

import batchnorm as bn
from batchnorm import checks

Array = Any


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` on this package's passes.

    Takes the same arguments, holds the same variables (`scale`, `bias`, `mean`, `var`), and is one to
    ``isinstance``. Statistics are exact whatever the mean of the data: `use_fast_variance` changes
    nothing here. A `mask` leaves values out; ranks along `axis_name` are weighed by what they count.

    Raises
    ------
    TypeError, ValueError
        As `nnx.BatchNorm` and `batchnorm.batch_norm`.
    """

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalize, and update the running statistics where the batch's own are used."""
        frozen = self.use_running_average if use_running_average is None else use_running_average
        if frozen is None:
            checks.fail(
                ValueError, "use_running_average", "None", "True or False, here or in the module"
            )
        axes = _channels(self.axis, x.ndim)
        gamma = self.scale[...] if self.scale is not None else None
        beta = self.bias[...] if self.bias is not None else None
        mean, var = self.mean[...], self.var[...]
        x, _, _, gamma, beta = self.promote_dtype((x, mean, var, gamma, beta), dtype=self.dtype)
        axis = axes[0] if len(axes) == 1 else axes
        if frozen:
            return bn.normalize(x, mean, var, gamma, beta, axis=axis, eps=self.epsilon)
        group = None if self.axis_name is None else _Group(self.axis_name, self.axis_index_groups)
        y, stats = bn.batch_norm(x, gamma, beta, axis=axis, eps=self.epsilon, where=mask, group=group)
        mean, var = bn.update_running(mean, var, stats, momentum=1 - self.momentum, correction=0)
        self.mean[...] = jax.lax.stop_gradient(mean)
        self.var[...] = jax.lax.stop_gradient(var)
        return y


class _Group:
    """Ranks along an axis name, each of which has a part of the batch."""

    def __init__(self, name: Any, groups: Any) -> None:
        self.name, self.groups = name, groups

    def all_reduce(self, v: Array) -> Array:
        """The sum over the ranks."""
        psum: Any = jax.lax.psum
        return psum(v, self.name, axis_index_groups=self.groups)


def _channels(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(sorted(a % ndim for a in (axis if isinstance(axis, Sequence) else (axis,))))
