"""Trained layers in and out: four frameworks' names and conventions, in memory and in files.

A framework's state is the arrays that its layer holds, under its names, and the settings that make
that layer, in its words. Running variances are taken as they are: only what later training adds to
them follows a framework's convention (`correction`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import array_api_compat as compat

from batchnorm import files
from batchnorm.arguments import (
    validate_axis,
    validate_bool,
    validate_choice,
    validate_number,
    validate_path,
)
from batchnorm.arrays import namespace
from batchnorm.errors import describe, describe_type, fail
from batchnorm.layer import PARAMETERS, RUNNING, BatchNorm
from batchnorm.layout import float_name
from batchnorm.presets import PRESETS
from batchnorm.state import checked

Array = Any


class State(NamedTuple):
    """A batch norm in a framework's names and words."""

    arrays: dict[str, Array]
    """NumPy arrays, copies."""
    settings: dict[str, Any]
    """Arguments of the framework's layer, or attributes of its node."""


class Format(NamedTuple):
    """How a framework names what a layer holds, and the settings that make it."""

    preset: str
    names: tuple[str, str, str, str]
    """Of gamma, beta, and the running mean and variance."""
    eps: str
    momentum: Callable[[float], float]
    """From our weight of the new batch to theirs, and back."""
    switches: tuple[str, ...]
    """Settings that say whether there are gamma and beta."""
    size: bool
    """Whether `num_features` is a setting."""
    axis: bool
    """Whether the channel axis is a setting; channels are second where it is not."""
    batches: str = ""
    """The name of the number of batches, where there is one."""


def _of_the_new(momentum: float) -> float:
    return momentum


def _of_the_old(momentum: float) -> float:
    return 1 - momentum


FORMATS = {
    "torch": Format(
        "pytorch",
        ("weight", "bias", "running_mean", "running_var"),
        "eps",
        _of_the_new,
        ("affine",),
        size=True,
        axis=False,
        batches="num_batches_tracked",
    ),
    "keras": Format(
        "keras",
        ("gamma", "beta", "moving_mean", "moving_variance"),
        "epsilon",
        _of_the_old,
        ("scale", "center"),
        size=False,
        axis=True,
    ),
    "flax": Format(
        "flax",
        ("scale", "bias", "mean", "var"),
        "epsilon",
        _of_the_old,
        ("use_scale", "use_bias"),
        size=True,
        axis=True,
    ),
    "onnx": Format(
        "onnx",
        ("scale", "B", "input_mean", "input_var"),
        "epsilon",
        _of_the_old,
        (),
        size=False,
        axis=False,
    ),
}
OURS = PARAMETERS + RUNNING
COUNT = "num_batches_tracked"


def to_state(layer: BatchNorm, framework: str) -> State:
    """Give a layer's arrays and settings in a framework's names and words.

    Parameters
    ----------
    layer : BatchNorm
        With running statistics.
    framework : {"torch", "keras", "flax", "onnx"}
        ``torch.nn.BatchNorm2d``, ``keras.layers.BatchNormalization``, ``flax.nnx.BatchNorm`` or ONNX's
        operator.

    Returns
    -------
    State
        `arrays`, as NumPy's and no views of the layer's, and `settings`, the arguments of the
        framework's layer. PyTorch's and ONNX's have their channels at axis 1, whatever `axis` the layer
        has. All arrays are float64 where the layer's parameters are, and float32 where they are
        narrower, as the framework's layer would hold them. A layer whose dtype neither `dtype` nor an
        input has decided, or that has no parameters, counts as float32, unless its parameters would
        lose digits.

    Raises
    ------
    TypeError, ValueError
        An unknown framework, a layer without running statistics, statistics beyond float32, or a
        cumulative average (``momentum=None``) for a framework that has none.
    """
    import numpy as np

    form = _format(framework)
    own, dtype = _held(layer)
    if layer.momentum is None and framework != "torch":
        got = f"momentum None, a cumulative average, which {framework} does not have"
        fail(ValueError, "layer", got, "a number")
    own |= {name: _rounded(name, own[name], dtype) for name in RUNNING}
    if not layer.affine and framework == "onnx":  # whose operator always has both
        shape = own["running_mean"].shape
        own = {"gamma": np.ones(shape, dtype), "beta": np.zeros(shape, dtype)} | own
    arrays = _named(own, form)
    settings: dict[str, Any] = {form.eps: layer.eps}
    settings["momentum"] = None if layer.momentum is None else _exact(form.momentum(layer.momentum))
    settings |= dict.fromkeys(form.switches, layer.affine)
    settings |= {"num_features": layer.num_features} if form.size else {}
    settings |= {"axis": layer.axis} if form.axis else {}
    return State(arrays, settings)


def from_state(
    arrays: Mapping[str, Array], framework: str, settings: Mapping[str, Any] | None = None
) -> BatchNorm:
    """Make a layer from a framework's arrays and settings.

    Parameters
    ----------
    arrays : mapping of str to array
        Under the framework's names, of any library. What its layer may leave out (gamma, beta, the
        number of batches) may be missing.
    framework : {"torch", "keras", "flax", "onnx"}
        Whose names and words they are.
    settings : mapping, optional
        Arguments of the framework's layer; its defaults where they are left out.

    Returns
    -------
    BatchNorm
        In inference mode, on NumPy until its first input.

    Raises
    ------
    TypeError, ValueError
        An unknown framework, missing or unknown names, a shape or dtype that does not fit, a variance
        below zero.
    """
    import numpy as np

    form = _format(framework)
    known = {*form.names, *filter(None, [form.batches])}
    needed = form.names if framework == "onnx" else form.names[2:]
    if not isinstance(arrays, Mapping) or not set(needed) <= set(arrays) <= known:
        named = isinstance(arrays, Mapping)
        got = f"names {sorted(map(str, arrays))}" if named else describe(arrays)
        fail(ValueError, "arrays", got, f"{sorted(needed)}, and perhaps {sorted(known - {*needed})}")
    settings = {} if settings is None else settings
    words = _words(form, framework, settings)
    given = {
        ours: _numpy(theirs, arrays[theirs])
        for ours, theirs in zip(OURS, form.names, strict=True)
        if theirs in arrays
    }
    for name, theirs in zip(OURS, form.names, strict=True):
        if name in given and float_name(np, given[name].dtype) is None:
            fail(TypeError, theirs, f"dtype {given[name].dtype}", "a floating one")
    shape = given["running_mean"].shape
    if not shape or math.prod(shape) == 0:
        fail(ValueError, form.names[2], f"shape {shape}", "a number for each channel")
    affine = any(name in given for name in PARAMETERS)
    _agree(form, settings, arrays, shape, words["axis"])
    if affine:  # one of two: the other is as if it were not there
        dtype = next(given[name].dtype for name in PARAMETERS if name in given)
        given = {"gamma": np.ones(shape, dtype), "beta": np.zeros(shape, dtype)} | given
    layer = BatchNorm(shape[0] if len(shape) == 1 else shape, affine=affine, **words)
    if form.batches in arrays:
        given[COUNT] = _numpy(form.batches, arrays[form.batches])
    names = dict(zip(OURS, form.names, strict=True)) | {COUNT: form.batches}
    _load({"": layer}, {"": given}, names)
    return layer.eval()


def save(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm] | BatchNorm) -> None:
    """Write layers to a file, under the names that PyTorch uses.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file (with the package `safetensors`) or an ``.npz`` file, without pickle.
        Parameters are in float32 or float64, statistics in all the digits that the layer has.
    layers : BatchNorm, or mapping of str to BatchNorm
        One layer, or several under their prefixes: ``{"layer1.bn": layer}`` is written as
        ``layer1.bn.weight`` and so on.

    Raises
    ------
    TypeError, ValueError
        Another kind of file or of layer, or names that `load` would not take apart. Nothing is written
        then.
    FileNotFoundError
        There is no such folder.

    Notes
    -----
    A file that is there is replaced at once, and keeps its permissions. Several processes may write the
    same file: the last one's stays.
    """
    several = _several(layers)
    found = {
        _name(prefix, name): v
        for prefix, layer in several.items()
        for name, v in _named(_held(layer)[0], FORMATS["torch"]).items()
    }
    validate_path("path", path)
    _found(several, list(found), path)  # what `load` would refuse
    files.write(path, found)


def load(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm] | BatchNorm) -> None:
    """Load layers from a file, all of them or none.

    Parameters
    ----------
    path : path
        A ``.safetensors`` or ``.npz`` file with the names that PyTorch uses: of `save`, or a published
        model's. What is not under a prefix of `layers` is not read. bfloat16 in a ``.safetensors`` file
        needs the package `ml_dtypes`.
    layers : BatchNorm, or mapping of str to BatchNorm
        One layer, or several under their prefixes.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    TypeError, ValueError
        A file that is cut or of another kind; missing or unknown names under a prefix; a shape or dtype
        that does not fit; a variance below zero. Every layer is then as it was.
    """
    several = _several(layers)
    wanted = _found(several, files.names(path), path)
    shapes = {
        name: () if ours == COUNT else tuple(several[prefix].state_dict()[ours].shape)
        for prefix, found in wanted.items()
        for ours, name in found.items()
    }
    arrays = files.read(path, shapes)
    states = {
        prefix: {ours: _numpy(name, arrays[name]) for ours, name in found.items()}
        for prefix, found in wanted.items()
    }
    _load(several, states, dict(zip(OURS, FORMATS["torch"].names, strict=True)) | {COUNT: COUNT})


def _found(
    layers: Mapping[str, BatchNorm], held: list[str], path: str | os.PathLike[str]
) -> dict[str, dict[str, str]]:
    """The names in a file of what each layer holds: those under its prefix, all and no others."""
    names = dict(zip(OURS, FORMATS["torch"].names, strict=True)) | {COUNT: COUNT}
    wanted: dict[str, dict[str, str]] = {}
    for prefix, layer in layers.items():
        above = _name(prefix, "")
        mine = {name.removeprefix(above) for name in held if name.startswith(above)}
        own = {ours: names[ours] for ours in layer.state_dict()}
        needed = {*own.values()} - {COUNT}
        if not needed <= mine <= needed | {COUNT}:
            got = f"names {sorted(mine)} under {prefix!r} in {os.fspath(path)}"
            fail(ValueError, "layers", got, f"{sorted(needed)}")
        wanted[prefix] = {ours: above + theirs for ours, theirs in own.items() if theirs in mine}
    return wanted


def _several(layers: Any) -> Mapping[str, BatchNorm]:
    """Check layers under prefixes, or one layer."""
    several = layers if isinstance(layers, Mapping) else {"": layers}
    if not several:
        fail(ValueError, "layers", "none", "at least one BatchNorm")
    for prefix, layer in several.items():
        if not isinstance(prefix, str):
            fail(TypeError, "layers", f"the key {describe(prefix)}", "prefixes that are str")
        if not prefix.isprintable() or len(prefix) > 1000:
            got = f"the prefix {prefix[:60]!a}"
            fail(ValueError, "layers", got, "printable prefixes of at most 1,000 characters")
        if not isinstance(layer, BatchNorm):
            fail(TypeError, "layers", describe_type(layer), "a BatchNorm")
    return several


def _load(
    layers: Mapping[str, BatchNorm], states: Mapping[str, dict[str, Any]], names: Mapping[str, str]
) -> None:
    """Check every state, then load every one."""
    import numpy as np

    for prefix, layer in layers.items():
        own, state = layer.state_dict(), states[prefix]
        for name, v in state.items():
            if name == COUNT:
                continue
            theirs = _name(prefix, names[name])
            if float_name(np, v.dtype) is None:
                fail(TypeError, theirs, f"dtype {v.dtype}", "a floating one")
            if v.shape != own[name].shape:
                fail(ValueError, theirs, f"shape {v.shape}", f"{tuple(own[name].shape)}")
            if not np.all(np.isfinite(v)):
                fail(ValueError, theirs, "a number that is infinite or NaN", "finite numbers")
            if name == "running_var" and not np.all(v >= 0):
                fail(ValueError, theirs, "a variance below zero", "variances >= 0")
        if COUNT in own:
            state[COUNT] = _batches(_name(prefix, names[COUNT]), state[COUNT]) if COUNT in state else 0
        checked(state, own)
    for prefix, layer in layers.items():
        layer.load_state_dict(states[prefix])


def _batches(argument: str, v: Array) -> int:
    """A number of batches: a whole one, also where a file holds all that it has in a floating dtype."""
    number = v.item() if v.shape == () and v.dtype.kind in "iuf" else -1
    if not (0 <= number < math.inf and number == int(number)):
        got = f"{v.item()!r}" if v.shape == () else f"shape {v.shape}"
        fail(ValueError, argument, got, "a whole number >= 0")
    return int(number)


def _held(layer: BatchNorm) -> tuple[dict[str, Array], Any]:
    """NumPy copies of what a layer holds, the statistics in all their digits; its parameters' dtype."""
    if not isinstance(layer, BatchNorm):
        fail(TypeError, "layer", describe_type(layer), "a BatchNorm")
    if not layer.track_running_stats:
        fail(ValueError, "layer", "one without running statistics", "one with them")
    own = {name: v if name == COUNT else _numpy(name, v) for name, v in layer.state_dict().items()}
    parameters = {name: own[name] for name in PARAMETERS if name in own}
    dtype = _dtype(layer, parameters)
    return own | {name: _rounded(name, v, dtype) for name, v in parameters.items()}, dtype


def _dtype(layer: BatchNorm, parameters: Mapping[str, Array]) -> Any:
    """The dtype of a framework's layer with these parameters: float64, or float32 for all others."""
    import numpy as np

    if parameters and layer._bound:
        wide = any(v.dtype == np.float64 for v in parameters.values())
    elif layer.dtype is not None:
        wide = _is_float64(layer.dtype)
    else:  # the first input is to decide: float64 only where float32 would lose digits until then
        with np.errstate(over="ignore"):
            wide = any(not np.array_equal(v, v.astype(np.float32)) for v in parameters.values())
    return np.dtype(np.float64 if wide else np.float32)


def _is_float64(dtype: Any) -> bool:
    import numpy as np

    try:
        return bool(np.dtype(dtype) == np.float64)
    except TypeError:  # a dtype of another library
        return str(dtype).endswith("float64")


def _rounded(name: str, v: Array, dtype: Any) -> Array:
    """A vector in the dtype of a framework's layer, if that holds it."""
    import numpy as np

    with np.errstate(over="ignore"):
        rounded = v.astype(dtype)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(v)):
        fail(ValueError, name, f"numbers beyond {dtype}", f"numbers that {dtype} holds")
    return rounded


def _named(own: Mapping[str, Any], form: Format) -> dict[str, Array]:
    """What a layer holds, under a framework's names."""
    import numpy as np

    names = zip((*OURS, COUNT), (*form.names, form.batches), strict=True)
    return {theirs: np.asarray(own[ours]) for ours, theirs in names if theirs and ours in own}


def _name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _format(framework: str) -> Format:
    return FORMATS[validate_choice("framework", framework, FORMATS)]


def _words(form: Format, framework: str, settings: Any) -> dict[str, Any]:
    """A framework's settings as arguments of `BatchNorm`."""
    if not isinstance(settings, Mapping):
        fail(TypeError, "settings", describe(settings), "a mapping of names to values")
    known = {form.eps, "momentum", *form.switches}
    known |= {"num_features"} if form.size else set()
    known |= {"axis"} if form.axis else set()
    known |= {"track_running_stats"} if framework == "torch" else set()
    known |= {"training_mode"} if framework == "onnx" else set()
    unknown = set(settings) - known
    if unknown:
        got = f"{sorted(map(str, unknown))}"
        fail(ValueError, "settings", got, f"some of {sorted(known)}")
    words: dict[str, Any] = dict(PRESETS[form.preset].settings())
    if form.eps in settings:
        words["eps"] = validate_number(form.eps, settings[form.eps], 0)
    if "momentum" in settings:
        theirs = settings["momentum"]
        if theirs is None and framework != "torch":
            expected = f"a number: {framework} has no cumulative average"
            fail(ValueError, "momentum", "None", expected)
        if theirs is not None:
            theirs = _exact(form.momentum(float(validate_number("momentum", theirs, 0, 1))))
        words["momentum"] = theirs
    if "axis" in settings:
        axis = settings["axis"]  # a list in what Keras writes
        words["axis"] = (axis[0] if len(axis) == 1 else tuple(axis)) if isinstance(axis, list) else axis
    return words


def _agree(
    form: Format,
    settings: Mapping[str, Any],
    arrays: Mapping[str, Array],
    shape: tuple[int, ...],
    axis: Any,
) -> None:
    """Check settings that say of the arrays what the arrays say themselves."""
    there = {switch: name in arrays for switch, name in zip(form.switches, form.names, strict=False)}
    if len(form.switches) == 1:  # one for both
        there = dict.fromkeys(form.switches, any(name in arrays for name in form.names[:2]))
    there["track_running_stats"] = True
    for switch, found in there.items():
        if switch in settings and validate_bool(switch, settings[switch]) != found:
            what = "whose arrays are there" if found else "whose arrays are not there"
            fail(ValueError, switch, f"{settings[switch]}, {what}", str(found))
    if "num_features" in settings:
        count = settings["num_features"]
        given = count if isinstance(count, tuple) else (count,)
        if not all(type(n) is int for n in given) or given != shape:
            got = f"{describe(count)}, for arrays of shape {shape}"
            fail(ValueError, "num_features", got, str(shape[0] if len(shape) == 1 else shape))
    if len(axes := validate_axis(axis)) != len(shape):
        got = f"{axis!r}, for arrays of shape {shape}"
        fail(ValueError, "axis", got, f"{len(shape)} axes, not {len(axes)}")
    if settings.get("training_mode", 0) not in (0, 1):
        fail(ValueError, "training_mode", describe(settings["training_mode"]), "0 or 1")


def _exact(momentum: float) -> float:
    """1 - 0.99 as 0.01, which it is not in binary."""
    return round(momentum, 15)


def _numpy(argument: str, v: Any) -> Array:
    """A NumPy copy of the same numbers, in the machine's byte order."""
    import numpy as np

    if not compat.is_array_api_obj(v):
        try:
            v = np.asarray(v)
        except ValueError:  # a list of lists of different lengths, say
            fail(TypeError, argument, describe(v), "an array")
    xp = namespace(argument, v)
    if float_name(xp, v.dtype) == "bfloat16":  # which NumPy does not have, and float32 holds exactly
        v = xp.astype(v, xp.float32)
    if compat.is_torch_array(v) or compat.is_cupy_array(v):
        v = compat.to_device(v.detach() if hasattr(v, "detach") else v, "cpu")
    try:
        v = np.from_dlpack(v)
    except (AttributeError, BufferError, TypeError, RuntimeError):
        v = np.asarray(v)
    return np.array(v, v.dtype.newbyteorder("="))
