"""Subclasses of the batch norms of `torch.nn` that compute with this package."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

import batchnorm as bn
from batchnorm import groups, optimistic
from batchnorm.arguments import validate_choice
from batchnorm.degenerate import CHOICES
from batchnorm.epilogue import Activation
from batchnorm.errors import fail
from batchnorm.torch.leaving import is_exporting
from batchnorm.training import limits_at, validate_renorm, validate_together

Module = Any


def _forward(self: Module, x: Any, residual: Any = None, activation: Activation | None = None) -> Any:
    """Compute `torch.nn.BatchNorm2d.forward`, and what follows, with the functions of this package."""
    special = self.training and (self.degenerate != "raise" or self.renorm is not None)
    if not (special or torch.compiler.is_compiling()):
        y = _whole_call(self, x, residual, activation)
        if y is not None:
            return y
    group = self.group if self.training else None
    with groups.call(group, type(self).__name__):
        self._check_input_dim(x)
        gamma, beta, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if self.training and mean is not None and x.shape[1] != mean.shape[0]:
            expected = f"{mean.shape[0]}, as running_mean"
            fail(ValueError, "input", f"{x.shape[1]} channels", expected)
    last: Any = {"residual": residual, "activation": activation}
    if not self.training and mean is not None:
        if not is_exporting():  # copies: the next batch may update these before the backward pass
            mean, var = mean.clone(), var.clone()
        return bn.normalize(x, mean, var, gamma, beta, eps=self.eps, **last)
    values = x.numel() // max(1, x.shape[1])
    if values == 1 and group is None and self.degenerate == "raise":
        expected = "at least 2 values per channel in training"
        fail(ValueError, "input", f"shape {tuple(x.shape)}", expected)
    tracking = self.training and self.track_running_stats
    count = self.num_batches_tracked if tracking else None
    if values == 0 and group is None:  # as in torch.nn, an empty batch is counted
        zeros = x.new_zeros(x.shape[1])
        y, stats = bn.normalize(x, zeros, zeros, gamma, beta, eps=1, **last), None
    elif special and self.renorm is not None:
        y, stats = _renormalized(self, x, group, last)
    else:
        last |= {"degenerate": self.degenerate} if special else {}
        y, stats = bn.batch_norm(x, gamma, beta, eps=self.eps, group=group, **last)
    if count is not None:
        count.add_(1)
    if tracking and mean is not None and stats is not None:
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 0.0 if count is None else 1.0 / count.double()
        n, batch_mean, batch_var = (v.detach() for v in stats[:3])
        new_mean = mean + momentum * (batch_mean - mean)
        if self.renorm is None:
            new_var = var + momentum * (batch_var * (n / (n - 1)) - var)
        else:  # the standard deviation moves, as in `update_renorm`
            std, batch_std = (torch.sqrt(v + self.eps) for v in (var.to(batch_var.dtype), batch_var))
            new_var = torch.clamp((std + momentum * (batch_std - std)) ** 2 - self.eps, min=0)
        for running, new in ((mean, new_mean), (var, new_var)):
            running.copy_(torch.where(n > 0, new, running) if special else new)
    return y


def _renormalized(self: Module, x: Any, group: Any, last: dict[str, Any]) -> Any:
    """Return y and the moments of batch renormalization."""
    limits: Any = self.renorm
    scheduled = any(map(callable, limits)) and self.num_batches_tracked is not None
    r_max, d_max = limits_at(limits, int(self.num_batches_tracked) if scheduled else 0) or (None, None)
    running = self.running_mean.clone(), self.running_var.clone()
    last |= {"eps": self.eps, "r_max": r_max, "d_max": d_max} | ({"group": group} if group else {})
    return bn.batch_renorm(x, *running, self.weight, self.bias, **last)


def _whole_call(self: Module, x: Any, residual: Any, activation: Activation | None) -> Any:
    """Return y by compiled code, which reads the tensors as they are; None where it declines them."""
    if self.training and self.group is not None:
        return None
    self._check_input_dim(x)
    own, buffers = self._parameters, self._buffers  # faster than attributes
    if "weight" not in own or "bias" not in own:  # parametrized
        return None
    gamma, beta = own["weight"], own["bias"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    fast = optimistic.for_array(x)
    if not self.training and mean is not None:
        return fast.inference(
            x, mean, var, None, gamma, beta, 1, self.eps, residual, activation, None, False
        )
    count = buffers["num_batches_tracked"] if self.training and self.track_running_stats else None
    if not self.training or (count is None) != (mean is None):
        return None
    momentum, eps = self.momentum, self.eps
    return fast.train(x, gamma, beta, mean, var, count, momentum, eps, residual, activation)


torch.fx.wrap("_forward")  # symbolic tracing does not trace into the call, as with modules of torch.nn


def _copy_with_name(function: Any, name: str) -> Any:
    """Copy a function under another name, which is the name of the method that TorchScript compiles."""
    copied = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copied.__annotations__ = function.__annotations__
    return copied


_scripted_forward = _copy_with_name(
    nn.BatchNorm1d.forward, "scripted_forward"
)  # the same for all three classes


def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Normalize, and update the running statistics in training."""
    # TorchScript cannot call this package, and compiles the method of torch.nn.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return self.scripted_forward(input)  # type: ignore[no-any-return]
    return _forward(self, input)  # type: ignore[no-any-return]


def _scriptable(self: Module) -> Module:
    """Return the module for `torch.jit.script`, which calls this method."""
    validate_no_group("torch.jit.script", self)
    for name, default in (("degenerate", "raise"), ("renorm", None)):
        if getattr(self, name) != default:
            got = f"a module with {name}={getattr(self, name)!r}"
            fail(TypeError, "torch.jit.script", got, f"one with {name}={default!r}")
    return self


def validate_no_group(what: str, module: Module) -> None:
    """Check that a module has no group, for functions of PyTorch that do not support groups."""
    if module.group is not None:
        got = "a module that joins batches over a group"
        fail(TypeError, what, got, "one without a group: call batchnorm.torch.revert first")


class _Module(groups.Shared, nn.Module):
    """What the modules below have in common."""

    degenerate: str = "raise"
    renorm: Any = None

    def __init__(
        self, *arguments: Any, degenerate: str = "raise", renorm: Any = None, **named: Any
    ) -> None:
        validate_choice("degenerate", degenerate, CHOICES)
        validate_renorm(renorm)
        validate_together(renorm, None, degenerate, None)
        super().__init__(*arguments, **named)
        if renorm is not None and self.running_mean is None:
            fail(ValueError, "renorm", "one without running statistics", "track_running_stats=True")
        if degenerate != "raise":  # TorchScript compiles attributes of the instance
            self.degenerate = degenerate
        if renorm is not None:
            self.renorm = renorm


class BatchNorm1d(_Module, nn.BatchNorm1d):
    """A subclass of `torch.nn.BatchNorm1d` that computes with this package.

    It has the same arguments and the same ``state_dict``. The input has the shape (N, C) or (N, C, L).
    The attribute ``group`` is the group of `convert`, or None. ``degenerate`` and ``renorm``, keywords
    and attributes, are those of `batchnorm.BatchNorm`.
    """

    forward = forward
    scripted_forward = _scripted_forward
    __prepare_scriptable__ = _scriptable
    group: Any = None


class BatchNorm2d(_Module, nn.BatchNorm2d):
    """A subclass of `torch.nn.BatchNorm2d`, as `BatchNorm1d`, for input of shape (N, C, H, W)."""

    forward = forward
    scripted_forward = _scripted_forward
    __prepare_scriptable__ = _scriptable
    group: Any = None


class BatchNorm3d(_Module, nn.BatchNorm3d):
    """A subclass of `torch.nn.BatchNorm3d`, as `BatchNorm1d`, for input of shape (N, C, D, H, W)."""

    forward = forward
    scripted_forward = _scripted_forward
    __prepare_scriptable__ = _scriptable
    group: Any = None
