"""Names and settings of batch norm in other frameworks, and their conversion.

A running variance is used as it is: the convention of a framework (`correction`) applies only to what
later training adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from batchnorm.arguments import validate_axis, validate_bool, validate_choice, validate_number
from batchnorm.errors import describe, fail
from batchnorm.layer import PARAMETERS, RUNNING
from batchnorm.presets import PRESETS

Array = Any


class Format(NamedTuple):
    """Names of the arrays and settings of a framework's layer."""

    preset: str
    names: tuple[str, str, str, str]
    """Names of gamma, beta, and the running mean and variance."""
    eps: str
    """The name of eps."""
    momentum: Callable[[float], float]
    """The conversion of the weight of the new batch to the framework's momentum, and back."""
    switches: tuple[str, ...]
    """Settings that tell whether there are gamma and beta."""
    has_num_features: bool
    """Whether `num_features` is a setting."""
    has_axis: bool
    """Whether the channel axis is a setting; without it, channels are at axis 1."""
    batches: str = ""
    """The name of the number of batches; empty if the framework does not count them."""


def _new_weight(momentum: float) -> float:
    return momentum


def _old_weight(momentum: float) -> float:
    return 1 - momentum


FORMATS = {
    "torch": Format(
        "pytorch",
        ("weight", "bias", "running_mean", "running_var"),
        "eps",
        _new_weight,
        ("affine",),
        has_num_features=True,
        has_axis=False,
        batches="num_batches_tracked",
    ),
    "keras": Format(
        "keras",
        ("gamma", "beta", "moving_mean", "moving_variance"),
        "epsilon",
        _old_weight,
        ("scale", "center"),
        has_num_features=False,
        has_axis=True,
    ),
    "flax": Format(
        "flax",
        ("scale", "bias", "mean", "var"),
        "epsilon",
        _old_weight,
        ("use_scale", "use_bias"),
        has_num_features=True,
        has_axis=True,
    ),
    "onnx": Format(
        "onnx",
        ("scale", "B", "input_mean", "input_var"),
        "epsilon",
        _old_weight,
        (),
        has_num_features=False,
        has_axis=False,
    ),
}
OWN_NAMES = PARAMETERS + RUNNING
COUNT = "num_batches_tracked"


def rename(own: Mapping[str, Any], form: Format) -> dict[str, Array]:
    """Return the arrays of a layer under the names of a framework."""
    import numpy as np

    names = zip((*OWN_NAMES, COUNT), (*form.names, form.batches), strict=True)
    return {theirs: np.asarray(own[ours]) for ours, theirs in names if theirs and ours in own}


def validate_framework(framework: str) -> Format:
    """Check the name of a framework, and return its format."""
    return FORMATS[validate_choice("framework", framework, FORMATS)]


def layer_arguments(form: Format, framework: str, settings: Any) -> dict[str, Any]:
    """Check the settings of a framework, and return them as arguments of `BatchNorm`."""
    if not isinstance(settings, Mapping):
        fail(TypeError, "settings", describe(settings), "a mapping of names to values")
    known = {form.eps, "momentum", *form.switches}
    known |= {"num_features"} if form.has_num_features else set()
    known |= {"axis"} if form.has_axis else set()
    known |= {"track_running_stats"} if framework == "torch" else set()
    known |= {"training_mode"} if framework == "onnx" else set()
    unknown = set(settings) - known
    if unknown:
        got = f"{sorted(map(str, unknown))}"
        fail(ValueError, "settings", got, f"some of {sorted(known)}")
    arguments: dict[str, Any] = dict(PRESETS[form.preset].settings())
    if form.eps in settings:
        arguments["eps"] = validate_number(form.eps, settings[form.eps], 0)
    if "momentum" in settings:
        theirs = settings["momentum"]
        if theirs is None and framework != "torch":
            expected = f"a number: {framework} has no cumulative average"
            fail(ValueError, "momentum", "None", expected)
        if theirs is not None:
            theirs = round_momentum(form.momentum(float(validate_number("momentum", theirs, 0, 1))))
        arguments["momentum"] = theirs
    if "axis" in settings:
        axis = settings["axis"]  # Keras writes a list
        arguments["axis"] = (
            (axis[0] if len(axis) == 1 else tuple(axis)) if isinstance(axis, list) else axis
        )
    return arguments


def validate_settings(
    form: Format,
    settings: Mapping[str, Any],
    arrays: Mapping[str, Array],
    shape: tuple[int, ...],
    axis: Any,
) -> None:
    """Check that the settings agree with the arrays."""
    present = {switch: name in arrays for switch, name in zip(form.switches, form.names, strict=False)}
    if len(form.switches) == 1:  # one setting for both
        present = dict.fromkeys(form.switches, any(name in arrays for name in form.names[:2]))
    present["track_running_stats"] = True
    for switch, found in present.items():
        if switch in settings and validate_bool(switch, settings[switch]) != found:
            what = "with its arrays" if found else "without its arrays"
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


def round_momentum(momentum: float) -> float:
    """Round a momentum to 15 decimals: 1 - 0.99 in binary is not the nearest number to 0.01."""
    return round(momentum, 15)
