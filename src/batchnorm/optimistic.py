"""Whole calls in compiled code, by the class of x.

A call asks these functions first. They take the arguments of a call, whatever these are, and run it, or
return None before anything is written: then the general path checks the arguments, and explains or runs
them. So there are no caches of checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Nothing:
    """Takes no call."""

    def __getattr__(self, name: str) -> Any:
        return self._decline

    @staticmethod
    def _decline(*arguments: Any) -> None:
        return None


calls: dict[type, Any] = {}
"""Class of x: an object with `forward`, `backward`, `inference`, `update_running` and `fits`."""
NOTHING: Any = _Nothing()


def _find_nothing(kind: type) -> Any:
    return NOTHING


find: Callable[[type], Any] = _find_nothing
"""Return what takes whole calls on a class of arrays that is new; the dispatcher sets it."""


def for_array(x: Any) -> Any:
    """Return what takes whole calls on arrays of the class of x."""
    kind = type(x)
    found = calls.get(kind)
    if found is None:
        found = calls[kind] = find(kind)
    return found
