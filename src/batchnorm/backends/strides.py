"""How an array lies in memory: its axes merged to as few as its strides allow."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Axis = tuple[int, tuple[int, ...]]  # a length, and the step of each operand


class Axes(NamedTuple):
    """The merged axes of one call's arrays."""

    columns: bool
    """Whether it is worked on as rows across channels, else channel by channel in runs."""
    rows: npt.NDArray[np.int64]
    """Lengths and steps of the reduced axes, the innermost last; a row of steps per array."""
    chan: npt.NDArray[np.int64]
    """The same of the channel axes."""
    outer: int
    """Rows: the product of all reduced lengths but the innermost."""
    length: int
    """The innermost reduced length: a run, or the neighbouring columns of a channel."""
    channels: int
    copies: int
    """Neighbouring rows that are taken for one, where there are few columns."""


# Runs of channels second that are shorter than this are worked on as columns.
SHORT_RUN = 512
# Fewer neighbouring columns than this are not worth a row.
NARROW = 16
# Columns of a row, at most, that is taken together from several; and how many such rows there must be.
WIDE, TALL = 1024, 64


def merged(
    shape: tuple[int, ...], kept: tuple[int, ...], steps: tuple[tuple[int, ...], ...], data: int
) -> Axes:
    """Merge the axes of arrays of one shape.

    `steps` has the strides of each array in values; the first `data` arrays are as large as x, one
    that may follow them holds weights.
    """
    chan = merge([(shape[i], tuple(s[i] for s in steps)) for i in kept])
    reduced = [(n, tuple(s[i] for s in steps)) for i, n in enumerate(shape) if i not in kept]
    rows = merge(sorted(reduced, key=lambda axis: -abs(axis[1][0])))
    length, inner = rows[-1] if rows else (1, (1,) * len(steps))
    outer = math.prod(n for n, _ in rows[:-1])

    one_channel_axis = len(chan) == 1
    neighbours = one_channel_axis and all(step == 1 for step in chan[0][1][:data])
    short_runs = (
        one_channel_axis
        and len(steps) == data
        and 1 < length <= SHORT_RUN
        and outer >= 4
        and all(step == 1 for step in inner)
        and all(step == length for step in chan[0][1])
    )
    copies = _copies(rows, chan) if neighbours and len(steps) == data else 1
    if neighbours and chan[0][0] * copies >= NARROW:
        if copies > 1:
            rows = [(length // copies, tuple(copies * step for step in inner))]
        outer, length, columns = outer * length // copies, 1, True
        rows = [*rows, (1, (1,) * len(steps))]
    else:
        columns = short_runs and chan[0][0] * length >= NARROW
    return Axes(
        columns=columns,
        rows=_table(rows, len(steps)),
        chan=_table(chan, len(steps)),
        outer=outer,
        length=length,
        channels=math.prod(n for n, _ in chan),
        copies=copies,
    )


def _copies(rows: list[Axis], chan: list[Axis]) -> int:
    """Return how many rows to fold into one: rows that follow each other, until they are wide enough."""
    if len(rows) != 1 or any(step != chan[0][0] for step in rows[0][1]):
        return 1
    count = rows[0][0]
    most = max(1, min(WIDE // max(1, chan[0][0]), count // TALL))
    return next(copies for copies in range(most, 0, -1) if count % copies == 0)


def merge(axes: list[Axis]) -> list[Axis]:
    """Merge neighbouring axes that one stride leads through; drop axes of length 1."""
    found: list[Axis] = []
    for n, steps in axes:
        if n == 1:
            continue
        if found and all(a == n * b for a, b in zip(found[-1][1], steps, strict=True)):
            found[-1] = (found[-1][0] * n, steps)
        else:
            found.append((n, steps))
    return found


def _table(axes: list[Axis], operands: int) -> npt.NDArray[np.int64]:
    """Return a row of lengths, and a row of strides for each operand; at least one axis."""
    axes = axes or [(1, (1,) * operands)]
    return np.array([[n for n, _ in axes], *zip(*(steps for _, steps in axes), strict=True)], np.int64)
