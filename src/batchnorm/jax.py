"""The forward pass of JAX's arrays with a rule for its derivative.

JAX differentiates array API code by itself, in several times as many passes over the big array as it
takes. The rule is for forward mode; JAX transposes it for reverse mode, and differentiates it again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from batchnorm.kernels import KernelSet, generic
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


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

    x, w, gamma, beta = given
    dx, _, dgamma, dbeta = along
    y, stats = _ruled(x, w, gamma, beta, eps, at)
    axis = at.kept[0] if len(at.kept) == 1 else at.kept
    dy, dmean, dvar = batch_norm_jvp(dx, dgamma, dbeta, x, stats, gamma, axis=axis, eps=eps, where=w)
    none = at.xp.zeros_like(stats.count)
    return (y, stats), (dy, Moments(none, dmean, dvar, none))


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
