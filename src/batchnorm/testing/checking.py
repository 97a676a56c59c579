"""`check_batch_norm`: checks of anybody's batch norm, and one test for each in pytest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from batchnorm.arguments import validate_callable, validate_choice, validate_int
from batchnorm.errors import describe, describe_type, fail
from batchnorm.testing.checks import CHECKS, FEATURES, Check, Implementation

DEFAULT = ("training", "inference", "running", "float64", "mixed")
"""The features of a function of which nothing else is said."""


class Record(NamedTuple):
    """What a check found."""

    check: str
    """The name of the check, which says what it judges."""
    parameters: dict[str, Any]
    error: float | None
    """The largest error, in eps of the dtype times the size of the terms; None where something else was
    wrong."""
    limit: float
    """The largest error that passes."""
    raised: str
    """What was raised or is wrong, in one line; empty for a number that can be compared."""
    passed: bool
    expected: str
    """The reason for which a failure was expected; empty otherwise."""

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items())
        said = self.raised or f"off by {self.error:.3g} eps, at most {self.limit:g} are right"
        return f"{self.check}({given}): {'passed' if self.passed else said}"


class BatchNormError(AssertionError):
    """A batch norm failed checks that it was not expected to fail, or passed others."""


def check_batch_norm(
    function: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    double_backward: Callable[..., Any] | None = None,
    set_threads: Callable[[int], Any] | None = None,
    xp: Any = None,
    features: Iterable[str] = DEFAULT,
    correction: int = 1,
    expected_failures: Mapping[str, str] | None = None,
    on_fail: str = "raise",
) -> list[Record]:
    """Check a batch norm: values, gradients, running statistics, and the cases that others get wrong.

    Parameters
    ----------
    function : callable
        ``function(x, gamma, beta, running_mean, running_var, training=..., momentum=..., eps=...)``
        returns y and the new running mean and variance, None for those that it does not have. x has
        its channels at axis 1, and `momentum` is the weight of the new batch. Further keywords come
        with `features`: ``where``, a mask that broadcasts to x; ``axis``; and ``shards``, into how many
        parts the function splits the batch, to normalize them together.
    backward : callable, optional
        ``backward(dy, x, gamma, beta, eps=...)`` returns dx, dgamma and dbeta in training.
    double_backward : callable, optional
        ``double_backward(ddx, dy, x, gamma, eps=...)`` returns the gradients of ``sum(ddx * dx)`` to dy,
        x and gamma.
    set_threads : callable, optional
        ``set_threads(n)`` sets the number of threads of the next calls.
    xp : module, optional
        The arrays are made by its ``asarray``; NumPy's without it. Results may be of any library that
        NumPy can read.
    features : iterable of str
        What the function has, by the names of `batchnorm.testing.FEATURES`.
    correction : {0, 1}
        Bessel's correction of the running variance.
    expected_failures : mapping of str to str, optional
        Checks that are known to fail, and why. One that passes is an error: the entry is stale.
    on_fail : {"raise", "warn", "return"}
        What to do about failures that were not expected, and stale entries.

    Returns
    -------
    list of Record

    Raises
    ------
    BatchNormError
        With ``on_fail="raise"``: a line for each.
    TypeError, ValueError
        An argument that is not as described.
    """
    expected = validate_expected(expected_failures)
    validate_choice("on_fail", on_fail, ("raise", "warn", "return"))
    implementation = implementation_of(
        function,
        backward=backward,
        double_backward=double_backward,
        set_threads=set_threads,
        xp=xp,
        features=features,
        correction=correction,
    )
    records = [
        run(implementation, name, parameters, expected.get(name, ""))
        for name, parameters in applicable(implementation)
    ]
    lines = surprises(records, expected)
    if lines and on_fail == "raise":
        raise BatchNormError("\n".join(lines))
    if lines and on_fail == "warn":
        warnings.warn("check_batch_norm: " + "\n".join(lines), UserWarning, stacklevel=2)
    return records


def parametrize_with_checks(
    function: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    double_backward: Callable[..., Any] | None = None,
    set_threads: Callable[[int], Any] | None = None,
    xp: Any = None,
    features: Iterable[str] = DEFAULT,
    correction: int = 1,
    expected_failures: Mapping[str, str] | None = None,
) -> Any:
    """Return a decorator for pytest: one test for each check, which calls its argument ``check``.

    The parameters are those of `check_batch_norm`. An expected failure that passes fails the test.

    Examples
    --------
    >>> from batchnorm.testing import parametrize_with_checks
    >>> @parametrize_with_checks(my_batch_norm)  # doctest: +SKIP
    ... def test_batch_norm(check):
    ...     check()
    """
    import pytest

    expected = validate_expected(expected_failures)
    implementation = implementation_of(
        function,
        backward=backward,
        double_backward=double_backward,
        set_threads=set_threads,
        xp=xp,
        features=features,
        correction=correction,
    )

    def case(name: str, parameters: dict[str, Any]) -> Any:
        def check() -> None:
            record = run(implementation, name, parameters)
            if not record.passed:
                raise BatchNormError(str(record))

        identity = "-".join([name, *map(str, parameters.values())])
        marks = (
            [pytest.mark.xfail(reason=expected[name], strict=True, raises=BatchNormError)]
            if name in expected
            else []
        )
        return pytest.param(check, id=identity, marks=marks)

    cases = [case(name, parameters) for name, parameters in applicable(implementation)]
    return pytest.mark.parametrize("check", cases)


def implementation_of(
    function: Any,
    *,
    backward: Any = None,
    double_backward: Any = None,
    set_threads: Any = None,
    xp: Any = None,
    features: Any = DEFAULT,
    correction: Any = 1,
) -> Implementation:
    """Validate the arguments of `check_batch_norm` that say what is checked."""
    validate_callable("function", function)
    optional = {"backward": backward, "double_backward": double_backward, "set_threads": set_threads}
    given_callables = {name for name, value in optional.items() if value is not None}
    for name in given_callables:
        validate_callable(name, optional[name])
    if isinstance(features, str) or not isinstance(features, Iterable):
        fail(TypeError, "features", describe(features), "an iterable of names")
    given = set(features)
    for name in given:
        validate_choice("features", name, FEATURES)
    if xp is not None and not callable(getattr(xp, "asarray", None)):
        fail(TypeError, "xp", describe_type(xp), "a module with asarray(array)")
    if validate_int("correction", correction, 0) > 1:
        fail(ValueError, "correction", describe(correction), "0 or 1")
    convert = (lambda v: v.copy()) if xp is None else xp.asarray
    return Implementation(
        function,
        backward,
        double_backward,
        set_threads,
        frozenset(given | given_callables),
        correction,
        convert,
    )


def validate_expected(expected_failures: Any) -> dict[str, str]:
    """Validate checks that are known to fail, and the reasons."""
    if expected_failures is None:
        return {}
    if not isinstance(expected_failures, Mapping):
        fail(TypeError, "expected_failures", describe_type(expected_failures), "a mapping of str to str")
    for name, why in expected_failures.items():
        validate_choice("expected_failures", name, CHECKS)
        if not isinstance(why, str) or not why:
            fail(TypeError, "expected_failures", describe(why), f"the reason for {name!r}")
    return dict(expected_failures)


def applicable(implementation: Implementation) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the checks that apply to an implementation, with each set of their parameters."""
    for name, check in CHECKS.items():
        if check.needs <= implementation.features:
            for parameters in check.parameters:
                yield name, parameters


def surprises(records: list[Record], expected: Mapping[str, str]) -> list[str]:
    """Return a line for each failure that was not expected, and for each expected one that passed."""
    lines = [str(r) for r in records if not r.passed and not r.expected]
    for name, why in expected.items():
        found = [r.passed for r in records if r.check == name]
        if found and all(found):
            lines.append(
                f"{name}: expected to fail ({why}), but it passed: remove it from expected_failures"
            )
    return lines


def run(
    implementation: Implementation, name: str, parameters: dict[str, Any], expected: str = ""
) -> Record:
    """Run a check, whatever the implementation raises."""
    check: Check = CHECKS[name]
    error, raised = None, ""
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():  # what comes out is judged, not how
            warnings.simplefilter("ignore")
            error = check.run(implementation, **parameters)
    except Exception as problem:  # of any framework
        said = " ".join(str(problem).split())[:200]
        raised = said if isinstance(problem, AssertionError) else f"{type(problem).__name__}: {said}"
    if error is not None and not np.isfinite(error):
        error, raised = None, "a result is not finite where it should be, or finite where it should not"
    passed = error is not None and error <= check.limit
    return Record(name, parameters, error, check.limit, raised, passed, "" if passed else expected)
