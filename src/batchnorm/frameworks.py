"""The modules of this package that need a framework, loaded by name when its arrays first ask for them.

They stand above the dispatcher, which therefore does not import them: see CONTRIBUTING.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def load(name: str) -> Any:
    """Return a module by its name below `batchnorm`."""
    _import(name)
    module: Any = sys.modules["batchnorm"]
    for part in name.split("."):  # in `sys.modules`, PyTorch's compiler sees what was there before
        module = getattr(module, part)
    return module


def _import(name: str) -> bool:
    importlib.import_module(f"batchnorm.{name}")
    return True


# What `torch.compiler.assume_constant_result` sets: PyTorch's compiler, which cannot follow an import by
# name, then calls the function while it traces.
_import._dynamo_marked_constant = True  # type: ignore[attr-defined]
