"""Counting magnitudes: the loop that sees every activation of every batch, and so decides how fast calibration is.

Two things happen to each block of 4096 values while it lies in the first-level cache: a vectorised pass over its bit
patterns finds the extreme values and the zeros; then every value increments a counter. Values of bin 0, nearly always
zeros behind a ReLU, go to four counters in turn: in a run of them each increment would otherwise wait until the one
before it has been stored. Two counters for every bin would help other runs of equal values as well, but twice the
memory costs more: the counters of a small tensor have left the cache when its turn comes again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import BINS, FINITE_BINS, SHIFT, MagnitudeHistogram

_CAPACITY = 2**32 - 1
"""How many values may be counted before the counters must be emptied: no counter of 32 bits can overflow by then."""

_BLOCK = 4096
_UNROLLED = 4
"""Values that the counting loop takes at a time, and counters for bin 0, which follow those of the bins."""

# Typed, because numba would compute with Python's integers as signed 64-bit ones, which halves the vector width.
_SHIFT = np.uint32(SHIFT)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_ZERO = np.uint32(0)
_ONE = np.uint32(1)
_BIN_0 = np.uint32(BINS)


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
        minimum, maximum, zeros, nonfinite = _count_magnitudes(bits, self._counters)
        self._counted += values.size
        self._minimum = min(self._minimum, float(minimum))
        self._maximum = max(self._maximum, float(maximum))
        self._zeros += zeros
        self._nonfinite += nonfinite

    def histogram(self) -> MagnitudeHistogram:
        """Return the histogram of everything counted so far; later updates do not change it."""
        counts = self._counters[:FINITE_BINS].copy()
        counts[0] += self._counters[BINS:].sum()  # cannot overflow: all counters together hold at most _CAPACITY
        bins = np.flatnonzero(counts)
        counted = MagnitudeHistogram(
            bins=bins.astype(np.int32),
            counts=counts[bins].astype(np.int64),
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
    bits: NDArray[np.uint32], counters: NDArray[np.uint32]
) -> tuple[np.float32, np.float32, int, int]:
    """Count values in `counters`; return their minimum, maximum, number of zeros and number of non-finite ones.

    Args:
        bits: (n,), the float32 patterns of the values.
        counters: (BINS + 4,), one for each bin and more for bin 0.

    Returns:
        Minimum and maximum are those of the finite values; without any they are +inf and -inf.
    """
    minimum = np.float32(np.inf)
    maximum = np.float32(-np.inf)
    zeros = 0
    nonfinite = 0
    for start in range(0, bits.size, _BLOCK):
        # Slices, not offsets: LLVM does not vectorise a loop whose index has a variable added to it.
        block = bits[start : start + _BLOCK]
        low, high, block_zeros = _extremes(block)
        if not (np.isfinite(low) and np.isfinite(high)):
            low, high, block_nonfinite = _finite_extremes(block)
            nonfinite += block_nonfinite
        minimum = min(minimum, low)
        maximum = max(maximum, high)
        zeros += block_zeros
        unrolled = block.size - block.size % _UNROLLED
        for i in range(0, unrolled, _UNROLLED):
            for j in range(_UNROLLED):
                k = (block[i + j] & _MAGNITUDE) >> _SHIFT
                counters[k if k != _ZERO else _BIN_0 + np.uint32(j)] += _ONE
        for i in range(unrolled, block.size):
            counters[(block[i] & _MAGNITUDE) >> _SHIFT] += _ONE
    return minimum, maximum, zeros, nonfinite


@njit
def _extremes(block: NDArray[np.uint32]) -> tuple[np.float32, np.float32, int]:
    """Return the smallest and the largest value of float32 patterns, and the number of zeros.

    Comparing floats does not vectorise, because of NaN; comparing integers does. Read as signed integers, non-negative
    floats ascend, and lie above all negative ones: the signed maximum is the largest value. Read as unsigned integers,
    negative floats lie above all others and ascend with their magnitude: the unsigned maximum is the smallest value. If
    there is no such value, all have the same sign, and the unsigned minimum is the one nearest to zero.

    NaN counts as a magnitude beyond infinity here, so a result is not finite if any value is not finite.
    """
    signed_maximum = np.int32(-(2**31))
    unsigned_maximum = _ZERO
    unsigned_minimum = np.uint32(0xFFFFFFFF)
    zeros = _ZERO
    for i in range(block.size):
        pattern = block[i]
        signed_maximum = max(signed_maximum, np.int32(pattern))
        unsigned_maximum = max(unsigned_maximum, pattern)
        unsigned_minimum = min(unsigned_minimum, pattern)
        zeros += np.uint32((pattern & _MAGNITUDE) == _ZERO)
    low = unsigned_maximum if unsigned_maximum >= _SIGN else unsigned_minimum
    high = np.uint32(signed_maximum) if signed_maximum >= 0 else unsigned_minimum
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32), int(zeros)


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
