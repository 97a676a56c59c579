"""Arrays in blocks that stay in a processor's cache from one NumPy call to the next."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

Array = Any
Index = tuple[slice, ...]

# Values of a block: 1 MiB in float64, in which sums are taken.
BLOCK = 2**17
# Contiguous values, at least, of a block that has all values of its channels.
LINE = 2**10
# Channels of a block, at most: fewer of them have more values each, and so fewer moments to merge.
CHANNELS = 2**11


class Block(NamedTuple):
    """A part of an array, its axes in the order of memory."""

    selection: Index
    """Its index into the array."""
    channels: Index
    """Where its channels are in a vector in broadcast shape."""
    row: int
    """Its number among the blocks of the same channels."""
    merged: tuple[int, ...]
    """Its shape, with reduced axes that follow each other merged, and channel axes too."""
    vector: tuple[int, ...]
    """The same of a vector."""
    reduced: tuple[int, ...]
    """The reduced ones of these axes."""
    values: int
    """Values of a channel."""

    def wide(self, a: Array) -> Array:
        """Return a float64 copy of this part of a big array, its axes merged."""
        return a[self.selection].astype(np.float64, order="C").reshape(self.merged)


class Plan(NamedTuple):
    """The blocks of an array."""

    order: tuple[int, ...]
    """The axes, from the outermost in memory to the innermost."""
    back: tuple[int, ...]
    """The inverse of `order`."""
    blocks: tuple[Block, ...]
    rows: int
    """How many blocks of the same channels there are."""

    def transposed(self, *arrays: Array | None) -> list[Any]:
        """Return big arrays, and vectors in broadcast shape, with their axes in the order of memory."""
        return [None if a is None else a.transpose(self.order) for a in arrays]


def _block_lengths(lengths: list[int], are_channels: list[bool]) -> list[int]:
    """Return the lengths of a block along axes in the order of memory."""
    size = math.prod(lengths)
    first = are_channels.index(True) if True in are_channels else 0
    channels = BLOCK * lengths[first] // max(1, size) if lengths else 0  # whose values fit into a block
    if size > BLOCK and True in are_channels and channels * math.prod(lengths[first + 1 :]) >= LINE:
        return [*lengths[:first], min(channels, lengths[first]), *lengths[first + 1 :]]
    block: list[int] = []
    room, channel_room = BLOCK, CHANNELS
    for n, is_channel in zip(reversed(lengths), reversed(are_channels), strict=True):
        length = max(1, min(n, room, channel_room if is_channel else room))
        block.append(length)
        room //= length
        channel_room //= length if is_channel else 1
    return block[::-1]


@functools.lru_cache(maxsize=256)
def plan_of(shape: tuple[int, ...], strides: tuple[int, ...], channel_axes: tuple[int, ...]) -> Plan:
    """Cut an array into blocks."""
    order = tuple(sorted(range(len(shape)), key=lambda axis: -abs(strides[axis])))
    kept = [axis in channel_axes for axis in order]
    lengths = [shape[axis] for axis in order]
    cuts = [
        [slice(i, min(n, i + step)) for i in range(0, n, step)]
        for n, step in zip(lengths, _block_lengths(lengths, kept), strict=True)
    ]
    rows: dict[tuple[int, ...], int] = {}
    blocks = []
    for index in itertools.product(*cuts):
        axes = [(s.stop - s.start, is_channel) for s, is_channel in zip(index, kept, strict=True)]
        groups = [
            (is_channel, list(g)) for is_channel, g in itertools.groupby(axes, lambda axis: axis[1])
        ]
        merged = tuple(math.prod(n for n, _ in group) for _, group in groups)
        starts = tuple(s.start for s, is_channel in zip(index, kept, strict=True) if not is_channel)
        blocks.append(
            Block(
                index,
                tuple(
                    s if is_channel else slice(None) for s, is_channel in zip(index, kept, strict=True)
                ),
                rows.setdefault(starts, len(rows)),
                merged,
                tuple(n if is_channel else 1 for n, (is_channel, _) in zip(merged, groups, strict=True)),
                tuple(i for i, (is_channel, _) in enumerate(groups) if not is_channel),
                math.prod(n for n, is_channel in axes if not is_channel),
            )
        )
    back = tuple(order.index(axis) for axis in range(len(shape)))
    return Plan(order, back, tuple(blocks), len(rows))
