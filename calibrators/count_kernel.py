"""The loops that count magnitudes: they see every activation of every batch, and so decide how fast calibration is.

A processor stores once a cycle, so that it cannot count more than one value a cycle; all other work has to be small
beside that, and values that need not be counted one by one are left out. A block of 1024 values lies in the first-level
cache while two things happen to it:

- A pass over its bit patterns in vector lanes (`calibrators.lanes.sift`) finds the extreme values, turns each value
  into its place in a window of the counters, and writes the places of those that are not zero one after the other.
  Zeros, which are half of all values behind a ReLU, cost no more than that.
- The counter of each place is incremented.

The window has 65536 bins: 64 octaves, up to four above the tensor's largest magnitude so far. Lower and higher values
get its first and last place. Where one of these was incremented, the block is taken back and counted value by value.

All tensors that are in the cache together are counted in one call, since calls from Python cost as much as counting
thousands of values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit, prefetch
from calibrators.histogram import BINS, BINS_PER_OCTAVE, FINITE_BINS, SHIFT
from calibrators.lanes import EXTREMES, LANES, STEP, pointer, sift

RECORD = 16
"""Size of a tensor's record, int64: the address of its counters or 0, zeros, non-finite values; then its extremes."""

COUNTERS, ZEROS, NONFINITE, EXTREMES_AT = 0, 1, 2, 4
"""What stands where in a record."""

_BLOCK = 1024
_UNROLLED = 16
_CACHE_LINE = 16
"""Values to a line of the cache."""

_LAST_PLACE = 2**16 - 1
_HEADROOM = 4
"""Octaves of the window above the largest magnitude so far."""

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
_INFINITY = np.uint32(0x7F800000)
_SIGNED_INFINITY = np.int32(0x7F800000)

carray: Any = numba.carray  # type: ignore[attr-defined]


@njit
def count_tensors(values: NDArray[np.int64], sizes: NDArray[np.int64], records: NDArray[np.int64]) -> None:
    """Count arrays.

    Args:
        values: addresses of float32 arrays.
        sizes: of them.
        records: addresses of the records of their counters.
    """
    places = np.empty(_BLOCK + LANES, dtype=np.uint16)
    extremes = np.empty(EXTREMES, dtype=np.uint32)
    for k in range(sizes.size):
        record = carray(pointer(records[k]), RECORD, np.int64)
        bits = carray(pointer(values[k]), sizes[k], np.uint32)
        total = carray(pointer(records[k] + 8 * EXTREMES_AT), EXTREMES, np.uint32)
        if record[COUNTERS]:
            counters = carray(pointer(record[COUNTERS]), BINS, np.uint32)
            zeros, nonfinite = _count_magnitudes(bits, counters, total, places, extremes)
        else:
            zeros, nonfinite = _find_range(bits, total)
        record[ZEROS] += zeros
        record[NONFINITE] += nonfinite


@njit
def _count_magnitudes(
    bits: NDArray[np.uint32],
    counters: NDArray[np.uint32],
    total: NDArray[np.uint32],
    places: NDArray[np.uint16],
    extremes: NDArray[np.uint32],
) -> tuple[int, int]:
    """Count values other than zero.

    Args:
        bits: (n,), the float32 patterns of the values.
        counters: (BINS,).
        total: (EXTREMES,), of all values so far.
        places: room for those of a block.
        extremes: room for those of a block.

    Returns:
        The number of zeros, and of values that are NaN or infinite, which are not counted.
    """
    zeros = 0
    nonfinite = 0
    first = _first_bin(total)
    window = counters[first : first + _LAST_PLACE + 1]
    whole = bits.size - bits.size % STEP
    for start in range(0, whole, _BLOCK):
        size = min(_BLOCK, whole - start)
        lowest = window[0]
        highest = window[_LAST_PLACE]
        forget(extremes)
        kept = 0
        for i in range(start, start + size, STEP):
            for j in range(0, STEP, _CACHE_LINE):
                prefetch(bits, i + _BLOCK + j)
            kept = sift(bits, i, _LITERAL_SHIFT, first, places, kept, extremes)
        # Slices: numba would look whether each index is negative.
        full = places[: kept - kept % _UNROLLED]
        for i in range(0, full.size, _UNROLLED):
            for j in range(_UNROLLED):
                window[full[i + j]] += _ONE
        rest = places[full.size : kept]
        for i in range(rest.size):
            window[rest[i]] += _ONE
        if window[0] == lowest and window[_LAST_PLACE] == highest:
            zeros += size - kept
            _extend(total, extremes)
        else:
            for i in range(kept):
                window[places[i]] -= _ONE
            block_zeros, block_nonfinite = _count_each(bits[start : start + size], counters, total)
            zeros += block_zeros
            nonfinite += block_nonfinite
    last_zeros, last_nonfinite = _count_each(bits[whole:], counters, total)
    return zeros + last_zeros, nonfinite + last_nonfinite


@njit
def _count_each(block: NDArray[np.uint32], counters: NDArray[np.uint32], total: NDArray[np.uint32]) -> tuple[int, int]:
    """Count values one by one, wherever they are; arguments and result as of `_count_magnitudes`."""
    zeros = 0
    nonfinite = 0
    for i in range(block.size):
        magnitude = np.uint32(block[i] & _MAGNITUDE)
        if magnitude >= _INFINITY:
            nonfinite += 1
            continue
        if magnitude == _ZERO:
            zeros += 1
        else:
            counters[magnitude >> _SHIFT] += _ONE
        _extend_by(total, block[i], block[i], block[i])
    return zeros, nonfinite


@njit
def _find_range(bits: NDArray[np.uint32], total: NDArray[np.uint32]) -> tuple[int, int]:
    """Find extremes without counting; arguments and result as of `_count_magnitudes`."""
    signed_maximum = np.int32(-(2**31))
    unsigned_maximum = _ZERO
    unsigned_minimum = _ALL_BITS
    zeros = 0
    for start in range(0, bits.size, 2**30):
        # Slices, not offsets: LLVM does not vectorise a loop whose index has a variable added to it.
        block = bits[start : start + 2**30]
        block_zeros = _ZERO
        for i in range(block.size):
            pattern = block[i]
            signed_maximum = max(signed_maximum, np.int32(pattern))
            unsigned_maximum = max(unsigned_maximum, pattern)
            unsigned_minimum = min(unsigned_minimum, pattern)
            block_zeros = np.uint32(block_zeros + np.uint32(np.uint32(pattern & _MAGNITUDE) == _ZERO))
        zeros += int(block_zeros)
    if np.uint32(unsigned_maximum & _MAGNITUDE) < _INFINITY and signed_maximum < _SIGNED_INFINITY:
        _extend_by(total, np.uint32(signed_maximum), unsigned_maximum, unsigned_minimum)
        return zeros, 0
    nonfinite = 0
    for i in range(bits.size):
        if np.uint32(bits[i] & _MAGNITUDE) >= _INFINITY:
            nonfinite += 1
        else:
            _extend_by(total, bits[i], bits[i], bits[i])
    return zeros, nonfinite


@njit
def forget(extremes: NDArray[np.uint32]) -> None:
    """Make extremes those of no values."""
    for lane in range(LANES):
        extremes[lane] = _SIGN
        extremes[LANES + lane] = _ZERO
        extremes[2 * LANES + lane] = _ALL_BITS


@njit
def _extend(total: NDArray[np.uint32], extremes: NDArray[np.uint32]) -> None:
    """Take other values' extremes into `total`, lane by lane."""
    for lane in range(LANES):
        total[lane] = np.uint32(max(np.int32(total[lane]), np.int32(extremes[lane])))
        total[LANES + lane] = max(total[LANES + lane], extremes[LANES + lane])
        total[2 * LANES + lane] = min(total[2 * LANES + lane], extremes[2 * LANES + lane])


@njit
def _extend_by(
    total: NDArray[np.uint32], signed_maximum: np.uint32, unsigned_maximum: np.uint32, unsigned_minimum: np.uint32
) -> None:
    """Take other values' extremes into `total`, in its first lanes."""
    total[0] = np.uint32(max(np.int32(total[0]), np.int32(signed_maximum)))
    total[LANES] = max(total[LANES], unsigned_maximum)
    total[2 * LANES] = min(total[2 * LANES], unsigned_minimum)


@njit
def signed_extremes(total: NDArray[np.uint32]) -> tuple[np.float32, np.float32, bool]:
    """Return the smallest and the largest value, and whether there was any.

    Comparing floats does not vectorise, because of NaN; comparing integers does. Read as signed integers, non-negative
    floats ascend, and lie above all negative ones: the signed maximum is the largest value. Read as unsigned integers,
    negative floats lie above all others and ascend with their magnitude: the unsigned maximum is the smallest value. If
    there is no such value, all have the same sign, and the unsigned minimum is the one nearest to zero.
    """
    signed_maximum = np.int32(-(2**31))
    unsigned_maximum = _ZERO
    unsigned_minimum = _ALL_BITS
    for lane in range(LANES):
        signed_maximum = max(signed_maximum, np.int32(total[lane]))
        unsigned_maximum = max(unsigned_maximum, total[LANES + lane])
        unsigned_minimum = min(unsigned_minimum, total[2 * LANES + lane])
    low = unsigned_maximum if unsigned_maximum >= _SIGN else unsigned_minimum
    high = np.uint32(signed_maximum) if signed_maximum >= 0 else unsigned_minimum
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32), bool(unsigned_minimum <= unsigned_maximum)


@njit
def _first_bin(total: NDArray[np.uint32]) -> int:
    """Return the bin that place 0 of the window stands for; the window ends before the bins of infinity."""
    low, high, some = signed_extremes(total)
    exponent = _USUAL_EXPONENT
    if some:
        exponent = int(np.float32(max(abs(low), abs(high))).view(np.uint32) >> np.uint32(23))
    end = min((exponent + 1 + _HEADROOM) * BINS_PER_OCTAVE, FINITE_BINS)
    return max(end - (_LAST_PLACE + 1), 0)


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
