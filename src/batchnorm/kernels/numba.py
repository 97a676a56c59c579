"""The four kernels, and forward and backward passes fused, as compiled loops on NumPy arrays.

The loops are in `compiled/`. Here is what surrounds a call of them: which axes lie how, tiles, memory
for the result, and threads.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import binding
from numba.core.compiler_lock import global_compiler_lock

from batchnorm import outputs, threads
from batchnorm.kernels import axes, written
from batchnorm.kernels.compiled import columns, planes, terms
from batchnorm.kernels.compiled.lanes import SENTINELS
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
# Below this, waking a second thread costs more than it saves.
ALONE_BYTES = 2**21
# From this size on, output is stored past the caches, which it would only flush.
STREAM_BYTES = 2**23

_sentinels: dict[Any, Any] = {}

threads.watch = terms.watch

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


class Loops(NamedTuple):
    """The compiled loops for one kind of array."""

    moments: Any
    output: Any
    forward: Any
    grad_sums: Any
    grad_input: Any
    backward: Any


PASSES = Loops._fields
COLUMNS = Loops(*(getattr(columns, f"columns_{name}") for name in PASSES))
PLANES = Loops(*(getattr(planes, f"planes_{name}") for name in PASSES))

Grid = npt.NDArray[np.int64]


class Plan(NamedTuple):
    """How the loops go over some arrays."""

    rows: Grid
    chan: Grid
    """The axes, as `axes.Axes` has them."""
    loops: Loops
    channels: int
    whole: Grid | None
    """Tiles of whole channels, for both passes at once; None where a channel is too large."""
    grid: Grid
    """Tiles for one pass."""
    blocks: int
    """Blocks of the reduced axes in `grid`."""
    alone: bool
    """Whether a second thread would not pay."""
    streaming: bool
    """Whether output goes past the caches."""


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
    values = at.outer * at.length  # of a channel
    read = values * size * max(1, data - 1)  # bytes of a channel that are read twice

    if at.columns:
        most, fewest = (max(1, columns // at.length) for columns in (MOST_COLUMNS, FEWEST_COLUMNS))
        reduced = at.outer
        whole = min(most, at.channels, TILE_BYTES // max(1, read))
        if whole < min(fewest, at.channels):
            whole = 0
        elif not alone:  # a share for each thread
            whole = min(whole, max(fewest, at.channels // 8))
        across = min(most, at.channels)
        share = min(TILE_BYTES, max(TILE_BYTES // 8, nbytes // 16))  # large tiles, but enough of them
        block = max(4, share // (across * at.length * size), -(-reduced // PARTS))
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

    def grid(block: int, across: int) -> Grid:
        return np.array([reduced, max(1, block), at.channels, max(1, across)], np.int64)

    return Plan(
        rows=at.rows,
        chan=at.chan,
        loops=COLUMNS if at.columns else PLANES,
        channels=at.channels,
        whole=grid(reduced, whole) if whole else None,
        grid=grid(block, across),
        blocks=max(1, -(-reduced // max(1, block))),
        alone=alone,
        streaming=nbytes >= STREAM_BYTES,
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


def _run(loop: Any, grid: Grid, alone: bool, arrays: tuple[Array | None, ...], *rest: Any) -> None:
    """Run a loop over arrays, which it takes by their addresses, on as many threads as pay."""
    addresses = [0 if a is None else _address(a) for a in arrays]
    if alone:
        loop(np.zeros((2, 1), np.int64), 0, grid, *addresses, *rest)
        return

    def task(me: int, bells: threads.Bells) -> None:
        for helper, bell in enumerate(bells):
            counter[1, helper] = ctypes.addressof(bell)
        loop(counter, me, grid, *addresses, *rest)

    reduced, block, channels, across = grid.tolist()
    count = threads.count(-(-reduced // block) * -(-channels // across))
    counter = np.zeros((2, count), np.int64)
    threads.run(task, count)


def _vector(v: Array | None, channels: int, default: float) -> Array:
    """A per-channel vector in float64; a copy, since loops are compiled for those of one kind."""
    return np.full(channels, default) if v is None else np.array(v, np.float64).reshape(-1)


def _compute(x: Array) -> Any:
    """The dtype that values of x are worked on in."""
    return np.float64 if x.dtype == np.float64 else np.float32


def _table(x: Array, *vectors: Array) -> Array:
    """Per-channel vectors as the rows of a table, in the dtype that values of x are worked on in."""
    return np.array([v.reshape(-1) for v in vectors], _compute(x))


def _alike(dy: Array, x: Array) -> tuple[Array, Array]:
    """Gradients and data in one dtype, the wider: the loops read both in the same."""
    dtype = np.result_type(dy, x, np.float32)
    return np.asarray(dy, dtype), np.asarray(x, dtype)


def _weights(w: Array | None, x: Array) -> tuple[Array | None, Any]:
    """Weights as the loops take them, and their sentinel: of the shape of x, bool or float64."""
    if w is None:
        return None, None
    if w.dtype != np.bool_ or not w.flags.aligned:
        w = np.array(w, np.bool_ if w.dtype == np.bool_ else np.float64)
    return np.broadcast_to(w, x.shape), SENTINELS[w.dtype.name]


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
    w, w_like = _weights(w, x)
    p = plan(x, at.kept, y, w=w)
    like, channels = sentinel(x.dtype), p.channels
    gamma, beta, eps = _vector(gamma, channels, 1.0), _vector(beta, channels, 0.0), float(eps)
    vectors = np.empty((4, channels), _compute(x))
    if p.whole is None:
        stats = _moments(p, x, w, like, w_like)
        terms.all_forward_terms(stats, gamma, beta, eps, vectors, like)
        _output(p, x, y, like, vectors)
    else:
        stats = np.empty((4, channels))
        rest = (like, w_like, p.rows, p.chan, gamma, beta, eps, stats, vectors, p.streaming)
        _run(p.loops.forward, p.whole, p.alone, (x, y, w), *rest)
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
    w, w_like = _weights(w, x)
    p = plan(dy, at.kept, x, dx, w=w)
    like, channels = sentinel(x.dtype), p.channels
    gamma = _vector(gamma, channels, 1.0)
    known = np.empty((4, channels))
    flat = len(at.kept) == 1
    for row, v in enumerate((stats.count, stats.mean, stats.var, stats.mean_lo)):
        known[row] = 0.0 if v is None else v if flat or not hasattr(v, "shape") else v.reshape(-1)
    grads, vectors, eps = np.empty((2, channels)), np.empty((4, channels), _compute(x)), float(eps)
    if p.whole is None:
        terms.all_centres(known, vectors, like)
        sums = _grad_sums(p, dy, x, w, like, w_like, vectors)
        terms.all_backward_terms(known, gamma, eps, sums, grads, vectors, like)
        _grad_input(p, dy, x, dx, w, like, w_like, vectors)
    else:
        rest = (like, w_like, p.rows, p.chan, gamma, eps, known, grads, vectors, p.streaming)
        _run(p.loops.backward, p.whole, p.alone, (dy, x, dx, w), *rest)
    dgamma, dbeta = _split(grads, at)
    return dx, dgamma, dbeta


def _split(vectors: Array, at: Layout) -> Any:
    """The rows of a table of vectors, each in the shape of gamma; 0-d arrays for no channel axis."""
    if len(at.kept) == 1:
        return vectors
    shaped = vectors.reshape((-1, *at.channels))
    return [shaped[i, ...] for i in range(len(vectors))]


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
    like, channels = sentinel(x.dtype), p.channels
    gamma, beta = _vector(gamma, channels, 1.0), _vector(beta, channels, 0.0)
    stats = np.zeros((4, channels))
    stats[1], stats[2] = (mean, var) if len(at.kept) == 1 else (mean.reshape(-1), var.reshape(-1))
    vectors = np.empty((4, channels), _compute(x))
    terms.all_forward_terms(stats, gamma, beta, float(eps), vectors, like)
    _output(p, x, y, like, vectors)
    return y


# One pass over the array.


def _moments(p: Plan, x: Array, w: Array | None, like: Any, w_like: Any) -> Array:
    stats, parts = np.empty((4, p.channels)), np.zeros((p.blocks, 4, p.channels))
    for given in (False, True):  # a second time where a pivot was too far from the mean
        rest = (like, w_like, p.rows, p.chan, parts, given)
        _run(p.loops.moments, p.grid, p.alone, (x, w), *rest)
        if terms.all_moments(parts, stats, like):
            break
    return stats


def _output(p: Plan, x: Array, y: Array, like: Any, vectors: Array) -> None:
    rest = (like, p.rows, p.chan, vectors, p.streaming)
    _run(p.loops.output, p.grid, p.alone, (x, y), *rest)


def _grad_sums(
    p: Plan, dy: Array, x: Array, w: Array | None, like: Any, w_like: Any, vectors: Array
) -> Array:
    parts = np.zeros((p.blocks, 2, p.channels))
    rest = (like, w_like, p.rows, p.chan, vectors, parts)
    _run(p.loops.grad_sums, p.grid, p.alone, (dy, x, w), *rest)
    terms.added(parts, 2)
    return parts[0]


def _grad_input(
    p: Plan, dy: Array, x: Array, dx: Array, w: Array | None, like: Any, w_like: Any, vectors: Array
) -> None:
    rest = (like, w_like, p.rows, p.chan, vectors, p.streaming)
    _run(p.loops.grad_input, p.grid, p.alone, (dy, x, dx, w), *rest)


# The four kernels, as `generic.py` specifies them.


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel."""
    w, w_like = _weights(w, x)
    p = plan(x, at.kept, x, w=w)  # as the loops of a forward pass have it, with y = x
    count, mean, var, low = _moments(p, x, w, sentinel(x.dtype), w_like).reshape(4, *at.broadcast)
    return count, mean, low, var


def scale_shift(x: Array, m: Array, a: Array, b: Array, at: Layout, out: Array | None) -> Array:
    """Give y = a·(x - m) + b."""
    y = outputs.empty_like(x) if out is None else out
    _output(plan(x, at.kept, y), x, y, sentinel(x.dtype), _table(x, m, a, b))
    return y


def grad_sums(dy: Array, x: Array, m: Array, w: Array | None, at: Layout) -> tuple[Array, Array]:
    """Σdy and Σdy·(x - m) of each channel."""
    if dy.dtype != x.dtype:
        dy, x = _alike(dy, x)
    w, w_like = _weights(w, x)
    p = plan(dy, at.kept, x, x, w=w)  # as the loops of a backward pass have it, with dx = x
    sums = _grad_sums(p, dy, x, w, sentinel(x.dtype), w_like, _table(x, m))
    sum_dy, sum_dy_d = sums.reshape(2, *at.broadcast)
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
    w, w_like = _weights(w, x)
    p, vectors = plan(dy, at.kept, x, dx, w=w), _table(x, m, a, b, c)
    _grad_input(p, dy, x, dx, w, sentinel(x.dtype), w_like, vectors)
    return dx
