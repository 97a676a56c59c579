"""The compiled core on JAX's arrays: on the CPU, through XLA's foreign-function interface."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm import core
from batchnorm.epilogue import Epilogue
from batchnorm.jax.array_code import Jax
from batchnorm.jax.primitives import BACKWARD, FORWARD, INFERENCE, MOMENTS
from batchnorm.jax.settings import Settings
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import validate_mask_count

Array = Any


def _elsewhere(a: Array) -> str | None:
    """Return why the handlers cannot work on an array where it is, or None."""
    if isinstance(a, jax.core.Tracer):
        platform = jax.default_backend()
        if platform != "cpu":
            return f"traced arrays are computed on the default device, a {platform}"
        spec = getattr(getattr(jax.typeof(a), "sharding", None), "spec", ())
        if any(axis is not None for axis in spec):
            return "an array is sharded, and XLA can cut array code only"
    elif isinstance(a, jax.Array):
        devices = a.devices()
        platform = next(iter(devices)).platform
        if platform != "cpu":
            return f"an array is on a {platform}"
        if len(devices) > 1:
            return f"an array is sharded over {len(devices)} devices, and XLA can cut array code only"
    return None


# Inference is one pass, which XLA runs as fast in array code, and together with what is around it. The
# core is faster on small arrays, where XLA's threads take longer to start than the pass, and on those
# whose memory comes anew from the system, which it asks for in large pages; not where vectors are a good
# part of the data.
MOST_CHANNELS = 8192
REUSED_BYTES = range(8 << 20, 32 << 20)


def _pays_in_inference(x: Array, layout: Layout) -> bool:
    if layout.values is None:  # a symbolic shape
        return False
    nbytes = math.prod(x.shape) * x.dtype.itemsize
    return math.prod(layout.channels) <= MOST_CHANNELS and nbytes not in REUSED_BYTES


class NativeJax(Jax):
    """The compiled core, by XLA's foreign-function interface; array code where there is no handler."""

    name = "native"
    summary = "the compiled core, called by XLA on the CPU"

    def refuses(self, arrays: tuple[Array | None, ...]) -> str | None:
        """Return why the handlers cannot run on the arrays of a call, or None."""
        missing = core.missing()
        if missing is not None:
            return f"the compiled core is not there: {missing}"
        reasons = (_elsewhere(a) for a in arrays if a is not None)
        return next((why for why in reasons if why is not None), None)

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
        if not isinstance(eps, float):  # gradients to eps are JAX's own
            return super().forward(x, w, gamma, beta, eps, layout, epilogue=epilogue)
        activation, residual, *_ = epilogue or (None, None)
        settings = Settings(layout.channel_axes, eps, activation)
        given = {"gamma": gamma, "beta": beta, "residual": residual}
        y, *vectors = FORWARD(settings, x=x, w=_weights(w), **given)
        stats = Moments(*vectors)
        validate_mask_count(layout, w, stats.count)
        return y, stats

    def statistics(self, x: Array, w: Array | None, layout: Layout) -> Moments:
        """Return count, mean and variance of each channel."""
        return Moments(*MOMENTS(Settings(layout.channel_axes), x=x, w=_weights(w)))

    def inference(
        self,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: Any,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return y from statistics that are given."""
        if not isinstance(eps, float) or not _pays_in_inference(x, layout):
            return super().inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue)
        activation, residual, *_ = epilogue or (None, None)
        settings = Settings(layout.channel_axes, eps, activation)
        given = {"mean": stats.mean, "var": stats.var, "low": stats.mean_lo}
        (y,) = INFERENCE(settings, x=x, gamma=gamma, beta=beta, residual=residual, **given)
        return y

    def backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: Any,
        layout: Layout,
        *,
        beta: Array | None = None,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, ...]:
        """Return dx, dgamma and dbeta in the dtype of gamma, and with a residual dresidual."""
        fused = epilogue is not None and epilogue.activation is not None
        if not fused or dy.dtype != x.dtype or not isinstance(eps, float):
            given: Any = {"beta": beta, "epilogue": epilogue}
            return super().backward(dy, x, w, stats, gamma, eps, layout, **given)
        return self._backward(dy, x, w, stats, gamma, beta, eps, layout, epilogue)

    def norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: Any,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return dx, dgamma and dbeta of the norm alone."""
        if dy.dtype != x.dtype or not isinstance(eps, float):
            return super().norm_backward(dy, x, w, stats, gamma, eps, layout)
        dx, dgamma, dbeta = self._backward(dy, x, w, stats, gamma, None, eps, layout, None)
        return dx, dgamma, dbeta

    def _backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        epilogue: Epilogue | None,
    ) -> tuple[Array, ...]:
        activation, residual, y, gradient = epilogue or (None, None, None, False)
        settings = Settings(layout.channel_axes, eps, activation, gradient)
        count = stats.count
        if not hasattr(count, "dtype") or count.shape != layout.channels:
            count = jnp.full(layout.channels, count, layout.wide)
        given = {"count": count, "mean": stats.mean, "var": stats.var, "low": stats.mean_lo}
        given |= {"w": _weights(w), "gamma": gamma, "beta": beta, "residual": residual, "y": y}
        return tuple(BACKWARD(settings, dy=dy, x=x, **given))


def _weights(w: Array | None) -> Array | None:
    """Return weights in a dtype that the handlers read."""
    if w is None or w.dtype == bool or jnp.issubdtype(w.dtype, jnp.floating):
        return w
    return w.astype(jnp.float32)


NATIVE_JAX = NativeJax()
