"""Thresholds that a given share of the magnitudes does not exceed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from calibrators.errors import CalibrationError
from calibrators.histogram import MagnitudeHistogram, lower_edges


def percentile_amax(histogram: MagnitudeHistogram, percentile: float) -> float:
    """Return the threshold that `percentile` per cent of all magnitudes do not exceed, by the nearest rank.

    Of n values, zeros included, the ceil(percentile / 100 * n)-th smallest magnitude is taken, rounded up to the edge
    of its bin but not beyond the largest magnitude: the result exceeds the exact percentile by 2**-10 of it at most.

    Where so many values are exactly zero that this would be 0 (a ReLU that is mostly off), it is the percentile of the
    non-zero values: zeros quantize without error whatever the threshold, and a threshold of 0 would erase the others.

    Args:
        histogram: of the tensor.
        percentile: 0 < percentile <= 100, taken as the decimal number that it prints as; 100 gives the exact maximum.

    Returns:
        The threshold in the tensor's unit; 0.0 for a tensor that is always zero.

    Raises:
        CalibrationError: `percentile` is out of range.
    """
    check_percentile(percentile)
    if histogram.amax == 0:
        return 0.0
    # Exact, because 99.99 / 100 * n in floats may fall on either side of an integer, which moves the rank by one.
    share = Fraction(str(percentile)) / 100
    counts = histogram.counts
    rank = math.ceil(share * histogram.count)
    if rank <= histogram.zeros:
        counts = histogram.nonzero_counts()
        rank = math.ceil(share * (histogram.count - histogram.zeros))
    k = int(np.searchsorted(np.cumsum(counts), rank))
    upper_edge = float(lower_edges(histogram.bins[k : k + 1] + 1)[0])
    return min(upper_edge, histogram.amax)


def check_percentile(percentile: float) -> None:
    """Raise CalibrationError unless 0 < percentile <= 100."""
    if not 0 < percentile <= 100:
        raise CalibrationError(
            f"Cannot calibrate by percentile {percentile}: expected a number above 0 and up to 100, such as 99.99."
        )
