"""Counting magnitudes: the loop that sees every activation of every batch, and so decides how fast calibration is.

Two things happen to each block of 1024 values while it lies in the first-level cache. A vectorised pass over its bit
patterns finds the extreme values and the zeros, and turns every value into its place in a window: the 20 octaves below
the tensor's largest magnitude, which hold all but one in a million values of a usual tensor. Then the place of each
value is incremented, at about one value a cycle, which is as fast as a processor that stores once a cycle can be.
Meanwhile the next block is fetched into the cache.

The window has 16 bits a bin, so that the octaves where the values are stay in the first-level cache, whatever number of
tensors take turns. It is added to the tensor's own counters, which have left the cache when their turn comes again,
once for 65535 values. A block with a value outside of the window is counted without it.

Zeros, which are half of all values behind a ReLU, go to four counters in turn: in a run of them each increment would
otherwise wait until the one before it has been stored.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit, prefetch
from calibrators.histogram import BINS, BINS_PER_OCTAVE, SHIFT, MagnitudeHistogram, bins_of

_CAPACITY = 2**32 - 1
"""How many values may be counted before the counters must be emptied: no counter of 32 bits can overflow by then."""

_BLOCK = 1024
_UNROLLED = 4
"""Counters for exact zeros; they follow those of the bins, and the places of the window."""

_CACHE_LINE = 16
"""Values to a line of the cache."""

_WINDOW = 20 * BINS_PER_OCTAVE
_WINDOW_CAPACITY = 2**16 - 1

# Typed, because numba would compute with Python's integers as signed 64-bit ones, which halves the vector width. It
# also widens the result of each operation, so that those in a vectorised loop are narrowed one by one.
_SHIFT = np.uint32(SHIFT)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_ZERO = np.uint32(0)
_ONE = np.uint32(1)
_BIN_0 = np.uint32(BINS)
_OUTSIDE = np.uint32(_WINDOW)
_PLACES_OUTSIDE = _OUTSIDE + np.arange(_BLOCK, dtype=np.uint32) % np.uint32(_UNROLLED)
"""For each position in a block the place of a value that is outside of the window: the counters of zeros in turn."""


class MagnitudeCounter:
    """Counts the magnitudes of one tensor, batch by batch.

    Memory does not depend on the number of values: at most 1 MB of counters, of which the operating system provides
    only the pages that are written to, usually a tenth.
    """

    __slots__ = ("_counted", "_counters", "_earlier", "_maximum", "_minimum", "_nonfinite", "_zeros")

    def __init__(self) -> None:
        self._earlier: MagnitudeHistogram | None = None
        self._counters = np.zeros(BINS + _UNROLLED, dtype=np.uint32)
        self._reset()

    def _reset(self) -> None:
        self._counted = 0
        self._minimum = math.inf
        self._maximum = -math.inf
        self._zeros = 0
        self._nonfinite = 0

    @property
    def nonfinite(self) -> int:
        """How many of the values so far were NaN or infinite."""
        return self._nonfinite + (self._earlier.nonfinite if self._earlier else 0)

    def update(self, values: NDArray[Any]) -> None:
        """Count `values`: any shape, any real dtype, contiguous or not; the array is neither kept nor changed.

        Dtypes other than float32 are converted to it; a float64 beyond its range becomes infinite.
        """
        if values.dtype != np.float32:
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        flat = np.ascontiguousarray(values).reshape(-1)
        for start in range(0, flat.size, _CAPACITY):
            self._count(flat[start : start + _CAPACITY])

    def _count(self, values: NDArray[np.float32]) -> None:
        if self._counted + values.size > _CAPACITY:
            self._earlier = self.histogram()
            self._counters[:] = 0
            self._reset()
        bits = values.view(np.uint32)
        bits.flags.writeable = False  # numba would compile the kernel twice, for writeable and for read-only arrays
        self._minimum, self._maximum, zeros, nonfinite = _count_magnitudes(
            bits, self._counters, self._minimum, self._maximum
        )
        self._counted += values.size
        self._zeros += zeros
        self._nonfinite += nonfinite

    def _top_bin(self) -> int:
        """Return the bin of the largest magnitude; nothing above it needs to be looked at."""
        amax = max(abs(self._minimum), abs(self._maximum)) if self._minimum <= self._maximum else 0.0
        return int(bins_of(np.array(amax)))

    def histogram(self) -> MagnitudeHistogram:
        """Return the histogram of everything counted so far; later updates do not change it."""
        bins, counts = _filled(self._counters, self._top_bin())
        counted = MagnitudeHistogram(
            bins=bins,
            counts=counts,
            # Adding 0.0 turns -0.0 into 0.0, so that the order of the two zeros in the data cannot show.
            minimum=self._minimum + 0.0 if bins.size else 0.0,
            maximum=self._maximum + 0.0 if bins.size else 0.0,
            zeros=self._zeros,
            nonfinite=self._nonfinite,
        )
        return self._earlier.merge(counted) if self._earlier else counted


def histogram_of(*arrays: NDArray[Any]) -> MagnitudeHistogram:
    """Return the histogram of the values of some arrays; see `MagnitudeCounter.update`."""
    counter = MagnitudeCounter()
    for values in arrays:
        counter.update(values)
    return counter.histogram()


@njit
def _count_magnitudes(
    bits: NDArray[np.uint32], counters: NDArray[np.uint32], minimum: float, maximum: float
) -> tuple[float, float, int, int]:
    """Count values in `counters`.

    Args:
        bits: (n,), the float32 patterns of the values.
        counters: (BINS + 4,), one for each bin and more for exact zeros.
        minimum: the smallest finite value so far; +inf without any.
        maximum: the largest finite value so far; -inf without any.

    Returns:
        Minimum and maximum with these values, their number of zeros and their number of non-finite ones.
    """
    zeros = 0
    nonfinite = 0
    window = np.zeros(_WINDOW + _UNROLLED, dtype=np.uint16)
    places = np.empty(_BLOCK, dtype=np.uint32)
    pending = 0
    first = _first_bin(minimum, maximum)
    for start in range(0, bits.size, _BLOCK):
        # Slices, not offsets: LLVM does not vectorise a loop whose index has a variable added to it.
        block = bits[start : start + _BLOCK]
        low, high, block_zeros, outside = _places(block, np.uint32(first), places)
        zeros += block_zeros
        if outside == block_zeros:
            minimum = min(minimum, float(low))
            maximum = max(maximum, float(high))
            if pending + block.size > _WINDOW_CAPACITY:
                _empty(window, first, counters)
                pending = 0
            full = block.size - block.size % _CACHE_LINE
            for i in range(0, full, _CACHE_LINE):
                prefetch(bits, start + _BLOCK + i)
                for j in range(_CACHE_LINE):
                    window[places[i + j]] += np.uint16(1)
            for i in range(full, block.size):
                window[places[i]] += np.uint16(1)
            pending += block.size
            continue
        if not (np.isfinite(low) and np.isfinite(high)):
            low, high, block_nonfinite = _finite_extremes(block)
            nonfinite += block_nonfinite
        minimum = min(minimum, float(low))
        maximum = max(maximum, float(high))
        _count_each(block, counters)
        if _first_bin(minimum, maximum) != first:
            _empty(window, first, counters)
            pending = 0
            first = _first_bin(minimum, maximum)
    _empty(window, first, counters)
    return minimum, maximum, zeros, nonfinite


@njit
def _first_bin(minimum: float, maximum: float) -> int:
    """Return the lowest bin of the window: its last one ends the octave of the largest magnitude. Never bin 0."""
    amax = max(abs(minimum), abs(maximum)) if minimum <= maximum else 0.0
    top = int(np.float32(amax).view(np.uint32) >> _SHIFT) | (BINS_PER_OCTAVE - 1)
    return max(top - (_WINDOW - 1), 1)


@njit
def _places(
    block: NDArray[np.uint32], first: np.uint32, places: NDArray[np.uint32]
) -> tuple[np.float32, np.float32, int, int]:
    """Write the place of each value in a window that starts at bin `first`.

    Comparing floats does not vectorise, because of NaN; comparing integers does. Read as signed integers, non-negative
    floats ascend, and lie above all negative ones: the signed maximum is the largest value. Read as unsigned integers,
    negative floats lie above all others and ascend with their magnitude: the unsigned maximum is the smallest value. If
    there is no such value, all have the same sign, and the unsigned minimum is the one nearest to zero.

    Args:
        block: (n,), float32 patterns, at most a block of them.
        first: a bin above 0, so that exact zeros are outside of the window.
        places: (_BLOCK,); the first n are written.

    Returns:
        The smallest and the largest value, the number of zeros, and the number of values outside of the window. NaN
        counts as a magnitude beyond infinity here, so an extreme is not finite if any value is not finite.
    """
    signed_maximum = np.int32(-(2**31))
    unsigned_maximum = _ZERO
    unsigned_minimum = np.uint32(0xFFFFFFFF)
    zeros = _ZERO
    outside = _ZERO
    for i in range(block.size):
        pattern = block[i]
        signed_maximum = max(signed_maximum, np.int32(pattern))
        unsigned_maximum = max(unsigned_maximum, pattern)
        unsigned_minimum = min(unsigned_minimum, pattern)
        magnitude = np.uint32(pattern & _MAGNITUDE)
        zeros = np.uint32(zeros + np.uint32(magnitude == _ZERO))
        place = np.uint32((magnitude >> _SHIFT) - first)  # of a lower bin it wraps around to a large number
        outside = np.uint32(outside + np.uint32(place >= _OUTSIDE))
        places[i] = min(place, _PLACES_OUTSIDE[i])
    low = unsigned_maximum if unsigned_maximum >= _SIGN else unsigned_minimum
    high = np.uint32(signed_maximum) if signed_maximum >= 0 else unsigned_minimum
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32), int(zeros), int(outside)


@njit
def _empty(window: NDArray[np.uint16], first: int, counters: NDArray[np.uint32]) -> None:
    """Add the window to the counters, and clear it."""
    bins = counters[first : first + _WINDOW]
    places = window[:_WINDOW]
    for i in range(_WINDOW):
        bins[i] += np.uint32(places[i])
    window[:_WINDOW] = np.uint16(0)
    for j in range(_UNROLLED):
        counters[BINS + j] += np.uint32(window[_WINDOW + j])
        window[_WINDOW + j] = np.uint16(0)


@njit
def _count_each(block: NDArray[np.uint32], counters: NDArray[np.uint32]) -> None:
    """Count values in the counters themselves."""
    unrolled = block.size - block.size % _UNROLLED
    for i in range(0, unrolled, _UNROLLED):
        for j in range(_UNROLLED):
            k = (block[i + j] & _MAGNITUDE) >> _SHIFT
            counters[k if k != _ZERO else _BIN_0 + np.uint32(j)] += _ONE
    for i in range(unrolled, block.size):
        counters[(block[i] & _MAGNITUDE) >> _SHIFT] += _ONE


@njit
def _filled(counters: NDArray[np.uint32], top: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the bins up to `top` that are not empty, and their counts; most are, whole octaves of them."""
    bins = np.empty(top + 1, dtype=np.int32)
    counts = np.empty(top + 1, dtype=np.int64)
    in_bin_0 = np.int64(counters[0])
    for j in range(_UNROLLED):
        in_bin_0 += counters[BINS + j]
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


@njit
def _finite_extremes(block: NDArray[np.uint32]) -> tuple[np.float32, np.float32, int]:
    """Return the smallest and the largest finite value of float32 patterns, and the number of non-finite ones."""
    low = np.float32(np.inf)
    high = np.float32(-np.inf)
    nonfinite = 0
    for i in range(block.size):
        value = np.uint32(block[i]).view(np.float32)
        if np.isfinite(value):
            low = min(low, value)
            high = max(high, value)
        else:
            nonfinite += 1
    return low, high, nonfinite
