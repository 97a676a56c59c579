"""What the members of a group do together: one vector per pass, and a word before it.

A group is anything with ``all_reduce(array) -> array``, a sum over its members. One that also tells
``rank`` and ``size`` needs a single reduction where there would be two. One with ``announce``,
``abort_unannounced``, ``abort`` and ``told`` (`distributed.members`) compares what its members come
with, and tells all of them when one fails.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from array_api_compat import array_namespace, device

from batchnorm.errors import describe_type, fail
from batchnorm.layout import Layout, float_name
from batchnorm.moments import Moments, merge_rows, merge_vectors

Array = Any

# Bytes up to which the moments of all members go into one vector, each in a place of its own. Beyond
# it, a second reduction costs less than the bytes: see the page on synchronized statistics.
ONE_VECTOR = 2**19


class Call:
    """A call that all members of a group make: a context whose error is an error on every member.

    Up to the last sum, that is: after it, each member has what it needs of the others.
    """

    def __init__(self, group: Any, name: str) -> None:
        self.group, self.name, self.announced = group, name, False

    def __enter__(self) -> Self:
        self.since = getattr(self.group, "exchanges", 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = getattr(self.group, "told", None)
        # What the members have told each other in a call within this one, they know.
        if error is not None and not (told is not None and told(error, self.since)):
            tell = getattr(self.group, "abort" if self.announced else "abort_unannounced", None)
            if tell is not None:
                tell(error)

    def announce(self, what: str, sums: Sequence[tuple[int, ...]], dtype: str) -> None:
        """Say what this member comes with, and the shapes of what it is going to add up."""
        self.announced = True
        if hasattr(self.group, "announce"):
            self.group.announce(f"{self.name} of {what}", tuple(sums), dtype)

    def announce_forward(self, layout: Layout, x: Array) -> None:
        """Say what this member comes with to a forward pass."""
        self.announce(_named(layout, x), moments_sums(self.group, layout.channels), _wide(layout))

    def announce_backward(self, layout: Layout, x: Array) -> None:
        """Say what this member comes with to a backward pass."""
        self.announce(_named(layout, x), [(2, *layout.broadcast)], _wide(layout))

    def allreduce_moments(self, own: Moments) -> Moments:
        """Return the moments of all members' values, given this member's own."""
        return allreduce_moments(self.group, own)

    def all_reduce(self, *vectors: Array) -> list[Array]:
        """Return the sums of vectors over the members."""
        return all_reduce(self.group, *vectors)


def call(group: Any, name: str) -> Any:
    """A call of a group's members; of nobody where there is no group."""
    return _ALONE if group is None else Call(group, name)


_ALONE = contextlib.nullcontext()


def _named(layout: Layout, x: Array) -> str:
    return f"{float_name(layout.xp, x.dtype)} with {layout.channels} channels"


def _wide(layout: Layout) -> str:
    return "float64" if layout.wide == layout.xp.float64 else "float32"


def moments_sums(group: Any, channels: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of what `allreduce_moments` adds up."""
    size = getattr(group, "size", None)
    if size is None or size * 4 * math.prod(channels) * 8 > ONE_VECTOR:
        return [(2, *channels)] * 2
    return [(size, 4, *channels)]


def allreduce_moments(group: Any, own: Moments) -> Moments:
    """The moments of all members' values, the same on each of them to the bit.

    Where it pays, each member puts its moments into its own place of one vector, and zeros elsewhere:
    sums with zeros are exact, so every member merges the very same numbers.
    """
    xp = array_namespace(own.mean)
    packed = xp.stack(tuple(own))  # (4, C)
    if len(moments_sums(group, tuple(packed.shape[1:]))) > 1:
        return merge_vectors([own], lambda *sums: all_reduce(group, *sums))
    size = group.size
    places = xp.reshape(xp.arange(size, device=device(own.mean)), (size,) + (1,) * packed.ndim)
    mine = places == group.rank
    vector = xp.where(mine, packed[None, ...], xp.zeros_like(packed)[None, ...])  # (size, 4, C)
    summed = _summed(group, vector)
    return merge_rows(Moments(*(summed[:, i, ...] for i in range(4))))


def all_reduce(group: Any, *vectors: Array) -> list[Array]:
    """Sum vectors over the members of a group, packed into one array."""
    xp = array_namespace(*vectors)
    summed = _summed(group, xp.stack(vectors))
    return [summed[i, ...] for i in range(len(vectors))]


def _summed(group: Any, packed: Array) -> Array:
    summed = group.all_reduce(packed)
    if getattr(summed, "shape", None) != packed.shape:
        got = f"{describe_type(summed)} of shape {getattr(summed, 'shape', None)}"
        fail(TypeError, "group.all_reduce", got, f"the sum, an array of shape {packed.shape}")
    return summed


class Shared:
    """An object whose `group` its copies share, and pickles leave out."""

    group: Any

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()  # PyTorch's modules leave out what they have compiled
        return {name: v for name, v in (state or {}).items() if name != "group"}

    def __copy__(self) -> Self:
        return self._with_state(type(self).__new__(type(self)), self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        return self._with_state(made, copy.deepcopy(self.__getstate__(), memo))

    def _with_state(self, made: Self, state: dict[str, Any]) -> Self:
        getattr(made, "__setstate__", vars(made).update)(state)
        if "group" in vars(self):
            vars(made)["group"] = self.group
        return made
