"""The forward pass of JAX's arrays with a rule for its derivative.

JAX differentiates array API code by itself, in several times as many passes over the big array as it
takes. The rule is for forward mode; JAX transposes it for reverse mode, and differentiates it again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.backends.base import Backend
from batchnorm.backends.generic import GENERIC
from batchnorm.derivatives import jvp
from batchnorm.epilogue import Activation, Epilogue, epilogue_of
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


class Jax(Backend):
    """Array API code that XLA fuses, and a forward pass with a rule for its derivative."""

    name = "jax"
    summary = "array API code that XLA fuses, with a rule for its derivative"

    moments = GENERIC.moments
    scale_shift = GENERIC.scale_shift
    grad_sums = GENERIC.grad_sums
    grad_input = GENERIC.grad_input

    def forward(
        self,
        x: Array,
        w: Array | None,
        gamma: Array | None,
        beta: Array | None,
        eps: Any,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Moments]:
        """Return y and the batch's moments."""
        ruled = isinstance(eps, float) and (w is None or w.dtype == bool)
        function = _ruled if ruled else _plain  # gradients to eps and to real weights are JAX's own
        activation, residual, *_ = epilogue or (None, None)
        y, stats = function(x, w, gamma, beta, residual, eps, layout, activation)
        return y, stats


def _plain(
    x: Array,
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    eps: Any,
    layout: Layout,
    activation: Activation | None,
) -> tuple[Array, Moments]:
    epilogue = epilogue_of(activation, residual)
    return GENERIC.forward(x, w, gamma, beta, eps, layout, epilogue=epilogue)


_ruled: Any = functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))(_plain)


@_ruled.defjvp  # type: ignore[untyped-decorator]
def _tangents(eps: float, layout: Layout, activation: Activation | None, given: Any, along: Any) -> Any:
    # NumPy's arrays come as they are, to a rule too.
    x, w, gamma, beta, residual = (v if v is None else jnp.asarray(v) for v in given)
    dx, dgamma, dbeta, dz = (v if v is None else jnp.asarray(v) for v in (along[0], *along[2:]))
    y, stats = _ruled(x, w, gamma, beta, residual, eps, layout, activation)
    epilogue = epilogue_of(activation, residual)
    last: Any = {"beta": beta, "epilogue": epilogue, "dresidual": dz}
    dy, dmean, dvar = jvp(layout, dx, dgamma, dbeta, x, stats, gamma, w, eps, **last)
    count, low = (layout.xp.zeros_like(v) for v in (stats.count, stats.mean_lo))
    return (y, stats), (dy, Moments(count, dmean, dvar, low))


JAX = Jax()
