"""Conversion of layers to and from the state of four frameworks, in memory and in files.

The state of a framework consists of the arrays of its layer under the framework's names, and of the
settings of that layer.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import array_api_compat as compat

from batchnorm import files
from batchnorm.arguments import validate_path
from batchnorm.arrays import namespace, on_host
from batchnorm.errors import describe, describe_type, fail
from batchnorm.formats import (
    COUNT,
    FORMATS,
    OWN_NAMES,
    layer_arguments,
    rename,
    round_momentum,
    validate_framework,
    validate_settings,
)
from batchnorm.layer import PARAMETERS, RUNNING, BatchNorm
from batchnorm.layout import float_name
from batchnorm.state import validate_state

Array = Any


class State(NamedTuple):
    """Arrays and settings of a batch norm under the names of a framework."""

    arrays: dict[str, Array]
    """Copies, as NumPy arrays."""
    settings: dict[str, Any]
    """Arguments of the framework's layer, or attributes of its operator."""


def to_state(layer: BatchNorm, framework: str) -> State:
    """Return the arrays and settings of a layer under the names of a framework.

    Parameters
    ----------
    layer : BatchNorm
        A layer with running statistics.
    framework : {"torch", "keras", "flax", "onnx"}
        ``torch.nn.BatchNorm2d``, ``keras.layers.BatchNormalization``, ``flax.nnx.BatchNorm`` or the
        operator of ONNX.

    Returns
    -------
    State
        `arrays`, copies as NumPy arrays, and `settings`, the arguments of the framework's layer.
        Channels are at axis 1 in PyTorch and ONNX, whatever the layer's `axis` is. If the layer's
        parameters are float64, all arrays are float64. Otherwise all arrays are float32, as the
        framework's layer would hold them. If neither `dtype` nor an input has determined the dtype of
        the layer, or if it has no parameters, the arrays are float32, unless the parameters would lose
        digits.

    Raises
    ------
    TypeError, ValueError
        The framework is unknown, the layer has no running statistics, they are out of the range of
        float32, the layer has an activation, or it has a cumulative average (``momentum=None``) and the
        framework does not.
    """
    import numpy as np

    form = validate_framework(framework)
    own, dtype = _layer_arrays(layer)
    if layer.activation is not None:
        fail(ValueError, "layer", f"one with the activation {layer.activation[0]!r}", "one without")
    if layer.momentum is None and framework != "torch":
        got = f"momentum None, a cumulative average, which {framework} does not have"
        fail(ValueError, "layer", got, "a number")
    own |= {name: _cast(name, own[name], dtype) for name in RUNNING}
    if not layer.affine and framework == "onnx":  # its operator always has both
        shape = own["running_mean"].shape
        own = {"gamma": np.ones(shape, dtype), "beta": np.zeros(shape, dtype)} | own
    arrays = rename(own, form)
    settings: dict[str, Any] = {form.eps: layer.eps}
    settings["momentum"] = (
        None if layer.momentum is None else round_momentum(form.momentum(layer.momentum))
    )
    settings |= dict.fromkeys(form.switches, layer.affine)
    settings |= {"num_features": layer.num_features} if form.has_num_features else {}
    settings |= {"axis": layer.axis} if form.has_axis else {}
    return State(arrays, settings)


def from_state(
    arrays: Mapping[str, Array], framework: str, settings: Mapping[str, Any] | None = None
) -> BatchNorm:
    """Make a layer from a framework's arrays and settings.

    Parameters
    ----------
    arrays : mapping of str to array
        Arrays of any library under the framework's names. Arrays that are optional in the framework's
        layer (gamma, beta, the number of batches) may be missing.
    framework : {"torch", "keras", "flax", "onnx"}
        The framework of the names and settings.
    settings : mapping, optional
        Arguments of the framework's layer; its defaults for those that are missing.

    Returns
    -------
    BatchNorm
        A layer in inference mode, with NumPy arrays until its first input.

    Raises
    ------
    TypeError, ValueError
        The framework is unknown, names are missing or unknown, a shape or dtype does not fit, or a
        variance is below zero.
    """
    import numpy as np

    form = validate_framework(framework)
    known = {*form.names, *filter(None, [form.batches])}
    needed = form.names if framework == "onnx" else form.names[2:]
    if not isinstance(arrays, Mapping) or not set(needed) <= set(arrays) <= known:
        named = isinstance(arrays, Mapping)
        got = f"names {sorted(map(str, arrays))}" if named else describe(arrays)
        fail(ValueError, "arrays", got, f"{sorted(needed)}, and optionally {sorted(known - {*needed})}")
    settings = {} if settings is None else settings
    arguments = layer_arguments(form, framework, settings)
    given = {
        ours: _numpy_copy(theirs, arrays[theirs])
        for ours, theirs in zip(OWN_NAMES, form.names, strict=True)
        if theirs in arrays
    }
    for name, theirs in zip(OWN_NAMES, form.names, strict=True):
        if name in given and float_name(np, given[name].dtype) is None:
            fail(TypeError, theirs, f"dtype {given[name].dtype}", "a floating one")
    shape = given["running_mean"].shape
    if not shape or math.prod(shape) == 0:
        fail(ValueError, form.names[2], f"shape {shape}", "one number per channel")
    affine = any(name in given for name in PARAMETERS)
    validate_settings(form, settings, arrays, shape, arguments["axis"])
    if affine:  # one of the two may be missing
        dtype = next(given[name].dtype for name in PARAMETERS if name in given)
        given = {"gamma": np.ones(shape, dtype), "beta": np.zeros(shape, dtype)} | given
    layer = BatchNorm(shape[0] if len(shape) == 1 else shape, affine=affine, **arguments)
    if form.batches in arrays:
        given[COUNT] = _numpy_copy(form.batches, arrays[form.batches])
    names = dict(zip(OWN_NAMES, form.names, strict=True)) | {COUNT: form.batches}
    _load_all({"": layer}, {"": given}, names)
    return layer.eval()


def save(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm] | BatchNorm) -> None:
    """Write layers to a file, under the names that PyTorch uses.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file (with the package `safetensors`) or an ``.npz`` file, without pickle.
        Parameters are written in float32 or float64, statistics in the dtype of the layer.
    layers : BatchNorm, or mapping of str to BatchNorm
        One layer, or several with their prefixes: ``{"layer1.bn": layer}`` is written as
        ``layer1.bn.weight`` and so on.

    Raises
    ------
    TypeError, ValueError
        The file or a layer is of another kind, or `load` could not separate the names. Nothing has been
        written then.
    FileNotFoundError
        The folder does not exist.

    Notes
    -----
    An existing file is replaced atomically, and keeps its permissions. If several processes write the
    same file, the last one determines its content.
    """
    named = _validate_layers(layers)
    found = {
        _prefixed(prefix, name): v
        for prefix, layer in named.items()
        for name, v in rename(_layer_arrays(layer)[0], FORMATS["torch"]).items()
    }
    validate_path("path", path)
    _file_names(named, list(found), path)  # raises what `load` would raise
    files.write(path, found)


def load(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm] | BatchNorm) -> None:
    """Load layers from a file, all of them or none.

    Parameters
    ----------
    path : path
        A ``.safetensors`` or ``.npz`` file with the names that PyTorch uses, written by `save` or
        published with a model. Arrays that are not under a prefix of `layers` are not read. bfloat16 in
        a ``.safetensors`` file needs the package `ml_dtypes`.
    layers : BatchNorm, or mapping of str to BatchNorm
        One layer, or several with their prefixes.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    TypeError, ValueError
        The file is truncated or of another kind, names under a prefix are missing or unknown, a shape or
        dtype does not fit, or a variance is below zero. No layer has been changed then.
    """
    named = _validate_layers(layers)
    wanted = _file_names(named, files.names(path), path)
    shapes = {
        name: () if ours == COUNT else tuple(named[prefix].state_dict()[ours].shape)
        for prefix, found in wanted.items()
        for ours, name in found.items()
    }
    arrays = files.read(path, shapes)
    states = {
        prefix: {ours: _numpy_copy(name, arrays[name]) for ours, name in found.items()}
        for prefix, found in wanted.items()
    }
    _load_all(named, states, dict(zip(OWN_NAMES, FORMATS["torch"].names, strict=True)) | {COUNT: COUNT})


def _file_names(
    layers: Mapping[str, BatchNorm], held: list[str], path: str | os.PathLike[str]
) -> dict[str, dict[str, str]]:
    """Check the names under the prefix of each layer, and return those of its arrays in the file."""
    names = dict(zip(OWN_NAMES, FORMATS["torch"].names, strict=True)) | {COUNT: COUNT}
    wanted: dict[str, dict[str, str]] = {}
    for prefix, layer in layers.items():
        start = _prefixed(prefix, "")
        mine = {name.removeprefix(start) for name in held if name.startswith(start)}
        own = {ours: names[ours] for ours in layer.state_dict()}
        needed = {*own.values()} - {COUNT}
        if not needed <= mine <= needed | {COUNT}:
            got = f"names {sorted(mine)} under {prefix!r} in {os.fspath(path)}"
            fail(ValueError, "layers", got, f"{sorted(needed)}")
        wanted[prefix] = {ours: start + theirs for ours, theirs in own.items() if theirs in mine}
    return wanted


def _validate_layers(layers: Any) -> Mapping[str, BatchNorm]:
    """Check layers with prefixes, or one layer, and return them as a mapping."""
    named = layers if isinstance(layers, Mapping) else {"": layers}
    if not named:
        fail(ValueError, "layers", "none", "at least one BatchNorm")
    for prefix, layer in named.items():
        if not isinstance(prefix, str):
            fail(TypeError, "layers", f"the key {describe(prefix)}", "prefixes that are str")
        if not prefix.isprintable() or len(prefix) > 1000:
            got = f"the prefix {prefix[:60]!a}"
            fail(ValueError, "layers", got, "printable prefixes of at most 1,000 characters")
        if not isinstance(layer, BatchNorm):
            fail(TypeError, "layers", describe_type(layer), "a BatchNorm")
    return named


def _load_all(
    layers: Mapping[str, BatchNorm], states: Mapping[str, dict[str, Any]], names: Mapping[str, str]
) -> None:
    """Check the states of all layers, then load them."""
    import numpy as np

    for prefix, layer in layers.items():
        own, state = layer.state_dict(), states[prefix]
        for name, v in state.items():
            if name == COUNT:
                continue
            theirs = _prefixed(prefix, names[name])
            if float_name(np, v.dtype) is None:
                fail(TypeError, theirs, f"dtype {v.dtype}", "a floating one")
            if v.shape != own[name].shape:
                fail(ValueError, theirs, f"shape {v.shape}", f"{tuple(own[name].shape)}")
            if not np.all(np.isfinite(v)):
                fail(ValueError, theirs, "a number that is infinite or NaN", "finite numbers")
            if name == "running_var" and not np.all(v >= 0):
                fail(ValueError, theirs, "a variance below zero", "variances >= 0")
        if COUNT in own:
            state[COUNT] = (
                _validate_count(_prefixed(prefix, names[COUNT]), state[COUNT]) if COUNT in state else 0
            )
        validate_state(state, own)
    for prefix, layer in layers.items():
        layer.load_state_dict(states[prefix])


def _validate_count(argument: str, v: Array) -> int:
    """Check a number of batches; a file may store it in a floating dtype."""
    number = v.item() if v.shape == () and v.dtype.kind in "iuf" else -1
    if not (0 <= number < math.inf and number == int(number)):
        got = f"{v.item()!r}" if v.shape == () else f"shape {v.shape}"
        fail(ValueError, argument, got, "a whole number >= 0")
    return int(number)


def _layer_arrays(layer: BatchNorm) -> tuple[dict[str, Array], Any]:
    """Return NumPy copies of the arrays of a layer, and the dtype of its parameters.

    The parameters are in that dtype, and the statistics in the dtype of the layer.
    """
    if not isinstance(layer, BatchNorm):
        fail(TypeError, "layer", describe_type(layer), "a BatchNorm")
    if not layer.track_running_stats:
        fail(ValueError, "layer", "one without running statistics", "one with them")
    own = {name: v if name == COUNT else _numpy_copy(name, v) for name, v in layer.state_dict().items()}
    parameters = {name: own[name] for name in PARAMETERS if name in own}
    dtype = _parameter_dtype(layer, parameters)
    return own | {name: _cast(name, v, dtype) for name, v in parameters.items()}, dtype


def _parameter_dtype(layer: BatchNorm, parameters: Mapping[str, Array]) -> Any:
    """Return the dtype of a framework's layer with these parameters: float64 or float32."""
    import numpy as np

    if parameters and layer._bound:
        wide = any(v.dtype == np.float64 for v in parameters.values())
    elif layer.dtype is not None:
        wide = _is_float64(layer.dtype)
    else:  # until the first input: float64 only if float32 would lose digits
        with np.errstate(over="ignore"):
            wide = any(not np.array_equal(v, v.astype(np.float32)) for v in parameters.values())
    return np.dtype(np.float64 if wide else np.float32)


def _is_float64(dtype: Any) -> bool:
    import numpy as np

    try:
        return bool(np.dtype(dtype) == np.float64)
    except TypeError:  # a dtype of another library
        return str(dtype).endswith("float64")


def _cast(name: str, v: Array, dtype: Any) -> Array:
    """Return a vector in the dtype of a framework's layer; raise if it is out of range."""
    import numpy as np

    with np.errstate(over="ignore"):
        rounded = v.astype(dtype)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(v)):
        fail(ValueError, name, f"numbers out of the range of {dtype}", "numbers in its range")
    return rounded


def _prefixed(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _numpy_copy(argument: str, v: Any) -> Array:
    """Return a NumPy copy of an array, in the byte order of the machine."""
    import numpy as np

    if not compat.is_array_api_obj(v):
        try:
            v = np.asarray(v)
        except ValueError:  # nested lists of different lengths, for example
            fail(TypeError, argument, describe(v), "an array")
    xp = namespace(argument, v)
    if float_name(xp, v.dtype) == "bfloat16":  # not in NumPy; exact in float32
        v = xp.astype(v, xp.float32)
    if not (compat.is_torch_array(v) or compat.is_cupy_array(v)):
        with contextlib.suppress(AttributeError, BufferError, TypeError, RuntimeError):
            v = np.from_dlpack(v)
    host = on_host(v)
    return np.array(host, host.dtype.newbyteorder("="))
