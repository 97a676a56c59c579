"""The four kernels on Dask's arrays: chunk by chunk, on the kernels of the chunks' own library.

Moments and sums of chunks meet in a tree. A chunk that was read for the statistics is not kept for the
output: it is read again once they are known, so that any size streams through little memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import dask
import dask.array
from array_api_compat import array_namespace, device
from dask.graph_manipulation import bind

from batchnorm.kernels import KernelSet, pick
from batchnorm.layout import Layout, layout
from batchnorm.moments import Moments, pool_rows

Array = Any
da: Any = dask.array


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel."""
    parts = _partial(_chunk_moments, 4, at, x, w)
    if at.reduced:
        axes = tuple(1 + a for a in at.reduced)
        merge = functools.partial(_merged, kept=at.kept)
        parts = da.reduction(parts, merge, merge, axes, keepdims=True, dtype=at.wide, meta=parts._meta)
    return parts[0], parts[1], parts[2], parts[3]


def scale_shift(x: Array, m: Array, a: Array, b: Array, at: Layout, out: None) -> Array:
    """Give y = a·(x - m) + b."""
    return _blocks(_chunk_scale_shift, at, x, m, a, b)


def grad_sums(dy: Array, x: Array, m: Array, w: Array | None, at: Layout) -> tuple[Array, Array]:
    """Σdy and Σdy·(x - m) of each channel."""
    parts = _partial(_chunk_grad_sums, 2, at, x, dy, m, w)
    if at.reduced:
        parts = da.sum(parts, axis=tuple(1 + a for a in at.reduced), keepdims=True)
    return parts[0], parts[1]


def grad_input(
    dy: Array,
    x: Array,
    m: Array,
    a: Array,
    b: Array,
    c: Array,
    w: Array | None,
    at: Layout,
    out: None,
) -> Array:
    """Give dx = a·(dy + w·(b·(x - m) + c))."""
    return _blocks(_chunk_grad_input, at, x, dy, m, a, b, c, w)


def forward(
    x: Array, w: Array | None, gamma: Array, beta: Array, eps: float, at: Layout, out: None
) -> tuple[Array, Moments]:
    """Give y and the batch's moments."""
    from batchnorm import vectors  # which imports this package's kernels

    stats = vectors.moments_by(kernel_set(), at, x, w)
    (x,) = _again((x,), stats)
    return vectors.scale_shift_by(kernel_set(), at, x, stats, gamma, beta, eps, None), stats


def backward(
    dy: Array,
    x: Array,
    w: Array | None,
    stats: Moments,
    gamma: Array | None,
    eps: float,
    at: Layout,
    out: None,
) -> tuple[Array, ...]:
    """Give dx, dgamma and dbeta."""
    from batchnorm import vectors

    sums = vectors.sums_with(kernel_set(), at, dy, x, vectors.centre(at, stats), w)
    dy, x = _again((dy, x), sums)
    return vectors.backward_from(kernel_set(), at, dy, x, w, stats, gamma, eps, sums, None)


def _again(arrays: tuple[Array, ...], after: Sequence[Array]) -> tuple[Array, ...]:
    """The same arrays, read or computed anew, and not before some others are there.

    Otherwise their chunks would be kept from the first pass to the second.
    """
    # The same names for the same call, so that Dask knows equal work by its name.
    seed = dask.base.tokenize([a.name for a in arrays], [a.name for a in after])
    found: tuple[Array, ...] = bind(arrays, list(after), seed=seed)
    return found


@functools.cache
def kernel_set() -> KernelSet:
    """The kernels on chunks."""
    why = "each chunk on the kernels of its own library"
    return KernelSet("dask", why, moments, scale_shift, grad_sums, grad_input, forward, backward)


# What runs on each chunk. Vectors come in broadcast shape, cut as the channels are.


def _partial(function: Callable[..., Array], rows: int, at: Layout, x: Array, *others: Any) -> Array:
    """Rows of vectors from each chunk: (rows, blocks along each axis but the channels')."""
    axes = tuple(range(1, 1 + x.ndim))
    given = _cut_as(x, axes, others)
    return da.blockwise(
        function,
        (0, *axes),
        *given,
        new_axes={0: rows},
        adjust_chunks={1 + a: 1 for a in at.reduced},
        kept=at.kept,
        dtype=at.wide,
        meta=da.utils.meta_from_array(x._meta, ndim=1 + x.ndim, dtype=at.wide),
    )


def _blocks(function: Callable[..., Array], at: Layout, x: Array, *others: Any) -> Array:
    """An array of the shape of x."""
    axes = tuple(range(x.ndim))
    given = _cut_as(x, axes, others)
    return da.blockwise(function, axes, *given, kept=at.kept, dtype=x.dtype, meta=x._meta)


def _cut_as(x: Array, axes: tuple[int, ...], others: tuple[Any, ...]) -> list[Any]:
    """Arguments of `blockwise`: x, and others in the same chunks, so that x keeps its own."""
    given = [x, axes]
    for a in others:
        if a is not None:
            chunks = [c if n == sum(c) else (n,) for n, c in zip(a.shape, x.chunks, strict=True)]
            given += [a.rechunk(tuple(chunks)), axes]
        else:
            given += [None, None]
    return given


def _layout(x: Array, kept: tuple[int, ...]) -> Layout:
    return layout("x", array_namespace(x), x, kept, device(x))


def _chunk_moments(x: Array, w: Array | None, *, kept: tuple[int, ...]) -> Array:
    at = _layout(x, kept)
    return at.xp.stack(pick(x, w).moments(x, w, at))


def _merged(parts: Array, axis: Any, keepdims: bool, *, kept: tuple[int, ...]) -> Array:
    """Moments of several chunks, as rows (n, mean, mean_lo, var), joined."""
    xp = array_namespace(parts)
    ndim = parts.ndim - 1
    reduced = [a for a in range(ndim) if a not in kept]
    shape = tuple(parts.shape[1 + a] for a in kept)
    broadcast = tuple(parts.shape[1 + a] if a in kept else 1 for a in range(ndim))
    n, mean, low, var = (
        xp.reshape(xp.permute_dims(parts[i, ...], (*reduced, *kept)), (-1, *shape)) for i in range(4)
    )
    n, mean, var, low = pool_rows(Moments(n, mean, var, low))
    return xp.stack([xp.reshape(v, broadcast) for v in (n, mean, low, var)])


def _chunk_scale_shift(x: Array, *vectors: Array, kept: tuple[int, ...]) -> Array:
    return pick(x).scale_shift(x, *vectors, _layout(x, kept), None)


def _chunk_grad_sums(x: Array, dy: Array, m: Array, w: Array | None, *, kept: tuple[int, ...]) -> Array:
    at = _layout(x, kept)
    return at.xp.stack(pick(dy, x, w).grad_sums(dy, x, m, w, at))


def _chunk_grad_input(
    x: Array,
    dy: Array,
    m: Array,
    a: Array,
    b: Array,
    c: Array,
    w: Array | None,
    *,
    kept: tuple[int, ...],
) -> Array:
    return pick(dy, x, w).grad_input(dy, x, m, a, b, c, w, _layout(x, kept), None)
