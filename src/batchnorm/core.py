"""The compiled core, where it was built; and why it is not there, where it was not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from batchnorm import outputs, threads
from batchnorm.moments import Moments


@functools.cache
def _found() -> ModuleType | str:
    try:
        _core = importlib.import_module("batchnorm._core")
    except ImportError as error:
        return str(error)
    _core.setup(Moments, threads.get_num_threads, outputs.empty_like)
    return _core


def missing() -> str | None:
    """Return why the core is not there, or None."""
    found = _found()
    return found if isinstance(found, str) else None


def load() -> Any:
    """Return the core, or None."""
    found = _found()
    return None if isinstance(found, str) else found
