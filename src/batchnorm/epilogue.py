"""What follows the norm in the same pass: a residual that is added, and an activation.

y = act(h), h = a·(x − m) + b + z. To add an activation: a line in `ACTIVATIONS` here, and one in
`backends/activations.h` for the native core and the CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.arguments import validate_number
from batchnorm.errors import describe, describe_type, fail
from batchnorm.layout import Layout, float_name
from batchnorm.validation import validate_same_shape

Array = Any


class Activation(NamedTuple):
    """An activation, by its name in `ACTIVATIONS`."""

    name: str
    slope: float = 0.0
    """The factor of negative values, for leaky_relu."""

    def __repr__(self) -> str:
        return repr((self.name, self.slope) if self.name == "leaky_relu" else self.name)


class Epilogue(NamedTuple):
    """The residual and the activation of a call."""

    activation: Activation | None
    residual: Array | None = None
    """z; None in a backward pass that has y, and where there is none."""
    y: Array | None = None
    """The result, in a backward pass that takes the derivative from it."""
    gradient: bool = False
    """Whether a backward pass returns the gradient to the residual."""


class Formulas(NamedTuple):
    """An activation on arrays of any library: functions of the namespace, h, and the slope."""

    value: Callable[[Any, Array, float], Array]
    """Return act(h)."""
    gradient: Callable[[Any, Array, Array, float], Array]
    """Return act'(h)·v of h and v, linear in v."""
    curvature: Callable[[Any, Array], Array] | None = None
    """Return act''(h); None where it is 0 everywhere. The gradient then follows from y as from h."""


def _zero_where(xp: Any, condition: Array, v: Array) -> Array:
    return xp.where(condition, xp.zeros_like(v), v)


def _sigmoids(xp: Any, h: Array) -> tuple[Array, Array]:
    """Return the sigmoids of h and of −h, without overflow and with derivatives at 0."""
    positive = h >= 0
    e = xp.exp(-xp.where(positive, h, -h))
    one = xp.ones_like(h)
    return xp.where(positive, one, e) / (1 + e), xp.where(positive, e, one) / (1 + e)


def _silu(xp: Any, h: Array, slope: float) -> Array:
    return h * _sigmoids(xp, h)[0]


def _silu_gradient(xp: Any, h: Array, v: Array, slope: float) -> Array:
    s, t = _sigmoids(xp, h)
    return v * (s * (1 + h * t))


def _silu_curvature(xp: Any, h: Array) -> Array:
    s, t = _sigmoids(xp, h)
    return s * t * (2 + h * (t - s))


# NaN stays NaN; at a kink the derivative is that of PyTorch.
ACTIVATIONS: dict[str, Formulas] = {
    "relu": Formulas(
        lambda xp, h, slope: _zero_where(xp, h <= 0, h),
        lambda xp, h, v, slope: _zero_where(xp, h <= 0, v),
    ),
    "relu6": Formulas(
        lambda xp, h, slope: xp.where(h >= 6, xp.full_like(h, 6), _zero_where(xp, h <= 0, h)),
        lambda xp, h, v, slope: _zero_where(xp, (h <= 0) | (h >= 6), v),
    ),
    "leaky_relu": Formulas(
        lambda xp, h, slope: xp.where(h > 0, h, slope * h),
        lambda xp, h, v, slope: xp.where(h > 0, v, slope * v),
    ),
    "silu": Formulas(_silu, _silu_gradient, _silu_curvature),
}
KINDS = (None, *ACTIVATIONS)
"""The order of the enum Activation in `backends/activations.h`."""
SLOPE = 0.01
"""The slope of leaky_relu where none is given."""

_EXPECTED = f"one of {', '.join(map(repr, ACTIVATIONS))}, ('leaky_relu', slope) or None"


def validate_activation(activation: Any) -> Activation | None:
    """Check an activation: a name, or a name and a slope."""
    if activation is None:
        return None
    name, slope = activation, None
    if isinstance(activation, tuple) and len(activation) == 2:
        name, slope = activation
    if not isinstance(name, str):
        fail(TypeError, "activation", describe(activation), _EXPECTED)
    if name not in ACTIVATIONS or (
        slope is not None and name != "leaky_relu" and type(activation) is not Activation
    ):
        fail(ValueError, "activation", describe(activation), _EXPECTED)
    if name != "leaky_relu":
        return Activation(name)
    return Activation(
        name, float(validate_number("activation's slope", SLOPE if slope is None else slope, 0))
    )


def validate_residual(
    layout: Layout, x: Array, residual: Array | None, argument: str = "residual"
) -> None:
    """Check a residual, or y: an array of the shape and dtype of x."""
    if residual is None:
        return
    validate_same_shape(layout, x, argument, residual)
    if residual.dtype != x.dtype:
        fail(TypeError, argument, f"dtype {residual.dtype}", f"{x.dtype}, as {layout.name}")


def validate_epilogue(layout: Layout, x: Array, residual: Any, activation: Any) -> Epilogue | None:
    """Check the residual and the activation of a forward pass; None where there is neither."""
    validate_residual(layout, x, residual)
    return epilogue_of(validate_activation(activation), residual)


def validate_backward_epilogue(
    layout: Layout, x: Array, residual: Any, activation: Any, y: Any
) -> Epilogue | None:
    """Check the residual (or whether there was one), the activation and y of a backward pass."""
    epilogue = backward_epilogue(residual, activation, y)
    if not isinstance(residual, bool):
        validate_residual(layout, x, residual)
    validate_residual(layout, x, y, "y")
    return epilogue


def backward_epilogue(residual: Any, activation: Any, y: Any) -> Epilogue | None:
    """Return the epilogue of a backward pass; an error where the derivative cannot be found from it."""
    checked = validate_activation(activation)
    given = residual is not None and not isinstance(residual, bool)
    if given and not hasattr(residual, "dtype"):
        expected = "True, False, None or the array that was added"
        fail(TypeError, "residual", describe_type(residual), expected)
    if checked is None:
        if y is not None:
            fail(ValueError, "y", "an array", "None, as there is no activation")
        return Epilogue(None, gradient=True) if given or residual else None
    curved = ACTIVATIONS[checked.name].curvature is not None
    if y is not None and curved:
        expected = f"None: the derivative of {checked.name} does not follow from it"
        fail(ValueError, "y", "an array", expected)
    if residual is True and y is None:
        added = "the array that was added"
        if curved:
            expected = f"{added}: the derivative of {checked.name} does not follow from y"
            fail(ValueError, "residual", "True", expected)
        fail(ValueError, "y", "None", f"the result of the forward pass, or residual as {added}")
    z = residual if given and y is None else None
    return Epilogue(checked, z, y, given or residual is True)


def epilogue_of(activation: Activation | None, residual: Array | None) -> Epilogue | None:
    """Return the epilogue of a forward pass; None where there is neither."""
    return None if activation is None and residual is None else Epilogue(activation, residual)


def kept_for_backward(
    activation: str | None, beta: Array | None, residual: Array | None, y: Array
) -> tuple[Array | None, Array | None, Array | None]:
    """Return beta, the residual and y, each as far as the activation's derivative needs it, or None."""
    if not activation:
        return None, None, None
    if residual is None:
        return beta, None, None
    curved = ACTIVATIONS[activation].curvature is not None
    return (beta, residual, None) if curved else (beta, None, y)


def with_residual(layout: Layout, h: Array, epilogue: Epilogue) -> Array:
    """Return h + z, in the dtype of h."""
    if epilogue.residual is None:
        return h
    return h + layout.xp.astype(epilogue.residual, h.dtype, copy=False)


def activated(layout: Layout, h: Array, epilogue: Epilogue) -> Array:
    """Return act(h + z), in the dtype of h."""
    h = with_residual(layout, h, epilogue)
    if epilogue.activation is None:
        return h
    name, slope = epilogue.activation
    return ACTIVATIONS[name].value(layout.xp, h, slope)


def gradient_through(layout: Layout, h: Array, dy: Array, epilogue: Epilogue) -> Array:
    """Return act'(h)·dy, in `gradient_dtype`.

    It is 0 where dy is 0: elements of zero weight may be NaN, for a gradient of this.
    """
    dy = layout.xp.astype(dy, gradient_dtype(layout, dy), copy=False)
    g = tangent_through(layout, h, dy, epilogue)
    return layout.xp.where(dy == 0, dy, g)


def gradient_dtype(layout: Layout, dy: Array) -> Any:
    """Return the dtype of act'(h)·dy, whose sums would be off if it were rounded to 16 bits."""
    return dy.dtype if float_name(layout.xp, dy.dtype) == "float64" else layout.compute


def tangent_through(layout: Layout, h: Array, v: Array, epilogue: Epilogue) -> Array:
    """Return act'(h)·v, linear in v."""
    if epilogue.activation is None:
        return v
    name, slope = epilogue.activation
    return ACTIVATIONS[name].gradient(layout.xp, h, v, slope)


def curvature(layout: Layout, h: Array, epilogue: Epilogue) -> Array | None:
    """Return act''(h), or None where that is 0 everywhere."""
    formula = None if epilogue.activation is None else ACTIVATIONS[epilogue.activation.name].curvature
    return None if formula is None else formula(layout.xp, h)
