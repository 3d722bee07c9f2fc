"""Vector instructions that a compiled loop cannot be brought to use by itself, as intrinsics of numba.

What is written here in LLVM's terms is what counting spends its vector time on: see `sift` and `pour`. Values are
handled in lanes of 16 at a time, which LLVM cuts to the width that the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
from llvmlite import ir
from numba.core import cgutils as untyped_cgutils
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray

_array_class: Any = arrayobj.make_array
_cgutils: Any = untyped_cgutils

LANES = 16
STEP = 2 * LANES
"""`sift` takes a multiple of it."""

EXTREMES = 3 * LANES
"""Size of the array in which extremes are kept, 16 lanes each: the largest pattern read as a signed number, the largest
read as an unsigned one, and the smallest magnitude that is not zero, less one."""

WINDOW = 2**16
"""Number of places."""

UNIT = 4
"""`sift` counts a multiple of it at a time."""

_NONE = (0x80000000, 0, 0xFFFFFFFF)
"""The extremes of no values, each of one lane."""

NO_EXTREMES = np.repeat(np.array(_NONE, dtype=np.uint32), LANES)
"""The same of all lanes."""

Packing = Literal["compress", "shuffle", "store"]
"""How wanted values are moved together: AVX-512's compression of 16-bit lanes, SSSE3's shuffle of bytes, or LLVM's own
operation, which is one instruction on some processors, and a sequence of them on any."""

_BIT, _BYTE, _SHORT, _WORD, _LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_words = ir.VectorType(_WORD, LANES)
_shorts = ir.VectorType(_SHORT, LANES)
_flags = ir.VectorType(_BIT, LANES)
_half_shorts = ir.VectorType(_SHORT, LANES // 2)
_half_bytes = ir.VectorType(_BYTE, LANES)


def _address(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


pointer = cast(Callable[[int], Any], intrinsic(_address))
"""Turn an address into a pointer, of which `numba.carray` makes an array; in compiled loops only."""


def _sift(
    typing_context: Any,
    values: Any,
    start: Any,
    size: Any,
    shift: Any,
    first: Any,
    places: Any,
    extremes: Any,
    counts: Any,
    earlier: Any,
    rate: Any,
) -> Any:
    if not isinstance(shift, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(index: int) -> Any:
            return _array_class(signature.args[index])(context, builder, arguments[index]).data

        source = builder.gep(data(0), [arguments[1]])
        target, found, counted, waiting = data(5), data(6), data(7), data(8)
        lowest = builder.trunc(arguments[4], _WORD)
        packing = _packing(context)
        # Variables of the loop, which LLVM keeps in registers.
        end = _cgutils.alloca_once_value(builder, _LONG(0))
        done = _cgutils.alloca_once_value(builder, _LONG(0))
        best = [_cgutils.alloca_once(builder, _words) for _ in _NONE]
        for variable, nothing in zip(best, _NONE, strict=True):
            builder.store(_all(nothing), variable)
        with _cgutils.for_range_slice(builder, _LONG(0), arguments[2], _LONG(STEP)) as (position, _):
            patterns, magnitudes = [], []
            for part in range(STEP // LANES):
                index = builder.add(position, _LONG(LANES * part))
                _prefetch(builder, builder.gep(source, [builder.add(index, _LONG(_AHEAD))]))
                pattern = builder.load(_vector_at(builder, source, index), align=4)
                patterns.append(pattern)
                magnitude = builder.and_(pattern, _all(0x7FFFFFFF))
                magnitudes.append(builder.sub(magnitude, _all(1)))  # that of a zero becomes the largest
                place = builder.sub(builder.lshr(magnitude, _all(shift.literal_value)), _repeated(builder, lowest))
                wanted = builder.icmp_unsigned("!=", magnitude, _all(0))
                kept = builder.load(end)
                _store_wanted(builder, packing, builder.trunc(place, _shorts), wanted, builder.gep(target, [kept]))
                number = builder.zext(builder.ctpop(builder.bitcast(wanted, _SHORT)), _LONG)
                builder.store(builder.add(kept, number), end)
            kinds = ((patterns, ">", True), (patterns, ">", False), (magnitudes, "<", False))
            for variable, (vectors, compare, signed) in zip(best, kinds, strict=True):
                both = _extreme(builder, compare, *vectors, signed=signed)
                builder.store(_extreme(builder, compare, builder.load(variable), both, signed=signed), variable)
            with _cgutils.for_range_slice(builder, _LONG(0), arguments[9], _LONG(UNIT)):
                begin = builder.load(done)
                for k in range(UNIT):
                    place = builder.load(builder.gep(waiting, [builder.add(begin, _LONG(k))]))
                    count = builder.gep(counted, [builder.zext(place, _LONG)])
                    builder.store(builder.add(builder.load(count), _SHORT(1)), count)
                builder.store(builder.add(begin, _LONG(UNIT)), done)
        outside = _outside(builder, [builder.load(variable) for variable in best], lowest, shift.literal_value)
        with builder.if_then(builder.not_(outside)):
            for kind, (variable, (_, compare, signed)) in enumerate(zip(best, kinds, strict=True)):
                state = _vector_at(builder, found, _LONG(LANES * kind))
                both = _extreme(builder, compare, builder.load(state, align=4), builder.load(variable), signed=signed)
                builder.store(both, state, align=4)
        return builder.select(outside, _LONG(-1), builder.load(end))

    index = types.intp
    return index(values, index, index, shift, index, places, extremes, counts, earlier, index), generate


sift = cast(Callable[..., int], intrinsic(prefer_literal=True)(_sift))
"""Find the extremes of values, write down the places of those that are not zero, and count places of earlier values.

    place = ((pattern & 0x7FFFFFFF) >> shift) - first

To count is to store, once a cycle at best; what else is done here takes other parts of the processor, which would be
idle in the meantime. In compiled loops only.

Args:
    values: float32 patterns, uint32.
    start: index of the first one.
    size: how many there are, a multiple of STEP.
    shift: a literal.
    first: what place 0 stands for, from 0 to (0x7F800000 >> shift) - WINDOW.
    places: where they are written, uint16, in the order of the values; up to LANES further entries are written to.
    extremes: uint32, shape (EXTREMES,), those so far; brought up to date.
    counts: uint16, shape (WINDOW,): those of `earlier` are incremented.
    earlier: places, uint16.
    rate: how many of them are counted for each STEP of values, a multiple of UNIT.

Returns:
    The number of places; -1 where a value has none, infinities and NaN among them. Then `places` holds nothing of use,
    and the extremes are those before. The earlier places are counted in either case.
"""


def _pour(typing_context: Any, counts: Any, start: Any, size: Any, counters: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            builder.gep(_array_class(signature.args[index])(context, builder, arguments[index]).data, [arguments[1]])
            for index in (0, 3)
        )
        with _cgutils.for_range_slice(builder, _LONG(0), arguments[2], _LONG(STEP)) as (position, _):
            addresses = [builder.gep(source, [builder.add(position, _LONG(part))]) for part in (0, LANES)]
            addresses = [builder.bitcast(address, _shorts.as_pointer()) for address in addresses]
            vectors = [builder.load(address, align=2) for address in addresses]
            filled = builder.icmp_unsigned("!=", builder.or_(*vectors), ir.Constant(_shorts, [0] * LANES))
            with builder.if_then(builder.icmp_unsigned("!=", builder.bitcast(filled, _SHORT), _SHORT(0))):
                for part, (address, vector) in enumerate(zip(addresses, vectors, strict=True)):
                    counter = _vector_at(builder, target, builder.add(position, _LONG(LANES * part)))
                    total = builder.add(builder.load(counter, align=4), builder.zext(vector, _words))
                    builder.store(total, counter, align=4)
                    builder.store(ir.Constant(_shorts, [0] * LANES), address, align=2)
        return context.get_dummy_value()

    index = types.intp
    return types.void(counts, index, index, counters), generate


pour = cast(Callable[[NDArray[np.uint16], int, int, NDArray[np.uint32]], None], intrinsic(_pour))
"""Add counts to counters and make them zero; in compiled loops only.

Args:
    counts: most of them zero.
    start: index of the first one, in both arrays.
    size: how many there are, a multiple of STEP.
    counters: what they are added to; those whose counts are zero are hardly touched.
"""

_AHEAD = 512
"""Values ahead of which the processor is asked to fetch others: its own prefetching stops at the end of a page.

They are asked for as what is read once, so that they do not drive out of the cache what is incremented.
"""


def _prefetch(builder: Any, address: Any) -> None:
    address = builder.bitcast(address, _cgutils.voidptr_t)
    kind = ir.FunctionType(ir.VoidType(), [address.type, _WORD, _WORD, _WORD])
    function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
    builder.call(function, [address, _WORD(0), _WORD(0), _WORD(1)])  # for reading, once, data


def _vector_at(builder: Any, array: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(array, [index]), _words.as_pointer())


def _all(value: int) -> Any:
    return ir.Constant(_words, [value] * LANES)


def _outside(builder: Any, extremes: Any, lowest: Any, shift: int) -> Any:
    """Tell whether a value lies outside of the window."""
    signed, unsigned, least = extremes
    low = builder.shl(lowest, _WORD(shift))
    high = builder.add(low, _WORD(WINDOW << shift))
    # The smallest magnitude is given less one, so that no value, and nothing but zeros, is the largest number.
    is_zero = builder.icmp_unsigned("==", low, _WORD(0))
    least_inside = builder.select(is_zero, low, builder.sub(low, _WORD(1)))
    found = (
        builder.icmp_signed(">=", signed, _repeated(builder, high)),
        builder.icmp_unsigned(">=", unsigned, _repeated(builder, builder.or_(high, _WORD(0x80000000)))),
        builder.icmp_unsigned("<", least, _repeated(builder, least_inside)),
    )
    lanes = builder.or_(builder.or_(found[0], found[1]), found[2])
    return builder.icmp_unsigned("!=", builder.bitcast(lanes, _SHORT), _SHORT(0))


def _repeated(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_words, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _WORD(0)), nothing, _all(0))


def _extreme(builder: Any, compare: str, one: Any, other: Any, *, signed: bool = False) -> Any:
    comparison = builder.icmp_signed if signed else builder.icmp_unsigned
    return builder.select(comparison(compare, one, other), one, other)


def _packing(context: Any) -> Packing:
    """Tell how the processor that is compiled for moves values together."""
    features = set(str(context.codegen().magic_tuple()[2]).split(","))
    if {"+avx512vbmi2", "+avx512vl"} <= features:
        return "compress"
    return "shuffle" if "+ssse3" in features else "store"


def _store_wanted(builder: Any, packing: Packing, values: Any, wanted: Any, address: Any) -> None:
    """Store the wanted ones of 16 values one after the other; what lies behind them is undefined."""
    if packing == "compress":
        kind = ir.FunctionType(_shorts, [_shorts, _shorts, _flags])
        compress = _cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i16")
        moved = builder.call(compress, [values, ir.Constant(_shorts, ir.Undefined), wanted])
        builder.store(moved, builder.bitcast(address, _shorts.as_pointer()), align=2)
    elif packing == "shuffle":
        mask = builder.bitcast(wanted, _SHORT)
        low = builder.trunc(mask, _BYTE)
        high = builder.trunc(builder.lshr(mask, _SHORT(8)), _BYTE)
        number = builder.zext(builder.ctpop(low), _LONG)
        for half, flags, place in ((0, low, address), (1, high, builder.gep(address, [number]))):
            lanes = ir.Constant(ir.VectorType(_WORD, LANES // 2), [LANES // 2 * half + k for k in range(LANES // 2)])
            moved = _shuffled(builder, builder.shuffle_vector(values, values, lanes), flags)
            builder.store(moved, builder.bitcast(place, _half_shorts.as_pointer()), align=2)
    else:
        kind = ir.FunctionType(ir.VoidType(), [_shorts, address.type, _flags])
        store = _cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v16i16")
        builder.call(store, [values, address, wanted])


def _shuffled(builder: Any, values: Any, flags: Any) -> Any:
    """Bring the wanted ones of 8 values to the front."""
    kind = ir.FunctionType(_half_bytes, [_half_bytes, _half_bytes])
    shuffle = _cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
    orders = _global_orders(builder)
    order = builder.load(builder.gep(orders, [_LONG(0), builder.zext(flags, _LONG)]), align=16)
    return builder.bitcast(builder.call(shuffle, [builder.bitcast(values, _half_bytes), order]), _half_shorts)


def _global_orders(builder: Any) -> Any:
    """For each mask of 8 lanes the byte order that brings the lanes in it to the front, in a table of the module."""
    name = "trt_int8.lanes.orders"
    if name in builder.module.globals:
        return builder.module.globals[name]
    orders = []
    for mask in range(2**8):
        front = [2 * lane + byte for lane in range(8) if mask >> lane & 1 for byte in range(2)]
        orders.append(ir.Constant(_half_bytes, front + [0] * (16 - len(front))))
    return _cgutils.global_constant(builder.module, name, ir.Constant(ir.ArrayType(_half_bytes, len(orders)), orders))
