"""State of the compilers and transformations of PyTorch and JAX."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from batchnorm import frameworks

P = ParamSpec("P")
R = TypeVar("R")
Array = Any

_own_operators: ContextVar[str | None] = ContextVar("own_operators", default=None)


def traced() -> bool:
    """Return whether PyTorch traces: values are then unknown, and NumPy arrays are constants."""
    torch: Any = sys.modules["torch"]
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def recorded(arrays: tuple[Array | None, ...]) -> str | None:
    """Return why operators on these tensors must be visible to PyTorch, or None."""
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
    """Return why PyTorch's own operators, the only ones it can transform, are needed; or None."""
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
    """Run calls on PyTorch's own operators, also if the state of PyTorch does not require them."""
    token = _own_operators.set(why)
    try:
        yield
    finally:
        _own_operators.reset(token)


def differentiates_weights(where: Array | None) -> bool:
    """Return whether PyTorch differentiates the weights, which needs its own operators."""
    torch = sys.modules["torch"]
    return where is not None and bool(where.requires_grad and torch.is_grad_enabled())


def is_jax_tracer(a: Any) -> bool:
    """Return whether an array is a tracer of JAX."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and isinstance(a, jax.core.Tracer)


def jax_trace() -> Any:
    """Return an object that identifies the current trace of JAX; None if JAX is not loaded."""
    if "jax" not in sys.modules:
        return None
    return importlib.import_module("jax.extend.core").get_opaque_trace_state(convention="batchnorm")


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function traceable by PyTorch's compiler, which cannot trace the function itself."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch: Any = sys.modules.get("torch")
        if torch is not None and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return frameworks.load("torch.graph").call_in_graph(name, *args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call
