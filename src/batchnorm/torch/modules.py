"""`torch.nn`'s batch norms on this package's passes: same arguments, same state, same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import batchnorm as bn
from batchnorm import checks

Module = Any


def _forward(self: Module, x: Any) -> Any:
    """What `torch.nn.BatchNorm2d.forward` does, step by step, with this package's functions."""
    self._check_input_dim(x)
    gamma, beta, mean, var = self.weight, self.bias, self.running_mean, self.running_var
    if not self.training and mean is not None:
        # Copies: the next batch moves these, maybe before the gradient of y is taken.
        return bn.normalize(x, mean.clone(), var.clone(), gamma, beta, eps=self.eps)
    if mean is not None and x.shape[1] != mean.shape[0]:
        expected = f"{mean.shape[0]}, as running_mean"
        checks.fail(ValueError, "input", f"{x.shape[1]} channels", expected)
    values = x.numel() // max(1, x.shape[1])
    group = self.group if self.training else None
    if values == 1 and group is None:
        expected = "at least 2 values per channel in training"
        checks.fail(ValueError, "input", f"shape {tuple(x.shape)}", expected)
    tracking = self.training and self.track_running_stats
    count = self.num_batches_tracked if tracking else None
    if values == 0 and group is None:  # as torch.nn: nothing to normalize, but a batch
        nothing = x.new_zeros(x.shape[1])
        y, stats = bn.normalize(x, nothing, nothing, gamma, beta, eps=1), None
    else:
        y, stats = bn.batch_norm(x, gamma, beta, eps=self.eps, group=group)
    if count is not None:
        count.add_(1)
    if tracking and mean is not None and stats is not None:
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 0.0 if count is None else 1.0 / count.double()
        with torch.no_grad():
            unbiased = stats.var * (stats.count / (stats.count - 1))
            for running, batch in ((mean, stats.mean), (var, unbiased)):
                running.copy_(running + momentum * (batch - running))
    return y


torch.fx.wrap("_forward")  # symbolic tracing keeps the call whole, as it does with torch.nn's modules


def forward(self: Module, input: torch.Tensor) -> torch.Tensor:
    """Normalize, and update the running statistics in training."""
    result: torch.Tensor = _forward(self, input)
    return result


class BatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this package's passes.

    Takes the same arguments, loads and saves the same ``state_dict``, and is one to ``isinstance``.
    Input of shape (N, C) or (N, C, L). Its ``group``, None unless it is set, is that of `convert`.
    """

    forward = forward
    group: Any = None


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this package's passes; see `BatchNorm1d`. Input: (N, C, H, W)."""

    forward = forward
    group: Any = None


class BatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this package's passes; see `BatchNorm1d`. Input: (N, C, D, H, W)."""

    forward = forward
    group: Any = None


_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Module, group: Any = None) -> Module:
    """Replace the batch norms of a model by this package's, in place.

    A module keeps all it has: parameters, running statistics, hooks, its place in the model and in
    optimizers. Subclasses of `torch.nn`'s batch norms, ``SyncBatchNorm`` among them, are left alone.

    Parameters
    ----------
    model : torch.nn.Module
        A model, or a batch norm.
    group : optional
        The members over which batches are joined in training, as in `batchnorm.batch_norm`. Gradients
        of parameters stay each member's own part, as DistributedDataParallel expects them.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        `model` is not a module, or `group` is no group.
    """
    checks.group(group)
    return _replaced(model, _OURS, group)


def revert(model: Module) -> Module:
    """Put `torch.nn`'s batch norms back, in place, as they are after any training since `convert`.

    Parameters
    ----------
    model : torch.nn.Module
        A model, or a batch norm.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        `model` is not a module.
    """
    return _replaced(model, _THEIRS)


def _replaced(model: Module, by: dict[type, type], group: Any = None) -> Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {checks.kind(model)}, expected a torch.nn.Module")
    for module in model.modules():
        if type(module) in by:  # the state is the same, so the class is all that differs
            module.__class__ = by[type(module)]
            vars(module).pop("group", None)
            if group is not None:
                module.group = group
    return model
