"""The forward pass of JAX's arrays with a rule for its derivative.

JAX differentiates array API code by itself, in several times as many passes over the big array as it
takes. The rule is for forward mode; JAX transposes it for reverse mode, and differentiates it again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from batchnorm.kernels import KernelSet, generic
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any

# So that an exported function may take or return them; who loads it imports this module before.
jax.export.register_namedtuple_serialization(Moments, serialized_name="batchnorm.Moments")


def forward(
    x: Array,
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: Any,
    at: Layout,
    out: Array | None,
) -> tuple[Array, Moments]:
    """Give y and the batch's moments."""
    ruled = isinstance(eps, float) and (w is None or w.dtype == bool)
    function = _ruled if ruled else _plain  # gradients to eps and to real weights are JAX's own
    y, stats = function(x, w, gamma, beta, eps, at)
    return y, stats


def _plain(
    x: Array, w: Array | None, gamma: Array | None, beta: Array | None, eps: Any, at: Layout
) -> tuple[Array, Moments]:
    from batchnorm import vectors  # which imports this package's kernels

    stats = vectors.moments_by(kernel_set(), at, x, w)
    return vectors.scale_shift_by(kernel_set(), at, x, stats, gamma, beta, eps, None), stats


_ruled: Any = functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))(_plain)


@_ruled.defjvp  # type: ignore[untyped-decorator]
def _tangents(eps: float, at: Layout, given: Any, along: Any) -> Any:
    from batchnorm.derivatives import batch_norm_jvp

    # NumPy's arrays come as they are, to a rule too.
    x, w, gamma, beta = (v if v is None else jnp.asarray(v) for v in given)
    dx, dgamma, dbeta = (v if v is None else jnp.asarray(v) for v in (along[0], *along[2:]))
    y, stats = _ruled(x, w, gamma, beta, eps, at)
    axis = at.kept[0] if len(at.kept) == 1 else at.kept
    dy, dmean, dvar = batch_norm_jvp(dx, dgamma, dbeta, x, stats, gamma, axis=axis, eps=eps, where=w)
    count, low = (at.xp.zeros_like(v) for v in (stats.count, stats.mean_lo))
    return (y, stats), (dy, Moments(count, dmean, dvar, low))


@functools.cache
def kernel_set() -> KernelSet:
    """Array API code, and the fused pass with its rule."""

    def writing(kernel: Any) -> Any:
        return lambda *arguments: kernel(*arguments[:-1])  # there is no `out` in JAX

    return KernelSet(
        "jax",
        "array API code that XLA fuses, with a rule for its derivative",
        generic.moments,
        writing(generic.scale_shift),
        generic.grad_sums,
        writing(generic.grad_input),
        forward,
    )
