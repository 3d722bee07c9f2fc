"""Counting magnitudes: the loop that sees every activation of every batch, so it decides how fast calibration is.

Two things happen to each block of 4096 values while it lies in the first-level cache: a vectorised pass over its bit patterns for
the extreme values and the zeros, then one counter increment per value. Neighbouring values go to two alternating rows of counters,
since runs of equal values (zeros after a ReLU) would otherwise wait for each other's store to the same counter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import BINS, FINITE_BINS, SHIFT, MagnitudeHistogram

_BLOCK = 4096
_SHIFT = np.uint32(SHIFT)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_ONE = np.uint32(1)
_CAPACITY = 2**32 - 1
"""What one counter can hold: as many values may be counted before the counters are emptied into a histogram."""


class MagnitudeCounter:
    """Counts the magnitudes of one tensor, batch by batch.

    Its memory does not grow with the number of values: two rows of 2**18 counters of 4 bytes, of which the operating system
    provides only the pages that are written to, typically a tenth.
    """

    __slots__ = ("_counted", "_counters", "_earlier", "_maximum", "_minimum", "_nonfinite", "_zeros")

    def __init__(self) -> None:
        self._earlier: MagnitudeHistogram | None = None
        self._counters = np.zeros((2, BINS), dtype=np.uint32)
        self._reset()

    def _reset(self) -> None:
        self._counted = 0
        self._minimum = np.inf
        self._maximum = -np.inf
        self._zeros = 0
        self._nonfinite = 0

    @property
    def nonfinite(self) -> int:
        """How many of the values so far were NaN or infinite."""
        return self._nonfinite + (self._earlier.nonfinite if self._earlier else 0)

    def update(self, values: NDArray[Any]) -> None:
        """Count `values`: any shape, any real dtype, contiguous or not; it is neither kept nor changed.

        Other dtypes than float32 are converted to it. A float64 value beyond float32's range becomes infinite.
        """
        with np.errstate(over="ignore"):
            flat = np.require(values, dtype=np.float32, requirements=("C", "ALIGNED")).reshape(-1)
        for start in range(0, flat.size, _CAPACITY):
            self._count(flat[start : start + _CAPACITY])

    def _count(self, values: NDArray[np.float32]) -> None:
        if self._counted + values.size > _CAPACITY:
            self._earlier = self.histogram()
            self._counters[:] = 0
            self._reset()
        bits = values.view(np.uint32)
        bits.flags.writeable = False  # numba would compile a second kernel for arrays that happen to be read-only
        minimum, maximum, zeros, nonfinite = _count_magnitudes(bits, self._counters)
        self._counted += values.size
        self._minimum = min(self._minimum, minimum)
        self._maximum = max(self._maximum, maximum)
        self._zeros += zeros
        self._nonfinite += nonfinite

    def histogram(self) -> MagnitudeHistogram:
        """Return everything counted so far; later updates do not change it."""
        # The second sum cannot overflow: together the counters hold at most _CAPACITY values.
        counts = self._counters[0, :FINITE_BINS] + self._counters[1, :FINITE_BINS]
        bins = np.flatnonzero(counts)
        counted = MagnitudeHistogram(
            bins=bins.astype(np.int32),
            counts=counts[bins].astype(np.int64),
            # Adding 0.0 turns a negative zero into zero.
            minimum=float(self._minimum) + 0.0 if bins.size else 0.0,
            maximum=float(self._maximum) + 0.0 if bins.size else 0.0,
            zeros=self._zeros,
            nonfinite=self._nonfinite,
        )
        return self._earlier.merge(counted) if self._earlier else counted


@njit
def _count_magnitudes(
    bits: NDArray[np.uint32], counters: NDArray[np.uint32]
) -> tuple[np.float32, np.float32, int, int]:
    """Add the values whose patterns are `bits` (n,) to `counters` (2, BINS); return minimum, maximum, zeros, non-finite.

    Minimum and maximum are over the finite values; without any they are +inf and -inf.
    """
    even = counters[0]
    odd = counters[1]
    minimum = np.float32(np.inf)
    maximum = np.float32(-np.inf)
    zeros = 0
    nonfinite = 0
    for start in range(0, bits.size, _BLOCK):
        # A slice, not an index offset: LLVM does not vectorise loops over the latter.
        block = bits[start : start + _BLOCK]
        low, high, block_zeros = _extremes(block)
        if (low & _MAGNITUDE) >= _INFINITY or (high & _MAGNITUDE) >= _INFINITY:
            low, high, bad = _finite_extremes(block)
            nonfinite += bad
            if bad == block.size:
                low = np.uint32(0x7F800000)
                high = np.uint32(0xFF800000)
        minimum = min(minimum, np.uint32(low).view(np.float32))
        maximum = max(maximum, np.uint32(high).view(np.float32))
        zeros += block_zeros
        pairs = block.size // 2
        for i in range(pairs):
            even[(block[2 * i] & _MAGNITUDE) >> _SHIFT] += _ONE
            odd[(block[2 * i + 1] & _MAGNITUDE) >> _SHIFT] += _ONE
        if block.size % 2:
            even[(block[-1] & _MAGNITUDE) >> _SHIFT] += _ONE
    return minimum, maximum, zeros, nonfinite


@njit
def _extremes(block: NDArray[np.uint32]) -> tuple[np.uint32, np.uint32, int]:
    """Return the patterns of the smallest and the largest value, NaN taken as beyond infinity, and the number of zeros.

    Float comparisons do not vectorise (NaN has no order); integer ones do. As signed integers, the patterns of non-negative
    floats ascend above all negative ones; as unsigned integers, the patterns of negative floats lie above all
    non-negative ones and ascend with the magnitude. So the largest value is the signed maximum, unless all are negative: then it is the
    unsigned minimum. The smallest is the unsigned maximum, unless none is negative: then it is the unsigned minimum.
    """
    signed_max = np.int32(-(2**31))
    unsigned_max = np.uint32(0)
    unsigned_min = np.uint32(0xFFFFFFFF)
    zeros = np.uint32(0)
    for i in range(block.size):
        pattern = block[i]
        signed_max = max(signed_max, np.int32(pattern))
        unsigned_max = max(unsigned_max, pattern)
        unsigned_min = min(unsigned_min, pattern)
        zeros += np.uint32((pattern & _MAGNITUDE) == np.uint32(0))
    low = unsigned_max if unsigned_max >= _SIGN else unsigned_min
    high = np.uint32(signed_max) if signed_max >= 0 else unsigned_min
    return low, high, int(zeros)


@njit
def _finite_extremes(block: NDArray[np.uint32]) -> tuple[np.uint32, np.uint32, int]:
    """Return the patterns of the smallest and the largest finite value, and the number of values that are not finite."""
    minimum = np.float32(np.inf)
    maximum = np.float32(-np.inf)
    nonfinite = 0
    for i in range(block.size):
        if (block[i] & _MAGNITUDE) >= _INFINITY:
            nonfinite += 1
        else:
            value = np.uint32(block[i]).view(np.float32)
            minimum = min(minimum, value)
            maximum = max(maximum, value)
    return np.float32(minimum).view(np.uint32), np.float32(maximum).view(np.uint32), nonfinite
