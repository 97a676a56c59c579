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
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


class _Joined(torch.autograd.Function):
    """One reduction forward, and one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, w: Any, gamma: Any, beta: Any, eps: Any, layout: Layout, call: groups.Call
    ) -> Any:
        backend = backend_for(x, gamma, beta, w)
        y, stats = backend.forward_in_group(call, x, w, gamma, beta, eps, layout)
        ctx.save_for_backward(x, w, gamma, *stats)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.eps, ctx.group = layout, eps, call.group
        ctx.beta = None if beta is None else beta.dtype
        return y, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        x, w, gamma, *fields = ctx.saved_tensors
        layout, moments = ctx.layout, Moments(*fields)
        with groups.call(ctx.group, "batch_norm_backward") as call:
            dy = torch.zeros_like(x) if dy is None else dy  # the others need this member's sums
            backend = backend_for(dy, x, gamma, w)
            call.announce_backward(layout, x)
            own = backend.centred_sums(dy, x, w, moments, layout)
            sums = call.all_reduce(*own)
        dx, _, _ = backend.gradients(dy, x, w, moments, gamma, ctx.eps, layout, sums)
        rstd, _ = rstd_and_scale(layout, moments.var, gamma, ctx.eps)
        dgamma = None if gamma is None else in_dtype_of(layout, gamma, rstd * own[1])
        dbeta = None if ctx.beta is None else layout.squeeze(own[0]).to(ctx.beta)
        return dx, None, dgamma, dbeta, None, None, None


def forward(
    call: groups.Call,
    x: Array,
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: Any,
    layout: Layout,
) -> tuple[Array, Moments]:
    """Return y and the moments of the joined batch, which are constants to PyTorch."""
    apply: Any = _Joined.apply
    y, *stats = apply(x, w, gamma, beta, eps, layout, call)
    return y, Moments(*stats)
