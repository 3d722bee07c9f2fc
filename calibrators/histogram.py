"""Histograms of magnitudes whose bins are the float's own bit pattern.

    bin of x = (float32 bits of x, sign dropped) >> 13        8 exponent bits and 10 mantissa bits: 2**18 bins

The bins do not depend on the data: there is no range to choose, nothing grows or is rebinned, and merging the histograms of
batches, threads or machines is integer addition. So the result depends neither on the order of the data nor on how it was split.
Each octave [2**k, 2**(k+1)) has 1024 bins of equal width. The top two octaves of any tensor therefore hold at least the resolution
of the linear histogram of 2048 bins that calibration searches are defined on, and `MagnitudeHistogram.linear` gives that one exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

MANTISSA_BITS = 10
SHIFT = 23 - MANTISSA_BITS
BINS_PER_OCTAVE = 1 << MANTISSA_BITS
BINS = 1 << (31 - SHIFT)
"""Number of bins: every magnitude that float32 has."""

FINITE_BINS = 0x7F800000 >> SHIFT
"""Bins below this one hold finite magnitudes; those from here on hold infinity and NaN."""

_LEVELS_OF_TWO_OCTAVES = 2 * BINS_PER_OCTAVE


def bins_of(magnitudes: NDArray[Any]) -> NDArray[np.int32]:
    """Return the bin of each magnitude: float32 bits with the sign dropped, shifted right by 13."""
    bits = np.asarray(magnitudes, dtype=np.float32).view(np.uint32)
    return ((bits & 0x7FFFFFFF) >> SHIFT).astype(np.int32)


def lower_edges(bins: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the smallest magnitude of each bin; that of `bins + 1` is the (excluded) upper edge.

    The upper edge of the last finite bin is infinite, as float32 has nothing above it.
    """
    return (bins.astype(np.uint32) << SHIFT).view(np.float32).astype(np.float64)


@dataclass(frozen=True, slots=True)
class LinearHistogram:
    """Counts of non-zero magnitudes in bins of one width: bin i is [i * width, (i + 1) * width).

    Attributes:
        counts: int64, shape (bins,), without trailing empty bins.
        width: of one bin, in the tensor's unit; a power of two.
    """

    counts: NDArray[np.int64]
    width: float


@dataclass(frozen=True, slots=True, eq=False)
class MagnitudeHistogram:
    """What a tensor's values were over a whole calibration; immutable, and exact however the data was split.

    Attributes:
        bins: int32, shape (n,), ascending: the non-empty bins of finite magnitudes.
        counts: int64, shape (n,): how many values fell into each of `bins`, exact zeros included (they are in bin 0).
        minimum: smallest finite value, signed and exact; 0.0 if there was none.
        maximum: largest finite value, signed and exact; 0.0 if there was none.
        zeros: how many values were exactly +0 or -0.
        nonfinite: how many values were NaN or infinite; they are in no other statistic.
    """

    bins: NDArray[np.int32]
    counts: NDArray[np.int64]
    minimum: float
    maximum: float
    zeros: int
    nonfinite: int = 0

    def __post_init__(self) -> None:
        consistent = (
            self.bins.ndim == 1
            and self.bins.shape == self.counts.shape
            and bool(np.all(self.counts > 0))
            and bool(np.all(np.diff(self.bins) > 0))
            and (not self.bins.size or 0 <= self.bins[0])
            and 0 <= self.zeros <= (self.counts[0] if self.bins.size and self.bins[0] == 0 else 0)
            and self.nonfinite >= 0
            and bool(np.isfinite(self.minimum) and np.isfinite(self.maximum) and self.minimum <= self.maximum)
            and (int(bins_of(np.array(self.amax))) == (self.bins[-1] if self.bins.size else 0))
        )
        if not consistent:
            raise ValueError("these bins, counts and extreme values do not belong to one set of numbers")
        self.bins.flags.writeable = False
        self.counts.flags.writeable = False

    @property
    def amax(self) -> float:
        """Largest finite magnitude, exact."""
        return max(abs(self.minimum), abs(self.maximum))

    @property
    def count(self) -> int:
        """Number of finite values."""
        return int(self.counts.sum())

    def merge(self, other: Self) -> MagnitudeHistogram:
        """Return the histogram of both sets of values; exact, commutative and associative."""
        bins = np.union1d(self.bins, other.bins)
        counts = np.zeros(bins.size, dtype=np.int64)
        for part in (self, other):
            counts[np.searchsorted(bins, part.bins)] += part.counts
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
        """Return `counts` without the exact zeros; the first entry may become 0. A copy."""
        counts = self.counts.copy()
        if self.zeros:
            counts[0] -= self.zeros
        return counts

    def linear(self) -> LinearHistogram:
        """Return the linear histogram of 2048 bins over [0, 2**e), where 2**(e-1) <= amax < 2**e.

        Each bin is 2**(e-11) wide. In the upper half a linear bin is one bin of this histogram; below, it is a sum of whole
        ones: the counts are exact. Empty bins above the largest value are cut off, which leaves 1025 to 2048 bins.

        Exact zeros are left out: they quantize without error whatever the scale, so they have no say in choosing one. All
        other values below one width fall into bin 0.

        Float32 has no finer octaves below 2**-126; a tensor whose amax is smaller is treated as if it reached that octave, so
        that it may have fewer than 1025 bins. One without non-zero values has none.
        """
        exponents = self.bins >> MANTISSA_BITS
        # Bins of exponent 0 (subnormal) are spaced as those of exponent 1, without its implicit leading one.
        leading_one = (exponents > 0).astype(np.int32) << MANTISSA_BITS
        significands = (self.bins & (BINS_PER_OCTAVE - 1)) | leading_one
        octaves = np.maximum(exponents, 1)
        top = int(octaves[-1]) if self.bins.size else 1
        positions = significands >> np.minimum(top - octaves, MANTISSA_BITS + 1)

        counts = np.zeros(_LEVELS_OF_TWO_OCTAVES, dtype=np.int64)
        np.add.at(counts, positions, self.nonzero_counts())
        filled = np.flatnonzero(counts)
        size = int(filled[-1]) + 1 if filled.size else 0
        return LinearHistogram(counts=counts[:size], width=2.0 ** (top - 127 - MANTISSA_BITS))
