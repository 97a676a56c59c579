"""Whole calls on PyTorch's CPU tensors in the compiled core, outside of PyTorch's dispatcher.

Where PyTorch records gradients, a call is one `torch.autograd.Function`. What a compiler or exporter
traces, and what is transformed, is left to the registered operators.
"""

from __future__ import annotations

from typing import Any

import torch

from batchnorm import core, tracing
from batchnorm.backends import native_tensors  # noqa: F401  which shows the core how to read tensors
from batchnorm.epilogue import Activation, validate_activation
from batchnorm.moments import Moments
from batchnorm.torch import operators

Array = Any

_CORE: Any = core.load()


def _plain() -> bool:
    """Return whether PyTorch runs a call at once, on tensors of memory."""
    return not tracing.traced() and tracing.transformed() is None


def _recorded(*tensors: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any([getattr(a, "requires_grad", False) for a in tensors])  # noqa: C419  faster


class _DeclinedError(Exception):
    """The core does not take the call, which the general path explains or runs."""


def _backward(
    ctx: Any, dy: Any, x: Any, stats: Moments, gamma: Any, where: Any, axis: Any, last: Any
) -> Any:
    """Return dx, dgamma, dbeta and dresidual by the core; None where PyTorch has to see operators."""
    if torch.is_grad_enabled() or not _plain():
        return None
    beta, residual, y = last
    added = residual if residual is not None else (ctx.residual and bool(ctx.activation))
    activation = Activation(ctx.activation, ctx.slope) if ctx.activation else None
    settings = axis, ctx.eps, where, added, activation, y, None, True
    found = _CORE.backward(dy, x, stats, gamma, beta, *settings)
    if found is None:
        return None
    dx, dgamma, dbeta, *dresidual = found
    if ctx.beta is None:
        dbeta = None
    elif dbeta.dtype != ctx.beta:
        dbeta = dbeta.to(ctx.beta)
    if ctx.residual and not dresidual:
        dresidual = [dy]
    return dx, None if gamma is None else dgamma, dbeta, dresidual[0] if dresidual else None


class _BatchNorm(torch.autograd.Function):
    """`batch_norm` for gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        gamma: Any,
        beta: Any,
        where: Any,
        axis: Any,
        eps: Any,
        residual: Any,
        activation: Any,
    ) -> Any:
        """Return y and the four vectors of the batch's moments."""
        found = _CORE.forward(x, gamma, beta, axis, eps, where, residual, activation, None, True)
        if found is None:
            raise _DeclinedError
        y, stats = found
        axes = list(axis) if isinstance(axis, tuple) else [axis]
        last = operators.epilogue_arguments(validate_activation(activation), residual)
        operators.save_batch_norm(ctx, (x, gamma, beta, where, axes, eps, *last), (y, *stats))
        return y, *stats

    @staticmethod
    def backward(ctx: Any, dy: Any, dn: Any, dmean: Any, dvar: Any, dlow: Any) -> Any:
        """Return the gradients of x, gamma, beta and the residual."""
        if dy is not None and dmean is None and dvar is None:
            x, gamma, where, n, mean, var, low, *last = ctx.saved_tensors
            stats = Moments(n, mean, var, low)
            found = _backward(ctx, dy, x, stats, gamma, where, tuple(ctx.axis), last)
            if found is not None:
                dx, dgamma, dbeta, dresidual = found
                return dx, dgamma, dbeta, None, None, None, dresidual, None
        return operators.grad_batch_norm(ctx, dy, dn, dmean, dvar, dlow)[:-1]


class _BatchNormModule(torch.autograd.Function):
    """A module's pass in training: y alone, as nothing else of it has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        gamma: Any,
        beta: Any,
        residual: Any,
        activation: Any,
        eps: float,
        found: list[Any],
    ) -> Any:
        """Return y, and append the batch's moments to `found`."""
        done = _CORE.forward(x, gamma, beta, 1, eps, None, residual, activation, None, True)
        if done is None:
            raise _DeclinedError
        y, stats = done
        found.append(stats)
        ctx.axis, ctx.eps, ctx.stats = [1], eps, stats
        last = operators.save_epilogue(ctx, beta, y, *operators.epilogue_arguments(activation, residual))
        ctx.save_for_backward(x, gamma, *last)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        """Return the gradients of x, gamma, beta and the residual."""
        if dy is None:
            return (None,) * 7
        x, gamma, *last = ctx.saved_tensors
        found = _backward(ctx, dy, x, ctx.stats, gamma, None, 1, last)
        if found is None:
            g, dresidual = operators.through_epilogue(ctx, dy, x, None, gamma, ctx.stats, last)
            dx, dgamma, dbeta = operators.backward(g, x, *ctx.stats, gamma, None, [1], ctx.eps)
            dbeta = None if ctx.beta is None else dbeta.to(ctx.beta)
            found = dx, None if gamma is None else dgamma, dbeta, dresidual
        return *found, None, None, None


# `Function.apply` without what it does for `torch.func`, which `_plain` excludes.
_apply_module: Any = super(torch.autograd.Function, _BatchNormModule).apply


def train(
    x: Array,
    gamma: Any,
    beta: Any,
    mean: Any,
    var: Any,
    count: Any,
    momentum: Any,
    eps: float,
    residual: Any = None,
    activation: Any = None,
) -> Any:
    """Return y of a module in training, and update its statistics; or None.

    The activation is an `Activation`.
    """
    if momentum is None or not _plain() or not _CORE.fits(x, 1, gamma, beta, mean, var):
        return None
    if mean is not None and not (mean.is_contiguous() and var.is_contiguous()):
        return None
    found: list[Any] = []
    try:
        if _recorded(x, gamma, beta, residual):
            y = _apply_module(x, gamma, beta, residual, activation, eps, found)
        else:
            done = _CORE.forward(x, gamma, beta, 1, eps, None, residual, activation, None, True)
            if done is None:
                return None
            y = done[0]
            found.append(done[1])
    except _DeclinedError:
        return None
    if mean is not None and count is not None:
        count.add_(1)
        _CORE.update_running(mean, var, found[0], momentum, 1.0, True)
        torch.autograd.graph.increment_version((mean, var))
    return y


def forward(
    x: Array,
    gamma: Any,
    beta: Any,
    axis: Any,
    eps: Any,
    where: Any,
    residual: Any,
    activation: Any,
    out: Any,
    trusted: bool,
) -> Any:
    """Return y and the batch's moments, or None."""
    if where is not None or out is not None or not _plain():
        return None
    if not _recorded(x, gamma, beta, residual):
        # Arguments that a pass with a mask has to look at are the general path's.
        return _CORE.forward(x, gamma, beta, axis, eps, None, residual, activation, None, True)
    try:
        y, *stats = _BatchNorm.apply(x, gamma, beta, None, axis, eps, residual, activation)  # type: ignore[no-untyped-call]
    except _DeclinedError:
        return None
    return y, Moments(*stats)


def backward(
    dy: Array,
    x: Array,
    stats: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    eps: Any,
    where: Any,
    residual: Any,
    activation: Any,
    y: Any,
    out: Any,
    trusted: bool,
) -> Any:
    """Return dx, dgamma and dbeta, or None."""
    if where is not None or out is not None or not isinstance(stats, Moments):
        return None
    given = (dy, x, gamma, beta, residual, y, *stats)
    if not _plain() or _recorded(*given):
        return None
    return _CORE.backward(
        dy, x, stats, gamma, beta, axis, eps, None, residual, activation, y, None, True
    )


def inference(
    x: Array,
    mean: Any,
    var: Any,
    mean_lo: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    eps: Any,
    residual: Any,
    activation: Any,
    out: Any,
    trusted: bool,
) -> Any:
    """Return y by given statistics, or None."""
    given = (x, mean, var, mean_lo, gamma, beta, residual)
    if out is not None or not _plain() or _recorded(*given):
        return None
    return _CORE.inference(
        x, mean, var, mean_lo, gamma, beta, axis, eps, residual, activation, None, True
    )


def update_running(
    mean: Array, var: Any, stats: Any, momentum: Any, correction: Any, in_place: bool
) -> Any:
    """Return new running statistics, or None."""
    if not isinstance(stats, Moments):
        return None
    given = (mean, var, *stats)
    if not _plain() or _recorded(*given):
        return None
    return _CORE.update_running(mean, var, stats, momentum, correction, in_place)


def fits(x: Array, axis: Any, *vectors: Any) -> bool:
    """Return whether each vector is None, or has one number for each channel of x."""
    found: bool = _CORE.fits(x, axis, *vectors)
    return found
