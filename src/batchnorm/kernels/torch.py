"""PyTorch's CPU tensors on the kernels for NumPy: both look at the same memory."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from batchnorm import checks
from batchnorm.kernels import KernelSet
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.tracing import traced

Array = Any

# Kernels whose output is like another argument than the first.
MODEL = {"backward": 1, "grad_input": 1}

_own_operators: ContextVar[str | None] = ContextVar("own_operators", default=None)


def recorded(arrays: tuple[Array | None, ...]) -> str | None:
    """Why PyTorch has to see operators on these tensors, or None."""
    torch = sys.modules["torch"]
    if traced():
        return "PyTorch traces the tensors"
    gradients = torch.is_grad_enabled()
    for a in arrays:
        if a is not None and gradients and a.requires_grad:
            return "PyTorch differentiates the tensors"
        if a is not None and type(a) is torch._subclasses.FakeTensor:
            return "PyTorch traces the tensors"
    return None


def transformed() -> str | None:
    """Why PyTorch has to see its own operators, or None: it knows how to transform only these."""
    torch = sys.modules["torch"]
    why = _own_operators.get()
    if why is not None:
        return why
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the tensors"
    if torch.autograd.forward_ad._current_level >= 0:
        return "PyTorch differentiates the tensors forward"
    return None


@contextlib.contextmanager
def own_operators(why: str) -> Iterator[None]:
    """Have calls run on PyTorch's own operators, where its state alone does not tell that they must."""
    token = _own_operators.set(why)
    try:
        yield
    finally:
        _own_operators.reset(token)


def learned(where: Array | None) -> str | None:
    """Why PyTorch has to see its own operators for gradients to weights, or None."""
    torch = sys.modules["torch"]
    if where is None or not (where.requires_grad and torch.is_grad_enabled()):
        return None
    return "PyTorch differentiates the weights"


def refuses(arrays: tuple[Array | None, ...], device: str) -> str | None:
    """Why kernels cannot look at the memory of some tensors, or None."""
    torch = sys.modules["torch"]
    for a in arrays:
        if a is None:
            continue
        if type(a) not in (torch.Tensor, torch.nn.Parameter):
            return f"include {checks.kind(a)}"
        if device not in ("cpu", "cuda") or a.layout is not torch.strided:
            return "are not strided memory of a CPU or a CUDA device"
        if a.is_neg():  # a view whose sign PyTorch changes as it reads
            return "include a negated view"
        if a.dtype is torch.bfloat16 and device == "cpu" and _bfloat16() is None:
            return "are bfloat16, for which ml_dtypes is not installed"
    return None


@functools.cache
def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def view(a: Array) -> Array:
    """A NumPy array of the same memory."""
    torch = sys.modules["torch"]
    if a.dtype is torch.bfloat16:
        return a.detach().view(torch.uint16).numpy().view(_bfloat16())
    return a.detach().numpy()


def tensor(a: Array) -> Array:
    """A tensor of the same memory."""
    torch = sys.modules["torch"]
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(a)


@functools.cache
def _layout(at: Layout) -> Layout:
    """A tensor's layout as that of the array that looks at it."""
    torch = sys.modules["torch"]
    return at._replace(
        xp=np,
        device="cpu",
        compute=np.float64 if at.compute is torch.float64 else np.float32,
        wide=np.float64,
    )


def memory_format(x: Array) -> Any:
    """How PyTorch's own batch norm lays out a result for x: channels last, or in the order of axes."""
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
    """A tensor for a result like x, as PyTorch's own batch norm makes it."""
    torch = sys.modules["torch"]
    return torch.empty_like(x, memory_format=memory_format(x), device=device)


def laid_out(result: Array, x: Array) -> Array:
    """A result like x, brought into the layout of PyTorch's own where it is in another."""
    if result.stride() == empty_result(x, "meta").stride():
        return result
    return empty_result(x).copy_(result)


def _into(value: Any) -> Any:
    torch = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        return view(value)
    if isinstance(value, Moments):
        return Moments(*(_into(v) for v in value))
    return _layout(value) if isinstance(value, Layout) else value


def _out_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return tensor(value)
    if isinstance(value, Moments):
        return Moments(*(_out_of(v) for v in value))
    return tuple(_out_of(v) for v in value) if isinstance(value, tuple) else value


def _through(kernel: Callable[..., Any], model: int = 0) -> Callable[..., Any]:
    """A kernel that takes and gives tensors; an `out`, the last argument, comes back itself.

    Its first result is like the argument of the number `model`.
    """

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        if arguments[-1] is None and not arguments[model].is_contiguous():
            arguments = (*arguments[:-1], empty_result(arguments[model]))
        result = kernel(*(_into(a) for a in arguments))
        out = arguments[-1]
        if out is None or isinstance(out, Layout):
            return _out_of(result)
        return (out, *_out_of(result[1:])) if isinstance(result, tuple) else out

    return call


@functools.cache
def adapted(host: KernelSet) -> KernelSet:
    """A kernel set for NumPy arrays as one for tensors."""
    kernels: dict[str, Any] = {f: k for f, k in host._asdict().items() if callable(k)}
    if host.name == "numba":
        from batchnorm.kernels.team import on_torch

        kernels = {f: on_torch(k) for f, k in kernels.items()}
    through: dict[str, Any] = {f: _through(k, MODEL.get(f, 0)) for f, k in kernels.items()}
    return host._replace(**through)


@functools.cache
def restrided(own: KernelSet) -> KernelSet:
    """PyTorch's own operators, with results in the layout of its batch norm's."""

    def laid(kernel: Callable[..., Any], model: int) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def call(*arguments: Any) -> Any:
            result = kernel(*arguments)
            return result if arguments[-1] is not None else laid_out(result, arguments[model])

        return call

    outputs: dict[str, Any] = {
        f: laid(getattr(own, f), MODEL.get(f, 0)) for f in ("scale_shift", "grad_input")
    }
    return own._replace(**outputs)
