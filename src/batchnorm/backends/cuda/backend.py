"""The four kernels, and the forward and backward passes fused, in CUDA C++ for any array library.

The kernels are in the `.cu` files, the arithmetic of single channels in `coefficients.h`, which the
native core has too, and the launch arithmetic in `launches.py`. This module prepares the launches: it
brings arrays into one memory layout, allocates results and packs the parameters. A `Device` has the
operations that depend on the array library; `devices.py` makes those of CuPy and PyTorch.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable
from typing import Any

from batchnorm.backends.base import Backend, to_out
from batchnorm.backends.cuda import launches, params
from batchnorm.backends.cuda.arrangement import Arranged, Device, arrange, output
from batchnorm.backends.cuda.launches import GIVEN, RAW, SUM, WRITE
from batchnorm.backends.cuda.params import Operands, Vector, Vectors
from batchnorm.backends.generic import GENERIC
from batchnorm.layout import Layout, float_name
from batchnorm.moments import Moments

Array = Any

FILES = ("values", "tiling", "moments", "tasks", "forward", "backward")


@functools.cache
def source() -> str:
    """Return the CUDA C++ source of all kernels as one text, so that a compiler's cache sees changes.

    It is ASCII, because CuPy writes it to a file in the encoding of the locale.
    """
    folder = importlib.resources.files("batchnorm.backends")
    files = (folder / "coefficients.h", *(folder / "cuda" / f"{name}.cu" for name in FILES))
    return "\n".join(file.read_text(encoding="ascii") for file in files)


# Launches.


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


def _run(
    device: Device,
    layout: Layout,
    kernel: str,
    phases: int,
    arranged: Arranged,
    *,
    out: Array | None = None,
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
        The big arrays and the weights.
    out : array, optional
        The big array that is written.
    vectors : dict, optional
        Per-channel inputs by their names in `params.Vectors`.
    factors : tuple of arrays
        Per-channel factors, where they are given instead of the vectors.
    eps : float
        Added to the variance.
    table : tuple of int and dtype, optional
        The number of per-channel results, and their dtype.
    """
    x, *dy = arranged.arrays
    xp, address, channels = layout.xp, device.address, arranged.memory_layout.channels
    dtype, weights = _dtype(layout, x.dtype), arranged.weights
    arrays = (address(x), address(dy[0]) if dy else 0, 0 if out is None else address(out))
    launch = launches.launch(
        arranged.memory_layout,
        dtype,
        launches.alignment(*arrays),
        weights is not None,
        len(arranged.arrays),
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
    factor_addresses = launches.quarters(start, scratch.factors)
    if factors:  # contiguous, and in the dtype of the arithmetic
        flat = [xp.reshape(xp.astype(v, layout.compute, copy=False), (-1,)) for v in factors]
        referenced += [device.contiguous(v) for v in flat]
        factor_addresses = tuple(address(v) for v in referenced[-len(factors) :])
    packed = params.pack_params(
        launch,
        Operands(*arrays, 0 if weights is None else address(weights)),
        arranged.weights_layout,
        Vectors(**given),
        0 if results is None else address(results),
        factor_addresses,
        partial,
        counters,
        eps,
    )
    kind = None if weights is None else "bool" if weights.dtype == xp.bool else "float64"
    name = launches.instance(kernel, launch, dtype, kind)
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


def _rows(layout: Layout, table: Array, shape: tuple[int, ...]) -> list[Array]:
    """Return the rows of a table of vectors, each in the given shape."""
    if len(shape) != 1:
        table = layout.xp.reshape(table, (-1, *shape))
    return [table[i, ...] for i in range(table.shape[0])]


def _active(pass_: Callable[..., Any]) -> Any:
    """Return the method, called with its device as the current one."""

    @functools.wraps(pass_)
    def call(self: Cuda, *arguments: Any, **named: Any) -> Any:
        with self.device.active():
            return pass_(self, *arguments, **named)

    return call


class Cuda(Backend):
    """The CUDA kernels on the arrays of one device."""

    name = "cupy"

    def __init__(self, summary: str, device: Device) -> None:
        self.summary, self.device = summary, device

    @_active
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
        """Return y and the moments of the batch."""
        if w is not None:  # the counts are checked before y is written
            return super().forward(x, w, gamma, beta, eps, layout, out=out)
        device = self.device
        arranged = arrange(device, layout, w, x)
        y = output(device, layout, arranged, out)
        given = {"gamma": gamma, "beta": beta}
        table = _run(
            device,
            layout,
            "forward",
            SUM | WRITE,
            arranged,
            out=y,
            vectors=given,
            eps=eps,
            table=(4, layout.wide),
        )
        return to_out(layout, y, x.dtype, out), Moments(*_rows(layout, table, layout.channels))

    @_active
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
        device = self.device
        arranged = arrange(device, layout, w, x, dy)
        dx = output(device, layout, arranged, out)
        given = dict(zip(("n", "mean", "var", "low"), stats, strict=True), gamma=gamma)
        dtype = layout.compute if gamma is None else gamma.dtype
        table = _run(
            device,
            layout,
            "backward",
            SUM | WRITE,
            arranged,
            out=dx,
            vectors=given,
            eps=eps,
            table=(2, dtype),
        )
        dgamma, dbeta = _rows(layout, table, layout.channels)
        return to_out(layout, dx, x.dtype, out), dgamma, dbeta

    @_active
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
        """Return y, normalized by given statistics."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        if stats.mean_lo is not None:  # the kernel takes no residual of the mean
            return super().inference(x, stats, gamma, beta, eps, layout, out=out)
        arranged = arrange(self.device, layout, None, x)
        y = output(self.device, layout, arranged, out)
        given = {"mean": stats.mean, "var": stats.var, "gamma": gamma, "beta": beta}
        _run(self.device, layout, "normalize", WRITE, arranged, out=y, vectors=given, eps=eps)
        return to_out(layout, y, x.dtype, out)

    @_active
    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        if 0 in x.shape:
            return GENERIC.moments(x, w, layout)
        arranged = arrange(self.device, layout, w, x)
        table = _run(self.device, layout, "forward", SUM, arranged, table=(4, layout.wide))
        count, mean, var, low = _rows(layout, table, layout.broadcast)
        return count, mean, low, var

    @_active
    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        arranged = arrange(self.device, layout, None, x)
        y = output(self.device, layout, arranged, out)
        _run(self.device, layout, "normalize", WRITE | GIVEN, arranged, out=y, factors=(m, a, b))
        return y

    @_active
    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        if 0 in x.shape:
            return GENERIC.grad_sums(dy, x, m, w, layout)
        arranged = arrange(self.device, layout, w, x, dy)
        table = _run(
            self.device,
            layout,
            "backward",
            SUM | RAW | GIVEN,
            arranged,
            factors=(m,),
            table=(2, layout.wide),
        )
        sum_dy, sum_dy_d = _rows(layout, table, layout.broadcast)
        return sum_dy, sum_dy_d

    @_active
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
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        arranged = arrange(self.device, layout, w, x, dy)
        dx = output(self.device, layout, arranged, out)
        _run(self.device, layout, "backward", WRITE | GIVEN, arranged, out=dx, factors=(m, a, b, c))
        return dx
