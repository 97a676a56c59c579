"""Validation of the state of a layer, and conversion to the library of the layer."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import array_api_compat as compat

from batchnorm.arrays import known_false, library_name, same_shape
from batchnorm.errors import describe, fail
from batchnorm.validation import validate_input

Array = Any


def validate_state(state: Any, own: Mapping[str, Any]) -> tuple[dict[str, Array], Any]:
    """Check a state against that of a layer; return its arrays and its number of batches."""
    if not isinstance(state, Mapping) or set(state) != set(own):
        got = f"keys {sorted(map(str, state))}" if isinstance(state, Mapping) else describe(state)
        fail(ValueError, "state", got, f"keys {sorted(own)}")
    arrays = {name: v for name, v in state.items() if name != "num_batches_tracked"}
    for name, v in arrays.items():
        layout = validate_input(v, tuple(range(getattr(v, "ndim", 0))), name)
        if not same_shape(v.shape, own[name].shape):
            fail(ValueError, name, f"shape {tuple(v.shape)}", f"{tuple(own[name].shape)}")
        if name == "running_var" and known_false(layout.xp.all(v >= 0)):
            fail(ValueError, name, "a variance below zero or NaN", "variances >= 0")
    return arrays, _validate_count(state.get("num_batches_tracked", 0))


def cast_like(name: str, v: Array, own: Array) -> Array:
    """Copy an array to the library, device and dtype of the array that it replaces."""
    xp = compat.array_namespace(own)
    given = compat.array_namespace(v)
    device = compat.device(own)
    if given is xp:
        if device is not None and compat.device(v) not in (None, device):
            v = compat.to_device(v, device)
        new = xp.astype(v, own.dtype, copy=True)
    elif compat.is_numpy_array(v):
        new = xp.asarray(v.tolist(), dtype=own.dtype, device=device)
    else:
        expected = " or ".join(dict.fromkeys((f"one of {library_name(xp)}", "one of numpy")))
        fail(TypeError, name, f"an array of {library_name(given)}", expected)
    if compat.is_torch_array(own):  # a leaf that requires a gradient if the old one does
        new = new.detach().requires_grad_(own.requires_grad)
    return new


def _validate_count(value: Any) -> Any:
    """Check a number of batches: an int, or an integer that JAX traces."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # raised by a tracer of JAX
        if compat.is_jax_array(value) and value.shape == () and value.dtype.kind in "iu":
            return value
        count = -1
    if count < 0:
        fail(ValueError, "num_batches_tracked", describe(value), "a whole number >= 0")
    return count
