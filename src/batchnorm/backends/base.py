"""The contract of a backend: four kernels, and every pass that is made of them.

Notation: x, dy and other big arrays have shape (..., C, ...); a per-channel vector is in broadcast shape
(1, ..., C, ..., 1), written (C). `w` is a mask or weights with as many axes as x, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchnorm.coefficients import (
    Renorm,
    backward_coefficients,
    forward_coefficients,
    frozen_gradients,
    in_compute,
    in_dtype_of,
    renorm_corrections,
    renormalized,
    rounded_mean,
)
from batchnorm.epilogue import Epilogue, activated, gradient_through, with_residual
from batchnorm.groups import Call
from batchnorm.layout import Layout, float_name
from batchnorm.moments import Moments
from batchnorm.validation import validate_group_count, validate_mask_count

Array = Any


class Backend:
    """A way to run the four kernels on some class of arrays.

    A backend implements `moments`, `scale_shift`, `grad_sums` and `grad_input`; `generic` specifies
    each. The passes below them are derived here. A backend overrides a pass that it can fuse, and calls
    the inherited one for arguments that its own cannot take.
    """

    name = ""
    """What `kernels_for` tells."""
    summary = ""
    """What it runs, in a few words."""
    why = ""
    """Why it was chosen; on what `kernels_for` returns."""

    def __repr__(self) -> str:
        return f"<backend {self.name}: {self.why or self.summary}>"

    def refuses(self, arrays: tuple[Array | None, ...]) -> str | None:
        """Return why it cannot run on the arrays of a call, or None.

        Parameters
        ----------
        arrays : tuple of arrays and None
            The big array first (dy in a backward pass), then the others, per-channel vectors among them.

        Returns
        -------
        str or None
            A few words for `kernels_for`; empty where such arrays are not meant for it at all.
        """
        return None

    # The four kernels. `out` is an offer: a kernel may write its result there, and returns its result
    # wherever that lies.

    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean in two parts and population variance: four (C) in `layout.wide`."""
        raise NotImplementedError

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b, in the dtype of x; m, a and b are (C) in `layout.compute`."""
        raise NotImplementedError

    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m): two (C) in `layout.wide`. dy and x are of one dtype."""
        raise NotImplementedError

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
        """Return dx = a·(dy + w·(b·(x − m) + c)), in the dtype of dy and x, which is one."""
        raise NotImplementedError

    # The epilogue: a residual z, of the dtype of x, and an activation. A backend overrides these two
    # where it can fuse them.

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
        """Return y = act(a·(x − m) + b + z), in the dtype of x, to which it is rounded once."""
        if epilogue is None:
            return self.scale_shift(x, m, a, b, layout, out=out)
        h = self.scale_shift(in_compute(layout, x), m, a, b, layout)  # (..., C, ...)
        return layout.xp.astype(activated(layout, h, epilogue), x.dtype, copy=False)

    def activation_gradient(
        self, dy: Array, x: Array, m: Array, a: Array, b: Array, epilogue: Epilogue, layout: Layout
    ) -> Array:
        """Return g = act'(a·(x − m) + b + z)·dy, in `gradient_dtype`: 32 bits at least."""
        if epilogue.y is None:
            h = self.scale_shift(in_compute(layout, x), m, a, b, layout)  # (..., C, ...)
            h = with_residual(layout, h, epilogue)
        else:
            h = in_compute(layout, epilogue.y)
        return gradient_through(layout, h, dy, epilogue)

    # The passes.

    def statistics(self, x: Array, w: Array | None, layout: Layout) -> Moments:
        """Return the moments of x as users have them, vectors in the shape of gamma."""
        count, mean, mean_lo, var = (layout.squeeze(v) for v in self.moments(x, w, layout))
        return Moments(count, mean, var, mean_lo)

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
        """Return y and the moments of x."""
        stats = self.statistics(x, w, layout)
        validate_mask_count(layout, w, stats.count)
        y = self.inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue, out=out)
        return y, stats

    def renorm_forward(
        self,
        x: Array,
        w: Array | None,
        gamma: Array | None,
        beta: Array | None,
        eps: Any,
        layout: Layout,
        renorm: Renorm,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Moments]:
        """Return y of batch renormalization, and the moments of x."""
        stats = self.statistics(x, w, layout)
        validate_mask_count(layout, w, stats.count)
        r, d = renorm_corrections(layout.xp, stats, eps, renorm)
        gamma, beta = renormalized(layout.xp, gamma, beta, r, d)
        y = self.inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue, out=out)
        return y, stats

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
        """Return y by given statistics; their count is ignored."""
        m, a, b = forward_coefficients(layout, stats, gamma, beta, eps)  # (C), (C), (C)
        y = self.output(x, m, a, b, layout, epilogue=epilogue, out=out)
        return to_out(layout, y, x.dtype, out)

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
        """Return dx, dgamma and dbeta in the shape and dtype of gamma, and with a residual dresidual.

        beta and the epilogue say what the activation was applied to.
        """
        g, *dresidual = self.through_epilogue(dy, x, stats, gamma, beta, eps, layout, epilogue)
        return *self.norm_backward(g, x, w, stats, gamma, eps, layout, out=out), *dresidual

    def through_epilogue(
        self,
        dy: Array,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: Any,
        layout: Layout,
        epilogue: Epilogue | None,
    ) -> tuple[Array, ...]:
        """Return the gradient to the result of the norm, and where it is asked for to the residual."""
        if epilogue is None:
            return (dy,)
        g, copy = dy, True
        if epilogue.activation is not None:
            m, a, b = forward_coefficients(layout, stats, gamma, beta, eps)  # (C), (C), (C)
            g, copy = self.activation_gradient(dy, x, m, a, b, epilogue, layout), False
        return (g, layout.xp.astype(g, x.dtype, copy=copy)) if epilogue.gradient else (g,)

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
        sums = self.centred_sums(dy, x, w, stats, layout)
        return self.gradients(dy, x, w, stats, gamma, eps, layout, sums, out=out)

    def centred_sums(
        self, dy: Array, x: Array, w: Array | None, stats: Moments, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − mean), (C) each."""
        dy, x, inner = _in_one_dtype(layout, dy, x)
        m, residual = rounded_mean(inner, stats)  # (C), (C)
        sum_dy, sum_dy_d = self.grad_sums(dy, x, m, w, inner)  # (C), (C)
        return sum_dy, sum_dy_d - residual * sum_dy

    def gradients(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: Any,
        layout: Layout,
        sums: Sequence[Array],
        *,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return dx, dgamma and dbeta from `centred_sums` over the whole batch."""
        dtype = x.dtype
        dy, x, inner = _in_one_dtype(layout, dy, x)
        m, a, b, c, *vectors = backward_coefficients(inner, stats, gamma, eps, sums)
        dgamma, dbeta = (in_dtype_of(layout, gamma, v) for v in vectors)
        offer = out if x.dtype == dtype else None
        dx = self.grad_input(dy, x, m, a, b, c, w, inner, out=offer)
        return to_out(layout, dx, dtype, out), dgamma, dbeta

    def inference_backward(
        self,
        dy: Array,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        eps: Any,
        layout: Layout,
        *,
        beta: Array | None = None,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, ...]:
        """Return dx, dgamma, dbeta, with a residual dresidual, dmean and dvar of `inference`."""
        dy, *dresidual = self.through_epilogue(dy, x, stats, gamma, beta, eps, layout, epilogue)
        dtype = x.dtype
        dy, x, inner = _in_one_dtype(layout, dy, x)
        sums = self.centred_sums(dy, x, None, stats, inner)
        a, *vectors = frozen_gradients(inner, stats, gamma, eps, sums)
        parameters = (gamma, gamma, stats.mean, stats.var)
        grads = [in_dtype_of(layout, p, v) for p, v in zip(parameters, vectors, strict=True)]
        zero = inner.xp.zeros_like(a)  # (C)
        dx = self.scale_shift(dy, zero, a, zero, inner, out=out if dy.dtype == dtype else None)
        return to_out(layout, dx, dtype, out), *grads[:2], *dresidual, *grads[2:]

    # Synchronized: the same with one all-reduce between the kernels.

    def forward_in_group(
        self,
        call: Call,
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
        """Return y of this member's part, and the moments of the joined batch."""
        call.announce_forward(layout, x)
        stats = call.allreduce_moments(self.statistics(x, w, layout))
        validate_group_count(layout, stats, w)
        y = self.inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue, out=out)
        return y, stats

    def backward_in_group(
        self,
        call: Call,
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
        """Return dx (and dresidual) of this member's part; dgamma and dbeta of the joined batch."""
        dy, *dresidual = self.through_epilogue(dy, x, stats, gamma, beta, eps, layout, epilogue)
        call.announce_backward(layout, x)
        sums = call.all_reduce(*self.centred_sums(dy, x, w, stats, layout))
        return *self.gradients(dy, x, w, stats, gamma, eps, layout, sums, out=out), *dresidual

    def reread(self, big: Sequence[Array | None], vectors: Sequence[Array]) -> Sequence[Array | None]:
        """Return the big arrays; a lazy backend returns copies that are computed after the vectors."""
        return big


def _in_one_dtype(layout: Layout, dy: Array, x: Array) -> tuple[Array, Array, Layout]:
    """Return dy and x in one dtype that holds both, and the layout of a call in that."""
    if dy.dtype == x.dtype:
        return dy, x, layout
    xp = layout.xp
    double = "float64" in (float_name(xp, dy.dtype), float_name(xp, x.dtype))
    dtype = xp.float64 if double else xp.float32
    return xp.astype(dy, dtype), xp.astype(x, dtype), layout._replace(compute=dtype)


def to_out(layout: Layout, result: Array, dtype: Any, out: Array | None) -> Array:
    """Return a kernel's result in its dtype, written to `out` where that is given."""
    if result is out:
        return out
    result = layout.xp.astype(result, dtype, copy=False)
    if out is None:
        return result
    out[...] = result
    return out


class KernelSet(Backend):
    """A backend made of four functions, the kernels."""

    def __init__(
        self, name: str, summary: str, moments: Any, scale_shift: Any, grad_sums: Any, grad_input: Any
    ) -> None:
        self.name, self.summary = name, summary
        self.moments, self.scale_shift = moments, scale_shift  # type: ignore[method-assign]
        self.grad_sums, self.grad_input = grad_sums, grad_input  # type: ignore[method-assign]
