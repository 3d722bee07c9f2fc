"""Thresholds that a given share of the magnitudes does not exceed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from calibrators.errors import CalibrationError
from calibrators.histogram import MagnitudeHistogram, lower_edges


def percentile_amax(histogram: MagnitudeHistogram, percentile: float) -> float:
    """Return the threshold that at least `percentile` per cent of all |x| do not exceed, by the nearest rank.

    With n values, zeros included, it is the upper edge of the bin that holds the ceil(percentile / 100 * n)-th smallest magnitude, but
    not more than the largest: at most one bin, 2**-10 of the value, above the exact percentile.

    Where so many values are exactly zero that this would be 0 (a ReLU that is mostly off), the percentile of the non-zero
    values is returned: zeros quantize without error whatever the threshold, and a threshold of 0 would erase the rest.

    Args:
        histogram: of the tensor.
        percentile: 0 < percentile <= 100, as the decimal number that it is written as; 100 gives the exact maximum.

    Returns:
        The threshold in the tensor's unit; 0.0 for a tensor that is always zero.

    Raises:
        CalibrationError: `percentile` is outside (0, 100].
    """
    check_percentile(percentile)
    if histogram.amax == 0:
        return 0.0
    # Exact arithmetic: in floats, 99.99 / 100 * 1e6 may round to either side of an integer and move the rank by one.
    share = Fraction(str(percentile)) / 100
    rank = math.ceil(share * histogram.count)
    counts = histogram.counts
    if rank <= histogram.zeros:
        counts = histogram.nonzero_counts()
        rank = math.ceil(share * int(counts.sum()))
    index = int(np.searchsorted(np.cumsum(counts), rank))
    upper_edge = float(lower_edges(histogram.bins[index : index + 1] + 1)[0])
    return min(upper_edge, histogram.amax)


def check_percentile(percentile: float) -> None:
    """Raise CalibrationError unless 0 < percentile <= 100."""
    if not 0 < percentile <= 100:
        raise CalibrationError(
            f"Cannot take percentile {percentile} of the magnitudes: expected a number above 0 and up to 100, such as 99.99."
        )
