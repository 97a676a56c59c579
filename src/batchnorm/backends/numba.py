"""The four kernels, and forward and backward passes fused, as compiled loops on NumPy arrays.

The loops are in `compiled/`. Here is what surrounds a call of them: which axes lie how, tiles, memory
for the result, and the job that threads share.
"""

from __future__ import annotations

import functools
import os
import platform
import struct
import threading
from typing import Any

import numpy as np
from llvmlite import binding
from numba import cfunc
from numba.core.compiler_lock import global_compiler_lock

from batchnorm import outputs, threads
from batchnorm.backends.base import Backend
from batchnorm.backends.compiled import columns, gradients, openmp, planes, pool, terms
from batchnorm.backends.compiled.crew import dispatch
from batchnorm.backends.compiled.lanes import SENTINELS
from batchnorm.backends.compiled.plans import Grid, Plan, address, plan
from batchnorm.layout import Layout
from batchnorm.moments import Moments
from batchnorm.validation import validate_mask_count

Array = Any

_sentinels: dict[Any, Any] = {}

# A child that is forked while another thread compiles would find Numba's lock, and LLVM's, held for
# ever. So a fork waits until nothing is being compiled: seconds at most, and only then.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def sentinel(dtype: Any) -> Any:
    """Return what stands for a dtype in the compiled loops, or None."""
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
    """Return the address of a loop for dtypes of data and weights; it is compiled when needed."""
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
    """Return the address of memory of the calling thread, for one pass."""
    if size > getattr(_own, "size", 0):
        _own.memory = np.empty(size + outputs.ALIGNMENT, np.uint8)
        _own.size = size
        _own.address = -(-_own.memory.ctypes.data // outputs.ALIGNMENT) * outputs.ALIGNMENT
    return _own.address if size else 0


_KINDS = {np.dtype(np.float32): terms.SINGLE, np.dtype(np.float64): terms.DOUBLE}
_PLAIN = 0x101  # flags of an array in the order of its axes, and aligned


def _parameter(v: Array | None) -> tuple[Array | None, int, int]:
    """Return gamma or beta as loops take it: an array to keep alive, its address and its kind."""
    if v is None:
        return None, 0, terms.NONE
    kind = _KINDS.get(v.dtype)
    if kind is None or v.flags.num & _PLAIN != _PLAIN:
        v, kind = np.array(v, np.float64, order="C"), terms.DOUBLE  # the default keeps v's own order
    return v, address(v), kind


# All numbers of a job are whole ones, but eps.
_NUMBERS = struct.Struct(f"={terms.EPS}qd{terms.TILES - terms.EPS - 1}q")


class Job:
    """What the threads of a call share: a row of numbers, and the arrays whose addresses are in it."""

    __slots__ = ("dtype", "given", "kept", "operands", "plan", "tables", "weights")

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
        gamma, *gamma_at = _parameter(gamma)
        beta, *beta_at = _parameter(beta)
        self.plan, self.dtype, self.weights = p, data[0].dtype, None if w is None else w.dtype
        self.kept = data, w, stats, vectors, parts, gamma, beta
        operands = [*map(address, data), 0, 0][:3]
        self.operands = *operands, 0 if w is None else address(w), *gamma_at, *beta_at, eps
        self.tables = (
            0 if stats is None else address(stats),
            address(vectors),
            0 if parts is None else address(parts),
        )
        self.given = 0

    def run(self, name: str, grid: Grid) -> None:
        """Run a pass over the tiles, on as many threads as pay."""
        crew_at = helpers = 0
        lent = openmp.current()
        if not self.plan.alone:
            count = threads.count(grid.tiles)
            if count > 1:
                crew_at, helpers = (0, count - 1) if lent else pool.boxes(count - 1)
        numbers = self.numbers(grid, helpers)  # has to live until the loops are through
        function = _function(grid.loops, name, self.dtype, self.weights)
        if lent and helpers:
            lent(function, address(numbers), helpers + 1)
        else:
            dispatch(function, address(numbers), crew_at, helpers)

    def join(self, name: str) -> bool:
        """Run what comes between two passes; whether it asks for the first one again."""
        numbers = self.numbers(self.plan.grid, 0)
        dispatch(_function("join", name, self.dtype, None), address(numbers), 0, 0)
        return bool(numbers[terms.AGAIN])

    def moments(self) -> None:
        """Compute sums of all tiles, moments from them, and the vectors of an output pass."""
        self.run("moments", self.plan.grid)
        if self.join("moments"):  # a pivot was too far from the mean: now it is the mean
            self.given = 1
            self.run("moments", self.plan.grid)
            self.join("moments")

    def numbers(self, grid: Grid, helpers: int) -> Array:
        """Return the launch parameters as the loops read them, in the order that `terms` gives."""
        p = self.plan
        numbers: Any = np.zeros(terms.TILES + 2 * helpers + 1, np.int64)
        scratch = _scratch(p.scratch * (helpers + 1))
        # fmt: off
        _NUMBERS.pack_into(
            numbers, 0, helpers + 1, *grid[:4], *p.places, *self.operands, *self.tables, scratch,
            p.scratch, self.given, grid.streaming, grid.blocks, p.copies, 0,
        )
        # fmt: on
        return numbers


def _table(x: Array, *vectors: Array) -> Array:
    """Return per-channel vectors as the rows of a table, in the dtype of arithmetic on x."""
    table = np.empty((4, vectors[0].size), np.float64 if x.dtype == np.float64 else np.float32)
    for row, v in zip(table, vectors, strict=False):
        row[:] = v.reshape(-1)
    return table


def _weights(w: Array | None, x: Array) -> Array | None:
    """Return weights as the loops take them: of the shape of x, bool or float64."""
    if w is None:
        return None
    if w.dtype != np.bool_ or not w.flags.aligned:
        w = np.array(w, np.bool_ if w.dtype == np.bool_ else np.float64)
    return np.broadcast_to(w, x.shape)


def _split(vectors: Array, layout: Layout) -> Any:
    """Return the rows of a table of vectors, in the shape of gamma; 0-d arrays for no channel axis."""
    if len(layout.channel_axes) == 1:
        return vectors
    shaped = vectors.reshape((-1, *layout.channels))
    return [shaped[i, ...] for i in range(len(vectors))]


class Numba(Backend):
    """Compiled loops, with forward and backward passes fused."""

    name = "numba"
    summary = "compiled loops for NumPy arrays and what shares their memory"

    def refuses(self, arrays: tuple[Array | None, ...]) -> str | None:
        """Return why the arrays of a call cannot be worked on, or None; vectors always can."""
        shape = arrays[0].shape  # type: ignore[union-attr]
        for a in arrays:
            if a is None or a.shape != shape or a.dtype.kind in "biu":  # weights, which are copied
                continue
            if sentinel(a.dtype) is None:
                return f"dtype {a.dtype} is not one that the compiled loops read"
            flags = a.flags
            if not (flags.c_contiguous and flags.aligned) and (
                not flags.aligned or any(step % a.itemsize for step in a.strides)
            ):
                return "values are not aligned in memory"
            if a.dtype == np.float16 and not _has_half():
                return "this processor cannot convert float16"
        return None

    def forward(
        self,
        x: Array,
        w: Array | None,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> tuple[Array, Moments]:
        """Return y and the batch's moments."""
        y = outputs.empty_like(x) if out is None else out
        weights = _weights(w, x)
        p = plan(x, layout.channel_axes, y, w=weights)
        whole = p.whole if w is None else None  # a mask's counts are looked at before y is written
        stats = np.empty((4, p.channels))
        room = np.empty((2, 4, p.channels)) if whole else np.zeros((1 + p.grid.blocks, 4, p.channels))
        job = Job(p, (x, y), weights, stats, room, room[1:], gamma, beta, float(eps))
        if whole:
            job.run("forward", whole)
        else:
            job.moments()
            validate_mask_count(layout, w, stats[0])
            job.run("output", p.grid)
        return y, Moments(*_split(stats, layout))

    def backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: float,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return dx, and dgamma and dbeta in the dtype of gamma."""
        if dy.dtype != x.dtype:
            return super().backward(dy, x, w, stats, gamma, eps, layout, out=out)
        dx = outputs.empty_like(x) if out is None else out
        w = _weights(w, x)
        p = plan(dy, layout.channel_axes, x, dx, w=w)
        room = np.empty((2, 4, p.channels))
        vectors, known = room
        flat = len(layout.channel_axes) == 1
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
        dtype = layout.compute if gamma is None else gamma.dtype
        dgamma, dbeta = _split(sums[0].astype(dtype), layout)
        return dx, dgamma, dbeta

    def inference(
        self,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> Array:
        """Return y from statistics that are given."""
        y = outputs.empty_like(x) if out is None else out
        p = plan(x, layout.channel_axes, y)
        room = np.zeros((2, 4, p.channels))
        vectors, known = room
        for row, v in ((1, stats.mean), (2, stats.var), (3, stats.mean_lo)):
            if v is not None:
                known[row] = v.reshape(-1)
        job = Job(p, (x, y), None, known, vectors, None, gamma, beta, float(eps))
        job.join("forward")
        job.run("output", p.sweep)
        return y

    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        w = _weights(w, x)
        p = plan(x, layout.channel_axes, x, w=w)  # as the loops of a forward pass have it, with y = x
        stats, room = np.empty((4, p.channels)), np.zeros((1 + p.grid.blocks, 4, p.channels))
        Job(p, (x, x), w, stats, room, room[1:]).moments()
        count, mean, var, low = stats.reshape(4, *layout.broadcast)
        return count, mean, low, var

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        y = outputs.empty_like(x) if out is None else out
        p = plan(x, layout.channel_axes, y)
        Job(p, (x, y), None, None, _table(x, m, a, b)).run("output", p.sweep)
        return y

    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        w = _weights(w, x)
        p = plan(dy, layout.channel_axes, x, x, w=w)  # as in a backward pass, with dx = x
        sums = np.zeros((p.grid.blocks, 2, p.channels))
        job = Job(p, (dy, x, x), w, None, _table(x, m), sums)
        job.run("grad_sums", p.grid)
        job.join("sums")
        sum_dy, sum_dy_d = sums[0].reshape(2, *layout.broadcast)
        return sum_dy, sum_dy_d

    def grad_input(
        self,
        dy: Array,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        c: Array,
        w: Array | None,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> Array:
        """Return dx = a·(dy + w·(b·(x − m) + c))."""
        dx = outputs.empty_like(x) if out is None else out
        w = _weights(w, x)
        p = plan(dy, layout.channel_axes, x, dx, w=w)
        Job(p, (dy, x, dx), w, None, _table(x, m, a, b, c)).run("grad_input", p.sweep)
        return dx


NUMBA = Numba()
