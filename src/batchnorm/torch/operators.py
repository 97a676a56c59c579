"""The passes of this package as PyTorch operators, which it differentiates, traces and compiles.

An operator's implementation runs on the tensors below all of PyTorch's layers, and so on the fastest
backend for them. Statistics travel as four tensors: count, mean,
variance, and the low part of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batchnorm.arrays import namespace
from batchnorm.backends.dispatch import backend_for
from batchnorm.backends.tensors import OWN_OPERATORS, OwnOperators, laid_out
from batchnorm.derivatives import before_activation, double_backward
from batchnorm.epilogue import ACTIVATIONS, Activation, Epilogue, epilogue_of, kept_for_backward
from batchnorm.errors import fail
from batchnorm.layout import Layout, layout_of
from batchnorm.moments import Moments
from batchnorm.torch import shapes, synchronized
from batchnorm.tracing import differentiates_weights

Array = Any

_ops = torch.ops.batchnorm


# Implementations: the passes below the public functions, for arguments that these have validated.


def _layout(x: Array, axis: Sequence[int], **vectors: Array | None) -> Layout:
    """Return the layout of a call; where a compiled program makes it, no function was there to check."""
    layout = layout_of("x", namespace("x", x), x, tuple(a % x.ndim for a in axis), x.device)
    for name, v in vectors.items():
        if v is not None and tuple(v.shape) != layout.channels:
            fail(ValueError, name, f"shape {tuple(v.shape)}", f"{layout.channels}, the channels of x")
    return layout


def _contiguous(vectors: Any) -> list[Array]:
    return [v.contiguous() for v in vectors]


def _epilogue(residual: Array | None, activation: str, slope: float) -> Epilogue | None:
    return epilogue_of(Activation(activation, slope) if activation else None, residual)


def epilogue_arguments(
    activation: Activation | None, residual: Array | None, *_: Any
) -> tuple[Array | None, str, float]:
    """Return the residual, the activation and its slope as arguments of operators."""
    return residual, *(activation or ("", 0.0))


def _batch_norm(  # type: ignore[no-untyped-def]
    x, gamma, beta, where, axis, eps, residual=None, activation="", slope=0.0
):
    layout = _layout(x, axis, gamma=gamma, beta=beta)
    backend = backend_for(x, gamma, beta, where, residual)
    epilogue = _epilogue(residual, activation, slope)
    y, stats = backend.forward(x, where, gamma, beta, eps, layout, epilogue=epilogue)
    return laid_out(y, x), *_contiguous(stats)


def _batch_norm_backward(dy, x, n, mean, var, mean_lo, gamma, where, axis, eps):  # type: ignore[no-untyped-def]
    stats = Moments(n, mean, var, mean_lo)
    layout = _layout(x, axis, gamma=gamma, n=n, mean=mean, var=var, mean_lo=mean_lo)
    backend = backend_for(dy, x, gamma, where, *stats)
    dx, *grads = backend.backward(dy, x, where, stats, gamma, eps, layout)
    return laid_out(dx, x), *grads


def _batch_norm_double_backward(  # type: ignore[no-untyped-def]
    ddx, ddgamma, ddbeta, dy, x, n, mean, var, mean_lo, gamma, where, axis, eps
):
    stats = Moments(n, mean, var, mean_lo)
    layout = _layout(x, axis, gamma=gamma, n=n, mean=mean, var=var, mean_lo=mean_lo)
    d_dy, d_x, d_gamma = double_backward(layout, ddx, ddgamma, ddbeta, dy, x, stats, gamma, where, eps)
    return laid_out(d_dy.to(dy.dtype), dy), laid_out(d_x, x), d_gamma


def _normalize(  # type: ignore[no-untyped-def]
    x, mean, var, gamma, beta, axis, eps, residual=None, activation="", slope=0.0
):
    layout = _layout(x, axis, mean=mean, var=var, gamma=gamma, beta=beta)
    backend = backend_for(x, mean, var, gamma, beta, residual)
    epilogue = _epilogue(residual, activation, slope)
    y = backend.inference(x, Moments(1, mean, var), gamma, beta, eps, layout, epilogue=epilogue)
    return laid_out(y, x)


def _activation_gradient(  # type: ignore[no-untyped-def]
    dy, x, n, mean, var, mean_lo, gamma, beta, residual, y, where, axis, eps, activation, slope
):
    """Return act'(h)·dy. `n` is there where the statistics are those of x, and `where` to go with it."""
    layout = _layout(x, axis, mean=mean, var=var, gamma=gamma, beta=beta)
    backend = backend_for(dy, x, mean, var, mean_lo, gamma, beta, residual, y)
    epilogue = Epilogue(Activation(activation, slope), residual, y)
    stats = Moments(1, mean, var, mean_lo)
    g, *_ = backend.through_epilogue(dy, x, stats, gamma, beta, eps, layout, epilogue)
    return laid_out(g, dy)


def _normalize_backward(dy, x, mean, var, gamma, axis, eps):  # type: ignore[no-untyped-def]
    layout = _layout(x, axis, mean=mean, var=var, gamma=gamma)
    backend = backend_for(dy, x, mean, var, gamma)
    dx, *grads = backend.inference_backward(dy, x, Moments(1, mean, var), gamma, eps, layout)
    return laid_out(dx, x), *grads


def _moments(x, where, axis):  # type: ignore[no-untyped-def]
    layout = _layout(x, axis)
    return tuple(_contiguous(backend_for(x, where).statistics(x, where, layout)))


# Derivatives. A gradient that is None is 0; one that nobody needs is not given.


def save_batch_norm(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep what the gradient needs."""
    x, gamma, beta, where, axis, eps, *epilogue = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[4])
    ctx.save_for_backward(x, gamma, where, *output[1:], *save_epilogue(ctx, beta, output[0], *epilogue))
    ctx.axis, ctx.eps = axis, eps


def save_epilogue(
    ctx: Any, beta: Any, y: Any, residual: Any = None, activation: str = "", slope: float = 0.0
) -> tuple[Any, Any, Any]:
    """Return beta, the residual and y, as far as the derivative of the activation needs them."""
    ctx.beta = None if beta is None else beta.dtype
    ctx.residual, ctx.activation, ctx.slope = residual is not None, activation, slope
    return kept_for_backward(activation, beta, residual, y)


def through_epilogue(ctx: Any, dy: Any, x: Any, where: Any, gamma: Any, stats: Any, last: Any) -> Any:
    """Return the gradient to the result of the norm, and to the residual."""
    if dy is None:
        return None, None
    beta, residual, y = last
    g = dy
    if ctx.activation:
        g = _ops.activation_gradient(
            dy, x, *stats, gamma, beta, residual, y, where, ctx.axis, ctx.eps, ctx.activation, ctx.slope
        )
    return g, g.to(x.dtype) if ctx.residual else None


def grad_batch_norm(ctx: Any, dy: Any, _n: Any, dmean: Any, dvar: Any, _low: Any) -> Any:
    """Return the gradients of x, gamma, beta and the residual, through y and the statistics."""
    _not_to_weights(ctx, 3)
    x, gamma, where, n, mean, var, mean_lo, *last = ctx.saved_tensors
    dy, dresidual = through_epilogue(ctx, dy, x, where, gamma, (n, mean, var, mean_lo), last)
    dx = dgamma = dbeta = None
    if dy is not None:
        dx, dgamma, dbeta = _ops.batch_norm_backward(
            dy, x, n, mean, var, mean_lo, gamma, where, ctx.axis, ctx.eps
        )
    if dmean is not None or dvar is not None:
        through = _through_moments(ctx, x, where, (n, mean, mean_lo), dmean, dvar)
        dx = through if dx is None else dx + through
    if dbeta is not None and ctx.beta is not None:
        dbeta = dbeta.to(ctx.beta)
    dgamma, dbeta = dgamma if gamma is not None else None, dbeta if ctx.beta else None
    return dx, dgamma, dbeta, None, None, None, dresidual, None, None


def _not_to_weights(ctx: Any, argument: int) -> None:
    """Refuse gradients to weights, which the functions leave to PyTorch's own operators."""
    if ctx.needs_input_grad[argument]:
        fail(ValueError, "where", "weights that require gradients", "weights that do not")


def _through_moments(ctx: Any, x: Any, where: Any, stats: Any, dmean: Any, dvar: Any) -> Any:
    """Return the gradient to x through the mean and variance that were returned."""
    layout = _layout(x, ctx.axis)
    n, mean, mean_lo = (layout.vector(v) for v in stats)
    total: Any = 0 if dmean is None else layout.vector(dmean) / n
    if dvar is not None:
        total = total + layout.vector(dvar) * 2 * ((x.to(layout.wide) - mean) - mean_lo) / n
    if where is not None:
        w = where.to(layout.wide)
        total = torch.where(w > 0, w * total, torch.zeros_like(total))
    return total.to(x.dtype).expand_as(x)


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, axis, eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.axis, ctx.eps = axis, eps


def _grad_backward(ctx: Any, ddx: Any, ddgamma: Any, ddbeta: Any) -> Any:
    _not_to_weights(ctx, 7)
    dy, x, *stats, gamma, where = ctx.saved_tensors
    nothing = [None] * 4
    if ddx is None and ddgamma is None and ddbeta is None:
        return None, None, *nothing, None, None, None, None
    d_dy, d_x, d_gamma = _ops.batch_norm_double_backward(
        ddx, ddgamma, ddbeta, dy, x, *stats, gamma, where, ctx.axis, ctx.eps
    )
    return d_dy, d_x, *nothing, d_gamma if gamma is not None else None, None, None, None


def _save_normalize(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, var, gamma, beta, axis, eps, *epilogue = inputs
    ctx.save_for_backward(x, mean, var, gamma, *save_epilogue(ctx, beta, output, *epilogue))
    ctx.axis, ctx.eps = axis, eps


def _grad_normalize(ctx: Any, dy: Any) -> Any:
    x, mean, var, gamma, *last = ctx.saved_tensors
    dy, dresidual = through_epilogue(ctx, dy, x, None, gamma, (None, mean, var, None), last)
    dx, dgamma, dbeta, dmean, dvar = _ops.normalize_backward(dy, x, mean, var, gamma, ctx.axis, ctx.eps)
    dgamma = dgamma if gamma is not None else None
    dbeta = dbeta.to(ctx.beta) if ctx.beta else None
    return dx, dmean, dvar, dgamma, dbeta, None, None, dresidual, None, None


def _save_activation(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, axis, eps, activation, slope = inputs
    ctx.save_for_backward(*tensors)
    ctx.axis, ctx.eps, ctx.activation, ctx.slope = axis, eps, activation, slope


def _grad_activation(ctx: Any, dg: Any) -> Any:
    """Return the gradients of dy and, where the activation is curved, of what h is made of."""
    dy, x, n, mean, var, mean_lo, gamma, beta, residual, y, where = ctx.saved_tensors
    settings = ctx.axis, ctx.eps, ctx.activation, ctx.slope
    given = x, n, mean, var, mean_lo, gamma, beta, residual, y, where
    d_dy = _ops.activation_gradient(dg, *given, *settings).to(dy.dtype)
    curvature = ACTIVATIONS[ctx.activation].curvature
    nothing = [None] * 10
    if curvature is None:
        return d_dy, *nothing, None, None, None, None
    layout = _layout(x, ctx.axis)
    stats = Moments(1, mean, var, mean_lo)
    h = before_activation(layout, x, stats, gamma, beta, ctx.eps, Epilogue(None, residual))
    dh = curvature(layout.xp, h) * dy * dg
    dmean = dvar = None
    if n is None:
        dx, dgamma, dbeta, dmean, dvar = _ops.normalize_backward(
            dh, x, mean, var, gamma, ctx.axis, ctx.eps
        )
    else:
        vectors = n, mean, var, mean_lo, gamma
        dx, dgamma, dbeta = _ops.batch_norm_backward(dh, x, *vectors, where, ctx.axis, ctx.eps)
    dgamma = None if gamma is None else dgamma
    dbeta = None if beta is None else dbeta.to(beta.dtype)
    dresidual = None if residual is None else dh.to(residual.dtype)
    found = dx, None, dmean, dvar, None, dgamma, dbeta, dresidual, None, None
    return d_dy, *found, None, None, None, None


def _grad_normalize_backward(
    ctx: Any, ddx: Any, ddgamma: Any, ddbeta: Any, ddmean: Any, ddvar: Any
) -> Any:
    """Differentiate the formulas of `normalize_backward`, by PyTorch's own operators."""
    dy, x, mean, var, gamma = ctx.saved_tensors
    given = [dy, x, mean, var] + ([] if gamma is None else [gamma])
    layout = _layout(x, ctx.axis)

    def formulas(dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None) -> Any:
        d = x.to(layout.wide) - layout.vector(mean)
        rstd = 1 / torch.sqrt(layout.vector(var) + ctx.eps)
        a = rstd if gamma is None else layout.vector(gamma) * rstd
        wide = dy.to(layout.wide)
        sums = [
            layout.squeeze(layout.xp.sum(v, axis=layout.reduced_axes, keepdims=True))
            for v in (wide, wide * d)
        ]
        r, scale = layout.squeeze(rstd), layout.squeeze(a)
        return (
            a * wide,
            r * sums[1],
            sums[0],
            -scale * sums[0],
            -0.5 * scale * r * r * sums[1],
        )

    vjp: Any = torch.func.vjp
    results, pullback = vjp(formulas, *given)
    weights = tuple(
        torch.zeros_like(r) if v is None else v.to(r.dtype)
        for r, v in zip(results, (ddx, ddgamma, ddbeta, ddmean, ddvar), strict=True)
    )
    found = pullback(weights)
    return *found[:4], found[4] if gamma is not None else None, None, None


def _save_moments(ctx: Any, inputs: Any, output: Any) -> None:
    x, where, axis = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[0], output[3])
    ctx.save_for_backward(x, where, output[0], output[1], output[3])
    ctx.axis = axis


def _grad_moments(ctx: Any, _n: Any, dmean: Any, dvar: Any, _low: Any) -> Any:
    _not_to_weights(ctx, 1)
    x, where, *stats = ctx.saved_tensors
    dx = None
    if dmean is not None or dvar is not None:
        dx = _through_moments(ctx, x, where, stats, dmean, dvar)
    return dx, None, None


def _no_third_order(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "batch_norm: got a third derivative, expected at most two;"
        " bn.set_kernels('generic') runs on operators that PyTorch differentiates any number of times"
    )


# Name: implementation, what is saved for the gradient, the gradient.
_OPERATORS: dict[str, Any] = {
    "batch_norm": (_batch_norm, save_batch_norm, grad_batch_norm),
    "batch_norm_backward": (
        _batch_norm_backward,
        _save_backward,
        _grad_backward,
    ),
    "batch_norm_double_backward": (
        _batch_norm_double_backward,
        _save_backward,
        _no_third_order,
    ),
    "normalize": (_normalize, _save_normalize, _grad_normalize),
    "normalize_backward": (
        _normalize_backward,
        _save_backward,
        _grad_normalize_backward,
    ),
    "activation_gradient": (_activation_gradient, _save_activation, _grad_activation),
    "moments": (_moments, _save_moments, _grad_moments),
}


def _register() -> None:
    def eager(function: Any) -> Any:
        def implementation(*arguments: Any) -> Any:
            with torch.no_grad():
                return function(*arguments)

        return implementation

    for name, (function, save, gradient) in _OPERATORS.items():
        full = f"batchnorm::{name}"
        torch.library.define(full, shapes.SCHEMAS[name])
        torch.library.impl(full, "CompositeExplicitAutograd", eager(function))
        torch.library.register_fake(full, getattr(shapes, name))
        torch.library.register_autograd(full, gradient, setup_context=save)


_register()
batch_norm, normalize, backward = _ops.batch_norm, _ops.normalize, _ops.batch_norm_backward


# As a backend.


def _refuse_out(out: Array | None) -> None:
    if out is not None:
        got = "an array to write to, with tensors that PyTorch differentiates or traces"
        fail(ValueError, "out", got, "None")


class Operators(OwnOperators):
    """The operators above; what they do not fuse is PyTorch's to record."""

    name = "operators"
    summary = (
        "operators of this package, on its fastest backends (in eager mode on CPUs, functions of its own"
        " outside of PyTorch's dispatcher); for gradients to `where`, PyTorch's own"
    )

    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        if differentiates_weights(w):
            return super().moments(x, w, layout)
        n, mean, var, low = (layout.vector(v) for v in _ops.moments(x, w, _axes(layout)))
        return n, mean, low, var

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
    ) -> Any:
        """Return y and the batch's moments."""
        _refuse_out(out)
        if differentiates_weights(w):
            return OWN_OPERATORS.forward(x, w, gamma, beta, eps, layout, epilogue=epilogue)
        last = epilogue_arguments(*(epilogue or (None, None)))
        y, *stats = _ops.batch_norm(x, gamma, beta, w, _axes(layout), eps, *last)
        return y, Moments(*stats)

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
    ) -> Any:
        """Return dx, dgamma and dbeta of the norm alone."""
        _refuse_out(out)
        if differentiates_weights(w):
            return OWN_OPERATORS.norm_backward(dy, x, w, stats, gamma, eps, layout)
        vectors = (self._vector(v, x, layout) for v in stats)
        return _ops.batch_norm_backward(dy, x, *vectors, gamma, w, _axes(layout), eps)

    def _vector(self, v: Any, x: Array, layout: Layout) -> Array:
        """Return one of the statistics as a tensor of one number per channel."""
        if hasattr(v, "dtype"):
            return v if v.shape else v.expand(layout.channels)
        value = 0.0 if v is None else float(v)
        return torch.full(layout.channels, value, dtype=layout.wide, device=x.device)

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
        _refuse_out(out)
        if stats.mean_lo is not None:
            return super().inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue)
        last = _axes(layout), eps, *epilogue_arguments(*(epilogue or (None, None)))
        return _ops.normalize(x, stats.mean, stats.var, gamma, beta, *last)

    def inference_backward(self, *arguments: Any, out: Array | None = None, **named: Any) -> Any:
        """Return dx, dgamma, dbeta, dmean and dvar of `inference`."""
        _refuse_out(out)
        return super().inference_backward(*arguments, **named)

    def forward_in_group(self, *arguments: Any, out: Array | None = None, **named: Any) -> Any:
        """Return y of this member's part, and the moments of the joined batch."""
        _refuse_out(out)
        return synchronized.forward(*arguments, **named)

    def backward_in_group(self, *arguments: Any, out: Array | None = None, **named: Any) -> Any:
        """Return dx of this member's part; dgamma and dbeta of the joined batch."""
        _refuse_out(out)
        return super().backward_in_group(*arguments, **named)


def _axes(layout: Layout) -> list[int]:
    return list(layout.channel_axes)


OPERATORS = Operators()
