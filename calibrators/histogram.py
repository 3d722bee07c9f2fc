"""Histograms of magnitudes whose bins are the float's own bit pattern.

    bin of x = (float32 bits of x, sign dropped) >> 13        8 bits of exponent, 10 of mantissa: 2**18 bins

The bins do not depend on the data: there is no range to choose, nothing grows or is binned again, and merging the
histograms of batches, threads or machines is integer addition. So the result depends neither on the order of the data
nor on how it was split. Each octave [2**k, 2**(k+1)) has 1024 bins of equal width, so the linear histogram of 2048 bins
on which calibration searches are defined can be had from it exactly, whatever the range of the tensor turned out to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit

MANTISSA_BITS = 10
BINS_PER_OCTAVE = 1 << MANTISSA_BITS
SHIFT = 23 - MANTISSA_BITS
"""How many of float32's 23 bits of mantissa do not count."""

BINS = 1 << (31 - SHIFT)
FINITE_BINS = 0x7F800000 >> SHIFT
"""Bins below this one hold finite magnitudes; those from here on hold infinity and NaN."""

_EXPONENT_BIAS = 127


def bins_of(magnitudes: NDArray[Any]) -> NDArray[np.int32]:
    """Return the bin of each magnitude."""
    bits = np.asarray(magnitudes, dtype=np.float32).view(np.uint32)
    return ((bits & 0x7FFFFFFF) >> SHIFT).astype(np.int32)


def lower_edges(bins: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the smallest magnitude of each bin. That of `bins + 1` is the upper edge, which is not in the bin.

    The upper edge of the last finite bin is infinite, as float32 has nothing beyond it.
    """
    return (bins.astype(np.uint32) << SHIFT).view(np.float32).astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LinearHistogram:
    """Counts of non-zero magnitudes in bins of one width: bin k is [k * width, (k + 1) * width).

    Attributes:
        counts: int64, shape (bins,); the last is not 0.
        width: of a bin, in the tensor's unit; a power of two.
    """

    counts: NDArray[np.int64]
    width: float


_MOST_VALUES = 2**61
"""More than any calibration counts: two such histograms can be added without an overflow."""


@dataclass(frozen=True, slots=True, eq=False)
class MagnitudeHistogram:
    """How large a tensor's values were over a calibration set; exact, and immutable.

    Attributes:
        bins: int32, shape (n,), ascending: the non-empty bins of finite magnitudes.
        counts: int64, shape (n,): how many values fell into each of `bins`. Exact zeros count too, in bin 0.
        minimum: the smallest finite value, signed and exact; 0.0 if there was none.
        maximum: the largest finite value, signed and exact; 0.0 if there was none.
        zeros: how many values were exactly +0 or -0.
        nonfinite: how many values were NaN or infinite; they are in no other statistic.

    Raises:
        ValueError: the numbers contradict each other; only a damaged file can do that.
    """

    bins: NDArray[np.int32]
    counts: NDArray[np.int64]
    minimum: float
    maximum: float
    zeros: int
    nonfinite: int

    def __post_init__(self) -> None:
        in_bin_0 = int(self.counts[0]) if self.bins.size and self.bins[0] == 0 else 0
        top_bin = int(self.bins[-1]) if self.bins.size else 0
        if not (
            self.bins.shape == self.counts.shape == (self.bins.size,)
            and (np.diff(self.bins, prepend=-1) > 0).all()
            and (self.counts > 0).all()
            and 0 <= self.zeros <= in_bin_0
            and self.counts.sum(dtype=np.float64) < _MOST_VALUES
            and self.nonfinite >= 0
            and -np.inf < self.minimum <= self.maximum < np.inf
            and int(bins_of(np.array(self.amax))) == top_bin
        ):
            raise ValueError("counts and extreme values contradict each other")
        self.bins.flags.writeable = False
        self.counts.flags.writeable = False

    @property
    def amax(self) -> float:
        """The largest finite magnitude, exact."""
        return max(abs(self.minimum), abs(self.maximum))

    @property
    def count(self) -> int:
        """Number of finite values, zeros included."""
        return int(self.counts.sum())

    def merge(self, other: MagnitudeHistogram) -> MagnitudeHistogram:
        """Return the histogram of both sets of values; exact, commutative and associative."""
        bins, counts = _merged(self.bins, self.counts, other.bins, other.counts)
        filled = [part for part in (self, other) if part.bins.size]
        return MagnitudeHistogram(
            bins=bins,
            counts=counts,
            minimum=min((part.minimum for part in filled), default=0.0),
            maximum=max((part.maximum for part in filled), default=0.0),
            zeros=self.zeros + other.zeros,
            nonfinite=self.nonfinite + other.nonfinite,
        )

    def nonzero_counts(self) -> NDArray[np.int64]:
        """Return `counts` without the exact zeros, as a copy; its first entry may be 0."""
        counts = self.counts.copy()
        counts[:1] -= self.zeros
        return counts

    def linear(self) -> LinearHistogram:
        """Return the linear histogram of 2048 bins over [0, 2**e), where 2**(e-1) <= amax < 2**e.

        A bin is 2**(e-11) wide. In the upper half of the range it is one bin of this histogram, and below a sum of
        whole ones, so its count is exact; bin 0 also takes everything below. The empty bins above amax are cut off,
        which leaves 1025 to 2048.

        Exact zeros are left out: they quantize without error whatever the scale, so they have no say in choosing it.

        Below 2**-126 float32 has no octaves any more. A tensor that stays below is given the range of the lowest
        octave, and has fewer bins than 1025; one that is always zero has none.
        """
        exponents = self.bins >> MANTISSA_BITS
        # Exponent 0 marks subnormals: spaced as in the octave of exponent 1, but without its leading one.
        octaves = np.maximum(exponents, 1)
        significands = (self.bins & (BINS_PER_OCTAVE - 1)) | np.where(exponents > 0, BINS_PER_OCTAVE, 0)
        top = int(octaves[-1]) if self.bins.size else 1
        counts = np.zeros(2 * BINS_PER_OCTAVE, dtype=np.int64)
        # A shift by 11 leaves nothing of a significand; shifts by more than an integer's width are undefined.
        _add_at(counts, significands >> np.minimum(top - octaves, MANTISSA_BITS + 1), self.nonzero_counts())
        size = int(np.max(np.flatnonzero(counts), initial=-1)) + 1
        return LinearHistogram(counts=counts[:size], width=2.0 ** (top - _EXPONENT_BIAS - MANTISSA_BITS))


@njit
def _add_at(sums: NDArray[np.int64], indices: NDArray[np.integer[Any]], terms: NDArray[np.int64]) -> None:
    """Add each term to the sum of its index; numpy's own `add.at` is twenty times slower."""
    for i in range(indices.size):
        sums[indices[i]] += terms[i]


@njit
def _merged(
    bins: NDArray[np.int32], counts: NDArray[np.int64], other_bins: NDArray[np.int32], other_counts: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the bins of both sides, ascending, and the sums of their counts."""
    merged_bins = np.empty(bins.size + other_bins.size, dtype=np.int32)
    merged_counts = np.empty(merged_bins.size, dtype=np.int64)
    i = j = size = 0
    while i < bins.size or j < other_bins.size:
        mine = j == other_bins.size or (i < bins.size and bins[i] <= other_bins[j])
        theirs = i == bins.size or (j < other_bins.size and other_bins[j] <= bins[i])
        merged_bins[size] = bins[i] if mine else other_bins[j]
        merged_counts[size] = 0
        if mine:
            merged_counts[size] += counts[i]
            i += 1
        if theirs:
            merged_counts[size] += other_counts[j]
            j += 1
        size += 1
    return merged_bins[:size].copy(), merged_counts[:size].copy()
