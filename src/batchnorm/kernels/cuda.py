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

from batchnorm.kernels import KernelSet, generic, launches, written
from batchnorm.kernels.launches import GIVEN, RAW, SUM, WRITE, Form, Limits, Vector, Vectors
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
    launch: Callable[[str, bytes, int, int, int], None]
    """Zero some bytes at an address, then run a kernel: its name, job, blocks, the address, bytes."""


@functools.cache
def source() -> str:
    """The CUDA C++ source of all kernels, in one text: a compiler's cache then sees every change."""
    folder = importlib.resources.files("batchnorm.kernels") / "cuda"
    return "\n".join((folder / f"{name}.cu").read_text() for name in FILES)


def kernel_set(name: str, why: str, device: Device) -> KernelSet:
    """Bind the kernels to a device."""
    functions = (moments, scale_shift, grad_sums, grad_input, forward, backward, inference)
    return KernelSet(name, why, **{f.__name__: _bound(f, device) for f in functions})


def _bound(kernel: Callable[..., Any], device: Device) -> Any:
    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        with device.active():
            return kernel(device, *arguments)

    return call


# How arrays lie.


class Arranged(NamedTuple):
    """Big arrays that lie alike, and weights that the same walk leads through."""

    arrays: tuple[Array, ...]
    weights: Array | None
    form: Form
    weights_form: Form | None
    order: tuple[int, ...]
    """The axes, from the outermost in memory to the innermost."""


def arrange(device: Device, at: Layout, w: Array | None, *arrays: Array) -> Arranged:
    """Bring big arrays into one order, that of the first: most are, what is not is copied."""
    xp, (first, *others) = at.xp, arrays
    shape, steps = tuple(first.shape), device.steps(first)
    order = tuple(sorted(range(len(shape)), key=lambda i: (-steps[i], i)))
    if not launches.dense(shape, steps) or launches.forms(shape, at.kept, (steps,)) is None:
        order = (*at.kept, *at.reduced)
        first = _copied(device, xp, first, order)
        steps = device.steps(first)
    laid = [a if _alike(shape, device.steps(a), steps) else _copied(device, xp, a, order) for a in others]

    found = None
    if w is not None:
        if float_name(xp, w.dtype) != "float64" and w.dtype != xp.bool:
            w = xp.astype(w, at.wide)
        w = xp.broadcast_to(w, shape)
        found = launches.forms(shape, at.kept, (steps, device.steps(w)))
        if found is None:
            w = _copied(device, xp, w, order)
            found = launches.forms(shape, at.kept, (steps, device.steps(w)))
    found = found or launches.forms(shape, at.kept, (steps,))
    assert found is not None
    return Arranged((first, *laid), w, found[0], None if w is None else found[1], order)


def _alike(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(n == 1 or i == j for n, i, j in zip(shape, a, b, strict=True))


def _copied(device: Device, xp: Any, a: Array, order: tuple[int, ...]) -> Array:
    """An array whose axes lie in this order, of the same shape."""
    return xp.permute_dims(device.contiguous(xp.permute_dims(a, order)), _inverse(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _output(device: Device, at: Layout, laid: Arranged, like: Array, out: Array | None) -> Array:
    """An array for the result: the caller's, where it lies as the others do."""
    x = laid.arrays[0]
    if out is not None and _alike(x.shape, device.steps(out), device.steps(x)):
        return out
    shape = tuple(x.shape[i] for i in laid.order)
    fresh = at.xp.empty(shape, dtype=like.dtype, device=at.device)
    return at.xp.permute_dims(fresh, _inverse(laid.order))


# Launches.


def _dtype(at: Layout, a: Array) -> str:
    name = float_name(at.xp, a.dtype)
    assert name is not None
    return name


def _vector(device: Device, at: Layout, v: Any, kept: list[Array]) -> Vector:
    """A per-channel vector, or one number for all channels, as a kernel takes it."""
    if v is None:
        return launches.NOTHING
    if not hasattr(v, "dtype"):
        v = at.xp.full((1,), float(v), dtype=at.wide, device=at.device)
    if v.ndim != 1:
        v = at.xp.reshape(v, (-1,))
    kept.append(v)  # until the launch
    step = device.steps(v)[0] if v.shape[0] > 1 else 0
    return Vector(device.address(v), launches.KINDS[_dtype(at, v)], step)


def _factors(device: Device, at: Layout, *factors: Array) -> list[Array]:
    """Factors of each channel as kernels take them: in order, in what values are worked on in."""
    return [
        device.contiguous(at.xp.reshape(at.xp.astype(v, at.compute, copy=False), (-1,))) for v in factors
    ]


def _run(
    device: Device,
    at: Layout,
    kernel: str,
    phases: int,
    laid: Arranged,
    x: Array,
    dy: Array | None = None,
    out: Array | None = None,
    vectors: Vectors = launches.VECTORS,
    stats: Array | None = None,
    coef: list[Array] | None = None,
    eps: float = 0.0,
) -> None:
    """Lay out a pass and launch it."""
    address = device.address
    operands = launches.Operands(
        address(x),
        0 if dy is None else address(dy),
        0 if out is None else address(out),
        0 if laid.weights is None else address(laid.weights),
    )
    dtype = _dtype(at, x)
    alignment = launches.alignment(*operands[:3])
    reads = 1 if dy is None else 2
    plan = launches.launch(
        laid.form, dtype, alignment, laid.weights is not None, reads, phases, device.limits
    )
    factors, partial, counters = launches.scratch(plan, 4 if dy is None else 2, 8 if dtype == "float64" else 4)
    memory, start = None, 0
    if factors + partial + counters:
        memory = at.xp.empty(((factors + partial + counters) // 8,), dtype=at.wide, device=at.device)
        start = address(memory)
    pointers = tuple(address(v) for v in coef or ())
    if factors:
        pointers = tuple(start + i * factors // 4 for i in range(4))
    job = launches.job(
        plan,
        operands,
        laid.weights_form,
        vectors,
        0 if stats is None else address(stats),
        pointers,
        start + factors,
        start + factors + partial,
        eps,
    )
    weights = None if laid.weights is None else "bool" if laid.weights.dtype == at.xp.bool else "float64"
    name = launches.instance(kernel, plan, dtype, weights)
    blocks = launches.blocks(plan, device.limits)
    device.launch(name, job, blocks, start + factors + partial, counters)


def _shaped(at: Layout, table: Array, shape: tuple[int, ...]) -> list[Array]:
    """The rows of a table of vectors."""
    if len(shape) != 1:
        table = at.xp.reshape(table, (-1, *shape))
    return [table[i, ...] for i in range(table.shape[0])]


# Passes fused, as `functional.py` calls them.


def forward(
    device: Device,
    x: Array,
    w: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    at: Layout,
    out: Array | None,
) -> tuple[Array, Moments]:
    """Give y and the batch's moments."""
    kept: list[Array] = []
    laid = arrange(device, at, w, x)
    y = _output(device, at, laid, x, out)
    stats = at.xp.empty((4, laid.form.channels), dtype=at.wide, device=at.device)
    vectors = Vectors(gamma=_vector(device, at, gamma, kept), beta=_vector(device, at, beta, kept))
    _run(
        device, at, "forward", SUM | WRITE, laid, laid.arrays[0], out=y, vectors=vectors, stats=stats, eps=eps
    )
    count, mean, var, low = _shaped(at, stats, at.channels)
    return y if out is None or y is out else written(y, out), Moments(count, mean, var, low)


def backward(
    device: Device,
    dy: Array,
    x: Array,
    w: Array | None,
    stats: Moments,
    gamma: Array | None,
    eps: float,
    at: Layout,
    out: Array | None,
) -> tuple[Array, Array, Array]:
    """Give dx, and dgamma and dbeta in the dtype of gamma."""
    if dy.dtype != x.dtype:
        dx, *grads = backward(device, *_in_one_dtype(at, dy, x), w, stats, gamma, eps, at, None)
        return written(at.xp.astype(dx, x.dtype), out), grads[0], grads[1]
    kept: list[Array] = []
    laid = arrange(device, at, w, x, dy)
    dx = _output(device, at, laid, x, out)
    dtype = at.compute if gamma is None else gamma.dtype
    grads = [at.xp.empty(at.channels, dtype=dtype, device=at.device) for _ in range(2)]
    given = (gamma, None, stats.count, stats.mean, stats.var, stats.mean_lo, *grads)
    vectors = Vectors(*(_vector(device, at, v, kept) for v in given))
    _run(device, at, "backward", SUM | WRITE, laid, *laid.arrays, out=dx, vectors=vectors, eps=eps)
    return dx if out is None or dx is out else written(dx, out), grads[0], grads[1]


def inference(
    device: Device,
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
    if 0 in x.shape:
        return at.xp.empty_like(x) if out is None else out
    kept: list[Array] = []
    laid = arrange(device, at, None, x)
    y = _output(device, at, laid, x, out)
    given = (gamma, beta, None, mean, var)
    vectors = Vectors(*(_vector(device, at, v, kept) for v in given))
    _run(device, at, "forward", WRITE, laid, laid.arrays[0], out=y, vectors=vectors, eps=eps)
    return y if out is None or y is out else written(y, out)


def _in_one_dtype(at: Layout, dy: Array, x: Array) -> tuple[Array, Array]:
    """Gradients and data in one dtype that holds both: the kernels read both in the same."""
    double = "float64" in (_dtype(at, dy), _dtype(at, x))
    dtype = at.xp.float64 if double else at.xp.float32
    return at.xp.astype(dy, dtype), at.xp.astype(x, dtype)


# The four kernels, as `generic.py` specifies them.


def moments(
    device: Device, x: Array, w: Array | None, at: Layout
) -> tuple[Array, Array, Array, Array]:
    """Count, mean as a high and a low part, and population variance of each channel."""
    if 0 in x.shape:
        return generic.moments(x, w, at)
    laid = arrange(device, at, w, x)
    stats = at.xp.empty((4, laid.form.channels), dtype=at.wide, device=at.device)
    _run(device, at, "forward", SUM, laid, laid.arrays[0], stats=stats)
    count, mean, var, low = _shaped(at, stats, at.broadcast)
    return count, mean, low, var


def scale_shift(
    device: Device, x: Array, m: Array, a: Array, b: Array, at: Layout, out: Array | None
) -> Array:
    """Give y = a·(x - m) + b."""
    if 0 in x.shape:
        return at.xp.empty_like(x) if out is None else out
    laid = arrange(device, at, None, x)
    y = _output(device, at, laid, x, out)
    coef = _factors(device, at, m, a, b)
    _run(device, at, "forward", WRITE | GIVEN, laid, laid.arrays[0], out=y, coef=coef)
    return y if out is None or y is out else written(y, out)


def grad_sums(
    device: Device, dy: Array, x: Array, m: Array, w: Array | None, at: Layout
) -> tuple[Array, Array]:
    """Σdy and Σdy·(x - m) of each channel."""
    if 0 in x.shape:
        return generic.grad_sums(dy, x, m, w, at)
    if dy.dtype != x.dtype:
        dy, x = _in_one_dtype(at, dy, x)
    laid = arrange(device, at, w, x, dy)
    sums = at.xp.empty((2, laid.form.channels), dtype=at.wide, device=at.device)
    coef = _factors(device, at, m)
    _run(device, at, "backward", SUM | RAW | GIVEN, laid, *laid.arrays, stats=sums, coef=coef)
    sum_dy, sum_dy_d = _shaped(at, sums, at.broadcast)
    return sum_dy, sum_dy_d


def grad_input(
    device: Device,
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
    if 0 in x.shape:
        return at.xp.empty_like(x) if out is None else out
    if dy.dtype != x.dtype:
        dx = grad_input(device, *_in_one_dtype(at, dy, x), m, a, b, c, w, at, None)
        return written(at.xp.astype(dx, x.dtype), out)
    laid = arrange(device, at, w, x, dy)
    dx = _output(device, at, laid, x, out)
    coef = _factors(device, at, m, a, b, c)
    _run(device, at, "backward", WRITE | GIVEN, laid, *laid.arrays, out=dx, coef=coef)
    return dx if out is None or dx is out else written(dx, out)
