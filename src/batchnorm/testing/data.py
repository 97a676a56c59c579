"""Inputs of the cases: seeded, and awkward on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm.testing.libraries import numpy_dtype

Array = Any

# (shape, axis): channels second, last, first and in two axes; odd sizes; one channel; sums that are
# longer than a leaf of the summation tree; more channels than a vector register or a warp has places.
SHAPES = [
    ((6, 5), 1),
    ((7, 3, 4), 1),
    ((3, 4, 5, 2), -1),
    ((4, 2, 3, 2, 3), 1),
    ((5, 70), 0),
    ((2, 4, 3, 3), (1, 3)),
    ((9, 1), 1),
    ((37,), ()),
    ((5, 131), 1),
]
IDS = [f"{'x'.join(map(str, shape))}-axis{axis}".replace(" ", "") for shape, axis in SHAPES]


def channels(shape: tuple[int, ...], axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of gamma."""
    return tuple(shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))


def batch(
    shape: tuple[int, ...], dtype: str = "float32", mean: float = 0.0, std: float = 1.0, seed: int = 0
) -> Array:
    """Return normal values."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) * std + mean).astype(numpy_dtype(dtype))


def parameters(shape: tuple[int, ...], dtype: str = "float32", seed: int = 1) -> tuple[Array, Array]:
    """Return a gamma that changes sign and is nowhere 0, and a beta."""
    rng = np.random.default_rng([seed, *shape])
    gamma = rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
    beta = rng.uniform(-1.0, 1.0, shape)
    return np.asarray(gamma, numpy_dtype(dtype)), np.asarray(beta, numpy_dtype(dtype))


def statistics(shape: tuple[int, ...], seed: int = 2) -> tuple[Array, Array]:
    """Return a running mean and variance."""
    rng = np.random.default_rng([seed, *shape])
    mean, var = rng.standard_normal(shape), rng.uniform(0.3, 3.0, shape)
    return np.asarray(mean, np.float32), np.asarray(var, np.float32)


def weights(shape: tuple[int, ...], kind: str, seed: int = 3) -> Array:
    """Return a mask or weights of which at least half of each row are positive."""
    rng = np.random.default_rng([seed, *shape])
    mask = rng.uniform(size=shape) < 0.6
    mask.reshape(-1)[::2] = True
    if kind == "mask":
        return mask
    if kind == "integers":
        return np.where(mask, rng.integers(1, 5, shape), 0).astype(np.int32)
    return np.where(mask, rng.uniform(0.25, 2.0, shape), 0.0).astype(np.float32)


def _strided(a: Array) -> Array:
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def _reversed(a: Array) -> Array:
    backwards = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[backwards])[backwards]


def _permuted(a: Array) -> Array:
    """Lay the first axis innermost: neither C nor Fortran order from three axes on."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)


def _broadcast(a: Array) -> Array:
    """Return other values: the first along the last axis, with a stride of 0."""
    return np.broadcast_to(a[..., :1], a.shape)


def _unaligned(a: Array) -> Array:
    found: Array = np.ndarray(a.shape, a.dtype, bytearray(a.nbytes + 1), offset=1)
    found[...] = a
    return found


def _read_only(a: Array) -> Array:
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "permuted": _permuted,
    "strided": _strided,
    "reversed": _reversed,
    "broadcast": _broadcast,
    "read-only": _read_only,
}
"""Ways to lie in memory, for arrays of one axis at least; each gives the same values but "broadcast"."""

VECTOR_LAYOUTS = {**LAYOUTS, "unaligned": _unaligned}
"""The same for per-channel arguments: these may also begin between two values' addresses."""
