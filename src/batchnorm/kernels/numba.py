"""The four kernels, and forward and backward passes fused, as compiled loops on NumPy arrays.

The loops are in `compiled/`. Here is what surrounds a call of them: which axes lie how, tiles, memory
for the result, and the job that threads share.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import binding
from numba import cfunc
from numba.core.compiler_lock import global_compiler_lock

from batchnorm import outputs, threads
from batchnorm.kernels import axes, crew, written
from batchnorm.kernels.compiled import columns, gradients, planes, terms
from batchnorm.kernels.compiled.crew import dispatch
from batchnorm.kernels.compiled.lanes import SENTINELS, WIDTH
from batchnorm.layout import Layout
from batchnorm.moments import Moments

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

_sentinels: dict[Any, Any] = {}

# A child that is forked while another thread compiles would find Numba's lock, and LLVM's, held for
# ever. So a fork waits until nothing is being compiled: seconds at most, and only then.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def refuses(arrays: tuple[Array | None, ...]) -> str | None:
    """Why the arrays of a call cannot be worked on, or None. Its vectors always can: they are copied."""
    shape = arrays[0].shape  # type: ignore[union-attr]
    for a in arrays:
        if a is None or a.shape != shape:
            continue
        if sentinel(a.dtype) is None:
            return f"dtype {a.dtype} is not one that it reads"
        flags = a.flags
        if not (flags.c_contiguous and flags.aligned) and (
            not flags.aligned or any(step % a.itemsize for step in a.strides)
        ):
            return "values are not aligned in memory"
        if a.dtype == np.float16 and not _has_half():
            return "this processor cannot convert float16"
    return None


def sentinel(dtype: Any) -> Any:
    """What stands for a dtype in the compiled loops, or None."""
    try:
        return _sentinels[dtype]
    except KeyError:
        known = dtype.isnative or dtype.name == "bfloat16"
        return _sentinels.setdefault(dtype, SENTINELS.get(dtype.name) if known else None)


@functools.cache
def _has_half() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(binding.get_host_cpu_features().get("f16c", False))


class Grid(NamedTuple):
    """How a pass is cut into tiles: the size of the whole and of a tile."""

    reduced: int
    block: int
    channels: int
    across: int

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
    loops: str
    """Columns or planes."""
    channels: int
    whole: Grid | None
    """Tiles of whole channels, for both passes at once; None where a channel is too large."""
    grid: Grid
    """Tiles for one pass."""
    alone: bool
    """Whether a second thread would not pay."""
    streaming: bool
    """Whether output goes past the caches."""
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
    at = axes.merged(shape, kept, steps, data)
    size = sizes[0]
    nbytes = math.prod(shape) * size
    alone = nbytes * data <= ALONE_BYTES
    values = at.outer * at.length * at.copies  # of a channel
    read = values * size * max(1, data - 1)  # bytes of a channel that are read twice

    width = at.length * at.copies  # columns of a channel
    if at.columns:
        most, fewest = (max(1, n // width) for n in (MOST_COLUMNS, FEWEST_COLUMNS))
        reduced = at.outer
        across = at.channels if at.copies > 1 else min(most, at.channels)
        whole = min(across, TILE_BYTES // max(1, read))
        if whole < min(fewest, at.channels) or (at.length == 1 and not alone):
            whole = 0  # two threads on neighbouring columns are in each other's way
        elif not alone:  # a share for each thread
            whole = min(whole, max(fewest, at.channels // 8))
        share = min(TILE_BYTES, max(TILE_BYTES // 8, nbytes // 16))  # large tiles, but enough of them
        fewest_rows = 4 if at.length > 1 else columns.BATCH
        block = max(fewest_rows, share // (across * width * size), -(-reduced // PARTS))
    else:
        reduced = at.outer * -(-at.length // terms.SEGMENT)
        whole = max(1, TILE_BYTES // 4 // max(1, read)) if read <= CHANNEL_BYTES else 0
        if at.channels < 4 and not alone:
            whole = 0
        across = max(1, TILE_BYTES // 2 // max(1, values * size))
        block = max(TILE_BYTES // 2 // (terms.SEGMENT * size), -(-reduced // PARTS))
        if across > 1:
            block = reduced
    whole = _even(at.channels, whole) if whole else 0
    across = _even(at.channels, min(across, at.channels))
    block = min(block, max(1, reduced))
    grid = Grid(reduced, max(1, block), at.channels, max(1, across))
    widest = max(whole, grid.across) * width
    padded = -(-widest // WIDTH) * WIDTH + WIDTH
    return Plan(
        rows=at.rows,
        chan=at.chan,
        loops="columns" if at.columns else "planes",
        channels=at.channels,
        whole=Grid(reduced, max(1, reduced), at.channels, whole) if whole else None,
        grid=grid,
        alone=alone,
        streaming=nbytes >= STREAM_BYTES,
        scratch=(columns.SUMS + columns.ROOM) * padded * 8 if at.columns else 0,
        places=(
            _address(at.rows),
            at.rows.shape[1],
            _address(at.chan),
            at.chan.shape[1],
            at.rows.shape[0] - 1,
        ),
        copies=at.copies,
    )


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


def _address(a: Array) -> int:
    if _READS_DATA:
        return ctypes.c_size_t.from_address(id(a) + _DATA).value
    address: int = a.ctypes.data
    return address


# Compiled code.

LOOPS: dict[tuple[str, str], Any] = {
    ("planes", "moments"): planes.planes_moments,
    ("planes", "output"): planes.planes_output,
    ("planes", "forward"): planes.planes_forward,
    ("planes", "grad_sums"): planes.planes_grad_sums,
    ("planes", "grad_input"): planes.planes_grad_input,
    ("planes", "backward"): planes.planes_backward,
    ("columns", "moments"): columns.columns_moments,
    ("columns", "output"): columns.columns_output,
    ("columns", "forward"): columns.columns_forward,
    ("columns", "grad_sums"): gradients.columns_grad_sums,
    ("columns", "grad_input"): gradients.columns_grad_input,
    ("columns", "backward"): gradients.columns_backward,
    ("join", "moments"): terms.join_moments,
    ("join", "forward"): terms.join_forward,
    ("join", "centres"): terms.join_centres,
    ("join", "sums"): terms.join_sums,
    ("join", "backward"): terms.join_backward,
}
_addresses: dict[Any, int] = {}
_functions: list[Any] = []  # kept: compiled code goes when nothing refers to it


def _function(loops: str, name: str, dtype: Any, weights: Any) -> int:
    """The address of a loop for data of a dtype, and weights of one or None; compiled when needed."""
    key = loops, name, dtype, weights
    if key not in _addresses:
        like, wlike = sentinel(dtype), None if weights is None else SENTINELS[weights.name]
        compiler: Any = cfunc
        run = compiler("void(int64, int64)", **terms.OPTIONS)(LOOPS[loops, name](like, wlike))
        _functions.append(run)
        _addresses[key] = run.address
    return _addresses[key]


# Jobs.

_own = threading.local()


def _scratch(size: int) -> int:
    """The address of memory of the calling thread's, for one pass."""
    if size > getattr(_own, "size", 0):
        _own.memory = np.empty(size + outputs.ALIGNMENT, np.uint8)
        _own.size = size
        _own.address = -(-_own.memory.ctypes.data // outputs.ALIGNMENT) * outputs.ALIGNMENT
    return _own.address if size else 0


def _parameter(v: Array | None) -> tuple[Array | None, int, int]:
    """Gamma or beta as loops take it: an array to keep, its address and its kind."""
    if v is None:
        return None, 0, terms.NONE
    kind = terms.SINGLE if v.dtype == np.float32 else terms.DOUBLE
    if not (v.dtype in (np.float32, np.float64) and v.flags.c_contiguous and v.flags.aligned):
        v, kind = np.array(v, np.float64), terms.DOUBLE
    return v, _address(v), kind


class Job:
    """What the threads of a call share: a row of numbers, and the arrays whose addresses are in it."""

    __slots__ = ("dtype", "eps", "kept", "numbers", "plan", "weights")

    def __init__(
        self,
        p: Plan,
        data: tuple[Array, ...],
        w: Array | None,
        stats: Array | None,
        vectors: Array,
        parts: Array | None = None,
        gamma: Array | None = None,
        beta: Array | None = None,
        eps: float = 0.0,
    ) -> None:
        gamma, gamma_at, gamma_kind = _parameter(gamma)
        beta, beta_at, beta_kind = _parameter(beta)
        self.plan, self.dtype, self.weights = p, data[0].dtype, None if w is None else w.dtype
        self.kept = data, w, stats, vectors, parts, gamma, beta
        self.numbers = np.zeros(terms.TILES + 2 * threads.get_num_threads(), np.int64)
        at = [_address(a) for a in data]
        self.numbers[terms.ROWS : terms.TILES] = (
            *p.places, at[0], at[1] if len(at) > 1 else 0, at[2] if len(at) > 2 else 0,
            0 if w is None else _address(w),
            gamma_at, gamma_kind, beta_at, beta_kind, 0,
            0 if stats is None else _address(stats), _address(vectors),
            0 if parts is None else _address(parts),
            0, p.scratch, 0, p.streaming, 1 if parts is None else len(parts), p.copies, 0,
        )  # fmt: skip
        ctypes.c_double.from_address(_address(self.numbers) + 8 * terms.EPS).value = eps

    def run(self, name: str, grid: Grid) -> None:
        """Run a pass over the tiles, on as many threads as pay."""
        p, numbers = self.plan, self.numbers
        crew_at = helpers = 0
        if not p.alone:
            count = min(threads.count(grid.tiles), (len(numbers) - terms.TILES) // 2)
            if count > 1:
                crew_at, helpers = crew.boxes(count - 1)
        numbers[: terms.ROWS] = (helpers + 1, *grid)
        numbers[terms.TILES :] = 0
        numbers[terms.SCRATCH] = _scratch(p.scratch * (helpers + 1))
        function = _function(p.loops, name, self.dtype, self.weights)
        dispatch(function, _address(numbers), crew_at, helpers)

    def join(self, name: str) -> None:
        """Run what comes between two passes."""
        self.numbers[: terms.ROWS] = (1, *self.plan.grid)
        dispatch(_function("join", name, self.dtype, None), _address(self.numbers), 0, 0)

    def moments(self) -> None:
        """Sums of all tiles, and moments from them."""
        while True:  # a second time where a pivot was too far from the mean
            self.run("moments", self.plan.grid)
            self.join("moments")
            if self.numbers[terms.GIVEN] or not self.numbers[terms.AGAIN]:
                return
            self.numbers[terms.GIVEN] = 1


def _table(x: Array, *vectors: Array) -> Array:
    """Per-channel vectors as the rows of a table, in the dtype that values of x are worked on in."""
    table = np.empty((4, vectors[0].size), np.float64 if x.dtype == np.float64 else np.float32)
    for row, v in zip(table, vectors, strict=False):
        row[:] = v.reshape(-1)
    return table


def _alike(dy: Array, x: Array) -> tuple[Array, Array]:
    """Gradients and data in one dtype, the wider: the loops read both in the same."""
    dtype = np.result_type(dy, x, np.float32)
    return np.asarray(dy, dtype), np.asarray(x, dtype)


def _weights(w: Array | None, x: Array) -> Array | None:
    """Weights as the loops take them: of the shape of x, bool or float64."""
    if w is None:
        return None
    if w.dtype != np.bool_ or not w.flags.aligned:
        w = np.array(w, np.bool_ if w.dtype == np.bool_ else np.float64)
    return np.broadcast_to(w, x.shape)


def _split(vectors: Array, at: Layout) -> Any:
    """The rows of a table of vectors, each in the shape of gamma; 0-d arrays for no channel axis."""
    if len(at.kept) == 1:
        return vectors
    shaped = vectors.reshape((-1, *at.channels))
    return [shaped[i, ...] for i in range(len(vectors))]


# Passes fused, as `functional.py` calls them. Vectors have room for float64, whatever they are in.


def forward(
    x: Array,
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    at: Layout,
    out: Array | None,
) -> tuple[Array, Moments]:
    """Give y and the batch's moments."""
    y = outputs.empty_like(x) if out is None else out
    w = _weights(w, x)
    p = plan(x, at.kept, y, w=w)
    stats = np.empty((4, p.channels))
    room = np.empty((2, 4, p.channels)) if p.whole else np.zeros((1 + p.grid.blocks, 4, p.channels))
    job = Job(p, (x, y), w, stats, room, room[1:], gamma, beta, float(eps))
    if p.whole:
        job.run("forward", p.whole)
    else:
        job.moments()
        job.join("forward")
        job.run("output", p.grid)
    return y, Moments(*_split(stats, at))


def backward(
    dy: Array,
    x: Array,
    w: Array | None,
    stats: Moments,
    gamma: Array | None,
    eps: float,
    at: Layout,
    out: Array | None,
) -> tuple[Array, Array, Array]:
    """Give dx, and dgamma and dbeta in float64."""
    if dy.dtype != x.dtype:
        dx, dgamma, dbeta = backward(*_alike(dy, x), w, stats, gamma, eps, at, None)
        return written(dx.astype(x.dtype), out), dgamma, dbeta
    dx = outputs.empty_like(x) if out is None else out
    w = _weights(w, x)
    p = plan(dy, at.kept, x, dx, w=w)
    room = np.empty((2, 4, p.channels))
    vectors, known = room
    flat = len(at.kept) == 1
    for row, v in enumerate((stats.count, stats.mean, stats.var, stats.mean_lo)):
        known[row] = 0.0 if v is None else v if flat or not hasattr(v, "shape") else v.reshape(-1)
    sums = np.zeros((1 if p.whole else p.grid.blocks, 2, p.channels))
    job = Job(p, (dy, x, dx), w, known, vectors, sums, gamma, eps=float(eps))
    if p.whole:
        job.run("backward", p.whole)
    else:
        job.join("centres")
        job.run("grad_sums", p.grid)
        job.join("backward")
        job.run("grad_input", p.grid)
    dgamma, dbeta = _split(sums[0] if len(sums) == 1 else sums[0].copy(), at)
    return dx, dgamma, dbeta


def inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    at: Layout,
    out: Array | None,
) -> Array:
    """Give y from statistics that are given."""
    y = outputs.empty_like(x) if out is None else out
    p = plan(x, at.kept, y)
    room = np.zeros((2, 4, p.channels))
    vectors, stats = room
    stats[1], stats[2] = (mean, var) if len(at.kept) == 1 else (mean.reshape(-1), var.reshape(-1))
    job = Job(p, (x, y), None, stats, vectors, None, gamma, beta, float(eps))
    job.join("forward")
    job.run("output", p.grid)
    return y


# The four kernels, as `generic.py` specifies them.


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel."""
    w = _weights(w, x)
    p = plan(x, at.kept, x, w=w)  # as the loops of a forward pass have it, with y = x
    stats, room = np.empty((4, p.channels)), np.zeros((1 + p.grid.blocks, 4, p.channels))
    Job(p, (x, x), w, stats, room, room[1:]).moments()
    count, mean, var, low = stats.reshape(4, *at.broadcast)
    return count, mean, low, var


def scale_shift(x: Array, m: Array, a: Array, b: Array, at: Layout, out: Array | None) -> Array:
    """Give y = a·(x - m) + b."""
    y = outputs.empty_like(x) if out is None else out
    p = plan(x, at.kept, y)
    Job(p, (x, y), None, None, _table(x, m, a, b)).run("output", p.grid)
    return y


def grad_sums(dy: Array, x: Array, m: Array, w: Array | None, at: Layout) -> tuple[Array, Array]:
    """Σdy and Σdy·(x - m) of each channel."""
    if dy.dtype != x.dtype:
        dy, x = _alike(dy, x)
    w = _weights(w, x)
    p = plan(dy, at.kept, x, x, w=w)  # as the loops of a backward pass have it, with dx = x
    sums = np.zeros((p.grid.blocks, 2, p.channels))
    job = Job(p, (dy, x, x), w, None, _table(x, m), sums)
    job.run("grad_sums", p.grid)
    job.join("sums")
    sum_dy, sum_dy_d = sums[0].reshape(2, *at.broadcast)
    return sum_dy, sum_dy_d


def grad_input(
    dy: Array,
    x: Array,
    m: Array,
    a: Array,
    b: Array,
    c: Array,
    w: Array | None,
    at: Layout,
    out: Array | None,
) -> Array:
    """Give dx = a·(dy + w·(b·(x - m) + c))."""
    if dy.dtype != x.dtype:
        return written(grad_input(*_alike(dy, x), m, a, b, c, w, at, None).astype(x.dtype), out)
    dx = outputs.empty_like(x) if out is None else out
    w = _weights(w, x)
    p = plan(dy, at.kept, x, dx, w=w)
    Job(p, (dy, x, dx), w, None, _table(x, m, a, b, c)).run("grad_input", p.grid)
    return dx
