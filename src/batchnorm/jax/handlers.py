"""The core's handlers for XLA on the CPU: their registration with JAX, and how a pass becomes a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from batchnorm import core, threads
from batchnorm.backends.dispatch import get_kernels
from batchnorm.epilogue import KINDS, SLOPE
from batchnorm.jax.settings import Settings

# The bits of optional arguments, in the order of the arguments; as in `src/native/xla.cc`.
GIVEN = {"w": 1, "gamma": 2, "beta": 4, "low": 8, "residual": 16, "y": 32}
GRADIENT = 64


def target(name: str) -> str:
    """Return the name by which XLA knows a handler, and which its error shows where there is none."""
    return f"batchnorm.{name} (import batchnorm.jax)"


@functools.cache
def register() -> None:
    """Register the handlers with JAX, and tell them of the number of threads."""
    compiled = core.load()
    if compiled is None:
        return
    for name, handler in compiled.xla_handlers().items():
        jax.ffi.register_ffi_target(target(name), handler, platform="cpu")
    threads.watch(compiled.set_xla_threads)


def lowering(name: str, array_code: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule that makes a pass a call of its handler, or array code where that cannot be."""
    in_general = mlir.lower_fun(array_code, multiple_results=True)

    def rule(ctx: Any, *operands: Any, names: tuple[str, ...], settings: Settings) -> Any:
        if not _callable_in(ctx.module_context):
            return in_general(ctx, *operands, names=names, settings=settings)
        given = sum(GIVEN.get(n, 0) for n in names) + GRADIENT * settings.gradient
        activation, slope = settings.activation or (None, SLOPE)
        return jax.ffi.ffi_lowering(target(name))(
            ctx,
            *operands,
            given=np.int64(given),
            axes=np.int64(sum(1 << i for i in settings.axes)),
            eps=np.float64(settings.eps),
            activation=np.int64(KINDS.index(activation)),
            slope=np.float64(slope),
        )

    return rule


def _callable_in(module: Any) -> bool:
    """Return whether a module that is compiled for the CPU may call a handler.

    XLA cuts array code for several devices, and would gather the arrays of a call on each. An exported
    program runs where this package is not installed, except when the handlers were asked for by name.
    """
    if core.missing() is not None:
        return False
    if module.lowering_parameters.for_export and get_kernels() != "native":
        return False
    context = module.axis_context
    if isinstance(context, mlir.ShardingContext):
        return bool(context.num_devices == 1)
    if isinstance(context, mlir.SPMDAxisContext):  # all of a mesh's axes are mapped by hand
        return bool(context.mesh.size == 1 or context.manual_axes == frozenset(context.mesh.axis_names))
    return True  # of `pmap`, where each device has a program of its own
