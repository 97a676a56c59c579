"""PyTorch's CPU tensors on the backends for NumPy arrays: both look at the same memory.

PyTorch is not imported here: tensors come from users who have.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from batchnorm.backends.base import Backend
from batchnorm.backends.generic import Generic
from batchnorm.epilogue import Epilogue
from batchnorm.errors import describe_type
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any
Arrays = tuple[Array | None, ...]


def refuses(arrays: Arrays, device: str) -> str | None:
    """Return why kernels on "cpu" or "cuda" cannot read the memory of some tensors, or None.

    As `Backend.refuses`: empty for tensors on another device.
    """
    torch = sys.modules["torch"]
    for a in arrays:
        if a is None:
            continue
        if type(a) not in (torch.Tensor, torch.nn.Parameter):
            return f"the tensors include {describe_type(a)}"
        if a.device.type != device:
            return ""
        if a.layout is not torch.strided:
            return "the tensors are not strided memory"
        if a.is_neg():  # a view whose sign PyTorch changes as it reads
            return "the tensors include a negated view"
    return None


def exchange() -> Any:
    """Return what describes the memory of tensors in C, DLPack's exchange interface; or None."""
    return getattr(sys.modules["torch"].Tensor, "__dlpack_c_exchange_api__", None)


def without_view(arrays: Arrays) -> str | None:
    """Return why there is no NumPy array of the memory of some tensors, or None."""
    torch = sys.modules["torch"]
    if any(a is not None and a.dtype is torch.bfloat16 for a in arrays) and _bfloat16() is None:
        return "the tensors are bfloat16, for which ml_dtypes is not installed"
    return None


@functools.cache
def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def view(a: Array) -> Array:
    """Return a NumPy array of the same memory."""
    torch = sys.modules["torch"]
    if a.dtype is torch.bfloat16:
        return a.detach().view(torch.uint16).numpy().view(_bfloat16())
    return a.detach().numpy()


def views(arrays: Arrays) -> Arrays:
    """Return NumPy arrays of the same memory."""
    return tuple(None if a is None else view(a) for a in arrays)


def tensor(a: Array) -> Array:
    """Return a tensor of the same memory."""
    torch = sys.modules["torch"]
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def memory_format(x: Array) -> Any:
    """Return how PyTorch's own batch norm lays out a result for x: channels last, or contiguous."""
    torch = sys.modules["torch"]
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None:
        return torch.contiguous_format
    if x.is_contiguous(memory_format=last):
        return last
    return torch._prims_common.suggest_memory_format(x)


def empty_result(x: Array, device: Any = None) -> Array:
    """Return a tensor for a result like x, as PyTorch's own batch norm makes it."""
    torch = sys.modules["torch"]
    return torch.empty_like(x, memory_format=memory_format(x), device=device)


def laid_out(result: Array, x: Array) -> Array:
    """Return a result in the memory layout of PyTorch's own for x."""
    if result.stride() == empty_result(x, "meta").stride():
        return result
    return empty_result(x).copy_(result)


@functools.lru_cache(maxsize=256)
def _layout(layout: Layout) -> Layout:
    """Return the `Layout` for the NumPy view of a tensor."""
    torch = sys.modules["torch"]
    return layout._replace(
        xp=np,
        device="cpu",
        compute=np.float64 if layout.compute is torch.float64 else np.float32,
        wide=np.float64,
    )


def _to_host(value: Any) -> Any:
    torch = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        return view(value)
    if isinstance(value, Epilogue):
        return value._replace(residual=_to_host(value.residual), y=_to_host(value.y))
    if isinstance(value, (tuple, list)) and not isinstance(value, Layout):
        return _like_tuple(value, map(_to_host, value))
    return _layout(value) if isinstance(value, Layout) else value


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return tensor(value)
    return _like_tuple(value, map(_to_tensors, value)) if isinstance(value, tuple) else value


def _like_tuple(value: Any, parts: Iterable[Any]) -> Any:
    return Moments(*parts) if isinstance(value, Moments) else tuple(parts)


def _delegated(method: str, like: int | None) -> Any:
    """Make a method that runs the host's on the memory of tensors; a result in `out` is that tensor."""

    def call(self: OnTensors, *arguments: Any, out: Array | None = None, **named: Any) -> Any:
        host = functools.partial(
            getattr(self.host, method), **{name: _to_host(v) for name, v in named.items()}
        )
        if like is None:
            return _to_tensors(host(*map(_to_host, arguments)))
        target = out
        if out is None and not arguments[like].is_contiguous():
            target = empty_result(arguments[like])
        result = host(*map(_to_host, arguments), out=_to_host(target))
        if target is None:
            return _to_tensors(result)
        return (target, *_to_tensors(result[1:])) if isinstance(result, tuple) else target

    return call


class OnTensors(Backend):
    """A backend for NumPy arrays, on CPU tensors."""

    def __init__(self, host: Backend) -> None:
        self.name, self.summary, self.host = host.name, host.summary, host


# Method, and the argument that its first result is like; None where it has no `out`.
for _method, _like in {
    "moments": None,
    "scale_shift": 0,
    "grad_sums": None,
    "grad_input": 1,
    "statistics": None,
    "forward": 0,
    "inference": 0,
    "backward": 1,
    "centred_sums": None,
    "gradients": 1,
    "inference_backward": 1,
    "output": 0,
    "activation_gradient": None,
}.items():
    setattr(OnTensors, _method, _delegated(_method, _like))


@functools.cache
def on_tensors(host: Backend) -> Backend:
    """Return a backend for NumPy arrays as one for CPU tensors."""
    return OnTensors(host)


class OwnOperators(Generic):
    """Array API code on PyTorch's own operators, with results in the layout of its batch norm's."""

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        return laid_out(super().scale_shift(x, m, a, b, layout), x)

    def output(self, x: Array, *arguments: Any, out: Array | None = None, **named: Any) -> Array:
        """Return y = act(a·(x − m) + b + z)."""
        return laid_out(super().output(x, *arguments, **named), x)

    def grad_input(self, dy: Array, x: Array, *arguments: Any, out: Array | None = None) -> Array:
        """Return dx = a·(dy + w·(b·(x − m) + c))."""
        return laid_out(super().grad_input(dy, x, *arguments), x)


OWN_OPERATORS = OwnOperators()
