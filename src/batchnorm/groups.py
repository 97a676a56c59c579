"""Calls of the members of a group: announcements, errors and reductions.

A group is any object with ``all_reduce(array) -> array``, a sum over its members. If it also has
``rank`` and ``size``, a forward pass needs one reduction in place of two. A group with ``announce``,
``abort_unannounced``, ``abort`` and ``is_known_to_all`` (`distributed.members`) compares the calls of
its members, and raises an error on all members if one of them fails.
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

# Up to this number of bytes, the moments of all members are packed into one vector. For larger vectors,
# a second reduction costs less than the bytes: see the page on synchronized statistics.
ONE_VECTOR = 2**19


class Call:
    """A call of all members of a group, as a context: an error in it is raised on every member.

    This holds up to the last sum of the call, after which no member depends on another.
    """

    def __init__(self, group: Any, name: str) -> None:
        self.group, self.name, self.announced = group, name, False

    def __enter__(self) -> Self:
        self.since = getattr(self.group, "exchanges", 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_known = getattr(self.group, "is_known_to_all", None)
        # An error of a call within this one may have been sent to all members already.
        if error is not None and not (is_known is not None and is_known(error, self.since)):
            abort = getattr(self.group, "abort" if self.announced else "abort_unannounced", None)
            if abort is not None:
                abort(error)

    def announce(self, what: str, sums: Sequence[tuple[int, ...]], dtype: str) -> None:
        """Announce a call, and the shapes of the arrays that it is going to sum."""
        self.announced = True
        if hasattr(self.group, "announce"):
            self.group.announce(f"{self.name} of {what}", tuple(sums), dtype)

    def announce_forward(self, layout: Layout, x: Array) -> None:
        """Announce a forward pass."""
        self.announce(
            _describe_input(layout, x), moments_sums(self.group, layout.channels), wide_name(layout)
        )

    def announce_backward(self, layout: Layout, x: Array) -> None:
        """Announce a backward pass."""
        self.announce(_describe_input(layout, x), [(2, *layout.broadcast)], wide_name(layout))

    def allreduce_moments(self, own: Moments) -> Moments:
        """Return the moments of the joined batch, from the moments of this member's part."""
        return allreduce_moments(self.group, own)

    def all_reduce(self, *vectors: Array) -> list[Array]:
        """Return the sums of vectors over the members."""
        return all_reduce(self.group, *vectors)


def call(group: Any, name: str) -> Any:
    """Return the context of a call of a group; a null context if there is no group."""
    return _NO_GROUP if group is None else Call(group, name)


_NO_GROUP = contextlib.nullcontext()


def _describe_input(layout: Layout, x: Array) -> str:
    return f"{float_name(layout.xp, x.dtype)} with {layout.channels} channels"


def wide_name(layout: Layout) -> str:
    """Return the name of the dtype of sums."""
    return "float64" if layout.wide == layout.xp.float64 else "float32"


def moments_sums(group: Any, channels: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays that `allreduce_moments` sums."""
    size = getattr(group, "size", None)
    if size is None or not hasattr(group, "rank") or size * 4 * math.prod(channels) * 8 > ONE_VECTOR:
        return [(2, *channels)] * 2
    return [(size, 4, *channels)]


def allreduce_moments(group: Any, own: Moments) -> Moments:
    """Return the moments of the joined batch, identical to the bit on all members.

    If the vectors are small, each member writes its moments into its own row of one array and zeros into
    the other rows. Sums with zeros are exact, so all members merge the same numbers.
    """
    xp = array_namespace(own.mean)
    packed = xp.stack(tuple(own))  # (4, C)
    if len(moments_sums(group, tuple(packed.shape[1:]))) > 1:
        return merge_vectors([own], lambda *sums: all_reduce(group, *sums))
    size = group.size
    ranks = xp.reshape(xp.arange(size, device=device(own.mean)), (size,) + (1,) * packed.ndim)
    own_row = ranks == group.rank
    vector = xp.where(own_row, packed[None, ...], xp.zeros_like(packed)[None, ...])  # (size, 4, C)
    summed = _all_reduce(group, vector)
    return merge_rows(Moments(*(summed[:, i, ...] for i in range(4))))


def all_reduce(group: Any, *vectors: Array) -> list[Array]:
    """Sum vectors over the members of a group, packed into one array."""
    xp = array_namespace(*vectors)
    summed = _all_reduce(group, xp.stack(vectors))
    return [summed[i, ...] for i in range(len(vectors))]


def _all_reduce(group: Any, packed: Array) -> Array:
    summed = group.all_reduce(packed)
    if getattr(summed, "shape", None) != packed.shape:
        got = f"{describe_type(summed)} of shape {getattr(summed, 'shape', None)}"
        fail(TypeError, "group.all_reduce", got, f"the sum, an array of shape {packed.shape}")
    return summed


class Shared:
    """An object whose copies share its `group`, and whose pickles do not contain it."""

    group: Any

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()  # PyTorch's modules leave out compiled functions
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
