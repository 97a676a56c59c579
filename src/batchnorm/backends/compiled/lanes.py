"""Vectors of 16 lanes for Numba: what the loops beside this file are written in.

A plain loop leaves it to the compiler whether and how to vectorize: it has to prove that buffers do
not overlap, it may add in any order that a flag permits, and it never stores past the cache. A loop
over lanes says all three. A sum is 16 partial sums on every processor (the compiler cuts 16 lanes
into whatever registers there are), an operand is read before its place is written, and `store` can
stream.

Storage is told by a sentinel, `like`: a scalar whose type names the dtype in memory. Addresses are
integers, steps and indices count values of that dtype. A `count` below 16 leaves the other lanes out:
they read as zero and are not written. None stands for all 16, and is compiled on its own.
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

from batchnorm.backends.compiled.tables import I64, pointer

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

I32 = ir.IntType(32)
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


# a + b, a - b, a * b and a / b, lane by lane.
_METHODS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
for _operator, _method in _METHODS.items():

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


def _active(builder: Any, count: Any) -> Any:
    """Which lanes a count leaves in."""
    numbers = ir.Constant(ir.VectorType(I64, WIDTH), list(range(WIDTH)))
    return builder.icmp_signed("<", numbers, _splat(builder, count))


def _masked(builder: Any, name: str, kind: ir.Type, result: ir.Type, *args: Any) -> Any:
    """Call LLVM's load or store of some lanes."""
    function = ir.FunctionType(result, [a.type for a in args])
    suffix = {2: "i16", 1: "i8"}.get(_size(kind)) or ("f64" if _size(kind) == 8 else "f32")
    name = f"llvm.masked.{name}.v{WIDTH}{suffix}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def _bits(kind: ir.Type) -> ir.Type:
    """What a dtype is moved as, some lanes at a time: not every processor moves float16."""
    return ir.IntType(16) if isinstance(kind, ir.HalfType) else kind


@intrinsic
def load(typing: Any, address: Any, index: Any, count: Any, like: Any) -> Any:
    """Read 16 neighbours, or the first of them, into lanes."""
    kind = _stored(like)
    vector, moved = ir.VectorType(kind, WIDTH), ir.VectorType(_bits(kind), WIDTH)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place, count = pointer(builder, args[0], args[1], kind), args[2]
        if isinstance(sig.args[2], types.NoneType):
            place = builder.bitcast(place, vector.as_pointer())
            return _decode(builder, builder.load(place, align=_size(kind)), like)
        place = builder.bitcast(place, moved.as_pointer())
        rest = _int(_size(kind)), _active(builder, count), ir.Constant(moved, None)
        raw = _masked(builder, "load", kind, moved, place, *rest)
        return _decode(builder, builder.bitcast(raw, vector), like)

    return Lanes(_computes_in(like))(address, index, count, like), emit


@intrinsic
def gather(typing: Any, address: Any, index: Any, step: Any, count: Any, like: Any) -> Any:
    """Read 16 values that lie a step apart, or the first of them, into lanes."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw: Any = ir.Constant(ir.VectorType(kind, WIDTH), ir.Undefined)
        for lane, at in enumerate(_steps(builder, sig.args[3], *args[1:4])):
            value = builder.load(pointer(builder, args[0], at, kind), align=_size(kind))
            raw = builder.insert_element(raw, value, _int(lane))
        if not isinstance(sig.args[3], types.NoneType):
            raw = builder.select(_active(builder, args[3]), raw, ir.Constant(raw.type, None))
        return _decode(builder, raw, like)

    return Lanes(_computes_in(like))(address, index, step, count, like), emit


def _steps(builder: Any, counted: types.Type, index: Any, step: Any, count: Any) -> list[Any]:
    """Where lanes lie; those that are left out, where the last one does."""
    at = [index]
    for lane in range(1, WIDTH):
        taken: Any = step
        if not isinstance(counted, types.NoneType):
            inside = builder.icmp_signed("<", _int(lane, I64), count)
            taken = builder.select(inside, step, _int(0, I64))
        at.append(builder.add(at[-1], taken))
    return at


@intrinsic
def store(typing: Any, address: Any, index: Any, value: Any, count: Any, like: Any) -> Any:
    """Write lanes, or the first of them, to neighbours."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw = _encode(builder, args[2], like)
        place = pointer(builder, args[0], args[1], kind)
        if isinstance(sig.args[3], types.NoneType):
            builder.store(raw, builder.bitcast(place, raw.type.as_pointer()), align=_size(kind))
        else:
            raw = builder.bitcast(raw, ir.VectorType(_bits(kind), WIDTH))
            place = builder.bitcast(place, raw.type.as_pointer())
            rest = _int(_size(kind)), _active(builder, args[3])
            _masked(builder, "store", kind, ir.VoidType(), raw, place, *rest)
        return context.get_dummy_value()

    return types.void(address, index, value, count, like), emit


@intrinsic
def stream(typing: Any, address: Any, index: Any, value: Any, like: Any) -> Any:
    """Write lanes to 16 neighbours past the cache; their address is a multiple of `streaming_size`."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw = _encode(builder, args[2], like)
        place = pointer(builder, args[0], args[1], kind)
        align = min(WIDTH * _size(kind), 64)
        whole = builder.store(raw, builder.bitcast(place, raw.type.as_pointer()), align=align)
        whole.set_metadata("nontemporal", builder.module.add_metadata([_int(1)]))
        return context.get_dummy_value()

    return types.void(address, index, value, like), emit


@intrinsic
def scatter(typing: Any, address: Any, index: Any, step: Any, value: Any, count: Any, like: Any) -> Any:
    """Write lanes, or the first of them, to places that lie a step apart."""
    kind = _stored(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw = _encode(builder, args[3], like)
        places = list(enumerate(_steps(builder, sig.args[4], args[1], args[2], args[4])))
        for lane, at in reversed(places):  # what is left out is written over by the last that is not
            place = pointer(builder, args[0], at, kind)
            builder.store(builder.extract_element(raw, _int(lane)), place, align=_size(kind))
        return context.get_dummy_value()

    return types.void(address, index, step, value, count, like), emit


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
    """Lanes, or one number, in the dtype in which values of a stored dtype are worked on."""
    target = _computes_in(like)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if target == types.float64:
            return args[0]
        return builder.fptrunc(args[0], _over(args[0], ir.FloatType()))

    return (Lanes(target) if isinstance(value, Lanes) else target)(value, like), emit


@intrinsic
def rounded(typing: Any, value: Any, like: Any) -> Any:
    """Lanes, or one number, of float64 as a stored dtype holds it."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if like == types.float64:
            return args[0]
        single = builder.fptrunc(args[0], _over(args[0], ir.FloatType()))
        raw = _decode(builder, _encode(builder, single, like), like)
        return builder.fpext(raw, _over(raw, ir.DoubleType()))

    return value(value, like), emit


@intrinsic
def root(typing: Any, value: Any) -> Any:
    """The square root, lane by lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(args[0].type, [args[0].type])
        name = f"llvm.sqrt.v{WIDTH}f64"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return Lanes(types.float64)(value), emit


def _above(builder: Any, number: Any) -> Any:
    """Which lanes are above zero; a NaN is not."""
    return builder.fcmp_ordered(">", number, ir.Constant(number.type, None))


@intrinsic
def above_zero(typing: Any, number: Any, value: Any, other: Any) -> Any:
    """The value in lanes whose number is above zero, and the other elsewhere (also for NaN)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_above(builder, args[0]), args[1], args[2])

    return value(number, value, other), emit


@intrinsic
def any_above_zero(typing: Any, number: Any) -> Any:
    """Whether a lane is above zero."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.IntType(WIDTH)
        return builder.icmp_unsigned(
            "!=", builder.bitcast(_above(builder, args[0]), bits), _int(0, bits)
        )

    return types.boolean(number), emit


@intrinsic
def only(typing: Any, weight: Any, value: Any) -> Any:
    """The value in lanes whose weight is above zero, and 0 elsewhere (also for NaN)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_above(builder, args[0]), args[1], ir.Constant(args[1].type, None))

    return value(weight, value), emit


@intrinsic
def either(typing: Any, weight: Any, gradient: Any, value: Any) -> Any:
    """The value in lanes with a weight or a gradient, and 0 elsewhere (also for NaN)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        weight, gradient, value = args
        weighs = _above(builder, weight)
        counts = builder.fcmp_unordered("!=", gradient, ir.Constant(gradient.type, None))
        return builder.select(builder.or_(weighs, counts), value, ir.Constant(value.type, None))

    return value(weight, gradient, value), emit


@intrinsic
def within(typing: Any, count: Any, value: Any) -> Any:
    """The value in lanes that a count leaves in, and 0 in the others."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if isinstance(sig.args[0], types.NoneType):
            return args[1]
        return builder.select(_active(builder, args[0]), args[1], ir.Constant(args[1].type, None))

    return value(count, value), emit


@intrinsic
def as_dtype_of(typing: Any, value: Any, other: Any) -> Any:
    """Lanes in the dtype of others."""
    source, target = value.dtype, other.dtype

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
