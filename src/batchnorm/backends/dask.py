"""The four kernels on Dask's arrays: chunk by chunk, on the kernels of the chunks' own library.

Moments and sums of chunks are merged in a tree. A chunk that was read for the statistics is not kept for
the output: it is read again once they are known, so that any size streams through little memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dask
import dask.array
from array_api_compat import array_namespace, device
from dask._task_spec import Alias, DataNode, Task, TaskRef, convert_legacy_graph
from dask.base import clone_key
from dask.highlevelgraph import HighLevelGraph
from dask.utils import key_split

from batchnorm.arrays import namespace
from batchnorm.backends.base import Backend
from batchnorm.epilogue import Epilogue, gradient_dtype
from batchnorm.layout import Layout, layout_of
from batchnorm.moments import Moments, merge_rows

Array = Any
Choose = Callable[..., Backend]
da: Any = dask.array

# Names in graphs: of statistics and other vectors, and of what comes between two passes.
STATISTICS, AFTER = "batchnorm-statistics", "batchnorm-after"


class Dask(Backend):
    """Chunk by chunk, each on the backend of its own library."""

    name = "dask"
    summary = "each chunk on the backend of its own library"

    def __init__(self, backend_for: Choose) -> None:
        self._chosen = backend_for  # for the arrays of a chunk

    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        parts = self._partial(_chunk_moments, 4, layout, x, _cut(x, w))
        if layout.reduced_axes:
            axes = tuple(1 + a for a in layout.reduced_axes)
            merge = functools.partial(_merged, channel_axes=layout.channel_axes)
            parts = da.reduction(
                parts, merge, merge, axes, keepdims=True, dtype=layout.wide, meta=parts._meta
            )
        parts = _statistics(parts)
        return parts[0], parts[1], parts[2], parts[3]

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        return self.output(x, m, a, b, layout, out=out)

    def output(
        self,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: None = None,
    ) -> Array:
        """Return y = act(a·(x − m) + b + z)."""
        z = None if epilogue is None else epilogue.residual
        (x, z), vectors = _ready((x, z), (m, a, b))
        return self._blocks(_chunk_output, layout, x, *vectors, z, epilogue=_without(epilogue))

    def activation_gradient(
        self, dy: Array, x: Array, m: Array, a: Array, b: Array, epilogue: Epilogue, layout: Layout
    ) -> Array:
        """Return g = act'(a·(x − m) + b + z)·dy."""
        (x, dy, z, y), vectors = _ready((x, dy, epilogue.residual, epilogue.y), (m, a, b))
        dtype = gradient_dtype(layout, dy)
        named = {"epilogue": _without(epilogue), "dtype": dtype}
        named["meta"] = da.utils.meta_from_array(x._meta, ndim=x.ndim, dtype=dtype)
        return self._blocks(_chunk_activation_gradient, layout, x, dy, *vectors, z, y, **named)

    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        (x, dy, w), (m,) = _ready((x, dy, w), (m,))
        parts = self._partial(_chunk_grad_sums, 2, layout, x, dy, m, w)
        if layout.reduced_axes:
            parts = da.sum(parts, axis=tuple(1 + a for a in layout.reduced_axes), keepdims=True)
        parts = _statistics(parts)
        return parts[0], parts[1]

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
        out: None = None,
    ) -> Array:
        """Return dx = a·(dy + w·(b·(x − m) + c))."""
        (x, dy, w), vectors = _ready((x, dy, w), (m, a, b, c))
        return self._blocks(_chunk_grad_input, layout, x, dy, *vectors, w)

    def reread(self, big: Sequence[Array | None], vectors: Sequence[Array]) -> Sequence[Array | None]:
        """Return big arrays to be read again, once these vectors are known, for several kernels."""
        return _ready(big, vectors)[0]

    def _partial(
        self, function: Callable[..., Array], rows: int, layout: Layout, x: Array, *others: Any
    ) -> Array:
        """Return rows of vectors of each chunk: (rows, chunks along each axis but the channels')."""
        axes = tuple(range(1, 1 + x.ndim))
        return da.blockwise(
            function,
            (0, *axes),
            *_along(axes, x, *others),
            new_axes={0: rows},
            adjust_chunks={1 + a: 1 for a in layout.reduced_axes},
            channel_axes=layout.channel_axes,
            backend_for=self._chosen,
            dtype=layout.wide,
            meta=da.utils.meta_from_array(x._meta, ndim=1 + x.ndim, dtype=layout.wide),
        )

    def _blocks(
        self, function: Callable[..., Array], layout: Layout, x: Array, *others: Any, **named: Any
    ) -> Array:
        """Return an array of the shape of x."""
        axes = tuple(range(x.ndim))
        return da.blockwise(
            function,
            axes,
            *_along(axes, x, *others),
            channel_axes=layout.channel_axes,
            backend_for=self._chosen,
            **{"dtype": x.dtype, "meta": x._meta, **named},
        )


def _statistics(parts: Array) -> Array:
    """Return the same array, under a name by which `_anew` recognizes statistics."""
    name = f"{STATISTICS}-{dask.base.tokenize(parts.name)}"
    return parts.map_blocks(_value, name=name, meta=parts._meta)


def _ready(big: Sequence[Array | None], vectors: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Return the arguments of a kernel, in the chunks of the first.

    Where the vectors come from the big arrays, as a batch's statistics do, these are read anew.
    """
    x = big[0]
    vectors = [_statistics(_cut(x, v)) for v in vectors]
    big = [_cut(x, a) for a in big]
    anew = iter(_anew([a for a in big if a is not None], vectors))
    return [None if a is None else next(anew) for a in big], vectors


def _cut(x: Array, a: Array | None) -> Array | None:
    """Return an array in the chunks of another, so that `blockwise` need not rechunk that."""
    if a is None:
        return None
    chunks = [c if n == sum(c) else (n,) for n, c in zip(a.shape, x.chunks, strict=True)]
    return a.rechunk(tuple(chunks))


def _anew(arrays: list[Array], after: list[Array]) -> list[Array]:
    """Return the same arrays, computed anew once others that depend on them are known.

    Otherwise their chunks would be kept from the first pass to the second. Statistics of earlier calls
    are not computed anew: they are small, and graphs would double with every layer. (Dask's own `bind`
    leaves the tasks of layers other than its blockwise ones as they are.)
    """
    sources, ends = (HighLevelGraph.merge(*(a.dask for a in found)) for found in (arrays, after))
    if sources.layers.keys().isdisjoint(ends.layers):  # without a look at the tasks
        return arrays
    graph: Any = HighLevelGraph.merge(sources, ends)
    nodes = convert_legacy_graph(graph.to_dict())
    outputs = [list(_flat(a.__dask_keys__())) for a in arrays]
    last = {key for a in after for key in _flat(a.__dask_keys__())}
    anew = _leading_to(nodes, [key for keys in outputs for key in keys], (STATISTICS, AFTER))
    if anew.isdisjoint(_leading_to(nodes, last, ())):
        return arrays
    # The same names for the same call, so that Dask knows equal work by its name.
    seed = dask.base.tokenize([a.name for a in arrays], [a.name for a in after])
    names = {key: clone_key(key, seed) for key in anew}
    # First come the others, and all vectors: or Dask would begin with chunks that then wait for these.
    given = {need for key in anew for need in nodes[key].dependencies if need not in anew}
    waited = last | {key for key in given if not isinstance(nodes[key], DataNode)}
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


def _leading_to(nodes: dict[Any, Any], outputs: Iterable[Any], but: tuple[str, ...]) -> set[Any]:
    """Return the keys of tasks that outputs depend on, without data and without tasks of some names."""
    found: set[Any] = set()
    rest = list(outputs)
    while rest:
        key = rest.pop()
        known = key in found or key not in nodes
        if not (known or isinstance(nodes[key], DataNode) or key_split(key) in but):
            found.add(key)
            rest += nodes[key].dependencies
    return found


def _flat(keys: Any) -> list[Any]:
    """Return the keys of an array's chunks."""
    return [key for part in keys for key in _flat(part)] if isinstance(keys, list) else [keys]


def _value(value: Any, *_: None) -> Any:
    return value


def _nothing(*_: Any) -> None:
    return None


# What runs on each chunk. Vectors come in broadcast shape, cut as the channels are.


def _along(axes: tuple[int, ...], *arrays: Array | None) -> list[Any]:
    """Return arguments of `blockwise`: arrays, each followed by its axes."""
    return [part for a in arrays for part in (a, None if a is None else axes)]


def _layout(x: Array, channel_axes: tuple[int, ...]) -> Layout:
    return layout_of("x", namespace("x", x), x, channel_axes, device(x))


def _chunk_moments(
    x: Array, w: Array | None, *, channel_axes: tuple[int, ...], backend_for: Choose
) -> Array:
    layout = _layout(x, channel_axes)
    return layout.xp.stack(backend_for(x, w).moments(x, w, layout))


def _merged(parts: Array, axis: Any, keepdims: bool, *, channel_axes: tuple[int, ...]) -> Array:
    """Merge moments of several chunks, as rows (n, mean, mean_lo, var)."""
    xp = array_namespace(parts)
    ndim = parts.ndim - 1
    reduced = [a for a in range(ndim) if a not in channel_axes]
    shape = tuple(parts.shape[1 + a] for a in channel_axes)
    broadcast = tuple(parts.shape[1 + a] if a in channel_axes else 1 for a in range(ndim))
    count = math.prod(parts.shape[1 + a] for a in reduced)  # chunks may have no channels
    n, mean, low, var = (
        xp.reshape(xp.permute_dims(parts[i, ...], (*reduced, *channel_axes)), (count, *shape))
        for i in range(4)
    )
    n, mean, var, low = merge_rows(Moments(n, mean, var, low))
    return xp.stack([xp.reshape(v, broadcast) for v in (n, mean, low, var)])


def _without(epilogue: Epilogue | None) -> Epilogue | None:
    """Return an epilogue without its arrays, which come in chunks."""
    return None if epilogue is None else epilogue._replace(residual=None, y=None)


def _chunk_output(
    x: Array,
    m: Array,
    a: Array,
    b: Array,
    z: Array | None,
    *,
    channel_axes: tuple[int, ...],
    backend_for: Choose,
    epilogue: Epilogue | None,
) -> Array:
    own = None if epilogue is None else epilogue._replace(residual=z)
    return backend_for(x, z).output(x, m, a, b, _layout(x, channel_axes), epilogue=own)


def _chunk_activation_gradient(
    x: Array,
    dy: Array,
    m: Array,
    a: Array,
    b: Array,
    z: Array | None,
    y: Array | None,
    *,
    channel_axes: tuple[int, ...],
    backend_for: Choose,
    epilogue: Epilogue,
) -> Array:
    own, layout = epilogue._replace(residual=z, y=y), _layout(x, channel_axes)
    return backend_for(dy, x, z, y).activation_gradient(dy, x, m, a, b, own, layout)


def _chunk_grad_sums(
    x: Array,
    dy: Array,
    m: Array,
    w: Array | None,
    *,
    channel_axes: tuple[int, ...],
    backend_for: Choose,
) -> Array:
    layout = _layout(x, channel_axes)
    return layout.xp.stack(backend_for(dy, x, w).grad_sums(dy, x, m, w, layout))


def _chunk_grad_input(
    x: Array,
    dy: Array,
    m: Array,
    a: Array,
    b: Array,
    c: Array,
    w: Array | None,
    *,
    channel_axes: tuple[int, ...],
    backend_for: Choose,
) -> Array:
    return backend_for(dy, x, w).grad_input(dy, x, m, a, b, c, w, _layout(x, channel_axes))
