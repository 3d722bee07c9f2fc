"""Vector instructions that a compiled loop cannot be brought to use by itself, as intrinsics of numba.

What is written here in LLVM's terms is what counting spends its vector time on: see `sift`. Values are handled in lanes
of 8 at a time, in any order, since nobody asks a histogram for one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba.core import cgutils as untyped_cgutils
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray

_array_class: Any = arrayobj.make_array
_cgutils: Any = untyped_cgutils

LANES = 8
STEP = 32
"""Values that one call of `sift` takes."""

EXTREMES = 3 * LANES
"""Size of the array in which extreme values are kept: largest signed, largest and smallest unsigned, 8 lanes each."""

_BYTE, _SHORT, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_words = ir.VectorType(_WORD, LANES)
_shorts = ir.VectorType(_SHORT, LANES)
_bytes = ir.VectorType(_BYTE, 2 * LANES)
_flags = ir.VectorType(ir.IntType(1), LANES)


def _address(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


pointer = cast(Callable[[int], Any], intrinsic(_address))
"""Turn an address into a pointer, of which `numba.carray` makes an array; in compiled loops only."""


def _sift(
    typing_context: Any, values: Any, start: Any, shift: Any, first: Any, places: Any, kept: Any, extremes: Any
) -> Any:
    if not isinstance(shift, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(index: int) -> Any:
            return _array_class(signature.args[index])(context, builder, arguments[index]).data

        def vector(array: Any, index: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(array, [index]), kind.as_pointer())

        def larger(one: Any, other: Any, *, signed: bool) -> Any:
            compare = builder.icmp_signed if signed else builder.icmp_unsigned
            return builder.select(compare(">", one, other), one, other)

        def smaller(one: Any, other: Any, *, signed: bool = False) -> Any:
            compare = builder.icmp_signed if signed else builder.icmp_unsigned
            return builder.select(compare("<", one, other), one, other)

        source, target, found = data(0), data(4), data(6)
        lowest = _repeated(builder, builder.trunc(arguments[3], _WORD))
        end = arguments[5]
        patterns = []
        for part in range(STEP // LANES):
            index = builder.add(arguments[1], _LONG(LANES * part))
            pattern = builder.load(vector(source, index, _words), align=4)
            patterns.append(pattern)
            magnitude = builder.and_(pattern, _all(0x7FFFFFFF))
            place = builder.sub(builder.lshr(magnitude, _all(shift.literal_value)), lowest)
            place = smaller(larger(place, _all(0), signed=True), _all(0xFFFF), signed=True)
            wanted = builder.icmp_unsigned("!=", magnitude, _all(0))
            end = _append(context, builder, builder.trunc(place, _shorts), wanted, target, end)
        combinations: list[Any] = [
            lambda one, other: larger(one, other, signed=True),
            lambda one, other: larger(one, other, signed=False),
            smaller,
        ]
        for kind, combine in enumerate(combinations):
            state = vector(found, _LONG(LANES * kind), _words)
            a, b, c, d = patterns
            best = combine(combine(a, b), combine(c, d))
            builder.store(combine(best, builder.load(state, align=4)), state, align=4)
        return end

    index = types.intp
    return index(values, index, shift, index, places, index, extremes), generate


sift = cast(
    Callable[[NDArray[np.uint32], int, int, int, NDArray[np.uint16], int, NDArray[np.uint32]], int],
    intrinsic(prefer_literal=True)(_sift),
)
"""Take 32 values, find their extremes, and write down the places of those that are not zero; in compiled loops only.

    place = clamp(((pattern & 0x7FFFFFFF) >> shift) - first, 0, 65535)

Args:
    values: float32 patterns.
    start: index of the first of 32.
    shift: a literal.
    first: what place 0 stands for.
    places: where they are written, in the order of the values; up to 8 further entries are written to.
    kept: number of places before.
    extremes: shape (EXTREMES,), largest and smallest patterns so far; brought up to date.

Returns:
    The number of places now.
"""


def _all(value: int) -> Any:
    return ir.Constant(_words, [value] * LANES)


def _repeated(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_words, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _WORD(0)), nothing, _all(0))


def _append(context: Any, builder: Any, values: Any, wanted: Any, target: Any, end: Any) -> Any:
    """Store the wanted ones of 8 values at `target[end:]`; return the new end."""
    mask = builder.bitcast(wanted, _BYTE)
    address = builder.gep(target, [end])
    if _shuffles_bytes(context):
        kind = ir.FunctionType(_bytes, [_bytes, _bytes])
        shuffle = _cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
        orders = _global_orders(builder)
        order = builder.load(builder.gep(orders, [_LONG(0), builder.zext(mask, _LONG)]), align=16)
        moved = builder.call(shuffle, [builder.bitcast(values, _bytes), order])
        builder.store(builder.bitcast(moved, _shorts), builder.bitcast(address, _shorts.as_pointer()), align=2)
    else:
        kind = ir.FunctionType(ir.VoidType(), [_shorts, address.type, _flags])
        store = _cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v8i16")
        builder.call(store, [values, address, wanted])
    return builder.add(end, builder.zext(builder.ctpop(mask), _LONG))


def _shuffles_bytes(context: Any) -> bool:
    """Tell whether the processor that is compiled for has x86's shuffle of 16 bytes.

    Elsewhere LLVM's own operation does the same, in one instruction or in eight.
    """
    return "+ssse3" in str(context.codegen().magic_tuple())


def _global_orders(builder: Any) -> Any:
    """For each mask of 8 lanes the byte order that brings the lanes in it to the front, in a table of the module."""
    name = "trt_int8.lanes.orders"
    if name in builder.module.globals:
        return builder.module.globals[name]
    orders = []
    for mask in range(1 << LANES):
        front = [2 * lane + byte for lane in range(LANES) if mask >> lane & 1 for byte in range(2)]
        orders.append(ir.Constant(_bytes, front + [0] * (2 * LANES - len(front))))
    return _cgutils.global_constant(builder.module, name, ir.Constant(ir.ArrayType(_bytes, len(orders)), orders))
