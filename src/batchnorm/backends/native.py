"""The compiled core, for NumPy arrays: the four kernels, and forward and backward passes fused.

The core is C++ in `src/native`; `core.py` loads it. It reads shapes, strides and dtypes itself, and
returns None for what it does not take.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm import core
from batchnorm.backends.base import Backend
from batchnorm.backends.generic import GENERIC
from batchnorm.coefficients import Renorm
from batchnorm.epilogue import Activation, Epilogue
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import validate_mask_count

Array = Any


def _arguments(epilogue: Epilogue | None) -> tuple[Array | None, Activation | None]:
    """Return the residual and the activation, as functions of the core take them."""
    return (None, None) if epilogue is None else (epilogue.residual, epilogue.activation)


def _readable(v: Array) -> bool:
    if v.dtype.name == "bfloat16":
        return True
    return bool(v.dtype.kind == "f" and v.dtype.isnative and v.itemsize <= 8)


class Native(Backend):
    """The compiled core, with forward and backward passes fused."""

    name = "native"
    summary = "the compiled core, for NumPy arrays and what shares their memory"

    def refuses(self, arrays: tuple[Array | None, ...]) -> str | None:
        """Return why the core cannot run on the arrays of a call, or None; vectors never hinder it."""
        shape = arrays[0].shape  # type: ignore[union-attr]
        for a in arrays:
            if a is None or a.shape != shape or a.dtype.kind in "biu":  # weights, which may be copied
                continue
            if not _readable(a):
                return f"dtype {a.dtype} is not one that the core reads"
            if not a.flags.aligned or any(step % a.itemsize for step in a.strides):
                return "values are not aligned in memory"
        return None

    def weights(self, w: Array | None) -> Array | None:
        """Return weights in a dtype that the core reads; integers become float64."""
        if w is None or (w.dtype == bool and w.flags.aligned):
            return w
        return np.require(w, w.dtype if w.dtype == bool or _readable(w) else np.float64, "A")

    def vector(self, v: Any) -> Any:
        """Return a per-channel vector in a dtype that the core reads."""
        if v is None or not hasattr(v, "dtype"):
            return v
        return np.asarray(v) if _readable(v) else np.asarray(v, np.float64)  # a scalar of NumPy, maybe

    def dense(self, v: Array) -> Array:
        """Return a vector of a kernel as the core reads it; that of a single channel may be a user's."""
        return np.require(v, None, ["C", "A"])

    def forward(
        self,
        x: Array,
        w: Array | None,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Moments]:
        """Return y and the batch's moments."""
        axes, w, last = layout.channel_axes, self.weights(w), _arguments(epilogue)
        found = _CORE.forward(x, self.vector(gamma), self.vector(beta), axes, eps, w, *last, out, True)
        if found is None:  # a mask with too few values in a channel, before y was written
            validate_mask_count(layout, w, _CORE.moments(x, axes, w).count)
        return found  # type: ignore[no-any-return]

    def renorm_forward(
        self,
        x: Array,
        w: Array | None,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        renorm: Renorm,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Moments]:
        """Return y of batch renormalization, and the batch's moments."""
        given = *map(self.vector, (renorm.mean, renorm.var)), renorm.r_max, renorm.d_max
        parameters, weights = map(self.vector, (gamma, beta)), self.weights(w)
        found: tuple[Array, Moments] | None = _CORE.forward(
            x, *parameters, layout.channel_axes, eps, weights, *_arguments(epilogue), out, True, given
        )
        if found is not None:
            return found
        last = {"epilogue": epilogue, "out": out}
        return super().renorm_forward(x, w, gamma, beta, eps, layout, renorm, **last)

    def backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: float,
        layout: Layout,
        *,
        beta: Array | None = None,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, ...]:
        """Return dx, dgamma and dbeta in the dtype of gamma, and with a residual dresidual."""
        found = None
        if epilogue is not None and epilogue.activation is not None:
            found = self._fused_backward(dy, x, w, stats, gamma, beta, eps, layout, epilogue, out)
        if found is None:
            given = {"beta": beta, "epilogue": epilogue, "out": out}
            return super().backward(dy, x, w, stats, gamma, eps, layout, **given)
        return found

    def norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: float,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return dx, dgamma and dbeta of the norm alone."""
        found: Any = self._fused_backward(dy, x, w, stats, gamma, None, eps, layout, None, out)
        if found is None:
            return super().norm_backward(dy, x, w, stats, gamma, eps, layout, out=out)
        return found  # type: ignore[no-any-return]

    def _fused_backward(
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
        out: Array | None,
    ) -> tuple[Array, ...] | None:
        """Run a backward pass in the core; None where it declines."""
        if dy.dtype != x.dtype:
            return None
        stats = Moments(*(self.vector(v) for v in stats))
        parameters = self.vector(gamma), self.vector(beta)
        residual, activation = _arguments(epilogue)
        y = None
        if epilogue is not None:
            residual, y = epilogue.gradient if residual is None else residual, epilogue.y
        last = residual, activation, y, out, True
        found = _CORE.backward(
            dy, x, stats, *parameters, layout.channel_axes, eps, self.weights(w), *last
        )
        if found is not None and parameters[0] is not gamma:
            dx, dgamma, dbeta, *dresidual = found
            dgamma, dbeta = (v.astype(gamma.dtype) for v in (dgamma, dbeta))  # type: ignore[union-attr]
            return dx, dgamma, dbeta, *dresidual
        return found  # type: ignore[no-any-return]

    def inference(
        self,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return y from statistics that are given."""
        vectors = map(self.vector, (stats.mean, stats.var, stats.mean_lo, gamma, beta))
        return _CORE.inference(x, *vectors, layout.channel_axes, eps, *_arguments(epilogue), out, True)

    def statistics(self, x: Array, w: Array | None, layout: Layout) -> Moments:
        """Return count, mean and variance of each channel."""
        found: Moments = _CORE.moments(x, layout.channel_axes, self.weights(w))
        return found

    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        stats: tuple[Any, ...] = self.statistics(x, w, layout)
        count, mean, var, low = (v.reshape(layout.broadcast) for v in stats)
        return count, mean, low, var

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        return self.output(x, m, a, b, layout, out=out)

    def output(
        self,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return y = act(a·(x − m) + b + z)."""
        vectors = map(self.dense, (m, a, b))
        return _CORE.scale_shift(x, *vectors, layout.channel_axes, *_arguments(epilogue), out)

    def activation_gradient(
        self, dy: Array, x: Array, m: Array, a: Array, b: Array, epilogue: Epilogue, layout: Layout
    ) -> Array:
        """Return g = act'(a·(x − m) + b + z)·dy."""
        if dy.dtype != x.dtype or x.itemsize == 2:  # the core writes what it reads
            return GENERIC.activation_gradient(dy, x, m, a, b, epilogue, layout)
        vectors = map(self.dense, (m, a, b))
        last = *_arguments(epilogue), epilogue.y
        return _CORE.activation_gradient(dy, x, *vectors, layout.channel_axes, *last)

    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        sums = _CORE.grad_sums(dy, x, self.dense(m), self.weights(w), layout.channel_axes)
        sum_dy, sum_dy_d = (v.reshape(layout.broadcast) for v in sums)
        return sum_dy, sum_dy_d

    def grad_input(
        self,
        dy: Array,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        c: Array,
        w: Array | None,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> Array:
        """Return dx = a·(dy + w·(b·(x − m) + c))."""
        vectors = map(self.dense, (m, a, b, c))
        return _CORE.grad_input(dy, x, *vectors, self.weights(w), layout.channel_axes, out)


_CORE: Any = core.load()
NATIVE = Native()
