"""The batch norm of a group's joined batch, as PyTorch differentiates it on each member.

Backward, a member gets the gradient of the sum of all members' losses with respect to its part of the
batch. Gradients of gamma and beta are its own part of that: PyTorch's DistributedDataParallel adds up
those of all parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from batchnorm import groups, vectors
from batchnorm.kernels import pick
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


class _Joined(torch.autograd.Function):
    """One reduction forward, and one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, gamma: Any, beta: Any, where: Any, at: Layout, eps: Any, group: Any
    ) -> Any:
        kernels = pick(x, gamma, beta, where)
        y, stats = groups.forward(kernels, at, x, where, gamma, beta, eps, None, group)
        ctx.save_for_backward(x, gamma, where, *stats)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.at, ctx.eps, ctx.group = at, eps, group
        ctx.beta = None if beta is None else beta.dtype
        return y, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        x, gamma, where, *stats = ctx.saved_tensors
        at, group, moments = ctx.at, ctx.group, Moments(*stats)
        with groups.call(group, "batch_norm_backward") as call:
            dy = torch.zeros_like(x) if dy is None else dy  # the others need this member's sums
            kernels, w = pick(dy, x, gamma, where), vectors.weights_of(where, x.ndim)
            call.announce_backward(at, x)
            own = vectors.sums_with(kernels, at, dy, x, vectors.centre(at, moments), w)
            sums = groups.all_reduce(group, *own)
        backward_from: Any = vectors.backward_from
        dx, *_ = backward_from(kernels, at, dy, x, w, moments, gamma, ctx.eps, sums, None)
        rstd, _ = vectors.slope(at, moments.var, gamma, ctx.eps)
        grads = vectors.grad_params(at, gamma, rstd * own[1], own[0])
        dgamma = None if gamma is None else grads[0]
        dbeta = None if ctx.beta is None else grads[1].to(ctx.beta)
        return dx, dgamma, dbeta, None, None, None, None


def forward(
    x: Array,
    where: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: Any,
    at: Layout,
    group: Any,
) -> tuple[Array, Moments]:
    """Give y and the moments of the joined batch, which are constants to PyTorch."""
    y, *stats = _Joined.apply(x, gamma, beta, where, at, eps, group)  # type: ignore[no-untyped-call]
    return y, Moments(*stats)
