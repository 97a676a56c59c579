"""How a layer normalizes a batch in training: plainly, renormalized, or in virtual batches.

Each way is a pair of functions with the arguments of `batch_norm` and `batch_norm_backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat as compat

from batchnorm import virtual
from batchnorm.arguments import validate_choice, validate_int
from batchnorm.arrays import known_false
from batchnorm.errors import describe, fail
from batchnorm.functional import batch_norm, batch_norm_backward
from batchnorm.moments import Moments
from batchnorm.renormalization import batch_renorm, batch_renorm_backward, validate_limits

Array = Any
NONFINITE = ("propagate", "raise", "skip")
Running = tuple[Array, Array, Any]
"""A running mean and variance, and how many batches they are of."""


class Way(NamedTuple):
    """A forward pass and its backward pass."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def way_of(
    size: int | None, renorm: tuple[Any, Any] | None, running: tuple[Array, Array], degenerate: str
) -> Way:
    """Return how a batch is normalized, by the settings of a layer."""
    examples = validate_size(size)
    if examples is not None:
        given: Any = {"degenerate": degenerate}
        forward = functools.partial(virtual.forward, examples, **given)
        return Way(forward, functools.partial(virtual.backward, examples, **given))
    if renorm is not None:
        given = {"r_max": renorm[0], "d_max": renorm[1]}
        given |= {"running_mean": running[0], "running_var": running[1]}
        return Way(functools.partial(_renorm_forward, given), functools.partial(_renorm_backward, given))
    given = {} if degenerate == "raise" else {"degenerate": degenerate}
    return Way(functools.partial(batch_norm, **given), functools.partial(batch_norm_backward, **given))


def _renorm_forward(
    given: dict[str, Any], x: Array, gamma: Array | None, beta: Array | None, **settings: Any
) -> Any:
    return batch_renorm(x, gamma=gamma, beta=beta, **given, **settings)


def _renorm_backward(
    given: dict[str, Any],
    dy: Array,
    x: Array,
    stats: Moments,
    gamma: Array | None,
    beta: Array | None,
    **settings: Any,
) -> Any:
    return batch_renorm_backward(dy, x, stats, gamma=gamma, beta=beta, **given, **settings)


def moments_of(stats: Any) -> Moments:
    """Return the moments of the whole batch from what a way returned."""
    return stats.merged() if isinstance(stats, virtual.Parts) else stats


def validate_renorm(renorm: Any) -> tuple[Any, Any] | None:
    """Check the limits of renormalization: numbers, None, or functions of the number of batches."""
    if renorm is None:
        return None
    if not isinstance(renorm, tuple) or len(renorm) != 2:
        expected = "None, or a tuple (r_max, d_max) of numbers, None or functions"
        fail(TypeError, "renorm", describe(renorm), expected)
    validate_limits(*(None if callable(v) else v for v in renorm))
    return renorm


def limits_at(renorm: tuple[Any, Any] | None, batches: Any) -> tuple[Any, Any] | None:
    """Return the limits for a batch: schedules are called with the number of batches before it."""
    renorm = validate_renorm(renorm)  # an attribute may have been assigned to
    if renorm is None:
        return None
    r_max, d_max = (v(batches) if callable(v) else v for v in renorm)
    return r_max, d_max  # which `batch_renorm` validates


def validate_size(size: Any) -> int | None:
    """Check the number of examples in a virtual batch."""
    return None if size is None else validate_int("virtual_batch_size", size, 1)


def validate_together(renorm: Any, size: Any, degenerate: str, group: Any) -> None:
    """Check that settings do not exclude one another."""
    if renorm is not None and size is not None:
        fail(ValueError, "renorm", "one beside a virtual_batch_size", "one of the two")
    if renorm is not None and degenerate != "raise":
        fail(ValueError, "renorm", f"one beside degenerate={degenerate!r}", "degenerate='raise'")
    if group is not None and size is not None:
        expected = "none: parts of a batch have statistics of their own"
        fail(ValueError, "group", "one beside a virtual_batch_size", expected)


def guarded(nonfinite: str, before: Running, after: Running, pending: Moments) -> Running:
    """Return the running statistics after a batch, or before it, by whether its own are finite."""
    if validate_choice("nonfinite", nonfinite, NONFINITE) == "propagate":
        return after
    xp = compat.array_namespace(pending.mean)
    finite = xp.isfinite(pending.mean) & xp.isfinite(pending.var)
    every = xp.all(finite)
    if known_false(~every):
        return after
    if known_false(every):
        if nonfinite == "raise":
            _fail_on_nonfinite(~finite)
        return before
    mean, var = (xp.where(every, a, b) for a, b in zip(after[:2], before[:2], strict=True))
    return mean, var, xp.where(every, xp.asarray(after[2]), xp.asarray(before[2]))


def _fail_on_nonfinite(wrong: Array) -> None:
    """Raise an error that names the channels whose statistics are not finite."""
    xp = compat.array_namespace(wrong)
    where = [tuple(map(int, i)) for i in zip(*map(list, xp.nonzero(wrong)), strict=True)]
    names = [str(i[0]) if len(i) == 1 else str(i) for i in where]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    got = f"a batch whose mean or variance is not finite in channel {shown}"
    fail(ValueError, "x", got, "finite values, or nonfinite='skip' or 'propagate'")
