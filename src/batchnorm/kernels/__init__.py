"""Ways to run the four kernels, and the one function that picks one for an array."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from batchnorm import checks
from batchnorm.kernels import generic

Array = Any

VARIABLE = "BATCHNORM_KERNELS"
NAMES = ("numba", "numpy", "cupy", "jax", "generic")


class KernelSet(NamedTuple):
    """The four kernels for some kind of array. `kernels/generic.py` specifies each of them."""

    name: str
    """What it is called: for this package's own, the file under `kernels/` that it lives in."""
    why: str
    """Why it was picked."""
    moments: Callable[..., tuple[Array, Array, Array, Array]]
    scale_shift: Callable[..., Array]
    grad_sums: Callable[..., tuple[Array, Array]]
    grad_input: Callable[..., Array]
    forward: Callable[..., Any] | None = None
    """`moments` and `scale_shift` at once, with the arithmetic between them, where there is such.
    This field and those below may change; `kernels/numba.py` has their arguments."""
    backward: Callable[..., Any] | None = None
    """`grad_sums` and `grad_input` at once."""
    inference: Callable[..., Array] | None = None
    """`scale_shift` from given statistics."""
    joined: Callable[..., Any] | None = None
    """`forward` of one member's part of a batch, where a library has to know of the group."""
    again: Callable[..., Any] | None = None
    """The big arrays of a pass by several kernels, where a library would keep what it has read."""

    def __repr__(self) -> str:
        return f"<kernels {self.name}: {self.why}>"


Rule = Callable[..., KernelSet | None]


def kernels_for(x: Array, *others: Array | None) -> KernelSet:
    """Tell which kernel set runs for an array, and why.

    Parameters
    ----------
    x : array
        The array to be normalized, of any array API library.
    *others : array or None
        Other arrays of the same call: a kernel set has to be able to work on all of them.

    Returns
    -------
    KernelSet
        Its `name` and `why` are for people; its other fields are the kernels.

    Raises
    ------
    TypeError
        `x` is not an array of an array API library, or kernels were asked for (with `set_kernels`)
        that cannot run on it.
    ValueError
        ``BATCHNORM_KERNELS`` names no kernels.
    """
    for i, a in enumerate((x, *others)):
        if a is not None or i == 0:
            argument = f"others[{i - 1}]" if i else "x"
            checks.real(argument, checks.namespace(argument, a), a)
    return pick(x, *others)


def pick(x: Array, *others: Array | None) -> KernelSet:
    """Pick the kernel set for the checked arrays of a call."""
    picked = _by_added_rules(x, *others) if _added else None
    kind: Any = type(x)
    return _rule(kind)(x, *others) if picked is None else picked


@functools.lru_cache(maxsize=64)
def _rule(kind: type) -> Callable[..., KernelSet]:
    """The package's rule for a class of arrays."""
    for module, ndarray, rule in _HOSTS:
        library = sys.modules.get(module)
        if library is not None and issubclass(kind, getattr(library, ndarray)):
            return rule
    return _for_others


def _by_added_rules(x: Array, *others: Array | None) -> KernelSet | None:
    """What an added rule picks, if one does and no kernels were asked for by name."""
    if get_kernels() is not None or _watched(x, *others):
        return None
    for kind, rule in reversed(_added):
        picked = rule(x, *others) if isinstance(x, kind) else None
        if isinstance(picked, KernelSet):
            return picked
        if picked is not None:
            got = f"{checks.kind(picked)} from {rule!r}"
            checks.fail(TypeError, "rule", got, "a KernelSet, or None")
    return None


def _watched(*arrays: Array | None) -> bool:
    """Whether PyTorch has to see operators: they call again with plain tensors."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(arrays[0], torch.Tensor):
        return False
    from batchnorm.kernels import torch as adapter

    return (adapter.transformed() or adapter.recorded(arrays)) is not None


def _for_others(x: Array, *others: Array | None) -> KernelSet:
    """The kernel set for a library that has none of its own: array API code."""
    library = checks.library(checks.namespace("x", x))
    if get_kernels() not in (None, "generic"):
        got = f"{get_kernels()!r} asked for, but x is an array of {library}"
        checks.fail(TypeError, "kernels", got, "arrays it can run on")
    return own_kernels(f"{library} has no kernels of its own here")


def _for_numpy(*arrays: Array | None) -> KernelSet:
    """The kernel set for NumPy arrays: the first that can run on all."""
    asked = get_kernels()
    if asked in ("cupy", "jax"):
        got = f"{asked!r} asked for, but the arrays are NumPy's"
        checks.fail(TypeError, "kernels", got, "arrays it can run on")
    if asked is None or asked == "numba":
        compiled, why_not = _numba()
        if compiled is not None:
            why_not = compiled.refuses(arrays)
            if why_not is None:
                return _compiled()
        if asked is not None:
            expected = "arrays it can run on" if compiled is not None else "a Numba that can be imported"
            checks.fail(TypeError, "kernels", f"'numba' asked for, but {why_not}", expected)
        return _blocked(why_not)
    return _blocked("it was asked for") if asked == "numpy" else own_kernels("it was asked for")


def _for_torch(x: Array, *others: Array | None) -> KernelSet:
    """The kernel set for PyTorch's tensors: CUDA kernels, or those of NumPy, on the same memory.

    Where PyTorch has to see operators, they are this package's, which call it again on plain tensors.
    """
    from batchnorm.kernels import torch as adapter

    asked, arrays = get_kernels(), (x, *others)
    why = adapter.transformed()
    if why is not None:
        return own_kernels(f"{why}, which it can do with its own operators")
    if asked == "generic":
        return adapter.restrided(own_kernels("it was asked for"))
    why = adapter.recorded(arrays)
    if why is not None:
        from batchnorm.torch import operators

        return operators.kernel_set(f"operators of this package, on its fastest kernels: {why}")
    on_gpu = x.device.type == "cuda"
    why_not = adapter.refuses(arrays, x.device.type)
    if why_not is not None:
        why_not = f"the tensors {why_not}"
    elif not on_gpu and asked != "cupy":
        return adapter.adapted(_for_numpy(*(a if a is None else adapter.view(a) for a in arrays)))
    elif on_gpu and asked in (None, "cupy"):
        from batchnorm.kernels import cupy

        why_not = cupy.unusable()
        if why_not is None:
            return cupy.on_tensors(x.device.index)
    if asked is not None:
        why_not = why_not or f"the tensors are on the device {x.device}"
        checks.fail(TypeError, "kernels", f"{asked!r} asked for, but {why_not}", "arrays it can run on")
    return adapter.restrided(own_kernels(str(why_not)))


def _for_cupy(x: Array, *others: Array | None) -> KernelSet:
    """The kernel set for CuPy's arrays."""
    from batchnorm.kernels import cupy

    asked = get_kernels()
    if asked == "generic":
        return own_kernels("it was asked for")
    why_not = cupy.unusable()
    if asked in (None, "cupy") and why_not is None:
        return cupy.on_arrays(x.device.id)
    if asked is not None:
        got = f"{asked!r} asked for, but {why_not or 'x is an array of cupy'}"
        checks.fail(TypeError, "kernels", got, "arrays it can run on")
    return own_kernels(str(why_not))


def _for_jax(x: Array, *others: Array | None) -> KernelSet:
    """The kernel set for JAX's arrays, traced ones too."""
    from batchnorm import jax

    asked = get_kernels()
    if asked not in (None, "jax", "generic"):
        got = f"{asked!r} asked for, but x is an array of jax.numpy"
        checks.fail(TypeError, "kernels", got, "arrays it can run on")
    return own_kernels("it was asked for") if asked == "generic" else jax.kernel_set()


def _for_dask(x: Array, *others: Array | None) -> KernelSet:
    """The kernel set for Dask's arrays: what is asked for is asked of the chunks."""
    from batchnorm.kernels import dask

    if get_kernels() == "generic":
        return own_kernels("it was asked for")
    return dask.kernel_set()


# Libraries whose arrays have kernels of their own: module, class, rule.
_HOSTS = (
    ("numpy", "ndarray", _for_numpy),
    ("torch", "Tensor", _for_torch),
    ("cupy", "ndarray", _for_cupy),
    ("jax", "Array", _for_jax),
    ("jax.core", "Tracer", _for_jax),
    ("dask.array", "Array", _for_dask),
)


def add_kernels(kind: type, rule: Rule) -> Callable[[], None]:
    """Run kernels of your own on a class of arrays.

    Parameters
    ----------
    kind : type
        The class of arrays, or a base of it.
    rule : callable
        Called as ``rule(x, *others)`` with the arrays of a call: first the big array (dy in a backward
        pass), then others, which may be None, per-channel vectors among them. Returns the `KernelSet`
        to run on them, or None to leave the call to what would run without this rule: rules that were
        added earlier, then the package's own.

    Returns
    -------
    callable
        Takes the rule away again.

    Raises
    ------
    TypeError
        `kind` is not a class, or `rule` cannot be called; and in calls, where `rule` gave something
        else than a `KernelSet` or None.

    Notes
    -----
    Kernels that are asked for by name, with `set_kernels` or ``BATCHNORM_KERNELS``, have precedence.
    Tensors that PyTorch differentiates go through this package's operators, whose plain tensors the
    rule is asked for. Chunks of Dask's arrays are NumPy's arrays (or another library's); PyTorch's
    tensors are not, though the package's own kernels for NumPy's arrays run on them.

    Kernels also get arrays in the dtype of arithmetic (`at.compute`) that no rule has seen, where a call
    makes such.
    """
    if not isinstance(kind, type):
        got = f"an object of class {type(kind).__name__}"
        checks.fail(TypeError, "kind", got, "a class of arrays")
    checks.function("rule", rule, "a function of arrays that gives a KernelSet")
    global _added
    entry = (kind, rule)
    _added = (*_added, entry)

    def remove() -> None:
        global _added
        _added = tuple(other for other in _added if other is not entry)

    return remove


def set_kernels(name: str | None) -> None:
    """Ask for one kernel set, and no other: for tests and comparisons.

    Parameters
    ----------
    name : {"numba", "numpy", "cupy", "jax", "generic"} or None
        None for the default: the environment variable ``BATCHNORM_KERNELS``, or the fastest that can
        run. Where the named one cannot run on an array, the call is an error.

    Raises
    ------
    TypeError, ValueError
        `name` is not the name of a kernel set.
    """
    global _chosen
    _chosen = _known("name", name) if name is not None else None


def get_kernels() -> str | None:
    """Tell which kernel set was asked for, with `set_kernels` or ``BATCHNORM_KERNELS``.

    Returns
    -------
    str or None
        None where the fastest that can run is picked.
    """
    return _chosen or _from_environment()


_chosen: str | None = None
_added: tuple[tuple[type, Rule], ...] = ()


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get(VARIABLE, "")
    return _known(VARIABLE, name) if name else None


def _known(argument: str, name: str) -> str:
    more = "" if argument == VARIABLE else ", or None for the default"
    return checks.one_of(argument, name, NAMES, more)


@functools.cache
def _numba() -> tuple[ModuleType | None, str]:
    """The compiled kernels, or why there are none. Numba is imported here, for the first array."""
    if importlib.util.find_spec("numba") is None:
        return None, "Numba is not installed: pip install 'batchnorm[numba]'"
    try:
        return importlib.import_module("batchnorm.kernels.numba"), ""
    except Exception as error:  # an installation that does not fit NumPy's, say
        return None, f"Numba cannot be used: {type(error).__name__}: {error}"


@functools.cache
def _compiled() -> KernelSet:
    from batchnorm.kernels import numba

    why = "compiled loops for NumPy arrays and what shares their memory"
    return _set("numba", why, numba)


@functools.cache
def _blocked(why: str) -> KernelSet:
    from batchnorm.kernels import numpy

    return _set("numpy", f"NumPy in blocks, on threads; {why}", numpy)


def _set(name: str, why: str, module: Any) -> KernelSet:
    functions = {f: getattr(module, f) for f in KernelSet._fields[2:] if hasattr(module, f)}
    return KernelSet(name, why, **functions)


@functools.cache
def own_kernels(why: str) -> KernelSet:
    """Give array API code as kernels: a library's own operators and nothing else."""
    return KernelSet(
        "generic",
        f"array API code that every library runs; {why}",
        generic.moments,
        _writing(generic.scale_shift),
        generic.grad_sums,
        _writing(generic.grad_input),
    )


def _writing(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel that hands its result out in the caller's array where there is one."""

    def write(*arguments: Any) -> Array:
        *rest, out = arguments
        return written(kernel(*rest), out)

    return write


def written(result: Array, out: Array | None) -> Array:
    """A result, in the caller's array where there is one."""
    if out is None:
        return result
    out[...] = result
    return out
