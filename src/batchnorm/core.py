"""The compiled core, where it was built; and why it is not there, where it was not."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

from batchnorm import outputs, threads
from batchnorm.moments import Moments


@functools.cache
def _found() -> ModuleType | str:
    if os.environ.get("BATCHNORM_NATIVE") == "0":  # one test suite covers both implementations
        return "BATCHNORM_NATIVE=0"
    if importlib.util.find_spec("batchnorm._core") is None:
        return "this installation was built without it"
    try:
        from batchnorm import _core  # type: ignore[attr-defined]
    except ImportError as error:
        return f"it cannot be loaded: {error}"
    core: ModuleType = _core
    core.setup(Moments, threads.get_num_threads, outputs.empty_like)
    threads.show_to_threadpoolctl()
    return core


def missing() -> str | None:
    """Return why the core is not there, or None."""
    found = _found()
    return found if isinstance(found, str) else None


def load() -> Any:
    """Return the core, or None."""
    found = _found()
    return None if isinstance(found, str) else found
