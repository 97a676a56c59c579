"""Modules for a batch norm, a residual that is added to it, and an activation, in one pass."""

from __future__ import annotations

from typing import Any, ClassVar, Optional

import torch
from torch import nn
from torch.nn import functional

from batchnorm.epilogue import Activation, validate_activation
from batchnorm.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    _forward,
)

Module = Any
_jit: Any = torch.jit


def _fits(x: Any, residual: Any) -> bool:
    """Return whether the pass takes the residual: a sum that neither broadcasts nor promotes."""
    return (
        type(residual) is type(x)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _activated(y: Any, name: str, slope: float) -> Any:
    """Return the activation as PyTorch computes it."""
    if not name:
        return y
    function = getattr(functional, name)
    return function(y, slope) if name == "leaky_relu" else function(y)


def _forward_act(self: Module, x: Any, residual: Any, name: str, slope: float, in_place: bool) -> Any:
    """Compute act(bn(x) + residual); in one pass if the residual is like x."""
    # What `torch.jit.trace` records has no checks: there, PyTorch's own operators follow the norm.
    if residual is None or (not _jit.is_tracing() and _fits(x, residual)):
        return _forward(self, x, residual, Activation(name, slope) if name else None)
    y = _forward(self, x)
    y = y.add_(residual) if in_place else y + residual
    return _activated(y, name, slope)


torch.fx.wrap("_forward_act")  # as `_forward`


def forward(  # type: ignore[no-untyped-def]
    self,
    input: torch.Tensor,
    residual: Optional[torch.Tensor] = None,  # noqa: UP045  (as TorchScript reads it)
    activation: Optional[str] = None,  # noqa: UP045
    slope: float = 0.0,
    in_place: bool = False,
) -> torch.Tensor:
    """Normalize, add the residual, and apply the activation.

    Parameters
    ----------
    input : torch.Tensor
        As for the module without an activation.
    residual : torch.Tensor, optional
        What is added before the activation. One of another dtype or shape is added as PyTorch adds it.
    activation : str, optional
        In the place of the module's own, with `slope`; what `convert` has rewritten gives it.
    slope : float
        Of leaky_relu.
    in_place : bool
        Whether the sum has the dtype and shape of the norm, as the one of ``y += residual`` has.
    """
    name = self.activation_name
    if activation is not None:
        name = activation
    else:
        slope = self.activation_slope
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return self.scripted_act(input, residual, name, slope, in_place)  # type: ignore[no-any-return]
    return _forward_act(self, input, residual, name, slope, in_place)  # type: ignore[no-any-return]


def scripted_act(  # type: ignore[no-untyped-def]
    self,
    input: torch.Tensor,
    residual: Optional[torch.Tensor],  # noqa: UP045
    name: str,
    slope: float,
    in_place: bool,
) -> torch.Tensor:
    """Compute the same in TorchScript, which cannot call this package."""
    y = self.scripted_forward(input)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    if name == "relu":
        y = functional.relu(y)
    elif name == "relu6":
        y = functional.relu6(y)
    elif name == "leaky_relu":
        y = functional.leaky_relu(y, slope)
    elif name == "silu":
        y = functional.silu(y)
    return y  # type: ignore[no-any-return]


class _Activated(nn.Module):
    """What the modules below have in common."""

    activation_name: str = ""
    activation_slope: float = 0.0
    __constants__: ClassVar[Any] = [
        *nn.BatchNorm2d.__constants__,
        "activation_name",
        "activation_slope",
    ]
    __jit_unused_properties__ = ("activation",)

    def __init__(self, *arguments: Any, activation: Any = "relu", **named: Any) -> None:
        checked = validate_activation(activation)
        super().__init__(*arguments, **named)
        self.activation = checked

    @property
    def activation(self) -> Activation | None:
        """The activation, with its slope; None for none."""
        name = self.activation_name
        return Activation(name, self.activation_slope) if name else None

    @activation.setter
    def activation(self, value: Any) -> None:
        checked = validate_activation(value) or ("", 0.0)
        self.activation_name, self.activation_slope = checked

    def extra_repr(self) -> str:
        """Return the settings, as PyTorch's modules do."""
        own, said = self.activation, super().extra_repr()
        if own is None:
            return said
        return f"{said}, activation={tuple(own) if own.name == 'leaky_relu' else own.name!r}"

    forward: Any = forward
    scripted_act: Any = scripted_act


class BatchNormAct1d(_Activated, BatchNorm1d):
    """A `BatchNorm1d` with an activation, which takes a residual: act(bn(x) + residual) in one pass.

    It has the arguments of `torch.nn.BatchNorm1d`, and the same ``state_dict``. ``module(x)`` is the
    activation of the norm, ``module(x, residual)`` that of the norm plus a tensor. A residual of another
    dtype or shape than x is added as PyTorch adds it, in a pass of its own.

    Parameters
    ----------
    *arguments, **named
        Of `torch.nn.BatchNorm1d`.
    activation : {"relu", "relu6", "leaky_relu", "silu"}, ("leaky_relu", slope) or None, default "relu"
        As in `batchnorm.batch_norm`; also an attribute, which can be set.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> module = batchnorm.torch.BatchNormAct1d(3)
    >>> x, residual = torch.randn(8, 3), torch.randn(8, 3)
    >>> expected = torch.relu(torch.nn.BatchNorm1d(3)(x) + residual)
    >>> torch.testing.assert_close(module(x, residual), expected)
    """


class BatchNormAct2d(_Activated, BatchNorm2d):
    """As `BatchNormAct1d`, for input of shape (N, C, H, W)."""


class BatchNormAct3d(_Activated, BatchNorm3d):
    """As `BatchNormAct1d`, for input of shape (N, C, D, H, W)."""
