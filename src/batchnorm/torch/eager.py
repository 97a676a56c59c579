"""Whole calls on PyTorch's CPU tensors in the compiled core, outside of PyTorch's dispatcher.

Where PyTorch records gradients, a call is one `torch.autograd.Function`. What a compiler or exporter
traces, and what is transformed, is left to the registered operators.
"""

from __future__ import annotations

from typing import Any

import torch

from batchnorm import core, tracing
from batchnorm.backends import native_tensors  # noqa: F401  which shows the core how to read tensors
from batchnorm.moments import Moments
from batchnorm.torch import operators

Array = Any

_CORE: Any = core.load()


def _plain(*tensors: Any) -> bool:
    """Return whether PyTorch runs a call at once, on tensors whose memory means what it says."""
    if tracing.traced() or tracing.transformed() is not None:
        return False
    return not any(isinstance(a, torch.Tensor) and a.is_neg() for a in tensors)


def _recorded(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(a, torch.Tensor) and a.requires_grad for a in tensors
    )


class _DeclinedError(Exception):
    """The core does not take the call, which the general path explains or runs."""


class _BatchNorm(torch.autograd.Function):
    """`batch_norm` for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Any, gamma: Any, beta: Any, where: Any, axis: Any, eps: Any) -> Any:
        """Return y and the four vectors of the batch's moments."""
        found = _CORE.forward(x, gamma, beta, axis, eps, where, None, True)
        if found is None:
            raise _DeclinedError
        y, stats = found
        axes = list(axis) if isinstance(axis, tuple) else [axis]
        operators.save_batch_norm(ctx, (x, gamma, beta, where, axes, eps), (y, *stats))
        return y, *stats

    @staticmethod
    def backward(ctx: Any, dy: Any, dn: Any, dmean: Any, dvar: Any, dlow: Any) -> Any:
        """Return the gradients of x, gamma and beta."""
        simple = dy is not None and dmean is None and dvar is None
        if simple and not torch.is_grad_enabled() and _plain(dy):
            x, gamma, where, *stats = ctx.saved_tensors
            axes, eps = tuple(ctx.axis), ctx.eps
            found = _CORE.backward(dy, x, Moments(*stats), gamma, axes, eps, where, None, True)
            if found is not None:
                dx, dgamma, dbeta = found
                dbeta = None if ctx.beta is None else dbeta.to(ctx.beta)
                return dx, None if gamma is None else dgamma, dbeta, None, None, None
        return operators.grad_batch_norm(ctx, dy, dn, dmean, dvar, dlow)


def forward(
    x: Array, gamma: Any, beta: Any, axis: Any, eps: Any, where: Any, out: Any, trusted: bool
) -> Any:
    """Return y and the batch's moments, or None."""
    if where is not None or out is not None or not _plain(x, gamma, beta):
        return None
    if not _recorded(x, gamma, beta):
        # Arguments that a pass with a mask has to look at are the general path's.
        return _CORE.forward(x, gamma, beta, axis, eps, None, None, True)
    try:
        y, *stats = _BatchNorm.apply(x, gamma, beta, None, axis, eps)  # type: ignore[no-untyped-call]
    except _DeclinedError:
        return None
    return y, Moments(*stats)


def backward(
    dy: Array,
    x: Array,
    stats: Any,
    gamma: Any,
    axis: Any,
    eps: Any,
    where: Any,
    out: Any,
    trusted: bool,
) -> Any:
    """Return dx, dgamma and dbeta, or None."""
    if where is not None or out is not None or not isinstance(stats, Moments):
        return None
    given = (dy, x, gamma, *stats)
    if not _plain(*given) or _recorded(*given):
        return None
    return _CORE.backward(dy, x, stats, gamma, axis, eps, None, None, True)


def inference(
    x: Array,
    mean: Any,
    var: Any,
    mean_lo: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    eps: Any,
    out: Any,
    trusted: bool,
) -> Any:
    """Return y by given statistics, or None."""
    given = (x, mean, var, mean_lo, gamma, beta)
    if out is not None or not _plain(*given) or _recorded(*given):
        return None
    return _CORE.inference(x, mean, var, mean_lo, gamma, beta, axis, eps, None, True)


def update_running(
    mean: Array, var: Any, stats: Any, momentum: Any, correction: Any, in_place: bool
) -> Any:
    """Return new running statistics, or None."""
    if not isinstance(stats, Moments):
        return None
    given = (mean, var, *stats)
    if not _plain(*given) or _recorded(*given):
        return None
    return _CORE.update_running(mean, var, stats, momentum, correction, in_place)


def fits(x: Array, axis: Any, *vectors: Any) -> bool:
    """Return whether each vector is None, or has one number for each channel of x."""
    found: bool = _CORE.fits(x, axis, *vectors)
    return found
