"""Where a compiler follows a call instead of running it: PyTorch's, and JAX's transformations."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def traced() -> bool:
    """Whether PyTorch follows what it runs: values then are not there, and NumPy's are constants."""
    torch: Any = sys.modules["torch"]
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_jax_tracer(a: Any) -> bool:
    """Whether an array stands for one that JAX has not computed."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and isinstance(a, jax.core.Tracer)


def jax_trace() -> Any:
    """Give what tells one transformation of JAX, or none, from another; None where JAX is not loaded."""
    if "jax" not in sys.modules:
        return None
    return importlib.import_module("jax.extend.core").get_opaque_trace_state(convention="batchnorm")


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """Let PyTorch's compiler follow a function that it could not follow by itself."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch: Any = sys.modules.get("torch")
        if torch is not None and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            from batchnorm.torch import graph

            return graph.follow(name, *args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call
