"""The passes as primitives of JAX: array code, shapes, and the rules to transform them.

A primitive takes the arrays that are given, with their names as a parameter. On the CPU it is a call of
the core's handler; elsewhere, and wherever no handler fits, it is array code. Derivatives:

- of `forward`: `tangent`, which is linear in its first four arguments; its transpose is `backward`;
- of `moments`: two of its three results;
- of everything else, and along real weights: JAX's own, of the array code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from batchnorm.backends.generic import GENERIC
from batchnorm.derivatives import jvp
from batchnorm.epilogue import Epilogue, epilogue_of, kept_for_backward
from batchnorm.jax.handlers import lowering
from batchnorm.jax.settings import Settings
from batchnorm.layout import Layout, layout_of
from batchnorm.moments import Moments

Array = Any
Given = dict[str, Array]
Names = tuple[str, ...]
Code = Callable[[Given, Settings], list[Array]]

WEIGHTS = "w"
LINEAR = ("dx", "dgamma", "dbeta", "dz")
_STATS = ("count", "mean", "var")
_AFTER = ("w", "gamma", "beta", "low", "residual", "y")


class Pass(NamedTuple):
    """A primitive, and what it is."""

    primitive: Any
    operands: Names

    def __call__(self, settings: Settings, **given: Array | None) -> list[Array]:
        """Run it on arrays by their names; None is not given."""
        names = tuple(n for n in self.operands if given.get(n) is not None)
        arrays = _alike([jnp.asarray(given[n]) for n in names])
        results: list[Array] = self.primitive.bind(*arrays, names=names, settings=settings)
        return results


def _varying(v: Array) -> frozenset[Any]:
    """Return the axes of a mesh along which an array varies; inside `shard_map` only."""
    aval: Any = jax.typeof(v)
    found = aval.vma if hasattr(aval, "vma") else aval.mat.varying
    return frozenset(found)


def _alike(arrays: list[Array]) -> list[Array]:
    """Return arrays that vary along the same axes of a mesh, as JAX's own operators make them."""
    varying = [_varying(v) for v in arrays]
    every = frozenset().union(*varying)
    if not every:
        return arrays
    lax: Any = jax.lax
    cast = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary
    missing = [tuple(sorted(every - own, key=str)) for own in varying]
    return [cast(v, axes) if axes else v for v, axes in zip(arrays, missing, strict=True)]


# The passes in array code. Each takes arrays by their names, and returns a list of arrays.


def _layout(x: Array, settings: Settings) -> Layout:
    return layout_of("x", jnp, x, settings.axes, None)


def _stats(given: Given) -> Moments:
    return Moments(given.get("count", 1), given["mean"], given["var"], given.get("low"))


def _forward(given: Given, settings: Settings) -> list[Array]:
    x, w, gamma, beta, residual = map(given.get, ("x", "w", "gamma", "beta", "residual"))
    epilogue = epilogue_of(settings.activation, residual)
    layout = _layout(x, settings)
    y, stats = GENERIC.forward(x, w, gamma, beta, settings.eps, layout, epilogue=epilogue)
    return [y, *stats]


def _moments(given: Given, settings: Settings) -> list[Array]:
    x = given["x"]
    return [*GENERIC.statistics(x, given.get("w"), _layout(x, settings))]


def _inference(given: Given, settings: Settings) -> list[Array]:
    x, gamma, beta, residual = map(given.get, ("x", "gamma", "beta", "residual"))
    epilogue = epilogue_of(settings.activation, residual)
    layout, eps = _layout(x, settings), settings.eps
    return [GENERIC.inference(x, _stats(given), gamma, beta, eps, layout, epilogue=epilogue)]


def _epilogue(given: Given, settings: Settings) -> Epilogue | None:
    if settings.activation is None:
        return None
    return Epilogue(settings.activation, given.get("residual"), given.get("y"), settings.gradient)


def _backward(given: Given, settings: Settings) -> list[Array]:
    dy, x, w, gamma, beta = map(given.get, ("dy", "x", "w", "gamma", "beta"))
    layout, epilogue = _layout(x, settings), _epilogue(given, settings)
    last: Any = {"beta": beta, "epilogue": epilogue}
    return [*GENERIC.backward(dy, x, w, _stats(given), gamma, settings.eps, layout, **last)]


def _tangent(given: Given, settings: Settings) -> list[Array]:
    dx, dgamma, dbeta, dz, x, w, gamma, beta = map(given.get, (*LINEAR, "x", "w", "gamma", "beta"))
    last: Any = {"beta": beta, "epilogue": _epilogue(given, settings), "dresidual": dz}
    layout = _layout(x, settings)
    return [*jvp(layout, dx, dgamma, dbeta, x, _stats(given), gamma, w, settings.eps, **last)]


# Shapes and dtypes of results, which vary along a mesh as x does.


def _vector(x: Any, settings: Settings, dtype: Any) -> Any:
    shape = tuple(x.shape[i] for i in settings.axes)
    spec: Any = jax.sharding.PartitionSpec
    sharding = jax.sharding.NamedSharding(x.sharding.mesh, spec(*(None for _ in shape)))
    return x.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def _shapes(name: str, given: Given, settings: Settings) -> list[Any]:
    x = given["x"]
    layout = _layout(x, settings)
    y, wide = x.update(weak_type=False), _vector(x, settings, layout.wide)
    if name == "backward":
        dtype = given["gamma"].dtype if "gamma" in given else layout.compute
        return [y, *[_vector(x, settings, dtype)] * 2, *[y] * settings.gradient]
    return {
        "forward": [y, *[wide] * 4],
        "moments": [wide] * 4,
        "inference": [y],
        "tangent": [y, *[wide] * 2],
    }[name]


# Rules.


def _batched(primitive: Any, operands: Sequence[Array], axes: Sequence[Any], **params: Any) -> Any:
    """Take the axis that `vmap` adds for another axis of channels, the first."""
    names, settings = params["names"], params["settings"]
    size = next(v.shape[axis] for v, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = []
    for name, v, axis in zip(names, operands, axes, strict=True):
        if axis is not None:
            v = jnp.moveaxis(v, axis, 0)
        elif name == WEIGHTS:
            v = v[None]
        else:
            v = jnp.broadcast_to(v, (size, *v.shape))
        moved.append(v)
    settings = settings._replace(axes=(0, *(i + 1 for i in settings.axes)))
    results = primitive.bind(*_alike(moved), names=names, settings=settings)
    return results, [0] * len(results)


def _is_zero(v: Any) -> bool:
    return isinstance(v, ad.Zero) or v.dtype == jax.dtypes.float0


def _own_derivative(array_code: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule that differentiates the array code."""

    def rule(primals: Any, tangents: Any, **params: Any) -> Any:
        moving = [i for i, t in enumerate(tangents) if not _is_zero(t)]

        def function(*values: Array) -> Any:
            arrays = list(primals)
            for i, v in zip(moving, values, strict=True):
                arrays[i] = v
            return array_code(*arrays, **params)

        at = [jnp.asarray(primals[i]) for i in moving]
        return jax.jvp(function, at, [jnp.asarray(tangents[i]) for i in moving])

    return rule


def _of_statistics(dmean: Array, dvar: Array) -> list[Array]:
    """Return tangents of count, mean, var and low: the mean's is that of its first part."""
    zero = jnp.zeros_like(dmean)
    return _alike([zero, dmean, dvar, zero])


def _forward_derivative(primals: Any, tangents: Any, *, names: Names, settings: Settings) -> Any:
    given = dict(zip(names, primals, strict=True))
    along = {n: jnp.asarray(t) for n, t in zip(names, tangents, strict=True) if not _is_zero(t)}
    if WEIGHTS in along:
        return _own_derivative(_array_code(_forward))(primals, tangents, names=names, settings=settings)
    y, count, mean, var, low = FORWARD(settings, **given)
    activation = None if settings.activation is None else settings.activation.name
    beta, residual = given.get("beta"), given.get("residual")
    kept = kept_for_backward(activation, beta, residual, y)
    linear = dict(zip(LINEAR, map(along.get, ("x", "gamma", "beta", "residual")), strict=True))
    stats = {"count": count, "mean": mean, "var": var, "low": low}
    given |= dict(zip(("beta", "residual", "y"), kept, strict=True)) | linear | stats
    dy, dmean, dvar = TANGENT(settings, **given)
    return [y, count, mean, var, low], [dy, *_of_statistics(dmean, dvar)]


def _moments_derivative(primals: Any, tangents: Any, *, names: Names, settings: Settings) -> Any:
    if len(names) > 1 and not _is_zero(tangents[1]):
        return _own_derivative(_array_code(_moments))(primals, tangents, names=names, settings=settings)
    given = dict(zip(names, primals, strict=True))
    count, mean, var, low = MOMENTS(settings, **given)
    given |= {"dx": tangents[0], "count": count, "mean": mean, "var": var, "low": low}
    _, dmean, dvar = TANGENT(
        settings._replace(eps=1.0), **given
    )  # no eps changes these two; 0 may divide
    return [count, mean, var, low], _of_statistics(dmean, dvar)


def _transposed_tangent(
    cotangents: Any, *operands: Any, names: Names, settings: Settings
) -> list[Array | None]:
    wanted = [n for n in names if n in LINEAR]
    given = {n: v for n, v in zip(names, operands, strict=True) if n not in wanted}
    found: Given = {}
    if not isinstance(cotangents[0], ad.Zero):
        dy = cotangents[0]
        gradient = settings.activation is not None and "dz" in wanted
        results = BACKWARD(settings._replace(gradient=gradient), dy=dy, **given)
        found = dict(zip(LINEAR, [*results, dy], strict=False))
    if "dx" in wanted and not all(isinstance(c, ad.Zero) for c in cotangents[1:]):
        x = given["x"]
        through = {n: v for n, v in given.items() if n not in ("beta", "residual", "y")}
        bare = settings._replace(activation=None)
        transpose = jax.linear_transpose(lambda dx: _tangent(through | {"dx": dx}, bare)[1:], x)
        instantiated: Any = ad.instantiate_zeros
        (more,) = transpose([instantiated(c) for c in cotangents[1:]])
        found["dx"] = found["dx"] + more if "dx" in found else more
    dtypes = {n: operands[names.index(n)].aval.dtype for n in wanted}
    return [found[n].astype(dtypes[n]) if n in found else None for n in names]


def _array_code(code: Code) -> Callable[..., list[Array]]:
    """Return a pass in array code with the arguments of its primitive."""

    def array_code(*arrays: Array, names: Names, settings: Settings) -> list[Array]:
        return code(dict(zip(names, arrays, strict=True)), settings)

    return array_code


def _define(name: str, operands: Names, code: Code) -> Pass:
    """Make the primitive of a pass, with its rules."""
    primitive: Any = Primitive(f"batchnorm_{name}")
    primitive.multiple_results = True
    array_code = _array_code(code)

    def shapes(*avals: Any, names: Names, settings: Settings) -> list[Any]:
        return _shapes(name, dict(zip(names, avals, strict=True)), settings)

    @functools.lru_cache(maxsize=256)
    def compiled(names: Names, settings: Settings) -> Any:
        return jax.jit(functools.partial(primitive.bind, names=names, settings=settings))

    def run(*arrays: Array, names: Names, settings: Settings) -> Any:
        with jax.disable_jit(False):  # uncompiled, the function would bind the primitive again
            return compiled(names, settings)(*arrays)

    primitive.def_impl(run)
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, mlir.lower_fun(array_code, multiple_results=True))
    if name != "tangent":
        mlir.register_lowering(primitive, lowering(name, array_code), platform="cpu")
    batching.primitive_batchers[primitive] = functools.partial(_batched, primitive)
    ad.primitive_jvps[primitive] = _own_derivative(array_code)
    return Pass(primitive, operands)


# Optional operands in the order of their bits in `handlers.GIVEN`.
FORWARD = _define("forward", ("x", "w", "gamma", "beta", "residual"), _forward)
MOMENTS = _define("moments", ("x", "w"), _moments)
INFERENCE = _define("inference", ("x", "mean", "var", "gamma", "beta", "low", "residual"), _inference)
BACKWARD = _define("backward", ("dy", "x", *_STATS, *_AFTER), _backward)
TANGENT = _define("tangent", (*LINEAR, "x", *_STATS, *_AFTER), _tangent)

ad.primitive_jvps[FORWARD.primitive] = _forward_derivative
ad.primitive_jvps[MOMENTS.primitive] = _moments_derivative
ad.primitive_transposes[TANGENT.primitive] = _transposed_tangent
