"""`torch.nn`'s batch norms on this package's passes: same arguments, same state, same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm.torch import operators

Module = Any


def _forward(self: Module, input: torch.Tensor) -> torch.Tensor:
    """What `torch.nn.BatchNorm2d.forward` does, step by step, with this package's operators."""
    x: Any = input
    self._check_input_dim(x)
    gamma, beta = self.weight, self.bias
    tracking = self.training and self.track_running_stats
    if not self.training and self.running_mean is not None:
        mean, var = self.running_mean, self.running_var
        result: torch.Tensor = operators.normalize(x, mean, var, gamma, beta, [1], self.eps)
        return result
    if x.numel() // max(1, x.shape[1]) < 2:
        got, expected = (
            f"an input of shape {tuple(x.shape)}",
            "at least 2 values per channel in training",
        )
        raise ValueError(f"{type(self).__name__}: got {got}, expected {expected}")
    y: torch.Tensor
    y, n, mean, var, _ = operators.batch_norm(x, gamma, beta, None, [1], self.eps)
    if tracking:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is not None:
            momentum = self.momentum
            if momentum is None:  # a cumulative average
                momentum = 1.0 / self.num_batches_tracked.double()
            with torch.no_grad():
                unbiased = var * (n / (n - 1))
                for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.copy_(running + momentum * (batch - running))
    return y


class BatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this package's passes.

    Takes the same arguments, loads and saves the same ``state_dict``, and is one to ``isinstance``.
    Input of shape (N, C) or (N, C, L).
    """

    forward = _forward


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this package's passes; see `BatchNorm1d`. Input: (N, C, H, W)."""

    forward = _forward


class BatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this package's passes; see `BatchNorm1d`. Input: (N, C, D, H, W)."""

    forward = _forward


_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Module) -> Module:
    """Replace the batch norms of a model by this package's, in place.

    A module keeps all it has: parameters, running statistics, hooks, its place in the model and in
    optimizers. Subclasses of `torch.nn`'s batch norms, ``SyncBatchNorm`` among them, are left alone.

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
    return _replaced(model, _OURS)


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


def _replaced(model: Module, by: dict[type, type]) -> Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, expected a torch.nn.Module")
    for module in model.modules():
        if type(module) in by:  # the state is the same, so the class is all that differs
            module.__class__ = by[type(module)]
    return model
