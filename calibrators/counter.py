"""Counters of magnitudes: one for each tensor, brought up to date batch by batch; see `calibrators.count_kernel`."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.count_kernel import (
    COUNTED,
    COUNTERS,
    COUNTS,
    EXTREMES_AT,
    NONFINITE,
    RECORD,
    ZEROS,
    count_tensors,
    filled,
    settle,
    signed_extremes,
)
from calibrators.histogram import BINS, MagnitudeHistogram, bins_of
from calibrators.lanes import NO_EXTREMES, WINDOW
from calibrators.magnitude_range import MagnitudeRange

CAPACITY = 2**32 - 1
"""How many values may be counted before the counters must be emptied: no counter of 32 bits can overflow by then."""

MOST_COUNTER_BYTES = 4 * BINS + 2 * WINDOW
"""What the counters of a tensor take at most."""


class RangeCounter:
    """Keeps the range of one tensor, batch by batch."""

    __slots__ = ("_extremes", "_record", "_record_at")

    def __init__(self) -> None:
        self._record = np.zeros(RECORD, dtype=np.int64)
        self._record_at = _address(self._record)
        self._extremes = self._record[EXTREMES_AT:].view(np.uint32)
        self._reset()

    def _reset(self) -> None:
        self._record[COUNTED] = self._record[ZEROS] = self._record[NONFINITE] = 0
        self._extremes[:] = NO_EXTREMES

    @property
    def nonfinite(self) -> int:
        """How many of the values so far were NaN or infinite."""
        return int(self._record[NONFINITE])

    def update(self, values: NDArray[Any]) -> None:
        """Count `values`: any shape, any real dtype, contiguous or not; the array is neither kept nor changed.

        Dtypes other than float32 are converted to it; a float64 beyond its range becomes infinite.
        """
        count_together([self], [values])

    def range(self) -> MagnitudeRange:
        """Return the range of everything counted so far."""
        minimum, maximum = self._minimum_and_maximum()
        finite = int(self._record[COUNTED] - self._record[NONFINITE])
        return MagnitudeRange(finite, minimum, maximum, int(self._record[ZEROS]), self.nonfinite)

    def _minimum_and_maximum(self) -> tuple[float, float]:
        low, high, some = signed_extremes(self._extremes, int(self._record[ZEROS]))
        # Adding 0.0 turns -0.0 into 0.0, so that the order of the two zeros in the data cannot show.
        return (float(low) + 0.0, float(high) + 0.0) if some else (0.0, 0.0)


class MagnitudeCounter(RangeCounter):
    """Counts the magnitudes of one tensor, batch by batch.

    Memory does not depend on the number of values: at most 1.1 MB of counters, of which the operating system provides
    only the pages that are written to, usually a sixth.
    """

    __slots__ = ("_counters", "_counts", "_earlier")

    def __init__(self) -> None:
        super().__init__()
        self._earlier: MagnitudeHistogram | None = None
        memory = _pages(MOST_COUNTER_BYTES)
        self._counters = np.frombuffer(memory, np.uint32, BINS)
        self._counts = np.frombuffer(memory, np.uint16, WINDOW, self._counters.nbytes)
        self._record[COUNTERS] = _address(self._counters)
        self._record[COUNTS] = _address(self._counts)

    @property
    def nonfinite(self) -> int:
        """How many of the values so far were NaN or infinite."""
        return int(self._record[NONFINITE]) + (self._earlier.nonfinite if self._earlier else 0)

    def range(self) -> MagnitudeRange:
        """Return the range of everything counted so far."""
        return MagnitudeRange.of(self.histogram())

    def histogram(self) -> MagnitudeHistogram:
        """Return the histogram of everything counted so far; later updates do not change it."""
        settle(self._record)
        minimum, maximum = self._minimum_and_maximum()
        zeros = int(self._record[ZEROS])
        bins, counts = filled(self._counters, zeros, int(bins_of(np.array(max(abs(minimum), abs(maximum))))))
        nonfinite = int(self._record[NONFINITE])
        counted = MagnitudeHistogram(bins, counts, minimum, maximum, zeros=zeros, nonfinite=nonfinite)
        return self._earlier.merge(counted) if self._earlier else counted

    def make_room(self) -> None:
        """Empty the counters, which are full; what they held is kept."""
        self._earlier = self.histogram()
        self._counters[:] = 0
        self._reset()


class Counting:
    """Arrays that are counted in one call, each in its own counter; again and again if they are filled anew.

    Args:
        counters: one for each array.
        arrays: float32, C-contiguous and aligned, of at most `CAPACITY` values.
    """

    __slots__ = ("_arrays", "_counters", "_records", "_sizes", "_values")

    def __init__(self, counters: Sequence[RangeCounter], arrays: Sequence[NDArray[np.float32]]) -> None:
        self._counters = counters
        self._arrays = arrays  # kept alive, as only their addresses are known below
        self._values = np.array([_address(values) for values in arrays], dtype=np.int64)
        self._sizes = np.array([values.size for values in arrays], dtype=np.int64)
        self._records = np.array([counter._record_at for counter in counters], dtype=np.int64)

    def count(self) -> int:
        """Count what the arrays hold now; return how many of the values are NaN or infinite."""
        first = nonfinite = 0
        while True:
            first, found = count_tensors(self._values, self._sizes, self._records, first, CAPACITY)
            nonfinite += found
            if first == len(self._sizes):
                return nonfinite
            full = self._counters[first]
            if isinstance(full, MagnitudeCounter):
                full.make_room()


def count_together(counters: Sequence[RangeCounter], arrays: Sequence[NDArray[Any]]) -> int:
    """Count arrays, each in its own counter and in one call; see `RangeCounter.update`.

    Returns:
        How many of the values are NaN or infinite.
    """
    flat = [_flat(array) for array in arrays]
    if all(values.size <= CAPACITY for values in flat):
        return Counting(counters, flat).count()
    return sum(
        Counting([counter], [values[start : start + CAPACITY]]).count()
        for counter, values in zip(counters, flat, strict=True)
        for start in range(0, values.size, CAPACITY)
    )


def is_countable(array: NDArray[Any]) -> bool:
    """Tell whether an array can be counted where it is, as `Counting` does."""
    flags = array.flags
    return array.dtype == np.float32 and flags.c_contiguous and flags.aligned and array.size <= CAPACITY


def histogram_of(*arrays: NDArray[Any]) -> MagnitudeHistogram:
    """Return the histogram of the values of some arrays; see `RangeCounter.update`."""
    counter = MagnitudeCounter()
    for values in arrays:
        counter.update(values)
    return counter.histogram()


def _flat(array: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 values one after the other in memory, aligned, in native byte order."""
    if array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned:
        return array.reshape(-1)
    with np.errstate(over="ignore"):
        return np.require(array, np.float32, ["C", "A"]).reshape(-1)


def _pages(size: int) -> mmap.mmap:
    """Return memory of zeros, of which the operating system provides only the pages that are written to.

    The C library would take memory that was freed before, where there is some, and write zeros to all of it.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages knows nothing of them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


@njit
def _address(array: NDArray[Any]) -> int:
    """Return where an array begins; ten times faster than numpy does."""
    return int(array.ctypes.data)
