"""Which backend runs a call: one table, of classes of arrays and their backends by preference."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm import core, frameworks, optimistic, tracing
from batchnorm.arguments import validate_choice
from batchnorm.arrays import device_of, library_name, namespace
from batchnorm.backends.base import Backend
from batchnorm.backends.generic import GENERIC
from batchnorm.errors import describe, fail
from batchnorm.validation import validate_real

Array = Any
Arrays = tuple[Array | None, ...]

VARIABLE = "BATCHNORM_KERNELS"
NAMES = ("native", "numpy", "cupy", "jax", "generic")
_BUT_GENERIC = tuple(name for name in NAMES if name != "generic")


class Candidate(NamedTuple):
    """A backend in the table, imported when it is first asked about or chosen."""

    names: tuple[str, ...]
    """The names by which users ask for it."""
    backend: Callable[[Arrays], Backend]
    """Return the backend for arrays that it does not refuse."""
    refuses: Callable[[Arrays], str | None] = lambda arrays: None
    """Return why it cannot run on the arrays of a call, or None. See `Backend.refuses`."""
    required: Callable[[Arrays], str | None] | None = None
    """Return why PyTorch has to see its operators, or None: it then precedes what users add."""


def backend_for(*arrays: Array | None) -> Backend:
    """Return the backend for the validated arrays of a call, of which the first is a big one."""
    return _choose(arrays)[0].backend(arrays)


def _choose(arrays: Arrays) -> tuple[Candidate, list[str]]:
    """Return the first candidate that can run, and the reasons for that choice."""
    asked = get_kernels()
    kind: Any = type(arrays[0])
    refusals: list[str] = []
    for candidate in _candidates(kind) if asked or not _added else _with_added(kind):
        if asked is not None and asked not in candidate.names:
            continue
        if candidate.required is not None:
            reason = candidate.required(arrays)
            if reason is not None:
                return candidate, [reason]
            continue
        refusal = candidate.refuses(arrays)
        if refusal is None:
            return candidate, ["it was asked for"] if asked else list(dict.fromkeys(refusals))
        if refusal:
            refusals.append(refusal)
    x: Any = arrays[0]
    own = f"x is an array of {library_name(namespace('x', x))} on the device {device_of(x)}"
    why = refusals[0] if refusals else own
    fail(TypeError, "kernels", f"{asked!r} asked for, but {why}", "arrays it can run on")


def kernels_for(x: Array, *others: Array | None) -> Backend:
    """Tell which backend runs for an array, and why.

    Parameters
    ----------
    x : array
        The array to be normalized, of any array API library.
    *others : array or None
        Other arrays of the same call: a backend has to be able to work on all of them.

    Returns
    -------
    Backend
        Its `name` and `why` are for people.

    Raises
    ------
    TypeError
        `x` is not an array of an array API library, or a backend was asked for (with `set_kernels`)
        that cannot run on it.
    ValueError
        ``BATCHNORM_KERNELS`` names no backend.
    """
    for i, a in enumerate((x, *others)):
        if a is not None or i == 0:
            argument = f"others[{i - 1}]" if i else "x"
            validate_real(argument, namespace(argument, a), a)
    candidate, reasons = _choose((x, *others))
    backend = copy.copy(candidate.backend((x, *others)))
    backend.why = "; ".join([backend.summary, *reasons])
    return backend


# The table. Functions import a backend when an array of its class first comes.


def _native_refuses(arrays: Arrays) -> str | None:
    missing = core.missing()
    if missing is not None:
        return _NO_CORE + missing
    from batchnorm.backends import native

    return native.NATIVE.refuses(arrays)


def _native_backend(arrays: Arrays) -> Backend:
    from batchnorm.backends import native

    return native.NATIVE


def _numpy_backend(arrays: Arrays) -> Backend:
    from batchnorm.backends import numpy

    return numpy.NUMPY


def _of(backend: Backend) -> Candidate:
    return Candidate((backend.name,), lambda arrays: backend, backend.refuses)


_NO_CORE = "the compiled core is not there: "
_NATIVE = Candidate(("native",), _native_backend, _native_refuses)
_NUMPY = Candidate(("numpy",), _numpy_backend)


def _for_numpy() -> tuple[Candidate, ...]:
    return _NATIVE, _NUMPY, _of(GENERIC)


def _for_torch() -> tuple[Candidate, ...]:
    from batchnorm.backends import tensors
    from batchnorm.backends.cuda import devices

    def on_tensors(host: Candidate) -> Candidate:
        def refuses(arrays: Arrays) -> str | None:
            why = tensors.refuses(arrays, "cpu")
            if why is None:
                why = tensors.without_view(arrays)
            return host.refuses(tensors.views(arrays)) if why is None else why

        return Candidate(host.names, lambda arrays: tensors.on_tensors(host.backend(arrays)), refuses)

    def native_refuses(arrays: Arrays) -> str | None:
        missing = core.missing()
        if missing is not None:
            return _NO_CORE + missing
        if tensors.exchange() is None:
            return ""
        return native(arrays).refuses(arrays)

    def native(arrays: Arrays) -> Backend:
        backend: Backend = frameworks.load("backends.native_tensors").NATIVE_TENSORS
        return backend

    def cuda_refuses(arrays: Arrays) -> str | None:
        why = tensors.refuses(arrays, "cuda")
        return devices.unusable() if why is None else why

    def pytorch_operators(arrays: Arrays) -> Backend:
        return tensors.OWN_OPERATORS

    def registered_operators(arrays: Arrays) -> Backend:
        backend: Backend = frameworks.load("torch.operators").OPERATORS
        return backend

    return (
        Candidate(NAMES, pytorch_operators, required=lambda arrays: tracing.transformed()),
        Candidate(_BUT_GENERIC, registered_operators, required=tracing.recorded),
        Candidate(("cupy",), devices.on_tensors, cuda_refuses),
        Candidate(("native",), native, native_refuses),
        on_tensors(_NATIVE),  # of older versions of PyTorch
        on_tensors(_NUMPY),
        _of(tensors.OWN_OPERATORS),
    )


def _for_cupy() -> tuple[Candidate, ...]:
    from batchnorm.backends.cuda import devices

    return Candidate(("cupy",), devices.on_arrays, lambda arrays: devices.unusable()), _of(GENERIC)


def _for_jax() -> tuple[Candidate, ...]:
    native, jax = frameworks.load("jax.native").NATIVE_JAX, frameworks.load("jax.array_code").JAX
    return _of(native), _of(jax), _of(GENERIC)


def _for_dask() -> tuple[Candidate, ...]:
    from batchnorm.backends import dask

    chunks = dask.Dask(backend_for)  # what is asked for by name is asked of the chunks
    return Candidate(_BUT_GENERIC, lambda arrays: chunks), _of(GENERIC)


# Module and class of arrays, and their backends in order of preference. All others have `generic`.
_TABLE: tuple[tuple[str, str, Callable[[], tuple[Candidate, ...]]], ...] = (
    ("numpy", "ndarray", _for_numpy),
    ("torch", "Tensor", _for_torch),
    ("cupy", "ndarray", _for_cupy),
    ("jax", "Array", _for_jax),
    ("jax.core", "Tracer", _for_jax),
    ("dask.array", "Array", _for_dask),
)


@functools.lru_cache(maxsize=64)
def _candidates(kind: type) -> tuple[Candidate, ...]:
    """Return the backends for a class of arrays, in order of preference."""
    for module, ndarray, candidates in _TABLE:
        library = sys.modules.get(module)
        if library is not None and issubclass(kind, getattr(library, ndarray)):
            return candidates()
    return (_of(GENERIC),)


def _whole_calls(kind: type) -> Any:
    """Return what takes whole calls on a class of arrays, where nobody added or asked for a backend."""
    if _added or get_kernels() not in (None, "native"):
        return optimistic.NOTHING
    compiled = core.load()
    if compiled is None:
        return optimistic.NOTHING
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and kind is numpy.ndarray:
        return compiled
    if torch is not None and kind in (torch.Tensor, torch.nn.Parameter):
        from batchnorm.backends import tensors

        if tensors.exchange() is not None:
            return frameworks.load("torch.eager")
    return optimistic.NOTHING


optimistic.find = _whole_calls

# What users add and ask for.

_added: tuple[tuple[type, Backend], ...] = ()
_asked: str | None = None


def _with_added(kind: type) -> list[Candidate]:
    """Return the backends for a class of arrays, with those that users added, the last one first."""
    own = _candidates(kind)
    added = [_of(backend) for base, backend in reversed(_added) if issubclass(kind, base)]
    return [*(c for c in own if c.required), *added, *(c for c in own if not c.required)]


def add_kernels(kind: type, backend: Backend) -> Callable[[], None]:
    """Run a backend of your own on a class of arrays.

    Parameters
    ----------
    kind : type
        The class of arrays, or a base of it.
    backend : Backend
        Its `refuses` is asked with the arrays of each call; a call that it refuses is left to what would
        run without it: backends that were added earlier, then the package's own.

    Returns
    -------
    callable
        Takes the backend away again.

    Raises
    ------
    TypeError
        `kind` is not a class, or `backend` is not a `Backend`.

    Notes
    -----
    Backends that are asked for by name, with `set_kernels` or ``BATCHNORM_KERNELS``, have precedence.
    Tensors that PyTorch differentiates go through this package's operators, which ask the backend about
    plain tensors. Chunks of Dask's arrays are NumPy's arrays (or another library's); PyTorch's tensors
    are not, though the package's own backends for NumPy's arrays run on them.
    """
    global _added
    if not isinstance(kind, type):
        fail(TypeError, "kind", describe(kind), "a class of arrays")
    if not isinstance(backend, Backend):
        fail(TypeError, "backend", describe(backend), "a Backend")
    entry = (kind, backend)
    _added = (*_added, entry)
    optimistic.calls.clear()

    def remove() -> None:
        global _added
        _added = tuple(other for other in _added if other is not entry)
        optimistic.calls.clear()

    return remove


def set_kernels(name: str | None) -> None:
    """Ask for one backend, and no other: for tests and comparisons.

    Parameters
    ----------
    name : {"native", "numpy", "cupy", "jax", "generic"} or None
        None for the default: the environment variable ``BATCHNORM_KERNELS``, or the fastest that can
        run. Where the named one cannot run on an array, the call is an error.

    Raises
    ------
    TypeError, ValueError
        `name` is not the name of a backend.
    """
    global _asked
    if name is not None:
        validate_choice("name", name, NAMES, ", or None for the default")
    _asked = name
    optimistic.calls.clear()


def get_kernels() -> str | None:
    """Tell which backend was asked for, with `set_kernels` or ``BATCHNORM_KERNELS``.

    Returns
    -------
    str or None
        None where the fastest that can run is chosen.
    """
    return _asked or _from_environment()


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get(VARIABLE, "")
    return validate_choice(VARIABLE, name, NAMES) if name else None
