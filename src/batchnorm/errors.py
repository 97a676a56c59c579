"""The format of error messages, and short descriptions of arguments."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn


class GroupError(RuntimeError):
    """An error of a group: a member is missing or late, has failed, or made another call.

    The call that raises it has changed nothing.
    """


def fail(error: type[Exception], argument: str, got: object, expected: str) -> NoReturn:
    """Raise an error with the message "argument: got …, expected …" on one line."""
    raise error(" ".join(f"{argument}: got {got}, expected {expected}".split()))


def fail_on_all_members(error: type[Exception], argument: str, got: object, expected: str) -> NoReturn:
    """Raise an error that every member of a group raises by itself, so that none has to send it."""
    try:
        fail(error, argument, got, expected)
    except error as raised:
        raised.on_all_members = True  # type: ignore[attr-defined]
        raise


def describe_type(value: Any) -> str:
    """Return the class of an argument with an indefinite article."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def describe(value: Any) -> str:
    """Return a short description of an argument."""
    what = describe_type(value)
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"{what} of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:  # str omits the class of a NumPy number
        text = " ".join((str if isinstance(value, numbers.Real) else repr)(value).split())
    except Exception:  # of an object whose repr raises
        return what
    return text if len(text) <= 80 else what
