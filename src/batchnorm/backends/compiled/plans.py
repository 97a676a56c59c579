"""How compiled loops go over arrays: axes, tiles, and which loops."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchnorm.backends import strides as memory_strides
from batchnorm.backends.compiled import columns, terms
from batchnorm.backends.compiled.lanes import WIDTH

Array = Any

# A tile's data, at most: it stays in a core's second-level cache between two readings.
TILE_BYTES = 2**20
# A channel's data, at most, for its two readings to follow each other.
CHANNEL_BYTES = 2**22
# Parts that a sum is cut into, at most: they are kept until they are added.
PARTS = 128
# Columns of a tile: fewer are slow to read, more do not leave their sums in the first-level cache.
FEWEST_COLUMNS, MOST_COLUMNS = 512, 1024
# Below this, a second thread costs more than it saves.
ALONE_BYTES = 2**19
# From this size on, output is stored past the caches, which it would only flush.
STREAM_BYTES = 2**23
# A run must be as long.
STREAM_RUN = 2**11
# Shorter runs are worked on as columns also by a pass that nothing precedes.
SWEPT = 128


class Grid(NamedTuple):
    """How a pass goes over arrays: with which loops, in which tiles."""

    reduced: int
    """How many rows there are, or segments of rows, and in a tile."""
    block: int
    channels: int
    """How many channels there are, and in a tile."""
    across: int
    loops: str
    """Columns or planes."""
    streaming: bool
    """Whether output goes past the caches."""

    @property
    def blocks(self) -> int:
        """Blocks of the reduced axes."""
        return max(1, -(-self.reduced // self.block))

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return self.blocks * -(-self.channels // self.across)


class Plan(NamedTuple):
    """How the loops go over some arrays."""

    rows: npt.NDArray[np.int64]
    chan: npt.NDArray[np.int64]
    """The axes, as `axes.Axes` has them."""
    channels: int
    whole: Grid | None
    """Tiles of whole channels, for both passes at once; None where a channel is too large."""
    grid: Grid
    """Tiles for one pass of two."""
    sweep: Grid
    """Tiles for a pass that nothing precedes, in the order of memory."""
    alone: bool
    """Whether a second thread would not pay."""
    scratch: int
    """Bytes of memory that a thread needs for itself."""
    places: tuple[int, ...]
    """What a job says of the axes."""
    copies: int
    """Rows that are taken for one."""


def plan(x: Array, kept: tuple[int, ...], *others: Array, w: Array | None = None) -> Plan:
    """The plan for arrays of the shape of x, and weights."""
    arrays = (x, *others) if w is None else (x, *others, w)
    if w is None and all(a.flags.c_contiguous for a in arrays):
        return _contiguous_plan(x.shape, kept, x.itemsize, len(arrays))
    strides = tuple(a.strides for a in arrays)
    return _plan(x.shape, kept, strides, tuple(a.itemsize for a in arrays), 1 + len(others))


@functools.lru_cache(maxsize=4096)
def _contiguous_plan(shape: tuple[int, ...], kept: tuple[int, ...], size: int, data: int) -> Plan:
    """The plan for arrays that all lie in the order of their axes: a shorter key."""
    strides = tuple(size * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _plan(shape, kept, (strides,) * data, (size,) * data, data)


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    kept: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    data: int,
) -> Plan:
    steps = tuple(tuple(s // size for s in a) for a, size in zip(strides, sizes, strict=True))
    at = memory_strides.merged(shape, kept, steps, data)
    size = sizes[0]
    nbytes = math.prod(shape) * size
    alone = nbytes * data <= ALONE_BYTES
    values = at.outer * at.length * at.copies  # of a channel
    read = values * size * max(1, data - 1)  # bytes of a channel that are read twice

    channels = max(1, at.channels)  # tiles have a size also where there are none
    width = at.length * at.copies  # columns of a channel
    if at.columns:
        most, fewest = (max(1, n // width) for n in (MOST_COLUMNS, FEWEST_COLUMNS))
        reduced = at.outer
        across = channels if at.copies > 1 else min(most, channels)
        whole = min(across, TILE_BYTES // max(1, read))
        if whole < min(fewest, channels) or (at.length == 1 and not alone):
            whole = 0  # two threads on neighbouring columns are in each other's way
        elif not alone:  # a share for each thread
            whole = min(whole, max(fewest, channels // 8))
        share = min(TILE_BYTES, max(TILE_BYTES // 8, nbytes // 16))  # large tiles, but enough of them
        fewest_rows = 4 if at.length > 1 else columns.BATCH
        block = max(fewest_rows, share // (across * width * size), -(-reduced // PARTS))
    else:
        reduced = at.outer * -(-at.length // terms.SEGMENT)
        whole = max(1, TILE_BYTES // 4 // max(1, read)) if read <= CHANNEL_BYTES else 0
        if channels < 4 and not alone:
            whole = 0
        across = max(1, TILE_BYTES // 2 // max(1, values * size))
        block = max(TILE_BYTES // 2 // (terms.SEGMENT * size), -(-reduced // PARTS))
        if across > 1:
            block = reduced
    whole = _even(channels, whole) if whole else 0
    across = _even(channels, min(across, channels))
    block = min(block, max(1, reduced))
    loops, streaming = "columns" if at.columns else "planes", nbytes >= STREAM_BYTES
    grid = Grid(reduced, max(1, block), at.channels, max(1, across), loops, streaming)
    sweep = grid
    if at.length >= SWEPT:
        sweep = _sweep(at.outer, at.length, at.channels, size, nbytes)
    widest = max(whole, grid.across) * width
    padded = -(-widest // WIDTH) * WIDTH + WIDTH
    return Plan(
        rows=at.rows,
        chan=at.chan,
        channels=at.channels,
        whole=grid._replace(block=max(1, reduced), across=whole) if whole else None,
        grid=grid,
        sweep=sweep,
        alone=alone,
        scratch=(columns.SUMS + columns.ROOM) * padded * 8 if at.columns else 0,
        places=(
            address(at.rows),
            at.rows.shape[1],
            address(at.chan),
            at.chan.shape[1],
            at.rows.shape[0] - 1,
        ),
        copies=at.copies,
    )


def _sweep(rows: int, length: int, channels: int, size: int, nbytes: int) -> Grid:
    """Tiles of planes: some rows of all channels, or some channels of a row, or a part of a run."""
    tile = min(TILE_BYTES, max(TILE_BYTES // 8, nbytes // 16))
    run, segments = max(1, length * size), -(-length // terms.SEGMENT)
    across = max(1, min(channels, tile // run))
    block = segments * max(1, tile // (run * across))
    if run > tile:
        block = max(1, tile // (terms.SEGMENT * size))
    reduced = rows * segments
    # A short run begins and ends within a cache line, of which only the rest could go past the caches.
    streaming = nbytes >= STREAM_BYTES and run >= STREAM_RUN
    block = min(block, max(1, reduced))
    return Grid(reduced, block, channels, _even(max(1, channels), across), "planes", streaming)


def _even(total: int, most: int) -> int:
    """The size of parts, none above `most`, that differ least; a multiple of 16 where it can be."""
    parts = -(-total // most)
    size = -(-total // parts)
    return -(-size // 16) * 16 if size > 16 and -(-size // 16) * 16 <= most else size


# Where an array object keeps the address of its data: a fifth of the time of `a.ctypes.data`.
_DATA = object.__basicsize__
_READS_DATA = platform.python_implementation() == "CPython" and (
    ctypes.c_size_t.from_address(id(_probe := np.zeros(1)) + _DATA).value == _probe.ctypes.data
)


def address(a: Array) -> int:
    """Where the data of an array begins."""
    if _READS_DATA:
        return ctypes.c_size_t.from_address(id(a) + _DATA).value
    address: int = a.ctypes.data
    return address
