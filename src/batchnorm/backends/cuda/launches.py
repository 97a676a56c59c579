"""Launch arithmetic of the CUDA kernels: template instances, tiles and numbers of blocks.

This is plain Python, and nothing here touches a device. Lengths and strides count elements, positions
count vectors. `tiling.cu` defines position, bundle, slice, part, tile and lane.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from batchnorm.backends.strides import merge
from batchnorm.errors import fail

Strides = tuple[int, ...]

THREADS = 256  # of a block
MAX_BUNDLES = 32  # of a slice

FAN = 32  # partial sums that one block merges

# What a launch does: the enum Phase of tiling.cu.
SUM, WRITE, ORDERED, GIVEN, RAW, FROM_Y = 1, 2, 4, 8, 16, 32

# For each dtype its name in C++, its size in bytes, and the lengths of vectors that have kernels.
TYPES = {
    "float16": ("Half", 2, (8, 4, 1)),
    "bfloat16": ("BFloat16", 2, (8, 4, 1)),
    "float32": ("float", 4, (4, 1)),
    "float64": ("double", 8, (2, 1)),
}
# Channels of a bundle, at most: each needs registers for three doubles.
MAX_BUNDLE = 4
WEIGHTS = {None: "None", "bool": "Mask", "float64": "double"}
KERNELS = ("forward", "backward", "normalize")

# The size of a slice, in largest tiles, up to which one block sums it and then writes its outputs. More
# blocks for it would cost sequence numbers and waiting, some 5 us, and gain less.
FUSED_TILES = 2
# The smallest tile, as a fraction of the largest: one round of loads.
MIN_TILE = 1 / 4
# Contiguous bytes that a block reads together: shorter accesses do not reach the memory's bandwidth.
LINE_BYTES = 128
# The fraction of the L2 cache for one group: it holds two groups, and the outputs that are written.
CACHE_SHARE = 1 / 6
# Blocks that run at a time on a multiprocessor: as many as their registers allow.
RESIDENT = 2
# Tiles of each running block, at most: the last tiles then take a small part of the time.
ROUNDS = 8
# A channels-last array of at most so many bytes has more slices than whole lines allow: then a sector of
# the cache is read together.
SPLIT_BYTES, SECTOR_BYTES = 16 * 2**20, 32


class Limits(NamedTuple):
    """The properties of a device that decide about tiles."""

    processors: int
    """Its multiprocessors."""
    cache: int
    """Bytes of its L2 cache."""
    tile: int = 64 * 2**10
    """Bytes of a tile, at most: large enough that the overhead per tile is small."""


class MemoryLayout(NamedTuple):
    """The shape and strides of a big array: (outer, C, inner), or channels last (outer, C)."""

    outer: int
    channels: int
    inner: int
    outer_stride: int
    channel_stride: int
    inner_stride: int


class Launch(NamedTuple):
    """The tiles of a launch, and what it does; `tiling.cu` describes the fields."""

    vector: int
    across_channels: bool
    memory_layout: MemoryLayout
    row: int
    positions: int
    adjacent_lanes: int
    slice_bundles: int
    lanes: int
    slices: int
    parts: int
    length: int
    group: int
    phases: int


def dense(shape: tuple[int, ...], strides: Strides) -> bool:
    """Return whether an array occupies one contiguous span of memory, with its axes in any order."""
    expected = 1
    for stride, n in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= n
    return True


@functools.lru_cache(maxsize=1024)
def memory_layouts(
    shape: tuple[int, ...], channel_axes: tuple[int, ...], strides: tuple[Strides, ...]
) -> list[MemoryLayout] | None:
    """Return the memory layout of each of several arrays of one shape, or None.

    The layouts have the same lengths. The result is None where the strides allow no such lengths. The
    strides of the first array decide which reduced axes are the outer ones.
    """
    count = len(strides)
    channels = merge([(shape[i], tuple(s[i] for s in strides)) for i in channel_axes])
    reduced = [(n, tuple(s[i] for s in strides)) for i, n in enumerate(shape) if i not in channel_axes]
    rows = merge(sorted(reduced, key=lambda axis: -abs(axis[1][0])))
    if len(channels) > 1 or len(rows) > 2:
        return None
    one = (1, (0,) * count)
    (c, c_strides), *_ = channels or [one]
    if len(rows) == 2:
        (outer, outer_strides), (inner, inner_strides) = rows
    elif rows and rows[0][1][0] == 1:
        (outer, outer_strides), (inner, inner_strides) = one, rows[0]
    else:
        (outer, outer_strides), (inner, inner_strides) = rows[0] if rows else one, one
    return [
        MemoryLayout(outer, c, inner, outer_strides[i], c_strides[i], inner_strides[i])
        for i in range(count)
    ]


def vector(memory_layout: MemoryLayout, dtype: str, alignment: int, weighted: bool) -> tuple[int, bool]:
    """Return the length of vectors, and whether their elements belong to neighbouring channels.

    The length divides every stride, and the alignment every vector, so no vector is incomplete.
    """
    _, size, widths = TYPES[dtype]
    outer, channels, inner, outer_stride, channel_stride, inner_stride = memory_layout
    if weighted:
        return 1, False
    across_channels = channel_stride == 1 and channels > 1
    contiguous = channels if across_channels else inner
    if not across_channels and (inner == 1 or inner_stride != 1):
        return 1, False
    other = (inner, inner_stride) if across_channels else (channels, channel_stride)
    strides = [stride for n, stride in ((outer, outer_stride), other) if n > 1]
    for width in widths:
        divides = contiguous % width == 0 and all(stride % width == 0 for stride in strides)
        aligned = alignment % (width * size) == 0
        if divides and aligned and not (across_channels and width > MAX_BUNDLE):
            return width, across_channels and width > 1
    return 1, False


@functools.lru_cache(maxsize=1024)
def launch(
    memory_layout: MemoryLayout,
    dtype: str,
    alignment: int,
    weighted: bool,
    reads: int,
    phases: int,
    limits: Limits,
) -> Launch:
    """Return the tiles of a launch.

    Parameters
    ----------
    memory_layout : MemoryLayout
        Of the big arrays, which all have the same.
    dtype : str
        Of the big arrays.
    alignment : int
        The largest power of two, up to 16, that divides all their addresses in bytes.
    weighted : bool
        Whether there are weights.
    reads : int
        Number of big arrays that are read, by the sums if there are sums.
    phases : int
        `SUM`, `WRITE` or both.
    limits : Limits
        Of the device.

    Returns
    -------
    Launch
        Its phases include `ORDERED` where the outputs of a slice are tasks of their own.
    """
    width, across_channels = vector(memory_layout, dtype, alignment, weighted)
    size = TYPES[dtype][1]
    row = max(1, memory_layout.inner // (1 if across_channels else width))
    positions = memory_layout.outer * row
    contiguous = row if memory_layout.inner_stride == 1 else 1  # positions of a channel
    bundle = width if across_channels else 1
    bundles = -(-memory_layout.channels // bundle)
    if row >= 2**32:
        fail(ValueError, "x", f"{row} values in a row of a channel", "less than 2**32")
    bundle_bytes = positions * width * size * reads

    def tiled(slice_bundles: int, parts: int, group: int, phases: int) -> Launch:
        adjacent_lanes, lanes = lane_counts(contiguous, positions, slice_bundles)
        length = -(-positions // parts)
        slices = -(-bundles // slice_bundles)
        return Launch(
            width,
            across_channels,
            memory_layout,
            row,
            positions,
            adjacent_lanes,
            slice_bundles,
            lanes,
            slices,
            -(-positions // length) if positions else 1,
            length,
            min(group, slices),
            phases,
        )

    # Adjacent threads read adjacent memory: a slice has as many bundles as it takes for whole lines, and
    # more where a bundle has fewer positions than a block has threads.
    most = min(bundles, MAX_BUNDLES)
    span = min(contiguous, THREADS) * width * size  # contiguous bytes of a bundle
    line_bundles = min(most, -(-LINE_BYTES // span)) if span < LINE_BYTES // 2 else 1
    slice_bundles = min(most, max(line_bundles, THREADS // max(1, positions)))
    slice_bytes = bundle_bytes * slice_bundles
    if phases & SUM and phases & WRITE:
        if contiguous == 1 and bundle_bytes * bundles <= SPLIT_BYTES:
            # So small an array takes less time with more blocks, if they read less than lines.
            least = -(-SECTOR_BYTES // span)
            balanced = 2 ** (bundles // limits.processors).bit_length() // 2
            slice_bundles = min(slice_bundles, max(least, balanced))
            slice_bytes = bundle_bytes * slice_bundles
        slices = -(-bundles // slice_bundles)
        at_once = min(slices, RESIDENT * limits.processors) * slice_bytes
        enough = slices >= 1.5 * limits.processors and at_once <= limits.cache / 2
        if slice_bytes <= FUSED_TILES * limits.tile or enough:
            return tiled(slice_bundles, 1, 1, phases)
        phases |= ORDERED

    # A group fits its share of the cache. If no slice of a channels-last array fits, one group has all
    # slices: adjacent slices are then read at about the same time, and in longer contiguous spans.
    share = int(limits.cache * CACHE_SHARE)
    if contiguous == 1:
        fits = bundle_bytes * line_bundles <= share and phases & ORDERED
        slice_bundles = line_bundles if fits else min(most, -(-2 * LINE_BYTES // span))
    slice_bytes = bundle_bytes * slice_bundles
    slices = -(-bundles // slice_bundles)
    group = slices
    if phases & ORDERED and (contiguous > 1 or fits):
        group = min(slices, max(1, share // slice_bytes))
    at_once = slice_bytes * group  # one tile or several for each block that runs
    running = RESIDENT * limits.processors
    rounds = min(ROUNDS, -(-at_once // (running * limits.tile)))
    tile = max(int(MIN_TILE * limits.tile), -(-at_once // (running * rounds)))
    parts = max(1, min(slice_bytes // tile, positions))
    return tiled(slice_bundles, parts, group, phases)


def lane_counts(contiguous: int, positions: int, slice_bundles: int) -> tuple[int, int]:
    """Return the number of adjacent lanes of a bundle, and of all its lanes.

    `contiguous` of the `positions` of a bundle are contiguous in memory.
    """
    share = THREADS // slice_bundles
    if slice_bundles == 1:
        lanes = max(1, min(share, positions))
        return lanes, lanes
    adjacent = min(contiguous, share)
    return adjacent, adjacent * max(1, min(share // adjacent, -(-positions // adjacent)))


def instance(
    kernel: str, launch: Launch, dtype: str, weights: str | None, epilogue: bool = False
) -> str:
    """Return the name of a template instance in C++."""
    return _name(
        kernel, TYPES[dtype][0], launch.vector, launch.across_channels, WEIGHTS[weights], epilogue
    )


def _name(kernel: str, *arguments: str | int) -> str:
    texts = (str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    return f"{kernel}<{', '.join(texts)}>"


# The kernels that take weights, by whether there is an epilogue: a forward pass checks the counts of the
# weights between its sums and its outputs, which `normalize` then writes.
WEIGHTED = {False: KERNELS[:2], True: KERNELS[1:2]}


def instances() -> list[str]:
    """Return the names of all template instances that a launch can need."""
    found = []
    for epilogue, (name, _, widths) in itertools.product((False, True), TYPES.values()):
        across_channels = [w for w in widths if 1 < w <= MAX_BUNDLE][:1]
        vectors = [(w, False) for w in widths] + [(w, True) for w in across_channels]
        for kernel in KERNELS:
            found += [_name(kernel, name, *vector, "None", epilogue) for vector in vectors]
            kinds = ("Mask", "double") if kernel in WEIGHTED[epilogue] else ()
            found += [_name(kernel, name, 1, False, w, epilogue) for w in kinds]
    return found


def levels(parts: int) -> list[int]:
    """Return the number of sums at each level of the tree in which the parts of a slice are merged."""
    levels = [parts]
    while levels[-1] > 1:
        levels.append(-(-levels[-1] // FAN))
    return levels


class Scratch(NamedTuple):
    """Bytes of working memory that a launch needs, each a multiple of 8."""

    factors: int
    partial: int
    counters: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


# Factors of a channel, at most: MAX_FACTORS of tiling.cu.
MAX_FACTORS = 5
# Doubles of a partial result of each kernel.
SUMS = {"forward": 4, "backward": 2, "normalize": 0}


def scratch(launch: Launch, kernel: str, dtype: str) -> Scratch:
    """Return the bytes that a launch needs for factors, partial sums and counters."""
    channels, ordered = launch.memory_layout.channels, bool(launch.phases & ORDERED)
    parts = launch.phases & SUM and launch.parts > 1
    size = 8 if dtype == "float64" else 4
    sums = levels(launch.parts) if parts else [1]
    factors = MAX_FACTORS * channels * size if ordered else 0
    partial = channels * sum(sums[:-1]) * SUMS[kernel] * 8
    counters = 4 * (1 + launch.slices * (1 + sum(sums[1:]))) if parts or ordered else 0
    return Scratch(-(-factors // 8) * 8, partial, -(-counters // 8) * 8)


def factor_addresses(start: int, scratch: Scratch, launch: Launch, dtype: str) -> tuple[int, ...]:
    """Return the addresses of the vectors of factors in working memory, or () where there are none."""
    length = launch.memory_layout.channels * (8 if dtype == "float64" else 4)
    return tuple(start + i * length for i in range(MAX_FACTORS)) if scratch.factors else ()


def blocks(launch: Launch, limits: Limits) -> int:
    """Return the number of blocks.

    It is one for each tile, but no more than can run at a time where they take sequence numbers.
    """
    most = RESIDENT * limits.processors if launch.phases & ORDERED else 2**31 - 1
    return max(1, min(launch.slices * launch.parts, most))


def alignment(*addresses: int) -> int:
    """Return the largest power of two, up to 16, that divides all addresses."""
    return math.gcd(16, *addresses)
