"""The batch norm of a group's joined batch, as PyTorch differentiates it on each member.

Backward, a member gets the gradient of the sum of all members' losses with respect to its part of the
batch. Gradients of gamma and beta are its own part of that: PyTorch's DistributedDataParallel adds up
those of all parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from batchnorm import groups
from batchnorm.backends.dispatch import backend_for
from batchnorm.coefficients import in_dtype_of, rstd_and_scale
from batchnorm.epilogue import Epilogue, epilogue_of
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


class _Joined(torch.autograd.Function):
    """One reduction forward, and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        w: Any,
        gamma: Any,
        beta: Any,
        residual: Any,
        eps: Any,
        layout: Layout,
        call: groups.Call,
        activation: Any,
    ) -> Any:
        backend = backend_for(x, gamma, beta, w, residual)
        epilogue = epilogue_of(activation, residual)
        y, stats = backend.forward_in_group(call, x, w, gamma, beta, eps, layout, epilogue=epilogue)
        ctx.activation, ctx.residual = activation, residual is not None
        ctx.save_for_backward(x, w, gamma, *stats, beta, residual if activation is not None else None)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.eps, ctx.group = layout, eps, call.group
        ctx.beta = None if beta is None else beta.dtype
        return y, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        x, w, gamma, n, mean, var, low, beta, residual = ctx.saved_tensors
        layout, moments = ctx.layout, Moments(n, mean, var, low)
        dresidual = None
        with groups.call(ctx.group, "batch_norm_backward") as call:
            dy = torch.zeros_like(x) if dy is None else dy  # the others need this member's sums
            backend = backend_for(dy, x, gamma, w)
            if ctx.activation is not None or ctx.residual:
                epilogue = Epilogue(ctx.activation, residual, gradient=ctx.residual)
                dy, *last = backend.through_epilogue(
                    dy, x, moments, gamma, beta, ctx.eps, layout, epilogue
                )
                dresidual = last[0] if last else None
            call.announce_backward(layout, x)
            own = backend.centred_sums(dy, x, w, moments, layout)
            sums = call.all_reduce(*own)
        dx, _, _ = backend.gradients(dy, x, w, moments, gamma, ctx.eps, layout, sums)
        rstd, _ = rstd_and_scale(layout, moments.var, gamma, ctx.eps)
        dgamma = None if gamma is None else in_dtype_of(layout, gamma, rstd * own[1])
        dbeta = None if ctx.beta is None else layout.squeeze(own[0]).to(ctx.beta)
        return dx, None, dgamma, dbeta, dresidual, None, None, None, None


def forward(
    call: groups.Call,
    x: Array,
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: Any,
    layout: Layout,
    *,
    epilogue: Epilogue | None = None,
) -> tuple[Array, Moments]:
    """Return y and the moments of the joined batch, which are constants to PyTorch."""
    apply: Any = _Joined.apply
    activation, residual, *_ = epilogue or (None, None)
    y, *stats = apply(x, w, gamma, beta, residual, eps, layout, call, activation)
    return y, Moments(*stats)
