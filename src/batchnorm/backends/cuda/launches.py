"""Launch arithmetic of the CUDA kernels: which instance, which tiles, how many blocks.

Plain Python: nothing here touches a device. Lengths and steps count values, positions count vectors;
`cuda/lanes.cu` says what a position, a lane, a slice, a part and a tile are.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

from batchnorm.backends.strides import merge
from batchnorm.errors import fail

Steps = tuple[int, ...]

THREADS = 256  # of a block
MOST = 32  # lanes beside each other that have channels of their own, at most

FAN = 32  # parts whose sums one block puts together

# Phases of a job, as lanes.cu numbers them.
SUM, WRITE, ORDERED, GIVEN, RAW = 1, 2, 4, 8, 16

# A dtype's name in C++, its bytes, and the vectors of values that there are kernels for.
TYPES = {
    "float16": ("Half", 2, (8, 4, 1)),
    "bfloat16": ("BFloat16", 2, (8, 4, 1)),
    "float32": ("float", 4, (4, 1)),
    "float64": ("double", 8, (2, 1)),
}
# Neighbouring channels that one thread takes, at most: each costs it three doubles.
BUNDLE = 4
WEIGHTS = {None: "None", "bool": "Mask", "float64": "double"}
KINDS = {None: 0, "float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}
KERNELS = ("forward", "backward", "normalize")

# Tiles' worth of a slice that one block sums and then writes. More blocks on less each would be faster
# only by what drawing tickets and waiting for each other cost: some 5 us.
ALONE = 2
# The smallest tile, as a share of the largest: one round of loads.
LEAST = 1 / 4
# Bytes of a row that a block reads together: below, memory is read in pieces that it does not like.
LINE = 128
# Of the L2 cache, what one group may take: two are in it, and what is written passes through.
SHARE = 1 / 6
# Blocks of a processor that run at a time: as many as their registers allow.
RESIDENT = 2
# Tiles of each block that runs, at most: the last ones then take little of the time.
ROUNDS = 8
# Bytes of all channels, channels last, that are cut into more slices than whole lines allow, and the
# bytes of a row that are then read together: a sector of the cache.
CUT, SECTOR = 16 * 2**20, 32


class Limits(NamedTuple):
    """What there is of a device."""

    processors: int
    cache: int
    """Bytes of its L2 cache."""
    tile: int = 64 * 2**10
    """Bytes of a tile, at most: so many that what it costs at its ends is little."""


class Form(NamedTuple):
    """How a big array lies in memory: (outer, C, inner), or channels last (outer, C)."""

    outer: int
    channels: int
    inner: int
    outer_step: int
    channel_step: int
    inner_step: int


class Launch(NamedTuple):
    """The tiles of a pass, in the order in which a job packs their numbers."""

    vector: int
    columns: bool
    form: Form
    row: int
    positions: int
    lane_run: int
    lane_channels: int
    lanes: int
    slices: int
    parts: int
    length: int
    group: int
    phases: int


def dense(shape: tuple[int, ...], steps: Steps) -> bool:
    """Whether an array has its values in one piece of memory, in whatever order of its axes."""
    expected = 1
    for step, n in sorted((s, n) for s, n in zip(steps, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return True


@functools.lru_cache(maxsize=1024)
def forms(shape: tuple[int, ...], kept: tuple[int, ...], steps: tuple[Steps, ...]) -> list[Form] | None:
    """The form of each of several arrays of one shape; None where they have none in common.

    The first array's steps decide which reduced axes are the outer ones.
    """
    count = len(steps)
    chan = merge([(shape[i], tuple(s[i] for s in steps)) for i in kept])
    reduced = [(n, tuple(s[i] for s in steps)) for i, n in enumerate(shape) if i not in kept]
    rows = merge(sorted(reduced, key=lambda axis: -abs(axis[1][0])))
    if len(chan) > 1 or len(rows) > 2:
        return None
    one = (1, (0,) * count)
    (c, c_steps), *_ = chan or [one]
    if len(rows) == 2:
        (outer, outer_steps), (inner, inner_steps) = rows
    elif rows and rows[0][1][0] == 1:
        (outer, outer_steps), (inner, inner_steps) = one, rows[0]
    else:
        (outer, outer_steps), (inner, inner_steps) = rows[0] if rows else one, one
    return [Form(outer, c, inner, outer_steps[i], c_steps[i], inner_steps[i]) for i in range(count)]


def vector(form: Form, dtype: str, alignment: int, weighted: bool) -> tuple[int, bool]:
    """How many values are loaded at once, and whether they belong to as many channels.

    As many as divide every step and start: there are no tails within vectors.
    """
    _, size, widths = TYPES[dtype]
    if weighted:
        return 1, False
    columns = form.channel_step == 1 and form.channels > 1
    along = form.channels if columns else form.inner
    if not columns and (form.inner == 1 or form.inner_step != 1):
        return 1, False
    across = (form.inner, form.inner_step) if columns else (form.channels, form.channel_step)
    others = [step for n, step in ((form.outer, form.outer_step), across) if n > 1]
    for width in widths:
        divides = along % width == 0 and all(step % width == 0 for step in others)
        if divides and alignment % (width * size) == 0 and not (columns and width > BUNDLE):
            return width, columns and width > 1
    return 1, False


@functools.lru_cache(maxsize=1024)
def launch(
    form: Form,
    dtype: str,
    alignment: int,
    weighted: bool,
    reads: int,
    phases: int,
    limits: Limits,
) -> Launch:
    """Lay out a pass.

    Parameters
    ----------
    form : Form
        Of the big arrays, which all have the same.
    dtype : str
        Of the big arrays.
    alignment : int
        The largest power of two that divides all their addresses, in bytes; 16 or more are alike.
    weighted : bool
        Whether there are weights.
    reads : int
        Big arrays that are read.
    phases : int
        `SUM`, `WRITE` or both.
    limits : Limits
        Of the device.
    """
    width, columns = vector(form, dtype, alignment, weighted)
    size = TYPES[dtype][1]
    row = max(1, form.inner // (1 if columns else width))
    positions = form.outer * row
    beside = row if form.inner_step == 1 else 1  # positions of a channel that lie beside each other
    bundle = width if columns else 1  # channels of a thread
    bundles = -(-form.channels // bundle)
    if row >= 2**32:
        fail(ValueError, "x", f"{row} values in a row of a channel", "less than 2**32")
    bytes_of = positions * width * size * reads  # of the channels of a thread

    def laid(lane_channels: int, parts: int, group: int, phases: int) -> Launch:
        run, lanes = lanes_of(beside, positions, lane_channels)
        length = -(-positions // parts)
        slices = -(-bundles // lane_channels)
        # fmt: off
        return Launch(
            width, columns, form, row, positions, run, lane_channels, lanes, slices,
            -(-positions // length) if positions else 1, length, min(group, slices), phases,
        )
        # fmt: on

    # Lanes beside each other read memory that is: as many channels as it takes for whole lines.
    most = min(bundles, MOST)
    run = min(beside, THREADS) * width * size
    narrow = min(most, -(-LINE // run)) if run < LINE // 2 else 1
    fill = min(most, max(narrow, THREADS // max(1, positions)))  # few positions: more channels
    slice_bytes = bytes_of * fill
    if phases & SUM and phases & WRITE:
        if beside == 1 and bytes_of * bundles <= CUT:  # so little that the number of blocks counts
            least = -(-SECTOR // run)
            fill = min(fill, max(least, 2 ** (bundles // limits.processors).bit_length() // 2))
            slice_bytes = bytes_of * fill
        at_once = min(-(-bundles // fill), RESIDENT * limits.processors) * slice_bytes
        enough = -(-bundles // fill) >= 1.5 * limits.processors and at_once <= limits.cache / 2
        if slice_bytes <= ALONE * limits.tile or enough:
            return laid(fill, 1, 1, phases)
        phases |= ORDERED

    # Groups that the cache holds; channels last, all slices where it does not hold one: pieces of a row
    # are then read at about the same time, and longer ones.
    share = int(limits.cache * SHARE)
    lane_channels = fill
    if beside == 1:
        fits = bytes_of * narrow <= share and phases & ORDERED
        lane_channels = narrow if fits else min(most, -(-2 * LINE // run))
    slice_bytes = bytes_of * lane_channels
    slices = -(-bundles // lane_channels)
    group = slices
    if phases & ORDERED and (beside > 1 or fits):
        group = min(slices, max(1, share // slice_bytes))
    at_once = slice_bytes * group  # a tile of it for each block that runs, or several
    running = RESIDENT * limits.processors
    rounds = min(ROUNDS, -(-at_once // (running * limits.tile)))
    tile = max(int(LEAST * limits.tile), -(-at_once // (running * rounds)))
    parts = max(1, min(slice_bytes // tile, positions))
    return laid(lane_channels, parts, group, phases)


def lanes_of(beside: int, positions: int, lane_channels: int) -> tuple[int, int]:
    """Neighbouring lanes of a channel, and all of its lanes in a block of so many channels."""
    share = THREADS // lane_channels
    if lane_channels == 1:
        lanes = max(1, min(share, positions))
        return lanes, lanes
    run = min(beside, share)
    return run, run * max(1, min(share // run, -(-positions // run)))


def instance(kernel: str, launch: Launch, dtype: str, weights: str | None) -> str:
    """The name of a kernel in C++."""
    columns = str(launch.columns).lower()
    return f"{kernel}<{TYPES[dtype][0]}, {launch.vector}, {columns}, {WEIGHTS[weights]}>"


def instances() -> list[str]:
    """Every kernel that can be asked for."""
    found = []
    for name, _, widths in TYPES.values():
        plain = [f"<{name}, {w}, false, None>" for w in widths]
        bundles = [f"<{name}, {w}, true, None>" for w in widths if 1 < w <= BUNDLE]
        weighted = [f"<{name}, 1, false, {w}>" for w in ("Mask", "double")]
        found += [k + i for k in KERNELS[:2] for i in plain + bundles[:1] + weighted]
        found += [KERNELS[2] + i for i in plain + bundles[:1]]
    return found


class Vector(NamedTuple):
    """A number for each channel, as a kernel takes it: an address, a dtype, a step in values."""

    address: int = 0
    kind: int = 0
    step: int = 0


NOTHING = Vector()


class Operands(NamedTuple):
    """Addresses of a pass, 0 for what it does not have, in the order in which a job packs them."""

    x: int
    dy: int = 0
    out: int = 0
    weights: int = 0


class Vectors(NamedTuple):
    """Per-channel vectors of a pass, in the order in which a job packs them."""

    gamma: Vector = NOTHING
    beta: Vector = NOTHING
    n: Vector = NOTHING
    mean: Vector = NOTHING
    var: Vector = NOTHING
    low: Vector = NOTHING
    dgamma: Vector = NOTHING
    dbeta: Vector = NOTHING


VECTORS = Vectors()


# The struct Job of lanes.cu: 4 addresses; 3 + 3 steps; 3 lengths; 4 of lanes; 5 of walks; 4 of tiles;
# the group and the phases; 8 vectors; 7 addresses; eps.
_JOB = struct.Struct("=4Q 6q 3q 4q 5q 4q 2q 24q 7Q d")
JOB_BYTES = _JOB.size


def job(
    at: Launch,
    operands: Operands,
    weights: Form | None,
    vectors: Vectors,
    stats: int,
    coef: tuple[int, ...],
    partial: int,
    counters: int,
    eps: float,
) -> bytes:
    """Pack a job for `cuda/lanes.cu`."""
    form = at.form
    inner = form.inner_step * (1 if at.columns else at.vector)
    rows, rest = divmod(at.lanes, at.row)
    w = weights or Form(0, 0, 0, 0, 0, 0)
    few = math.isqrt(max(0, at.lanes - 1)) + 1
    # fmt: off
    return _JOB.pack(
        *operands,
        form.outer_step, form.channel_step, inner, w.outer_step, w.channel_step, w.inner_step,
        form.channels, at.row, at.positions,
        at.lane_run, at.lane_channels, at.lanes, few,
        rest,
        rows * form.outer_step + rest * inner, form.outer_step - at.row * inner,
        rows * w.outer_step + rest * w.inner_step, w.outer_step - at.row * w.inner_step,
        at.slices, at.parts, at.length, sum(_levels(at.parts)[1:]), at.group, at.phases,
        *(number for v in vectors for number in v),
        stats, *(*coef, 0, 0, 0, 0)[:4], partial, counters, eps,
    )
    # fmt: on


def _levels(parts: int) -> list[int]:
    """Sums at each level of the tree in which those of a slice's parts meet."""
    levels = [parts]
    while levels[-1] > 1:
        levels.append(-(-levels[-1] // FAN))
    return levels


class Scratch(NamedTuple):
    """Bytes that a launch needs to work with, each a multiple of 8."""

    factors: int
    partial: int
    counters: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


# Doubles of a partial result of each kernel.
SUMS = {"forward": 4, "backward": 2, "normalize": 0}


def scratch(at: Launch, kernel: str, dtype: str) -> Scratch:
    """The bytes that a launch needs: factors of each channel, sums of parts, counters."""
    ordered, parts = bool(at.phases & ORDERED), at.phases & SUM and at.parts > 1
    size = 8 if dtype == "float64" else 4
    levels = _levels(at.parts) if parts else [1]
    factors = 4 * at.form.channels * size if ordered else 0
    partial = at.form.channels * sum(levels[:-1]) * SUMS[kernel] * 8
    counters = 4 * (1 + at.slices * (1 + sum(levels[1:]))) if parts or ordered else 0
    return Scratch(-(-factors // 8) * 8, partial, -(-counters // 8) * 8)


def quarters(start: int, size: int) -> tuple[int, ...]:
    """The addresses of four vectors of the same length that follow each other; none where size is 0."""
    return tuple(start + i * size // 4 for i in range(4)) if size else ()


def blocks(at: Launch, limits: Limits) -> int:
    """Blocks to launch: one for each tile; as many as can run at a time where they draw tickets."""
    most = RESIDENT * limits.processors if at.phases & ORDERED else 2**31 - 1
    return max(1, min(at.slices * at.parts, most))


def alignment(*addresses: int) -> int:
    """The largest power of two, up to 16, that divides all addresses."""
    return math.gcd(16, *addresses)
