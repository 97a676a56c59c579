"""The passes of this package as PyTorch operators, which it differentiates, traces and compiles.

An operator's implementation calls the package's own function on the tensors below all of PyTorch's
layers, and so runs on the fastest kernels for them. Statistics travel as four tensors: count, mean,
variance, and the low part of the mean.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

import batchnorm as bn
from batchnorm import checks
from batchnorm.kernels import KernelSet, generic
from batchnorm.kernels import torch as adapter
from batchnorm.layout import Layout
from batchnorm.torch import shapes, synchronized
from batchnorm.torch.shapes import plain_axis

Array = Any

_ops = torch.ops.batchnorm


# Implementations: the package's functions.


def _like(x: Array, result: Array) -> Array:
    """A result that lies in memory as those of PyTorch's own batch norm do, and is no input itself."""
    return adapter.laid_out(result, x)


def _contiguous(vectors: Any) -> list[Array]:
    return [v.contiguous() for v in vectors]


def _batch_norm(x, gamma, beta, where, axis, eps):  # type: ignore[no-untyped-def]
    y, stats = bn.batch_norm(x, gamma, beta, axis=plain_axis(axis), eps=eps, where=where)
    return _like(x, y), *_contiguous(stats)


def _batch_norm_backward(dy, x, n, mean, var, mean_lo, gamma, where, axis, eps):  # type: ignore[no-untyped-def]
    stats = bn.Moments(n, mean, var, mean_lo)
    dx, *grads = bn.batch_norm_backward(dy, x, stats, gamma, axis=plain_axis(axis), eps=eps, where=where)
    return _like(x, dx), *grads


def _batch_norm_double_backward(  # type: ignore[no-untyped-def]
    ddx, ddgamma, ddbeta, dy, x, n, mean, var, mean_lo, gamma, where, axis, eps
):
    stats = bn.Moments(n, mean, var, mean_lo)
    d_dy, d_x, d_gamma = bn.batch_norm_double_backward(
        ddx, ddgamma, ddbeta, dy, x, stats, gamma, axis=plain_axis(axis), eps=eps, where=where
    )
    return _like(dy, d_dy.to(dy.dtype)), _like(x, d_x), d_gamma


def _normalize(x, mean, var, gamma, beta, axis, eps):  # type: ignore[no-untyped-def]
    return _like(x, bn.normalize(x, mean, var, gamma, beta, axis=plain_axis(axis), eps=eps))


def _normalize_backward(dy, x, mean, var, gamma, axis, eps):  # type: ignore[no-untyped-def]
    dx, *grads = bn.normalize_backward(
        dy, x, mean, var, gamma, axis=plain_axis(axis), eps=eps, stats_grad=True
    )
    return _like(x, dx), *grads


def _moments(x, where, axis):  # type: ignore[no-untyped-def]
    return tuple(_contiguous(bn.moments(x, axis=plain_axis(axis), where=where)))


# Derivatives. A gradient that is None is 0; one that nobody needs is not given.


def _save_batch_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, gamma, beta, where, axis, eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[4])
    ctx.save_for_backward(x, gamma, where, *output[1:])
    ctx.beta = None if beta is None else beta.dtype
    ctx.axis, ctx.eps = axis, eps


def _grad_batch_norm(ctx: Any, dy: Any, _n: Any, dmean: Any, dvar: Any, _low: Any) -> Any:
    _not_to_weights(ctx, 3)
    x, gamma, where, n, mean, var, mean_lo = ctx.saved_tensors
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
    return dx, dgamma if gamma is not None else None, dbeta if ctx.beta else None, None, None, None


def _not_to_weights(ctx: Any, argument: int) -> None:
    """The functions of this package leave these gradients to PyTorch's own operators."""
    if ctx.needs_input_grad[argument]:
        checks.fail(ValueError, "where", "weights that require gradients", "weights that do not")


def _through_moments(ctx: Any, x: Any, where: Any, stats: Any, dmean: Any, dvar: Any) -> Any:
    """The gradient to x of what depends on the mean and variance that were returned."""
    at = checks.subject(x, plain_axis(ctx.axis))
    n, mean, mean_lo = (at.vector(v) for v in stats)
    total: Any = 0 if dmean is None else at.vector(dmean) / n
    if dvar is not None:
        total = total + at.vector(dvar) * 2 * ((x.to(at.wide) - mean) - mean_lo) / n
    if where is not None:
        w = where.to(at.wide)
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
    x, mean, var, gamma, beta, axis, eps = inputs
    ctx.save_for_backward(x, mean, var, gamma)
    ctx.beta = None if beta is None else beta.dtype
    ctx.axis, ctx.eps = axis, eps


def _grad_normalize(ctx: Any, dy: Any) -> Any:
    x, mean, var, gamma = ctx.saved_tensors
    dx, dgamma, dbeta, dmean, dvar = _ops.normalize_backward(dy, x, mean, var, gamma, ctx.axis, ctx.eps)
    dgamma = dgamma if gamma is not None else None
    return dx, dmean, dvar, dgamma, dbeta.to(ctx.beta) if ctx.beta else None, None, None


def _grad_normalize_backward(
    ctx: Any, ddx: Any, ddgamma: Any, ddbeta: Any, ddmean: Any, ddvar: Any
) -> Any:
    """By PyTorch's own operators: the formulas of `normalize_backward`, differentiated by it."""
    dy, x, mean, var, gamma = ctx.saved_tensors
    given = [dy, x, mean, var] + ([] if gamma is None else [gamma])

    def formulas(dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None) -> Any:
        at = checks.subject(x, plain_axis(ctx.axis))
        d = x.to(at.wide) - at.vector(mean)
        rstd = 1 / torch.sqrt(at.vector(var) + ctx.eps)
        a = rstd if gamma is None else at.vector(gamma) * rstd
        wide = dy.to(at.wide)
        sums = [at.squeeze(at.xp.sum(v, axis=at.reduced, keepdims=True)) for v in (wide, wide * d)]
        r, slope = at.squeeze(rstd), at.squeeze(a)
        return a * wide, r * sums[1], sums[0], -slope * sums[0], -0.5 * slope * r * r * sums[1]

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
    "batch_norm": (_batch_norm, _save_batch_norm, _grad_batch_norm),
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
batch_norm, normalize = _ops.batch_norm, _ops.normalize


# As kernels.


def _axes(at: Layout) -> list[int]:
    return list(at.kept)


def _written(result: Array, out: Array | None) -> Array:
    if out is not None:
        got = "an array to write to, with tensors that PyTorch differentiates or traces"
        checks.fail(ValueError, "out", got, "None")
    return result


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel."""
    if adapter.learned(w) is not None:
        return generic.moments(x, w, at)
    n, mean, var, low = (at.vector(v) for v in _ops.moments(x, w, _axes(at)))
    return n, mean, low, var


def forward(
    x: Array, w: Array | None, gamma: Array, beta: Array, eps: float, at: Layout, out: Array | None
) -> Any:
    """Give y and the batch's moments."""
    why = adapter.learned(w)
    if why is not None:
        with adapter.own_operators(why):
            y, moments = bn.batch_norm(x, gamma, beta, axis=plain_axis(at.kept), eps=eps, where=w)
        return _written(y, out), moments
    y, *stats = _ops.batch_norm(x, gamma, beta, w, _axes(at), eps)
    return _written(y, out), bn.Moments(*stats)


def backward(
    dy: Array,
    x: Array,
    w: Array | None,
    stats: Any,
    gamma: Array,
    eps: float,
    at: Layout,
    out: Array | None,
) -> Any:
    """Give dx, dgamma and dbeta."""
    why = adapter.learned(w)
    if why is not None:
        with adapter.own_operators(why):
            dx, *grads = bn.batch_norm_backward(
                dy, x, stats, gamma, axis=plain_axis(at.kept), eps=eps, where=w
            )
        return _written(dx, out), *grads
    n, mean, var, low = (
        torch.zeros(at.channels, dtype=at.wide, device=x.device)
        if v is None
        else v
        if hasattr(v, "dtype")
        else torch.full(at.channels, float(v), dtype=at.wide, device=x.device)
        for v in stats
    )
    dx, *grads = _ops.batch_norm_backward(dy, x, n, mean, var, low, gamma, w, _axes(at), eps)
    return _written(dx, out), *grads


def inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    at: Layout,
    out: Array | None,
) -> Array:
    """Give y from statistics that are given."""
    return _written(_ops.normalize(x, mean, var, gamma, beta, _axes(at), eps), out)


@functools.cache
def kernel_set(why: str) -> KernelSet:
    """The operators as kernels; what they do not fuse is PyTorch's to record."""

    def writing(kernel: Any) -> Any:
        return lambda *arguments: _written(kernel(*arguments[:-1]), arguments[-1])

    return KernelSet(
        "operators",
        f"{why}; for gradients to `where`, PyTorch's own",
        moments,
        writing(generic.scale_shift),
        generic.grad_sums,
        writing(generic.grad_input),
        forward,
        backward,
        inference,
        synchronized.forward,
    )
