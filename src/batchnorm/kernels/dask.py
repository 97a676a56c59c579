"""The four kernels on Dask's arrays: chunk by chunk, on the kernels of the chunks' own library.

Moments and sums of chunks meet in a tree. A chunk that was read for the statistics is not kept for the
output: it is read again once they are known, so that any size streams through little memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import dask
import dask.array
from array_api_compat import array_namespace, device
from dask._task_spec import Alias, DataNode, Task, TaskRef, convert_legacy_graph
from dask.base import clone_key
from dask.highlevelgraph import HighLevelGraph
from dask.utils import key_split

from batchnorm import checks
from batchnorm.kernels import KernelSet, pick
from batchnorm.layout import Layout, layout
from batchnorm.moments import Moments, pool_rows

Array = Any
da: Any = dask.array

# Names in graphs: of statistics and other vectors, and of what comes between two passes.
STATISTICS, AFTER = "batchnorm-statistics", "batchnorm-after"


def moments(x: Array, w: Array | None, at: Layout) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel."""
    parts = _partial(_chunk_moments, 4, at, x, w)
    if at.reduced:
        axes = tuple(1 + a for a in at.reduced)
        merge = functools.partial(_merged, kept=at.kept)
        parts = da.reduction(parts, merge, merge, axes, keepdims=True, dtype=at.wide, meta=parts._meta)
    parts = _statistics(parts)
    return parts[0], parts[1], parts[2], parts[3]


def scale_shift(x: Array, m: Array, a: Array, b: Array, at: Layout, out: None) -> Array:
    """Give y = a·(x - m) + b."""
    return _blocks(_chunk_scale_shift, at, x, *map(_statistics, (m, a, b)))


def grad_sums(dy: Array, x: Array, m: Array, w: Array | None, at: Layout) -> tuple[Array, Array]:
    """Σdy and Σdy·(x - m) of each channel."""
    parts = _partial(_chunk_grad_sums, 2, at, x, dy, m, w)
    if at.reduced:
        parts = da.sum(parts, axis=tuple(1 + a for a in at.reduced), keepdims=True)
    parts = _statistics(parts)
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
    return _blocks(_chunk_grad_input, at, x, dy, *map(_statistics, (m, a, b, c)), w)


def forward(
    x: Array, w: Array | None, gamma: Array, beta: Array, eps: float, at: Layout, out: None
) -> tuple[Array, Moments]:
    """Give y and the batch's moments."""
    from batchnorm import vectors  # which imports this package's kernels

    stats = vectors.moments_by(kernel_set(), at, x, w)
    (x,) = again((x,), stats)
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

    # Where the statistics are x's own and still to come, its chunks are not kept for the sums either.
    given = [v for v in stats if hasattr(v, "dtype")]
    own_dy, own_x = again((dy, x), given)
    sums = vectors.sums_with(kernel_set(), at, own_dy, own_x, vectors.centre(at, stats), w)
    dy, x = again((dy, x), sums)
    return vectors.backward_from(kernel_set(), at, dy, x, w, stats, gamma, eps, sums, None)


def _statistics(parts: Array) -> Array:
    """The same array, under a name by which `again` knows it."""
    name = f"{STATISTICS}-{dask.base.tokenize(parts.name)}"
    return parts.map_blocks(_same, name=name, meta=parts._meta)


def _same(parts: Array) -> Array:
    return parts


def again(arrays: tuple[Array, ...], after: Sequence[Array]) -> list[Array]:
    """The same arrays, read or computed anew, and not before some others are there.

    Otherwise their chunks would be kept from the first pass to the second. Statistics of earlier calls
    are not computed anew: they are small, and graphs would double with every layer. (Dask's own `bind`
    leaves the tasks of layers other than its blockwise ones as they are.)
    """
    graph: Any = HighLevelGraph.merge(*(a.__dask_graph__() for a in (*arrays, *after)))
    nodes = convert_legacy_graph(graph.to_dict())
    outputs = [list(_flat(a.__dask_keys__())) for a in arrays]
    # The same names for the same call, so that Dask knows equal work by its name.
    seed = dask.base.tokenize([a.name for a in arrays], [a.name for a in after])
    anew = _computed_anew(nodes, [key for keys in outputs for key in keys])
    names = {key: clone_key(key, seed) for key in anew}
    # First come the others, and all vectors: or Dask would begin with chunks that then wait for these.
    given = {need for key in anew for need in nodes[key].dependencies if need not in anew}
    waited = {key for a in after for key in _flat(a.__dask_keys__())}
    waited |= {key for key in given if not isinstance(nodes[key], DataNode)}
    first, name = f"{AFTER}-{seed}", f"batchnorm-again-{seed}"
    layer: dict[Any, Any] = {first: Task(first, _nothing, *map(TaskRef, sorted(waited, key=str)))}
    for key in anew:
        node = nodes[key].substitute(names, key=names[key])
        bound = anew.isdisjoint(nodes[key].dependencies)
        layer[node.key] = Task(node.key, _value, node, TaskRef(first)) if bound else node
    needed = given | waited
    needs = {n for n, found in graph.layers.items() if not needed.isdisjoint(found.get_output_keys())}
    layers, dependencies = {**graph.layers, name: layer}, {**graph.dependencies, name: needs}
    found = []
    for i, (a, keys) in enumerate(zip(arrays, outputs, strict=True)):
        own = f"{name}-{i}"
        aliases: Any = {(own, *key[1:]): Alias((own, *key[1:]), names.get(key, key)) for key in keys}
        whole = HighLevelGraph({**layers, own: aliases}, {**dependencies, own: {name, a.name}})
        found.append(da.Array(whole, own, a.chunks, meta=a._meta))
    return found


def _computed_anew(nodes: dict[Any, Any], outputs: list[Any]) -> set[Any]:
    """Keys of what leads to some outputs, but for data and for statistics of earlier calls."""
    found: set[Any] = set()
    rest = outputs
    while rest:
        key = rest.pop()
        known = key in found or key not in nodes
        if not (known or isinstance(nodes[key], DataNode) or key_split(key) in (STATISTICS, AFTER)):
            found.add(key)
            rest += nodes[key].dependencies
    return found


def _flat(keys: Any) -> list[Any]:
    """The keys of an array's chunks."""
    return [key for part in keys for key in _flat(part)] if isinstance(keys, list) else [keys]


def _value(value: Any, _: None) -> Any:
    return value


def _nothing(*_: Any) -> None:
    return None


@functools.cache
def kernel_set() -> KernelSet:
    """The kernels on chunks."""
    why = "each chunk on the kernels of its own library"
    fused: dict[str, Any] = {"forward": forward, "backward": backward, "again": again}
    return KernelSet("dask", why, moments, scale_shift, grad_sums, grad_input, **fused)


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
    return layout("x", checks.namespace("x", x), x, kept, device(x))


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
    count = math.prod(parts.shape[1 + a] for a in reduced)  # chunks may have no channels
    n, mean, low, var = (
        xp.reshape(xp.permute_dims(parts[i, ...], (*reduced, *kept)), (count, *shape)) for i in range(4)
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
