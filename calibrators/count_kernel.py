"""The loops that count magnitudes: they see every activation of every batch, and so decide how fast calibration is.

A processor stores once a cycle, so that it cannot count more than one value a cycle; all other work has to fit beside
that, values that need not be counted one by one are left out, and nothing may wait for memory. The values of an array
are taken in blocks of 1024, which lie in the first-level cache while two things happen to them:

- A pass over the bit patterns in vector lanes (`calibrators.lanes.sift`) finds the extremes, turns each value into its
  place in a window of bins, and writes the places of those that are not zero one after the other. Zeros, which are half
  of all values behind a ReLU, cost no more than that.
- The count of each place is incremented, in the pass over the block behind: vectors and stores take different parts of
  the processor.

Each tensor has counts of 16 bits, of which those that matter, 20 kB, fit the first-level cache, as counters of 32 bits
would not. Before one of them could overflow they are added to the counters, in vector lanes (`calibrators.lanes.pour`);
that is seldom, as it takes 32768 values in one bin.

The window has 65536 bins: 64 octaves, four of them above the tensor's largest magnitude so far. Where a value lies
outside, its block is counted value by value.

All tensors that are in the cache together are counted in one call, since calls from Python cost as much as counting
thousands of values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import BINS, BINS_PER_OCTAVE, FINITE_BINS, SHIFT
from calibrators.lanes import EXTREMES, LANES, STEP, UNIT, WINDOW, pointer, pour, sift

RECORD = 7 + EXTREMES // 2
"""Size of a tensor's record, int64; the last part are its extremes."""

COUNTERS, COUNTED, ZEROS, NONFINITE, COUNTS, FIRST, ROOM, EXTREMES_AT = range(8)
"""What stands where in a record: the address of the counters or 0; how many values there were, and of them zeros and
non-finite ones; the address of the counts, the bin of their first place, and how many values may be counted before one
of them could overflow; the extremes."""

_BLOCK = 1024
_SIDE = _BLOCK + LANES
"""Room for the places of a block."""

_MOST = 2**16 - 1
"""What a count holds."""

_HEADROOM = 4
"""Octaves of the window above the largest magnitude so far."""

_OCTAVES = 32
"""Octaves below the largest magnitude in which there are values after some 2**30 of them."""

_USUAL_EXPONENT = 137
"""Of 2**10: the largest magnitude that is reckoned with where nothing has been counted."""

# Typed, because numba would compute with Python's integers as signed 64-bit ones, which halves the vector width.
_LITERAL_SHIFT = int(SHIFT)
_SHIFT = np.uint32(SHIFT)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_ALL_BITS = np.uint32(0xFFFFFFFF)
_ZERO = np.uint32(0)
_ONE = np.uint32(1)
_COUNT = np.uint16(1)
_NO_COUNT = np.uint16(0)
_HALF = np.uint16(2**15 - 1)
_INFINITY = np.uint32(0x7F800000)
_SIGNED_INFINITY = np.int32(0x7F800000)

carray: Any = numba.carray  # type: ignore[attr-defined]


@njit
def count_tensors(
    values: NDArray[np.int64],
    sizes: NDArray[np.int64],
    records: NDArray[np.int64],
    first: int,
    capacity: int,
) -> tuple[int, int]:
    """Count arrays, until the counters of one are full.

    Args:
        values: addresses of float32 arrays.
        sizes: of them, each at most `capacity`.
        records: addresses of the records of their counters.
        first: index of the first array to count.
        capacity: how many values counters hold.

    Returns:
        The index of the array whose counters have no room for it, or the number of arrays; and how many of the values
        counted are NaN or infinite.
    """
    places = np.empty(2 * _SIDE, dtype=np.uint16)
    nonfinite = 0
    for k in range(first, sizes.size):
        record = carray(pointer(records[k]), RECORD, np.int64)
        if record[COUNTERS] and record[COUNTED] + sizes[k] > capacity:
            return k, nonfinite
        bits = carray(pointer(values[k]), sizes[k], np.uint32)
        nonfinite -= record[NONFINITE]
        if record[COUNTERS]:
            _count(bits, record, places)
        else:
            _find_range(bits, record)
        nonfinite += record[NONFINITE]
        record[COUNTED] += sizes[k]
    return sizes.size, nonfinite


@njit
def _count(bits: NDArray[np.uint32], record: NDArray[np.int64], places: NDArray[np.uint16]) -> None:
    """Count values.

    Args:
        bits: (n,), the float32 patterns of the values.
        record: of their counters.
        places: room for those of two blocks.
    """
    first = _first_bin(record)
    window = carray(pointer(record[COUNTS]), WINDOW, np.uint16)
    if first != record[FIRST]:
        settle(record)
        record[FIRST] = first
        _take_memory(record, window)
    extremes = _extremes_of(record)
    room = record[ROOM]
    whole = bits.size - bits.size % STEP
    side = waiting = 0
    for start in range(0, whole, _BLOCK):
        size = min(_BLOCK, whole - start)
        if room < size:
            room = _make_room(record, window) - waiting
        rate = waiting // (size // STEP) // UNIT * UNIT
        earlier = places[side : side + _SIDE]
        side = _SIDE - side
        these = places[side : side + _SIDE]
        kept = sift(bits, start, size, _LITERAL_SHIFT, first, these, extremes, window, earlier, rate)
        _increment(window, earlier[rate * (size // STEP) : waiting])
        if kept >= 0:
            record[ZEROS] += size - kept
            waiting = kept
            room -= kept
        else:
            waiting = 0
            _count_each(bits[start : start + size], record)
    _increment(window, places[side : side + waiting])
    record[ROOM] = room
    _count_each(bits[whole:], record)


@njit
def _increment(window: NDArray[np.uint16], places: NDArray[np.uint16]) -> None:
    for i in range(places.size):
        window[places[i]] += _COUNT


@njit
def _places(record: NDArray[np.int64]) -> tuple[int, int]:
    """Return between which places, multiples of STEP, all counts lie that are not zero."""
    lowest, highest = _magnitudes(_extremes_of(record))
    if highest == _ZERO:
        return 0, 0
    low = (int(lowest >> _SHIFT) - record[FIRST]) // STEP * STEP
    end = (int(highest >> _SHIFT) - record[FIRST]) // STEP * STEP + STEP
    return max(low, 0), min(end, WINDOW)


@njit
def _make_room(record: NDArray[np.int64], window: NDArray[np.uint16]) -> int:
    """Return how many values may be counted before a count could overflow; add them to the counters if few."""
    low, end = _places(record)
    highest = _NO_COUNT
    counts = window[low:end]
    for i in range(counts.size):
        highest = max(highest, counts[i])
    if highest <= _HALF:
        return _MOST - int(highest)
    settle(record)
    return _MOST


@njit
def settle(record: NDArray[np.int64]) -> None:
    """Add the counts to the counters, and make them zero."""
    low, end = _places(record)
    if end > low:
        window = carray(pointer(record[COUNTS]), WINDOW, np.uint16)
        counters = carray(pointer(record[COUNTERS] + 4 * record[FIRST]), WINDOW, np.uint32)
        pour(window, low, end - low, counters)
    record[ROOM] = _MOST


@njit
def _take_memory(record: NDArray[np.int64], window: NDArray[np.uint16]) -> None:
    """Write to the memory of the octaves below the largest magnitude, while all counts are zero.

    The operating system provides memory where it is written to, and small magnitudes are rare: each time the number of
    values doubles, there are some in one octave more. What a long calibration needs it takes at its beginning.
    """
    # Read before zero is written to it, the count is not known to be zero: what adds nothing would be compiled away.
    counters = carray(pointer(record[COUNTERS] + 4 * record[FIRST]), WINDOW, np.uint32)
    end = _places(record)[1]
    for place in range(max(0, end - _OCTAVES * BINS_PER_OCTAVE), end, BINS_PER_OCTAVE):
        counters[place] += window[place]
        window[place] = _NO_COUNT


@njit
def _count_each(block: NDArray[np.uint32], record: NDArray[np.int64]) -> None:
    """Count values one by one, wherever they are."""
    counters = carray(pointer(record[COUNTERS]), BINS, np.uint32)
    total = _extremes_of(record)
    for i in range(block.size):
        magnitude = np.uint32(block[i] & _MAGNITUDE)
        if magnitude >= _INFINITY:
            record[NONFINITE] += 1
        elif magnitude == _ZERO:
            record[ZEROS] += 1
        else:
            counters[magnitude >> _SHIFT] += _ONE
            _extend_by(total, block[i], block[i], magnitude - _ONE)


@njit
def _find_range(bits: NDArray[np.uint32], record: NDArray[np.int64]) -> None:
    """Find extremes without counting, except for zeros."""
    total = _extremes_of(record)
    signed_maximum = np.int32(-(2**31))
    unsigned_maximum = _ZERO
    least = _ALL_BITS
    zeros = 0
    for start in range(0, bits.size, 2**30):
        # Slices, not offsets: LLVM does not vectorise a loop whose index has a variable added to it.
        block = bits[start : start + 2**30]
        block_zeros = _ZERO
        for i in range(block.size):
            pattern = block[i]
            magnitude = np.uint32(pattern & _MAGNITUDE)
            signed_maximum = max(signed_maximum, np.int32(pattern))
            unsigned_maximum = max(unsigned_maximum, pattern)
            least = min(least, np.uint32(magnitude - _ONE))
            block_zeros = np.uint32(block_zeros + np.uint32(magnitude == _ZERO))
        zeros += int(block_zeros)
    record[ZEROS] += zeros
    if np.uint32(unsigned_maximum & _MAGNITUDE) < _INFINITY and signed_maximum < _SIGNED_INFINITY:
        _extend_by(total, np.uint32(signed_maximum), unsigned_maximum, least)
        return
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & _MAGNITUDE)
        if magnitude >= _INFINITY:
            record[NONFINITE] += 1
        elif magnitude != _ZERO:
            _extend_by(total, bits[i], bits[i], np.uint32(magnitude - _ONE))


@njit
def _extremes_of(record: NDArray[np.int64]) -> NDArray[np.uint32]:
    extremes: NDArray[np.uint32] = record[EXTREMES_AT:].view(np.uint32)
    return extremes


@njit
def _extend_by(total: NDArray[np.uint32], signed: np.uint32, unsigned: np.uint32, least: np.uint32) -> None:
    """Take other values' extremes into `total`, in its first lanes."""
    total[0] = np.uint32(max(np.int32(total[0]), np.int32(signed)))
    total[LANES] = max(total[LANES], unsigned)
    total[2 * LANES] = min(total[2 * LANES], least)


@njit
def _joined(extremes: NDArray[np.uint32]) -> tuple[np.int32, np.uint32, np.uint32]:
    """Return the extremes of all lanes; the last is the smallest magnitude that is not zero, and 0 where none is."""
    signed = np.int32(-(2**31))
    unsigned = _ZERO
    least = _ALL_BITS
    for lane in range(LANES):
        signed = max(signed, np.int32(extremes[lane]))
        unsigned = max(unsigned, extremes[LANES + lane])
        least = min(least, extremes[2 * LANES + lane])
    return signed, unsigned, np.uint32(least + _ONE)


@njit
def _magnitudes(extremes: NDArray[np.uint32]) -> tuple[np.uint32, np.uint32]:
    """Return the smallest magnitude that is not zero, and the largest, as patterns; zeros where there is none."""
    signed, unsigned, least = _joined(extremes)
    positive = np.uint32(max(signed, np.int32(0)))
    negative = np.uint32(unsigned & _MAGNITUDE) if unsigned >= _SIGN else _ZERO
    return least, max(positive, negative)


@njit
def signed_extremes(extremes: NDArray[np.uint32], zeros: int) -> tuple[np.float32, np.float32, bool]:
    """Return the smallest and the largest value, and whether there was any.

    Comparing floats does not vectorise, because of NaN; comparing integers does. Read as signed integers, positive
    floats ascend, and lie above all others: the signed maximum is the largest value. Read as unsigned integers,
    negative floats lie above all others and ascend with their magnitude: the unsigned maximum is the smallest value. If
    there is no such value, it is zero or, where there is no zero, the one nearest to it.
    """
    signed, unsigned, least = _joined(extremes)
    nearest = _ZERO if zeros else least
    low = unsigned if unsigned > _SIGN else nearest
    high = np.uint32(signed) if signed > 0 else np.uint32(nearest | _SIGN)
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32), bool(zeros or least)


@njit
def _first_bin(record: NDArray[np.int64]) -> int:
    """Return the bin that place 0 of the window stands for; the window ends before the bins of infinity."""
    highest = _magnitudes(_extremes_of(record))[1]
    exponent = int(highest >> np.uint32(23)) if highest else _USUAL_EXPONENT
    end = min((exponent + 1 + _HEADROOM) * BINS_PER_OCTAVE, FINITE_BINS)
    return max(end - WINDOW, 0)


@njit
def filled(counters: NDArray[np.uint32], zeros: int, top: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the bins up to `top` that are not empty, and their counts; most are, whole octaves of them."""
    bins = np.empty(top + 1, dtype=np.int32)
    counts = np.empty(top + 1, dtype=np.int64)
    in_bin_0 = np.int64(counters[0]) + zeros
    size = 0
    if in_bin_0:
        bins[0] = 0
        counts[0] = in_bin_0
        size = 1
    for start in range(0, top + 1, BINS_PER_OCTAVE):
        octave = counters[start : min(start + BINS_PER_OCTAVE, top + 1)]
        filled = _ZERO
        for i in range(octave.size):
            filled |= octave[i]
        if filled:
            for i in range(1 if start == 0 else 0, octave.size):
                if octave[i]:
                    bins[size] = start + i
                    counts[size] = octave[i]
                    size += 1
    return bins[:size].copy(), counts[:size].copy()
