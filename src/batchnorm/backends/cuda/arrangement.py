"""How the arrays of a call lie in the memory of a device, and results that lie as they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda.launches import Limits, MemoryLayout
from batchnorm.layout import Layout, float_name

Array = Any


class Device(NamedTuple):
    """A device, and the operations on it that depend on the array library."""

    limits: Limits
    active: Callable[[], Any]
    """Return a context in which the device is the current one."""
    address: Callable[[Array], int]
    strides: Callable[[Array], tuple[int, ...]]
    """Return the strides in elements."""
    contiguous: Callable[[Array], Array]
    """Return the array itself if it is C-contiguous, else a C-contiguous copy."""
    capturing: Callable[[], bool]
    """Return whether a graph is being captured whose memory the library does not keep."""
    launch: Callable[[str, bytes, int, int, int], None]
    """Set memory to zero and run a kernel: its name, parameters, blocks; the address, bytes to zero."""


class Arranged(NamedTuple):
    """Big arrays of one memory layout, and weights with the same lengths and their own strides."""

    arrays: tuple[Array, ...]
    weights: Array | None
    memory_layout: MemoryLayout
    weights_layout: MemoryLayout | None
    order: tuple[int, ...]
    """The axes, from the outermost in memory to the innermost."""


def arrange(device: Device, layout: Layout, w: Array | None, *arrays: Array) -> Arranged:
    """Return big arrays in the memory layout of the first; those with another layout are copied."""
    xp, (first, *others) = layout.xp, arrays
    shape, strides = tuple(first.shape), device.strides(first)
    order = tuple(sorted(range(len(shape)), key=lambda i: (-strides[i], i)))
    channel_axes = layout.channel_axes
    if (
        not launches.dense(shape, strides)
        or launches.memory_layouts(shape, channel_axes, (strides,)) is None
    ):
        order = (*channel_axes, *layout.reduced_axes)
        first = _copy(device, xp, first, order)
        strides = device.strides(first)
    arranged = [
        a if _same_strides(shape, device.strides(a), strides) else _copy(device, xp, a, order)
        for a in others
    ]

    found = None
    if w is not None:
        if float_name(xp, w.dtype) != "float64" and w.dtype != xp.bool:
            w = xp.astype(w, layout.wide)
        w = xp.broadcast_to(w, shape)
        found = launches.memory_layouts(shape, channel_axes, (strides, device.strides(w)))
        if found is None:
            w = _copy(device, xp, w, order)
            found = launches.memory_layouts(shape, channel_axes, (strides, device.strides(w)))
    found = found or launches.memory_layouts(shape, channel_axes, (strides,))
    assert found is not None
    return Arranged((first, *arranged), w, found[0], None if w is None else found[1], order)


def _same_strides(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(n == 1 or i == j for n, i, j in zip(shape, a, b, strict=True))


def _copy(device: Device, xp: Any, a: Array, order: tuple[int, ...]) -> Array:
    """Return a contiguous copy of the same shape, with its axes in memory in this order."""
    return xp.permute_dims(device.contiguous(xp.permute_dims(a, order)), _inverse(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def result_like(device: Device, layout: Layout, arranged: Arranged, out: Array | None) -> Array:
    """Return an array for the result: `out`, if it has the strides of the inputs, or a new one."""
    x = arranged.arrays[0]
    if out is not None and _same_strides(x.shape, device.strides(out), device.strides(x)):
        return out
    shape = tuple(x.shape[i] for i in arranged.order)
    fresh = layout.xp.empty(shape, dtype=x.dtype, device=layout.device)
    return layout.xp.permute_dims(fresh, _inverse(arranged.order))
