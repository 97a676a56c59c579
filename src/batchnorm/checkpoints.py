"""Trained layers in and out: four frameworks' names and conventions in memory, and files.

A framework's state is the arrays that its layer holds, under its names, and the settings that make
that layer, in its words. Running variances are taken as they are: only what later training adds to
them follows a framework's convention (`correction`).
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat as compat

from batchnorm import checks
from batchnorm.layer import PARAMETERS, RUNNING, BatchNorm
from batchnorm.presets import PRESETS
from batchnorm.state import checked

Array = Any


class State(NamedTuple):
    """A batch norm in a framework's names and words."""

    arrays: dict[str, Array]
    """NumPy arrays."""
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
        `arrays`, as NumPy's, and `settings`, the arguments of the framework's layer. PyTorch's and
        ONNX's have their channels at axis 1, whatever `axis` the layer has.

    Raises
    ------
    TypeError, ValueError
        An unknown framework, a layer without running statistics, or a cumulative average
        (``momentum=None``) for a framework that has none.
    """
    import numpy as np

    form = _format(framework)
    if not isinstance(layer, BatchNorm):
        checks.fail(TypeError, "layer", f"a {type(layer).__name__}", "a BatchNorm")
    if not layer.track_running_stats:
        checks.fail(ValueError, "layer", "one without running statistics", "one with them")
    if layer.momentum is None and framework != "torch":
        got = f"momentum None, a cumulative average, which {framework} does not have"
        checks.fail(ValueError, "layer", got, "a number")
    own = layer.state_dict()
    if not layer.affine and framework == "onnx":  # whose operator always has both
        shape = own["running_mean"].shape
        own = {"gamma": np.ones(shape, np.float32), "beta": np.zeros(shape, np.float32)} | own
    pairs = zip(OURS, form.names, strict=True)
    arrays = {theirs: _numpy(own[ours]) for ours, theirs in pairs if ours in own}
    if form.batches:
        arrays[form.batches] = np.asarray(int(own[COUNT]))
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
        Under the framework's names. What its layer may leave out (gamma, beta, the number of batches)
        may be missing.
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
        got = f"names {sorted(arrays)}" if isinstance(arrays, Mapping) else f"a {type(arrays).__name__}"
        checks.fail(
            ValueError, "arrays", got, f"{sorted(needed)}, and perhaps {sorted(known - {*needed})}"
        )
    words = _words(form, framework, settings or {})
    given = {
        ours: _numpy(arrays[theirs])
        for ours, theirs in zip(OURS, form.names, strict=True)
        if theirs in arrays
    }
    shape = given["running_mean"].shape
    if not shape or math.prod(shape) == 0:
        checks.fail(ValueError, form.names[2], f"shape {shape}", "a number for each channel")
    affine = any(name in given for name in PARAMETERS)
    if affine:  # one of two: the other is as if it were not there
        dtype = next(given[name].dtype for name in PARAMETERS if name in given)
        given = {"gamma": np.ones(shape, dtype), "beta": np.zeros(shape, dtype)} | given
    layer = BatchNorm(shape[0] if len(shape) == 1 else shape, affine=affine, **words)
    state: dict[str, Any] = dict(given)
    state[COUNT] = int(arrays[form.batches]) if form.batches in arrays else 0
    _load({"": layer}, {"": state}, dict(zip(OURS, form.names, strict=True)))
    return layer.eval()


def save(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm] | BatchNorm) -> None:
    """Write layers to a file, under the names that PyTorch uses.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file (with the package `safetensors`) or an ``.npz`` file, without pickle.
    layers : BatchNorm, or mapping of str to BatchNorm
        One layer, or several under their prefixes: ``{"layer1.bn": layer}`` is written as
        ``layer1.bn.weight`` and so on.

    Raises
    ------
    TypeError, ValueError
        Another kind of file or of layer. Nothing is written then.
    """
    write = _file(path)[1]
    several = layers if isinstance(layers, Mapping) else {"": layers}
    found = {
        _name(prefix, name): v
        for prefix, layer in several.items()
        for name, v in to_state(layer, "torch").arrays.items()
    }
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        write(partial, found)
        partial.replace(path)  # a file is there whole or not at all
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm] | BatchNorm) -> None:
    """Load layers from a file, all of them or none.

    Parameters
    ----------
    path : path
        A ``.safetensors`` or ``.npz`` file with the names that PyTorch uses: of `save`, or a published
        model's. What is not under a prefix of `layers` is left alone.
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
    arrays = _file(path)[0](Path(path))
    several = layers if isinstance(layers, Mapping) else {"": layers}
    names = dict(zip(OURS, FORMATS["torch"].names, strict=True)) | {COUNT: COUNT}
    states = {}
    for prefix, layer in several.items():
        if not isinstance(layer, BatchNorm):
            checks.fail(TypeError, "layers", f"a {type(layer).__name__}", "a BatchNorm")
        mine = {
            name.removeprefix(_name(prefix, "")): v
            for name, v in arrays.items()
            if name.startswith(_name(prefix, ""))
        }
        needed = {names[ours] for ours in layer.state_dict()} - {COUNT}
        if not needed <= set(mine) <= needed | {COUNT}:
            got = f"names {sorted(mine)} under {prefix!r} in {os.fspath(path)}"
            checks.fail(ValueError, "layers", got, f"{sorted(needed)}")
        state = {ours: mine[theirs] for ours, theirs in names.items() if theirs in mine}
        if COUNT in layer.state_dict():
            state[COUNT] = int(mine.get(COUNT, 0))
        states[prefix] = state
    _load(several, states, names)


def _load(
    layers: Mapping[str, BatchNorm], states: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]
) -> None:
    """Check every state, then load every one."""
    import numpy as np

    for prefix, layer in layers.items():
        own = layer.state_dict()
        for name, v in states[prefix].items():
            if name == COUNT:
                continue
            theirs = _name(prefix, names[name])
            if v.dtype.kind != "f" and v.dtype.name != "bfloat16":
                checks.fail(TypeError, theirs, f"dtype {v.dtype}", "a floating one")
            if v.shape != own[name].shape:
                checks.fail(ValueError, theirs, f"shape {v.shape}", f"{tuple(own[name].shape)}")
            if not np.all(np.isfinite(v.astype(np.float64))):
                checks.fail(ValueError, theirs, "a number that is infinite or NaN", "finite numbers")
            if name == "running_var" and not np.all(v >= 0):
                checks.fail(ValueError, theirs, "a variance below zero", "variances >= 0")
        checked(states[prefix], own)
    for prefix, layer in layers.items():
        layer.load_state_dict(states[prefix])


def _name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _format(framework: str) -> Format:
    if framework not in FORMATS:
        checks.fail(ValueError, "framework", repr(framework), f"one of {', '.join(FORMATS)}")
    return FORMATS[framework]


def _words(form: Format, framework: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A framework's settings as arguments of `BatchNorm`."""
    known = {form.eps, "momentum", *form.switches}
    known |= {"num_features"} if form.size else set()
    known |= {"axis"} if form.axis else set()
    known |= {"track_running_stats"} if framework == "torch" else set()
    known |= {"training_mode"} if framework == "onnx" else set()
    unknown = set(settings) - known
    if unknown:
        checks.fail(ValueError, "settings", f"{sorted(unknown)}", f"some of {sorted(known)}")
    words: dict[str, Any] = dict(PRESETS[form.preset].settings())
    if form.eps in settings:
        words["eps"] = settings[form.eps]
    if "momentum" in settings:
        theirs = settings["momentum"]
        words["momentum"] = None if theirs is None else _exact(form.momentum(theirs))
    if "axis" in settings:
        words["axis"] = settings["axis"]
    return words


def _exact(momentum: float) -> float:
    """1 - 0.99 as 0.01, which it is not in binary."""
    return round(momentum, 15)


def _numpy(v: Array) -> Array:
    """A NumPy array of the same numbers."""
    import numpy as np

    if compat.is_numpy_array(v):
        return v
    if hasattr(v, "detach"):
        v = v.detach().cpu()
    try:
        return np.from_dlpack(v)
    except (AttributeError, BufferError, TypeError, RuntimeError):
        return np.asarray(v)


# Files.


def _read_npz(path: Path) -> dict[str, Array]:
    import numpy as np

    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _write_npz(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **arrays)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        got = "a .safetensors file, but safetensors is not installed"
        checks.fail(ImportError, "path", got, "it: pip install 'batchnorm[safetensors]'")


def _read_safetensors(path: Path) -> dict[str, Array]:
    return dict(_safetensors().load_file(path))


def _write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    _safetensors().save_file({name: np.asarray(v, order="C") for name, v in arrays.items()}, path)


_Read = Callable[[Path], dict[str, Array]]
_Write = Callable[[Path, dict[str, Array]], None]
_FILES: dict[str, tuple[_Read, _Write]] = {
    ".npz": (_read_npz, _write_npz),
    ".safetensors": (_read_safetensors, _write_safetensors),
}


def _file(path: Any) -> tuple[_Read, _Write]:
    """How a kind of file is read and written."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FILES:
        checks.fail(ValueError, "path", os.fspath(path), f"a file that ends in {' or '.join(_FILES)}")
    read, write = _FILES[suffix]

    def reading(path: Path) -> dict[str, Array]:
        try:
            return read(path)
        except (FileNotFoundError, ImportError):
            raise
        except Exception as error:  # each library has errors of its own for what is cut or foreign
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            got = f"{os.fspath(path)}, which cannot be read ({reason})"
            checks.fail(ValueError, "path", got, f"a whole {suffix} file")

    return reading, write
