"""The four kernels for NumPy alone: in blocks that stay in cache between passes, on threads.

NumPy's loops release the interpreter, so blocks run on several threads. Results do not depend on
their number: each block's sums are kept, and added in the order of the blocks.

Arrays are looked at with their axes in the order of memory, so that a block and its scratch are
walked through in one long loop; a per-channel vector is repeated along short axes for the same end.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm import outputs, threads
from batchnorm.layout import Layout

Array = Any
Index = tuple[slice, ...]

# Values of a block: 512 KiB in float32, and 1 MiB of scratch in float64 beside it. Smaller ones stay in
# a nearer cache, but two threads then meet at the interpreter more often than they compute.
BLOCK = 2**17
# Values that NumPy's inner loop should walk through at least.
LONG = 2**10
# Values of a dot product, at most: longer ones wake the threads of NumPy's own BLAS.
DOT = 2**13
# Values that are added one after the other where a sum runs across memory.
LEAF = 16
# Values of a channel that its pivot is the mean of.
SAMPLE = 64


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel.

    Σw, Σw·d and Σw·d² with d = x - pivot, in float64: with the pivot within a standard deviation
    of the mean, var = Σwd²/n - (Σwd/n)² loses next to nothing, and one reading gives both.
    """
    pivot = np.zeros(at.broadcast)
    sample = _sample(x, at)
    if w is not None:
        w = np.broadcast_to(w, x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        n, s, _ = _sums(x[sample], None if w is None else w[sample], pivot, at)
        d = s / np.where(n > 0, n, 1)
        for _ in range(2):  # a second time where the pivot was too far from the mean
            pivot = (pivot + d).astype(x.dtype).astype(np.float64)  # so that d is exact
            n, s, q = _sums(x, w, pivot, at)
            some = np.where(n > 0, n, 1)
            d = s / some
            var = q / some - d * d
            if not np.any(d * d > var):
                break
        mean = pivot + d
        back = mean - pivot
        return n, mean, (pivot - (mean - back)) + (d - back), np.where(var < 0, 0.0, var)


def _sums(x: Array, w: Array | None, pivot: Array, at: Layout) -> tuple[Array, Array, Array]:
    """Σw, Σw·d and Σw·d² of each channel, with d = x - pivot."""
    view = _View(x, at)
    x, pivot = view.of(x), view.of(pivot)
    w = None if w is None else view.of(w)

    def block(index: Index) -> tuple[Array, ...]:
        part = x[index]
        d = _scratch(part.shape, np.float64)
        np.copyto(d, part)
        np.subtract(d, view.repeated(pivot, index), out=d)
        if w is None:
            return view.total(d), view.total(d, d)
        weights = w[index]
        d[~(weights > 0)] = 0.0
        wd = np.multiply(d, weights, dtype=np.float64)
        return view.total(wd), view.total(wd, d), view.total(weights.astype(np.float64))

    if w is None:
        s, q = view.add(block, 2)
        n = np.full(s.shape, x.size / max(1, s.size))
    else:
        s, q, n = view.add(block, 3)
    return view.back(n), view.back(s), view.back(q)


def scale_shift(x: Array, m: Array, a: Array, b: Array, at: Layout, out: Array | None) -> Array:
    """Give y = a·(x - m) + b."""
    y = outputs.empty_like(x) if out is None else out
    view = _View(x, at)
    x, m, a, b, target = (view.of(v) for v in (x, m, a, b, y))

    def block(index: Index) -> None:
        part = target[(*index, ...)]  # a view, where there are no axes too
        d = part if part.dtype == at.compute else _scratch(part.shape, at.compute)
        np.subtract(x[index], view.repeated(m, index), out=d, dtype=at.compute)
        np.multiply(d, view.repeated(a, index), out=d)
        np.add(d, view.repeated(b, index), out=part, casting="same_kind")

    view.each(block)
    return y


def grad_sums(dy: Array, x: Array, m: Array, w: Array | None, at: Layout) -> tuple[Array, Array]:
    """Σdy and Σdy·(x - m) of each channel."""
    view = _View(x, at)
    w = None if w is None else view.of(np.broadcast_to(w, x.shape))
    dy, x, m = (view.of(v) for v in (dy, x, m.astype(np.float64)))

    def block(index: Index) -> tuple[Array, ...]:
        part = x[index]
        g, d = _scratch(part.shape, np.float64, 0), _scratch(part.shape, np.float64, 1)
        np.copyto(g, dy[index])
        np.copyto(d, part)
        np.subtract(d, view.repeated(m, index), out=d)
        if w is not None:  # a value without weight and without gradient may be NaN
            d[~((w[index] > 0) | (g != 0))] = 0.0
        return view.total(g), view.total(g, d)

    s, q = view.add(block, 2)
    return view.back(s), view.back(q)


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
    dx = outputs.empty_like(x) if out is None else out
    view = _View(x, at)
    w = None if w is None else view.of(np.broadcast_to(w, x.shape))
    dy, x, m, a, b, c, target = (view.of(v) for v in (dy, x, m, a, b, c, dx))

    def block(index: Index) -> None:
        part = x[index]
        d = _scratch(part.shape, at.compute)
        np.subtract(part, view.repeated(m, index), out=d, dtype=at.compute)
        np.multiply(d, view.repeated(b, index), out=d)
        np.add(d, view.repeated(c, index), out=d)
        if w is not None:
            np.multiply(d, w[index], out=d, casting="same_kind")
            d[~(w[index] > 0)] = 0.0
        np.add(d, dy[index], out=d, dtype=at.compute)
        np.multiply(d, view.repeated(a, index), out=target[(*index, ...)], casting="same_kind")

    view.each(block)
    return dx


class _View:
    """An array with its axes in the order of memory, and the blocks it is worked on in."""

    def __init__(self, x: Array, at: Layout) -> None:
        self.order = tuple(sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])))
        self.shape = tuple(x.shape[axis] for axis in self.order)
        self.kept = tuple(axis in at.kept for axis in self.order)
        self.channels = tuple(n if kept else 1 for n, kept in zip(self.shape, self.kept, strict=True))
        # The last axes, as many as make a long loop, and whether channels change within it.
        self.inner = len(self.shape)
        while self.inner > 0 and math.prod(self.shape[self.inner :]) < LONG:
            self.inner -= 1
        self.mixed = any(self.kept[self.inner :])

    def of(self, v: Array) -> Array:
        """An array, or a vector in broadcast shape, with its axes in this order."""
        return v.transpose(self.order)

    def back(self, v: Array) -> Array:
        """The reverse of `of`."""
        return v.transpose(np.argsort(self.order))

    def repeated(self, v: Array, index: Index) -> Array:
        """A vector's part for a block, as long as the inner loop where that saves time."""
        part = v[self.at(index)]
        if not self.mixed:
            return part
        inner = range(self.inner, len(index))
        lengths = [len(range(*index[axis].indices(self.shape[axis]))) for axis in inner]
        return np.ascontiguousarray(np.broadcast_to(part, (*part.shape[: self.inner], *lengths)))

    def at(self, index: Index) -> Index:
        """The index into a vector that belongs to a block's."""
        return tuple(i if n > 1 else slice(None) for i, n in zip(index, self.channels, strict=True))

    def total(self, v: Array, factor: Array | None = None) -> Array:
        """Σv or Σv·factor of each channel of a block in scratch, (…, C, …) -> (C)."""
        last = len(v.shape)
        while last > 0 and not self.kept[last - 1]:
            last -= 1
        length = math.prod(v.shape[last:])
        channels = tuple(n if kept else 1 for n, kept in zip(v.shape, self.kept, strict=True))
        if length >= 32:  # runs of one channel
            runs = v.reshape((*v.shape[:last], length))
            factors = None if factor is None else factor.reshape(runs.shape)
            total = np.zeros(v.shape[:last])
            for start in range(0, length, DOT):
                run = runs[..., start : start + DOT]
                other = _ones()[: run.shape[-1]]
                total += np.vecdot(run, other if factors is None else factors[..., start : start + DOT])
            v = total.reshape((*v.shape[:last], *[1] * (len(channels) - last)))
        elif factor is not None:
            v = np.multiply(v, factor, out=_scratch(v.shape, np.float64, 2))
        axes = tuple(i for i, n in enumerate(v.shape) if n > 1 and not self.kept[i])
        # From the last axis to the first: a tree, whose error does not grow with all values.
        for axis in reversed(axes):
            v = _sum(v, axis)
        return v.reshape(channels)

    def blocks(self) -> list[Index]:
        """Indices of blocks of at most `BLOCK` values that together are the array."""
        ranges: list[list[slice]] = []
        rest = math.prod(self.shape)
        for n in self.shape:
            rest //= max(1, n)  # values of one step along this axis
            step = max(1, min(n, BLOCK // max(1, rest)))
            ranges.append([slice(i, min(n, i + step)) for i in range(0, n, step)])
        return list(itertools.product(*ranges))

    def each(self, work: Callable[[Index], Any]) -> list[tuple[Index, Any]]:
        """What a function gives for each block, run on as many threads as there are blocks."""
        blocks = self.blocks()
        found: list[Any] = [None] * len(blocks)
        tickets = iter(range(len(blocks)))

        def task(_: int) -> None:
            with np.errstate(all="ignore"):
                for ticket in tickets:
                    found[ticket] = work(blocks[ticket])

        threads.run(task, threads.count(len(blocks)))
        return list(zip(blocks, found, strict=True))

    def add(self, work: Callable[[Index], tuple[Array, ...]], count: int) -> list[Array]:
        """Add what each block gives for its channels, in the order of the blocks."""
        sums = [np.zeros(self.channels) for _ in range(count)]
        parts: dict[Any, tuple[Index, list[tuple[Array, ...]]]] = {}
        for index, terms in self.each(work):
            place = self.at(index)
            key = tuple((s.start, s.stop) for s in place)
            parts.setdefault(key, (place, []))[1].append(terms)
        with np.errstate(invalid="ignore", over="ignore"):
            for place, terms_of_blocks in parts.values():
                for total, terms in zip(sums, zip(*terms_of_blocks, strict=True), strict=True):
                    total[place] = _sum(np.stack(terms), 0)[0]
        return sums


def _sum(v: Array, axis: int) -> Array:
    """Sum over an axis, which is kept with length 1; no more than `LEAF` values in a row."""
    n = v.shape[axis]
    if n <= LEAF:
        return np.add.reduce(v, axis=axis, keepdims=True)
    before, after, whole = v.shape[:axis], v.shape[axis + 1 :], n // LEAF * LEAF
    pick = (slice(None),) * axis
    leaves = v[(*pick, slice(0, whole))].reshape((*before, n // LEAF, LEAF, *after))
    total = _sum(np.add.reduce(leaves, axis=axis + 1), axis)
    return total + np.add.reduce(v[(*pick, slice(whole, n))], axis=axis, keepdims=True)


def _sample(x: Array, at: Layout) -> Index:
    """An index to some values of each channel."""
    index, left = [], SAMPLE
    for axis, n in enumerate(x.shape):
        take = n if axis in at.kept else min(n, left)
        if axis not in at.kept:
            left = max(1, left // max(1, take))
        index.append(slice(0, take))
    return tuple(index)


_memory = threading.local()


def _scratch(shape: tuple[int, ...], dtype: Any, number: int = 0) -> Array:
    """Memory of this thread's own that the next call of the same number takes again."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    held = _memory.__dict__.setdefault("held", {})
    if number not in held or held[number].size < size:
        held[number] = np.empty(size, np.uint8)
    return held[number][:size].view(dtype).reshape(shape)


@functools.cache
def _ones() -> Array:
    return np.ones(DOT)
