"""Memory that threads share, and calls of compiled functions by their address, for Numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batchnorm.backends.compiled.tables import I64

_INT = types.int64
# One order for all threads: the few of these that there are cost next to nothing.
_ORDER = "seq_cst"


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def peek(typing: Any, address: Any) -> Any:
    """Read a number that another thread may change."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), _ORDER, 8)

    return _INT(_INT), emit


@intrinsic
def poke(typing: Any, address: Any, value: Any) -> Any:
    """Write a number that another thread may read."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(_INT, _INT), emit


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """Take a number from a counter that threads share, and leave the next one there."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), ir.Constant(I64, 1), _ORDER)

    return _INT(_INT), emit


@intrinsic
def changed(typing: Any, address: Any, known: Any, value: Any) -> Any:
    """Write a number if what is there is the known one; whether it was."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _pointer(builder, args[0])
        return builder.extract_value(builder.cmpxchg(place, args[1], args[2], _ORDER, _ORDER), 1)

    return types.boolean(_INT, _INT, _INT), emit


@intrinsic
def invoke(typing: Any, function: Any, job: Any, me: Any) -> Any:
    """Call a C function that takes two integers, by its address."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT), emit
