"""Where a compiler follows a call instead of running it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def traceable(function: Callable[P, R]) -> Callable[P, R]:
    """Let PyTorch's compiler follow a function that it could not follow by itself."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():
            from batchnorm.torch import graph

            return getattr(graph, name)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call
