"""Vectors of 16 lanes for Numba: what the loops beside this file are written in.

A plain loop leaves it to the compiler whether and how to vectorize: it has to prove that buffers do
not overlap, it may add in any order that a flag permits, and it never stores past the cache. A loop
over lanes says all three. A sum is 16 partial sums on every processor (the compiler cuts 16 lanes
into whatever registers there are), an operand is read before its place is written, and `store` can
stream.

Storage is told by a sentinel, `like`: a scalar whose type names the dtype in memory. Addresses are
integers, steps and indices count values of that dtype.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16

# The dtype in memory -> its sentinel. Numba has no 16-bit floats on a CPU, so integers of that size
# stand for them.
SENTINELS = {
    "float32": np.float32(0),
    "float64": np.float64(0),
    "float16": np.int16(0),
    "bfloat16": np.uint16(0),
    "bool": np.uint8(0),
}
HALF, BRAIN = types.int16, types.uint16

I32, I64 = ir.IntType(32), ir.IntType(64)
CONTRACT = ("contract",)  # a product may be added without being rounded first


class Lanes(types.Type):  # type: ignore[misc]
    """16 values of float32 or float64 that are worked on at once."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.VectorType(_llvm(kind.dtype), WIDTH))


def _llvm(dtype: types.Float) -> ir.Type:
    return ir.DoubleType() if dtype == types.float64 else ir.FloatType()


def _computes_in(like: types.Type) -> types.Float:
    """The dtype in which values of a stored dtype are worked on."""
    return types.float64 if like == types.float64 else types.float32


# a + b, a - b and a * b, lane by lane.
for _operator, _method in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):

    @infer_global(_operator)
    class _Arithmetic(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Lanes) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(_operator, Lanes, Lanes)
    def _lower(context: Any, builder: Any, sig: Any, args: Any, method: str = _method) -> Any:
        return getattr(builder, method)(*args, flags=CONTRACT)


def _int(value: int, kind: ir.Type = I32) -> ir.Constant:
    return ir.Constant(kind, value)


def _splat(builder: Any, value: Any) -> Any:
    """One value in all lanes."""
    vector = ir.VectorType(value.type, WIDTH)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _int(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, WIDTH), [0] * WIDTH))


def _pointer(builder: Any, address: Any, index: Any, kind: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


# What lies in memory, the LLVM type to read it as, and how that becomes and comes from a number.


def _stored(like: types.Type) -> ir.Type:
    kinds = {HALF: ir.HalfType(), BRAIN: ir.IntType(16), types.uint8: ir.IntType(8)}
    return kinds.get(like) or _llvm(like)


def _over(raw: Any, kind: ir.Type) -> ir.Type:
    """A type with as many lanes as a value has."""
    return ir.VectorType(kind, WIDTH) if isinstance(raw.type, ir.VectorType) else kind


def _decode(builder: Any, raw: Any, like: types.Type) -> Any:
    """From what is stored to float32 or float64; one value or all lanes."""
    if like == types.uint8:
        return builder.uitofp(raw, _over(raw, ir.FloatType()))
    if like == HALF:
        return builder.fpext(raw, _over(raw, ir.FloatType()))
    if like == BRAIN:  # the upper half of a float32
        wide = builder.zext(raw, _over(raw, I32))
        return builder.bitcast(builder.shl(wide, _all(wide, 16)), _over(raw, ir.FloatType()))
    return raw


def _encode(builder: Any, value: Any, like: types.Type) -> Any:
    """From float32 or float64 to what is stored, to nearest even."""
    if like == HALF:
        return builder.fptrunc(value, _over(value, ir.HalfType()))
    if like == BRAIN:
        bits = builder.bitcast(value, _over(value, I32))
        odd = builder.and_(builder.lshr(bits, _all(bits, 16)), _all(bits, 1))
        rounded = builder.add(bits, builder.add(odd, _all(bits, 0x7FFF)))
        quiet = builder.or_(bits, _all(bits, 0x400000))  # a NaN stays one, whatever is cut off
        kept = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(kept, _all(bits, 16)), _over(value, ir.IntType(16)))
    return value


def _all(like: Any, value: int) -> ir.Constant:
    """An integer constant of the type of a value."""
    if isinstance(like.type, ir.VectorType):
        return ir.Constant(like.type, [value] * WIDTH)
    return ir.Constant(like.type, value)


@intrinsic
def load(typing: Any, address: Any, index: Any, like: Any) -> Any:
    """Read 16 neighbours into lanes."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(kind, WIDTH).as_pointer()
        pointer = builder.bitcast(_pointer(builder, args[0], args[1], kind), vector)
        return _decode(builder, builder.load(pointer, align=_size(kind)), like)

    return Lanes(_computes_in(like))(address, index, like), emit


@intrinsic
def gather(typing: Any, address: Any, index: Any, step: Any, like: Any) -> Any:
    """Read 16 values that lie a step apart into lanes."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw: Any = ir.Constant(ir.VectorType(kind, WIDTH), ir.Undefined)
        at = args[1]
        for lane in range(WIDTH):
            value = builder.load(_pointer(builder, args[0], at, kind), align=_size(kind))
            raw = builder.insert_element(raw, value, _int(lane))
            at = builder.add(at, args[2])
        return _decode(builder, raw, like)

    return Lanes(_computes_in(like))(address, index, step, like), emit


@intrinsic
def load1(typing: Any, address: Any, index: Any, like: Any) -> Any:
    """Read one value."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], args[1], kind)
        return _decode(builder, builder.load(pointer, align=_size(kind)), like)

    return _computes_in(like)(address, index, like), emit


@intrinsic
def store(typing: Any, address: Any, index: Any, value: Any, like: Any) -> Any:
    """Write lanes to 16 neighbours."""
    return types.void(address, index, value, like), _storing(like, streaming=False)


@intrinsic
def stream(typing: Any, address: Any, index: Any, value: Any, like: Any) -> Any:
    """Write lanes to 16 neighbours past the cache; their address is a multiple of their size."""
    return types.void(address, index, value, like), _storing(like, streaming=True)


def _storing(like: types.Type, streaming: bool) -> Any:
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw = _encode(builder, args[2], like)
        pointer = _pointer(builder, args[0], args[1], kind)
        align = _size(kind) * (min(WIDTH, 64 // _size(kind)) if streaming else 1)
        whole = builder.store(raw, builder.bitcast(pointer, raw.type.as_pointer()), align=align)
        if streaming:
            whole.set_metadata("nontemporal", builder.module.add_metadata([_int(1)]))
        return context.get_dummy_value()

    return emit


@intrinsic
def scatter(typing: Any, address: Any, index: Any, step: Any, value: Any, like: Any) -> Any:
    """Write lanes to 16 places that lie a step apart."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw, at = _encode(builder, args[3], like), args[1]
        for lane in range(WIDTH):
            place = _pointer(builder, args[0], at, kind)
            builder.store(builder.extract_element(raw, _int(lane)), place, align=_size(kind))
            at = builder.add(at, args[2])
        return context.get_dummy_value()

    return types.void(address, index, step, value, like), emit


@intrinsic
def store1(typing: Any, address: Any, index: Any, value: Any, like: Any) -> Any:
    """Write one value."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw = _encode(builder, args[2], like)
        builder.store(raw, _pointer(builder, args[0], args[1], kind), align=_size(kind))
        return context.get_dummy_value()

    return types.void(address, index, value, like), emit


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Where the data of an array begins."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        parts = context.make_array(array)(context, builder, args[0])
        return builder.ptrtoint(parts.data, I64)

    return types.int64(array), emit


@intrinsic
def streaming_size(typing: Any, like: Any) -> Any:
    """What the address of a streaming store has to be a multiple of, and the bytes of one value."""
    size = _size(_stored(like))

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return cgutils.pack_array(builder, [_int(min(WIDTH * size, 64), I64), _int(size, I64)])

    return types.UniTuple(types.int64, 2)(like), emit


def _size(kind: ir.Type) -> int:
    if isinstance(kind, ir.IntType):
        return int(kind.width) // 8
    return {ir.HalfType(): 2, ir.FloatType(): 4, ir.DoubleType(): 8}[kind]


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One number in all lanes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return Lanes(value)(value), emit


@intrinsic
def wide(typing: Any, value: Any) -> Any:
    """Lanes, or one number, in float64."""
    lanes = isinstance(value, Lanes)
    source = value.dtype if lanes else value

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if source == types.float64:
            return args[0]
        return builder.fpext(args[0], _over(args[0], ir.DoubleType()))

    return (Lanes(types.float64) if lanes else types.float64)(value), emit


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float64 number in the dtype in which values of a stored dtype are worked on."""
    target = _computes_in(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[0] if target == types.float64 else builder.fptrunc(args[0], ir.FloatType())

    return target(value, like), emit


@intrinsic
def rounded(typing: Any, value: Any, like: Any) -> Any:
    """A float64 number as a stored dtype holds it."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if like == types.float64:
            return args[0]
        raw = _encode(builder, builder.fptrunc(args[0], ir.FloatType()), like)
        return builder.fpext(_decode(builder, raw, like), ir.DoubleType())

    return types.float64(value, like), emit


@intrinsic
def only(typing: Any, weight: Any, value: Any) -> Any:
    """The value where its weight is above zero, else 0 (also for NaN); one or all lanes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero_w, zero = ir.Constant(args[0].type, None), ir.Constant(args[1].type, None)
        return builder.select(builder.fcmp_ordered(">", args[0], zero_w), args[1], zero)

    return value(weight, value), emit


@intrinsic
def either(typing: Any, weight: Any, gradient: Any, value: Any) -> Any:
    """The value where it has a weight or a gradient, else 0 (also for NaN); one or all lanes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weight, gradient, value = args
        weighs = builder.fcmp_ordered(">", weight, ir.Constant(weight.type, None))
        counts = builder.fcmp_unordered("!=", gradient, ir.Constant(gradient.type, None))
        return builder.select(builder.or_(weighs, counts), value, ir.Constant(value.type, None))

    return value(weight, gradient, value), emit


@intrinsic
def as_dtype_of(typing: Any, value: Any, other: Any) -> Any:
    """Lanes or one number in the dtype of another."""
    source, target = (t.dtype if isinstance(t, Lanes) else t for t in (value, other))

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if source == target:
            return args[0]
        cast = builder.fpext if target == types.float64 else builder.fptrunc
        return cast(args[0], _over(args[0], _llvm(target)))

    return other(value, other), emit


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of the lanes, as a tree."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        parts = [builder.extract_element(args[0], _int(lane)) for lane in range(WIDTH)]
        while len(parts) > 1:
            half = len(parts) // 2
            pairs = zip(parts[:half], parts[half:], strict=True)
            parts = [builder.fadd(a, b) for a, b in pairs]
        return parts[0]

    return value.dtype(value), emit


@intrinsic
def peek(typing: Any, address: Any) -> Any:
    """Read a number that another thread may change."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "monotonic", 8)

    return types.int64(address), emit


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """Take a number from a counter that threads share, and leave the next one there."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, _int(1, I64), "monotonic")

    return types.int64(address), emit


__all__ = [
    "SENTINELS",
    "WIDTH",
    "address_of",
    "as_dtype_of",
    "either",
    "fetch_add",
    "gather",
    "load",
    "load1",
    "narrow",
    "only",
    "peek",
    "rounded",
    "scatter",
    "splat",
    "store",
    "store1",
    "stream",
    "streaming_size",
    "total",
    "wide",
]
