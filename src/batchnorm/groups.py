"""What the members of a group do together: one vector per pass, and a word before it.

A group is anything with ``all_reduce(array) -> array``, a sum over its members. One that also tells
``rank`` and ``size`` needs a single reduction where there would be two. One that can ``announce`` is
told what a member comes with, or that its arguments are wrong, before the others wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from array_api_compat import array_namespace, device

from batchnorm import checks, vectors
from batchnorm.kernels import KernelSet
from batchnorm.layout import Layout
from batchnorm.moments import Moments, pool, pool_rows

Array = Any

# Bytes up to which the moments of all members go into one vector, each in a place of its own. Beyond
# it, a second reduction costs less than the bytes: see the page on synchronized statistics.
ONE_VECTOR = 2**19


@contextmanager
def attending(group: Any, call: str, x: Array, axis: int | tuple[int, ...]) -> Iterator[None]:
    """Tell the other members what this one comes with; or, if it fails in here, why it does not."""
    try:
        yield
    except Exception as error:
        decline(group, error)
        raise
    if hasattr(group, "announce"):
        axes = axis if isinstance(axis, tuple) else (axis,)
        group.announce(f"{call} of {x.dtype} with {tuple(x.shape[a] for a in axes)} channels")


def decline(group: Any, error: BaseException) -> None:
    """Tell the other members that this one does not come, and why."""
    if hasattr(group, "announce"):
        group.announce(f"{type(error).__name__}: {error}", failed=True)


def forward(
    kernels: KernelSet,
    at: Layout,
    x: Array,
    where: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: Any,
    out: Array | None,
    group: Any,
) -> tuple[Array, Moments]:
    """Give y of a member's part, and the moments of the joined batch."""
    stats = join(group, vectors.moments_by(kernels, at, x, where))
    checks.joined(at, stats, where)
    return vectors.scale_shift_by(kernels, at, x, stats, gamma, beta, eps, out), stats


def join(group: Any, own: Moments) -> Moments:
    """The moments of all members' values, the same on each of them to the bit.

    Where it pays, each member puts its moments into its own place of one vector, and zeros elsewhere:
    sums with zeros are exact, so every member merges the very same numbers.
    """
    xp = array_namespace(own.mean)
    size = getattr(group, "size", None)
    packed = xp.stack(tuple(own))  # (4, C)
    each = math.prod(packed.shape) * 8
    if size is None or size * each > ONE_VECTOR:
        return pool([own], lambda *sums: all_reduce(group, *sums))
    places = xp.reshape(xp.arange(size, device=device(own.mean)), (size,) + (1,) * packed.ndim)
    mine = places == group.rank
    vector = xp.where(mine, packed[None, ...], xp.zeros_like(packed)[None, ...])  # (size, 4, C)
    (vector,) = all_reduce(group, vector)
    return pool_rows(Moments(*(vector[:, i, ...] for i in range(4))))


def all_reduce(group: Any, *vectors: Array) -> list[Array]:
    """Sum vectors over the members of a group, packed into one array."""
    xp = array_namespace(*vectors)
    packed = xp.stack(vectors)
    summed = group.all_reduce(packed)
    if getattr(summed, "shape", None) != packed.shape:
        got = f"{checks.kind(summed)} of shape {getattr(summed, 'shape', None)}"
        checks.fail(TypeError, "group.all_reduce", got, f"the sum, an array of shape {packed.shape}")
    return [summed[i, ...] for i in range(len(vectors))]
