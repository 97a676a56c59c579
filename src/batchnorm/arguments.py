"""Validation of arguments other than arrays: numbers, switches, names, axes, paths, callables."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import numbers
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchnorm.arrays import known_false, namespace
from batchnorm.errors import describe, describe_type, fail
from batchnorm.layout import FLOATS, float_name

Array = Any


def validate_group(group: Any) -> None:
    """Check that a group can sum over its members."""
    if group is not None and not callable(getattr(group, "all_reduce", None)):
        fail(TypeError, "group", describe_type(group), "an object with all_reduce(array)")


def validate_number(argument: str, value: Any, low: float, high: float = float("inf")) -> Any:
    """Check a number with bounds; return it as a float, or as it is if it is a 0-d array."""
    if type(value) is float and low <= value <= high and value != float("inf"):
        return value
    interval = f"a number >= {low:g}" if high == float("inf") else f"a number in [{low:g}, {high:g}]"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if not low <= number <= high or number == float("inf"):
            fail(ValueError, argument, describe(value), interval)
        return number
    if (
        getattr(value, "shape", None) != ()
        or float_name(namespace(argument, value), value.dtype) is None
    ):
        fail(TypeError, argument, describe(value), interval)
    if known_false((value >= low) & (value <= high) & (value < float("inf"))):
        fail(ValueError, argument, describe(value), interval)
    return value


def validate_int(argument: str, value: Any, low: int) -> int:
    """Check an integer with a lower bound, and return it as an int."""
    expected = f"a whole number >= {low}"
    try:
        number = operator.index(value)
    except TypeError:
        fail(TypeError, argument, describe(value), expected)
    if isinstance(value, bool) or number < low:
        fail(ValueError, argument, describe(value), expected)
    return number


def validate_bool(argument: str, value: Any) -> bool:
    """Check a switch, and return it as a bool."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # NumPy's
        fail(TypeError, argument, describe(value), "True or False")
    return bool(value)


def validate_choice(argument: str, value: Any, names: Iterable[str], more: str = "") -> str:
    """Check a name that must be one of several."""
    expected = f"one of {', '.join(map(repr, names))}{more}"
    if not isinstance(value, str):
        fail(TypeError, argument, describe(value), expected)
    if value not in names:
        fail(ValueError, argument, describe(value), expected)
    return value


def validate_callable(argument: str, value: Any, what: str = "a function") -> None:
    """Check that a value is callable."""
    if not callable(value):
        fail(TypeError, argument, describe(value), what)


def validate_iterable(argument: str, value: Any, what: str) -> None:
    """Check that a value is iterable."""
    if not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        fail(TypeError, argument, describe(value), what)


def validate_path(argument: str, value: Any) -> Path:
    """Check a path, and return it as a `Path`."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        fail(TypeError, argument, describe(value), "a path")
    return Path(value)


def validate_axis(axis: Any, expected: str = "an int, or a tuple of ints") -> tuple[int, ...]:
    """Check an axis, or a tuple of axes, without the array that it belongs to."""
    given = axis if isinstance(axis, tuple) else (axis,)
    if any(isinstance(a, bool) or getattr(a, "shape", ()) != () for a in given):
        fail(TypeError, "axis", describe(axis), expected)
    try:
        return tuple(operator.index(a) for a in given)
    except TypeError:
        fail(TypeError, "axis", describe(axis), expected)


def validate_dtype(argument: str, dtype: Any) -> str:
    """Check a dtype of any library, or its name, and return the name."""
    if dtype is float or isinstance(dtype, str):  # these are dtypes in NumPy
        with contextlib.suppress(TypeError):
            dtype = importlib.import_module("numpy").dtype(dtype)
    named = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    name = (named if isinstance(named, str) else describe(dtype).strip("'")).rpartition(".")[2]
    if not isinstance(dtype, str):
        name = name.lower()  # those of ndonnx are named Float32
    if name not in FLOATS:
        fail(TypeError, argument, describe(dtype), f"one of {', '.join(FLOATS)}")
    return name


def int_from_environment(variable: str, low: int, expected: str) -> int | None:
    """Return an integer with a lower bound from an environment variable; None if it is not set."""
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and int(text) >= low):
        fail(ValueError, variable, repr(text), expected)
    return int(text) if text else None


def validate_axes(axis: int | tuple[int, ...], ndim: int, name: str = "x") -> tuple[int, ...]:
    """Return the channel axes as non-negative, increasing numbers."""
    expected = f"an int, or a tuple of increasing ints, in [{-ndim}, {ndim - 1}] for {ndim}-d {name}"
    if ndim == 0:
        expected = f"() for 0-d {name}, which has no axis"
    given = validate_axis(axis, expected)
    axes = tuple(a + ndim if a < 0 else a for a in given)
    increasing = all(a < b for a, b in itertools.pairwise(axes))
    if not increasing or not all(0 <= a < ndim for a in axes):
        fail(ValueError, "axis", describe(axis), expected)
    return axes
