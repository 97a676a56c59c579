"""Where a compiler follows a call instead of running it."""

from __future__ import annotations

import functools
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
