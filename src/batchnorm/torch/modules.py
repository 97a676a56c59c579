"""`torch.nn`'s batch norms on this package's passes: same arguments, same state, same results."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

import batchnorm as bn
from batchnorm import groups
from batchnorm.errors import fail
from batchnorm.torch.leaving import leaves

Module = Any


def _forward(self: Module, x: Any) -> Any:
    """What `torch.nn.BatchNorm2d.forward` does, step by step, with this package's functions."""
    group = self.group if self.training else None
    with groups.call(group, type(self).__name__):
        self._check_input_dim(x)
        gamma, beta, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if self.training and mean is not None and x.shape[1] != mean.shape[0]:
            expected = f"{mean.shape[0]}, as running_mean"
            fail(ValueError, "input", f"{x.shape[1]} channels", expected)
    if not self.training and mean is not None:
        if not leaves():  # copies: the next batch moves these, maybe before the gradient of y is taken
            mean, var = mean.clone(), var.clone()
        return bn.normalize(x, mean, var, gamma, beta, eps=self.eps)
    values = x.numel() // max(1, x.shape[1])
    if values == 1 and group is None:
        expected = "at least 2 values per channel in training"
        fail(ValueError, "input", f"shape {tuple(x.shape)}", expected)
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
        n, batch_mean, batch_var = (v.detach() for v in stats[:3])
        for running, batch in ((mean, batch_mean), (var, batch_var * (n / (n - 1)))):
            running.copy_(running + momentum * (batch - running))
    return y


torch.fx.wrap("_forward")  # symbolic tracing keeps the call whole, as it does with torch.nn's modules


def _renamed(function: Any, name: str) -> Any:
    """The same function under another name: TorchScript compiles a method under that of its function."""
    copied = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copied.__annotations__ = function.__annotations__
    return copied


_theirs = _renamed(nn.BatchNorm1d.forward, "scripted_forward")  # all three have the same one


def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Normalize, and update the running statistics in training."""
    # TorchScript cannot call this package: it compiles torch.nn's own.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return self.scripted_forward(input)  # type: ignore[no-any-return]
    return _forward(self, input)  # type: ignore[no-any-return]


def _scriptable(self: Module) -> Module:
    """What `torch.jit.script` asks for."""
    alone("torch.jit.script", self)
    return self


def alone(what: str, module: Module) -> None:
    """Check that a module has no group, for what does not know of groups."""
    if module.group is not None:
        got = "a module that joins batches over a group"
        fail(TypeError, what, got, "one without: batchnorm.torch.revert it before")


class BatchNorm1d(groups.Shared, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this package's passes.

    Takes the same arguments, loads and saves the same ``state_dict``, and is one to ``isinstance``.
    Input of shape (N, C) or (N, C, L). Its ``group``, None unless it is set, is that of `convert`.
    """

    forward = forward
    scripted_forward = _theirs
    __prepare_scriptable__ = _scriptable
    group: Any = None


class BatchNorm2d(groups.Shared, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this package's passes; see `BatchNorm1d`. Input: (N, C, H, W)."""

    forward = forward
    scripted_forward = _theirs
    __prepare_scriptable__ = _scriptable
    group: Any = None


class BatchNorm3d(groups.Shared, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this package's passes; see `BatchNorm1d`. Input: (N, C, D, H, W)."""

    forward = forward
    scripted_forward = _theirs
    __prepare_scriptable__ = _scriptable
    group: Any = None
