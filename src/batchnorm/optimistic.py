"""Whole calls in compiled code, by the class of x; the general path registers them.

A call asks these functions first. They take the arguments of a call, whatever these are, and run it, or
return None before anything is written: then the general path checks the arguments, and explains or runs
them. So there are no caches of checks.
"""

from __future__ import annotations

from typing import Any

calls: dict[type, Any] = {}
"""Class of x: an object with `forward`, `backward`, `inference` and `update_running`, the core's."""


class _Nothing:
    """Takes no call."""

    def __getattr__(self, name: str) -> Any:
        return self._decline

    @staticmethod
    def _decline(*arguments: Any) -> None:
        return None


_nothing = _Nothing()


def for_array(x: Any) -> Any:
    """Return what takes whole calls on arrays of the class of x."""
    return calls.get(type(x), _nothing)
