"""Numbers and tables at addresses, for Numba: what loops are given instead of arrays."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

I64 = ir.IntType(64)
_INT = types.int64


def pointer(builder: Any, address: Any, index: Any, kind: ir.Type) -> Any:
    """Where a value of a kind lies; for what emits code."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def item(typing: Any, address: Any, place: Any) -> Any:
    """A number of a row of numbers of 64 bits."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(pointer(builder, *args, I64))

    return _INT(_INT, _INT), emit


@intrinsic
def set_item(typing: Any, address: Any, place: Any, value: Any) -> Any:
    """Write a number of a row of numbers of 64 bits."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, *args[:2], I64))
        return context.get_dummy_value()

    return types.void(_INT, _INT, _INT), emit


@intrinsic
def real_item(typing: Any, address: Any, place: Any) -> Any:
    """The same as a float64."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(pointer(builder, *args, ir.DoubleType()))

    return types.float64(_INT, _INT), emit


@intrinsic
def table(typing: Any, address: Any, rows: Any, columns: Any, like: Any) -> Any:
    """Memory as a table: an array that owns nothing."""
    kind = types.Array(like, 2, "C")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        stored = context.get_data_type(like)
        each = context.get_constant(types.intp, context.get_abi_sizeof(stored))
        populate_array(
            array,
            data=builder.inttoptr(args[0], stored.as_pointer()),
            shape=cgutils.pack_array(builder, args[1:3]),
            strides=cgutils.pack_array(builder, [builder.mul(args[2], each), each]),
            itemsize=each,
            meminfo=None,
        )
        return array._getvalue()

    return kind(_INT, _INT, _INT, like), emit


@intrinsic
def row_of(typing: Any, table: Any, row: Any, first: Any) -> Any:
    """The address of a place in a table."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(table)(context, builder, args[0])
        _, columns = cgutils.unpack_tuple(builder, array.shape, 2)
        index = builder.add(builder.mul(args[1], columns), args[2])
        return builder.ptrtoint(builder.gep(array.data, [index]), I64)

    return _INT(table, _INT, _INT), emit
