"""Ways to run the four kernels, and the one function that picks one for an array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from batchnorm import checks
from batchnorm.kernels import generic

Array = Any


class KernelSet(NamedTuple):
    """The four kernels for some kind of array. `kernels/generic.py` specifies each of them."""

    name: str
    """The file under `kernels/` that it lives in."""
    why: str
    """Why it was picked."""
    moments: Callable[..., tuple[Array, Array, Array, Array]]
    scale_shift: Callable[..., Array]
    grad_sums: Callable[..., tuple[Array, Array]]
    grad_input: Callable[..., Array]

    def __repr__(self) -> str:
        return f"<kernels {self.name}: {self.why}>"


def kernels_for(x: Array) -> KernelSet:
    """Tell which kernel set runs for an array, and why.

    Parameters
    ----------
    x : array
        The array to be normalized, of any array API library.

    Returns
    -------
    KernelSet
        Its `name` and `why` are for people; its other fields are the four kernels.

    Raises
    ------
    TypeError
        `x` is not an array of an array API library.
    """
    return _kernels(checks.namespace("x", x))


@functools.cache
def _kernels(xp: ModuleType) -> KernelSet:
    return KernelSet(
        "generic",
        f"array API code that every library runs; {checks.library(xp)} has no kernels of its own here",
        generic.moments,
        generic.scale_shift,
        generic.grad_sums,
        generic.grad_input,
    )
