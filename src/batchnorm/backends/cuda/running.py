"""One launch of the CUDA kernels: from arrays to parameters, and to per-channel results."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

from batchnorm.backends.cuda import launches, params
from batchnorm.backends.cuda.arrangement import Arranged, Device
from batchnorm.backends.cuda.launches import FROM_Y, RAW
from batchnorm.backends.cuda.params import Operands, Vector, Vectors
from batchnorm.epilogue import Epilogue
from batchnorm.layout import Layout, float_name

Array = Any

HEADERS = ("coefficients", "activations")
FILES = ("values", "tiling", "moments", "tasks", "epilogue", "forward", "backward")


@functools.cache
def source() -> str:
    """Return the CUDA C++ source of all kernels as one text, so that a compiler's cache sees changes.

    It is ASCII, because CuPy writes it to a file in the encoding of the locale.
    """
    folder = importlib.resources.files("batchnorm.backends")
    headers = (folder / f"{name}.h" for name in HEADERS)
    files = (folder / "cuda" / f"{name}.cu" for name in FILES)
    return "\n".join(file.read_text(encoding="ascii") for file in (*headers, *files))


def _dtype(layout: Layout, dtype: Any) -> str:
    name = float_name(layout.xp, dtype)
    assert name is not None
    return name


def _vector(device: Device, layout: Layout, v: Any, referenced: list[Array]) -> Vector:
    """Return the address, dtype and stride of a per-channel vector, or of one value for all channels.

    The array is appended to `referenced`, which keeps it until the launch.
    """
    if v is None:
        return params.NOTHING
    if not hasattr(v, "dtype"):
        v = layout.xp.full((1,), float(v), dtype=layout.wide, device=layout.device)
    if v.ndim != 1:
        v = layout.xp.reshape(v, (-1,))
    referenced.append(v)
    stride = device.strides(v)[0] if v.shape[0] > 1 else 0
    return Vector(device.address(v), params.DTYPE_TAGS[_dtype(layout, v.dtype)], stride)


def run(
    device: Device,
    layout: Layout,
    kernel: str,
    phases: int,
    arranged: Arranged,
    *,
    out: Array | None = None,
    dresidual: Array | None = None,
    epilogue: Epilogue | None = None,
    vectors: dict[str, Any] | None = None,
    factors: tuple[Array, ...] = (),
    eps: float = 0.0,
    table: tuple[int, Any] | None = None,
) -> Array:
    """Launch a kernel and return a table of its per-channel results, or None.

    Parameters
    ----------
    device : Device
        Where it runs.
    layout : Layout
        Of the call.
    kernel : str
        One of `launches.KERNELS`.
    phases : int
        What the launch does: `SUM`, `WRITE` or both, with `GIVEN` or `RAW`.
    arranged : Arranged
        The big arrays and the weights: x; in a backward pass dy; the residual, or y, if it is read.
    out, dresidual : array, optional
        The big arrays that are written.
    epilogue : Epilogue, optional
        The activation, and whether y is in the residual's place.
    vectors : dict, optional
        Per-channel inputs by their names in `params.Vectors`.
    factors : tuple of arrays
        Per-channel factors, where they are given instead of the vectors.
    eps : float
        Added to the variance.
    table : tuple of int and dtype, optional
        The number of per-channel results, and their dtype.
    """
    x, *others = arranged.arrays
    # What the sums read decides about tiles. In a forward pass this is x, so that a residual of the same
    # alignment changes no bit of the statistics.
    reads = 1 if kernel == "forward" else len(arranged.arrays)
    dy = others.pop(0) if kernel == "backward" else None
    if epilogue is not None and epilogue.y is not None:
        phases |= FROM_Y
    xp, address, channels = layout.xp, device.address, arranged.memory_layout.channels
    dtype, weights = _dtype(layout, x.dtype), arranged.weights
    big = (x, dy, out, weights, others[0] if others else None, dresidual)
    operands = Operands(*(0 if a is None else address(a) for a in big))
    launch = launches.launch(
        arranged.memory_layout,
        dtype,
        launches.alignment(*operands._replace(weights=0)),
        weights is not None,
        reads,
        phases,
        device.limits,
    )
    scratch = launches.scratch(launch, kernel, dtype)
    results, start, memory = _allocate(device, layout, table, channels, scratch.total)
    partial, counters = start + scratch.factors, start + scratch.factors + scratch.partial
    referenced: list[Array] = [memory]
    given = {name: _vector(device, layout, v, referenced) for name, v in (vectors or {}).items()}
    if kernel == "backward" and not phases & RAW and results is not None:
        gradients = (_vector(device, layout, v, referenced) for v in results)
        given.update(zip(("dgamma", "dbeta"), gradients, strict=True))
    factor_addresses = launches.factor_addresses(start, scratch, launch, dtype)
    if factors:  # contiguous, and in the dtype of the arithmetic
        flat = [xp.reshape(xp.astype(v, layout.compute, copy=False), (-1,)) for v in factors]
        referenced += [device.contiguous(v) for v in flat]
        factor_addresses = tuple(address(v) for v in referenced[-len(factors) :])
    packed = params.pack_params(
        launch,
        operands,
        arranged.weights_layout,
        Vectors(**given),
        0 if results is None else address(results),
        factor_addresses,
        partial,
        counters,
        eps,
        None if epilogue is None else epilogue.activation,
    )
    kind = None if weights is None else "bool" if weights.dtype == xp.bool else "float64"
    name = launches.instance(kernel, launch, dtype, kind, epilogue is not None)
    blocks = launches.blocks(launch, device.limits)
    device.launch(name, packed, blocks, counters, scratch.counters)
    return results


def _allocate(
    device: Device, layout: Layout, wanted: tuple[int, Any] | None, channels: int, scratch: int
) -> tuple[Array, int, Array]:
    """Return a table of vectors, the address of working memory, and the array that owns the latter.

    The working memory may be reused as soon as the call returns, because later work on the stream runs
    after the launch. A captured graph may be replayed at any time while its results exist, so the
    working memory is then part of the memory of the results.
    """
    if wanted is None:
        return None, 0, None
    rows, dtype = wanted
    shape, size = (rows, channels), launches.TYPES[_dtype(layout, dtype)][1]
    if not scratch or not device.capturing():
        memory = (
            layout.xp.empty((scratch // 8,), dtype=layout.wide, device=layout.device)
            if scratch
            else None
        )
        table = layout.xp.empty(shape, dtype=dtype, device=layout.device)
        return table, device.address(memory) if scratch else 0, memory
    start = -(-rows * channels * size // 256) * 256
    memory = layout.xp.empty(((start + scratch) // size,), dtype=dtype, device=layout.device)
    table = layout.xp.reshape(memory[: rows * channels], shape)
    return table, device.address(memory) + start, memory


def rows(layout: Layout, table: Array, shape: tuple[int, ...]) -> list[Array]:
    """Return the rows of a table of vectors, each in the given shape."""
    if len(shape) != 1:
        table = layout.xp.reshape(table, (-1, *shape))
    return [table[i, ...] for i in range(table.shape[0])]
