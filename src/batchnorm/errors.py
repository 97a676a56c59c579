"""The one form of every error message, and short descriptions of what an argument is."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn


def fail(error: type[Exception], argument: str, got: object, expected: str) -> NoReturn:
    """Raise an error in the one form that all of ours have: one line."""
    raise error(" ".join(f"{argument}: got {got}, expected {expected}".split()))


def fail_on_all_members(error: type[Exception], argument: str, got: object, expected: str) -> NoReturn:
    """Raise an error that all members of a group find by themselves: nobody has to be told."""
    try:
        fail(error, argument, got, expected)
    except error as raised:
        raised.on_all_members = True  # type: ignore[attr-defined]
        raise


def describe_type(value: Any) -> str:
    """The class of an argument, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def describe(value: Any) -> str:
    """What an argument is, in a few words."""
    what = describe_type(value)
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"{what} of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:  # a number of NumPy's without its class
        text = " ".join((str if isinstance(value, numbers.Real) else repr)(value).split())
    except Exception:  # an object that cannot tell what it is
        return what
    return text if len(text) <= 80 else what
