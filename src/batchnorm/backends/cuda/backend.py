"""The four kernels, and forward and backward passes fused, in CUDA C++: on any library's GPU arrays.

`cuda/*.cu` has the kernels, `launches.py` the launch arithmetic. Here is what surrounds a launch: how
the arrays lie, memory for results, and which vectors go where. A `Device` is all that a library has to
bring; `cupy.py` has those of CuPy and PyTorch.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.backends.base import Backend, place
from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda.launches import GIVEN, RAW, SUM, WRITE, Form, Limits, Vector, Vectors
from batchnorm.backends.generic import GENERIC
from batchnorm.layout import Layout, float_name
from batchnorm.moments import Moments

Array = Any

FILES = ("numbers", "lanes", "moments", "tasks", "forward", "backward")


class Device(NamedTuple):
    """A device, and what only its arrays' library knows how to do."""

    limits: Limits
    active: Callable[[], Any]
    """A context in which work goes to the device, in the caller's order."""
    address: Callable[[Array], int]
    steps: Callable[[Array], tuple[int, ...]]
    """Strides, counted in values."""
    contiguous: Callable[[Array], Array]
    """An array with its values in the order of its axes: itself where they are so."""
    capturing: Callable[[], bool]
    """Whether a graph is captured whose memory nobody keeps for it."""
    launch: Callable[[str, bytes, int, int, int], None]
    """Zero some bytes at an address, then run a kernel: its name, job, blocks, the address, bytes."""


@functools.cache
def source() -> str:
    """The CUDA C++ source of all kernels, in one text: a compiler's cache then sees every change."""
    folder = importlib.resources.files("batchnorm.backends") / "cuda"
    return "\n".join((folder / f"{name}.cu").read_text() for name in FILES)


# How arrays lie.


class Arranged(NamedTuple):
    """Big arrays that lie alike, and weights that the same walk leads through."""

    arrays: tuple[Array, ...]
    weights: Array | None
    form: Form
    weights_form: Form | None
    order: tuple[int, ...]
    """The axes, from the outermost in memory to the innermost."""


def arrange(device: Device, layout: Layout, w: Array | None, *arrays: Array) -> Arranged:
    """Bring big arrays into one order, that of the first: most are, what is not is copied."""
    xp, (first, *others) = layout.xp, arrays
    shape, steps = tuple(first.shape), device.steps(first)
    order = tuple(sorted(range(len(shape)), key=lambda i: (-steps[i], i)))
    if not launches.dense(shape, steps) or launches.forms(shape, layout.channel_axes, (steps,)) is None:
        order = (*layout.channel_axes, *layout.reduced_axes)
        first = _copied(device, xp, first, order)
        steps = device.steps(first)
    laid = [
        a if _alike(shape, device.steps(a), steps) else _copied(device, xp, a, order) for a in others
    ]

    found = None
    if w is not None:
        if float_name(xp, w.dtype) != "float64" and w.dtype != xp.bool:
            w = xp.astype(w, layout.wide)
        w = xp.broadcast_to(w, shape)
        found = launches.forms(shape, layout.channel_axes, (steps, device.steps(w)))
        if found is None:
            w = _copied(device, xp, w, order)
            found = launches.forms(shape, layout.channel_axes, (steps, device.steps(w)))
    found = found or launches.forms(shape, layout.channel_axes, (steps,))
    assert found is not None
    return Arranged((first, *laid), w, found[0], None if w is None else found[1], order)


def _alike(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(n == 1 or i == j for n, i, j in zip(shape, a, b, strict=True))


def _copied(device: Device, xp: Any, a: Array, order: tuple[int, ...]) -> Array:
    """An array whose axes lie in this order, of the same shape."""
    return xp.permute_dims(device.contiguous(xp.permute_dims(a, order)), _inverse(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _output(device: Device, layout: Layout, laid: Arranged, out: Array | None) -> Array:
    """An array for the result: the caller's, where it lies as the others do."""
    x = laid.arrays[0]
    if out is not None and _alike(x.shape, device.steps(out), device.steps(x)):
        return out
    shape = tuple(x.shape[i] for i in laid.order)
    fresh = layout.xp.empty(shape, dtype=x.dtype, device=layout.device)
    return layout.xp.permute_dims(fresh, _inverse(laid.order))


# Launches.


def _dtype(layout: Layout, dtype: Any) -> str:
    name = float_name(layout.xp, dtype)
    assert name is not None
    return name


def _vector(device: Device, layout: Layout, v: Any, kept: list[Array]) -> Vector:
    """A per-channel vector, or one number for all channels, as a kernel takes it."""
    if v is None:
        return launches.NOTHING
    if not hasattr(v, "dtype"):
        v = layout.xp.full((1,), float(v), dtype=layout.wide, device=layout.device)
    if v.ndim != 1:
        v = layout.xp.reshape(v, (-1,))
    kept.append(v)  # until the launch
    step = device.steps(v)[0] if v.shape[0] > 1 else 0
    return Vector(device.address(v), launches.KINDS[_dtype(layout, v.dtype)], step)


def _run(
    device: Device,
    layout: Layout,
    kernel: str,
    phases: int,
    laid: Arranged,
    *,
    out: Array | None = None,
    vectors: dict[str, Any] | None = None,
    factors: tuple[Array, ...] = (),
    eps: float = 0.0,
    table: tuple[int, Any] | None = None,
) -> Array:
    """Lay out a pass and launch it; returns a table of the vectors that it finds.

    `vectors` and `factors` are given for each channel; `table` says how many vectors are found, and
    their dtype.
    """
    x, *dy = laid.arrays
    xp, address, channels = layout.xp, device.address, laid.form.channels
    dtype, weights = _dtype(layout, x.dtype), laid.weights
    arrays = (address(x), address(dy[0]) if dy else 0, 0 if out is None else address(out))
    plan = launches.launch(
        laid.form,
        dtype,
        launches.alignment(*arrays),
        weights is not None,
        len(laid.arrays),
        phases,
        device.limits,
    )
    room = launches.scratch(plan, kernel, dtype)
    found, start, memory = _table(device, layout, table, channels, room.total)
    kept: list[Array] = [memory]
    given = {name: _vector(device, layout, v, kept) for name, v in (vectors or {}).items()}
    if kernel == "backward" and not phases & RAW and found is not None:
        given.update(
            zip(("dgamma", "dbeta"), (_vector(device, layout, v, kept) for v in found), strict=True)
        )
    coef = launches.quarters(start, room.factors)
    if factors:  # in order, and in what values are worked on in
        flat = [xp.reshape(xp.astype(v, layout.compute, copy=False), (-1,)) for v in factors]
        kept += [device.contiguous(v) for v in flat]
        coef = tuple(address(v) for v in kept[-len(factors) :])
    job = launches.job(
        plan,
        launches.Operands(*arrays, 0 if weights is None else address(weights)),
        laid.weights_form,
        Vectors(**given),
        0 if found is None else address(found),
        coef,
        start + room.factors,
        start + room.factors + room.partial,
        eps,
    )
    kind = None if weights is None else "bool" if weights.dtype == xp.bool else "float64"
    name = launches.instance(kernel, plan, dtype, kind)
    blocks = launches.blocks(plan, device.limits)
    device.launch(name, job, blocks, start + room.factors + room.partial, room.counters)
    return found


def _table(
    device: Device, layout: Layout, wanted: tuple[int, Any] | None, channels: int, scratch: int
) -> tuple[Array, int, Array]:
    """A table of vectors, and an address where there are bytes to work with, and what holds these.

    The latter is free for others when the call returns: what follows on the stream comes later. Not so
    where a graph is captured, which may run at any time while its results are there: it is then part
    of the memory of these.
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
    """The rows of a table of vectors, in some shape."""
    if len(shape) != 1:
        table = layout.xp.reshape(table, (-1, *shape))
    return [table[i, ...] for i in range(table.shape[0])]


def _active(pass_: Callable[..., Any]) -> Any:
    """Make a method that runs with its device current."""

    @functools.wraps(pass_)
    def call(self: Cuda, *arguments: Any, **named: Any) -> Any:
        with self.device.active():
            return pass_(self, *arguments, **named)

    return call


class Cuda(Backend):
    """CUDA kernels on the arrays of one device."""

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
        """Return y and the batch's moments."""
        if w is not None:  # whose counts are looked at before y is written
            return super().forward(x, w, gamma, beta, eps, layout, out=out)
        device = self.device
        laid = arrange(device, layout, w, x)
        y = _output(device, layout, laid, out)
        given = {"gamma": gamma, "beta": beta}
        table = _run(
            device,
            layout,
            "forward",
            SUM | WRITE,
            laid,
            out=y,
            vectors=given,
            eps=eps,
            table=(4, layout.wide),
        )
        return place(layout, y, x.dtype, out), Moments(*_rows(layout, table, layout.channels))

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
        laid = arrange(device, layout, w, x, dy)
        dx = _output(device, layout, laid, out)
        given = dict(zip(("n", "mean", "var", "low"), stats, strict=True), gamma=gamma)
        dtype = layout.compute if gamma is None else gamma.dtype
        table = _run(
            device,
            layout,
            "backward",
            SUM | WRITE,
            laid,
            out=dx,
            vectors=given,
            eps=eps,
            table=(2, dtype),
        )
        dgamma, dbeta = _rows(layout, table, layout.channels)
        return place(layout, dx, x.dtype, out), dgamma, dbeta

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
        """Return y from statistics that are given."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        if stats.mean_lo is not None:  # which the kernel does not take
            return super().inference(x, stats, gamma, beta, eps, layout, out=out)
        laid = arrange(self.device, layout, None, x)
        y = _output(self.device, layout, laid, out)
        given = {"mean": stats.mean, "var": stats.var, "gamma": gamma, "beta": beta}
        _run(self.device, layout, "normalize", WRITE, laid, out=y, vectors=given, eps=eps)
        return place(layout, y, x.dtype, out)

    @_active
    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        if 0 in x.shape:
            return GENERIC.moments(x, w, layout)
        laid = arrange(self.device, layout, w, x)
        table = _run(self.device, layout, "forward", SUM, laid, table=(4, layout.wide))
        count, mean, var, low = _rows(layout, table, layout.broadcast)
        return count, mean, low, var

    @_active
    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        laid = arrange(self.device, layout, None, x)
        y = _output(self.device, layout, laid, out)
        _run(self.device, layout, "normalize", WRITE | GIVEN, laid, out=y, factors=(m, a, b))
        return y

    @_active
    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        if 0 in x.shape:
            return GENERIC.grad_sums(dy, x, m, w, layout)
        laid = arrange(self.device, layout, w, x, dy)
        table = _run(
            self.device,
            layout,
            "backward",
            SUM | RAW | GIVEN,
            laid,
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
        laid = arrange(self.device, layout, w, x, dy)
        dx = _output(self.device, layout, laid, out)
        _run(self.device, layout, "backward", WRITE | GIVEN, laid, out=dx, factors=(m, a, b, c))
        return dx
