"""Thresholds with the least expected squared error of symmetric INT8.

With threshold t and step s = t / 127, a magnitude x becomes s * n(x), n(x) = min(round(x / s), 127). Write the rounding boundaries as
x_j = (j - 1/2) s, j = 1 .. 127; n(x) is the number of boundaries below x. Since the squared error falls by 2 s (x - x_j) with each
boundary that x has passed,

    (x - s n(x))**2 = x**2 - 2 s * sum over j of max(x - x_j, 0)

and the error of a whole distribution needs its second moment and 127 values of the excess function E(y) = sum of max(x - y, 0):

    error(t) = sum of x**2 - 2 s * sum over j of E(x_j)

Rounding and saturation are both in it. Counts are taken as spread evenly over their bins, which makes E a quadratic within each bin
whose coefficients are suffix sums over the bins: a candidate costs 127 short evaluations, whatever the number of bins.

Saturation alone, V(t) = sum of max(x - t, 0)**2, is a lower bound of error(t) that grows as t falls. So going down from the
largest magnitude, the search ends as soon as V reaches the least error found: no smaller threshold can be better, and
heavy-tailed tensors are searched as many octaves down as it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import BINS_PER_OCTAVE, SHIFT, MagnitudeHistogram, lower_edges
from calibrators.numerics import LEVELS

_SEARCHED_OCTAVES = 20
"""Thresholds down to 2**-20 of the largest magnitude are tried: among n values, one outlier can pull the best threshold of the others at
most about sqrt(n) below itself before losing the others costs less."""

_RESOLVED_OCTAVES = _SEARCHED_OCTAVES + 8
"""Eight octaves further down lies the first rounding boundary of the smallest threshold, t / 254."""


def mse_amax(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the least expected squared error among all bin edges and the exact maximum.

    The bins are 2**-10 of their octave wide, and every edge is evaluated that can still win.

    Returns:
        The threshold in the tensor's unit; 0.0 for a tensor that is always zero.
    """
    if histogram.amax == 0:
        return 0.0
    excess = _Excess.of(histogram)
    best = histogram.amax
    (least,) = excess.errors(np.array([best]))
    for stop in range(excess.edges.size, excess.first_threshold, -BINS_PER_OCTAVE):
        octave = slice(max(stop - BINS_PER_OCTAVE, excess.first_threshold), stop)
        if excess.saturation[stop - 1] >= least:
            break
        thresholds = excess.edges[octave]
        errors = excess.errors(thresholds)
        winner = int(np.argmin(errors))
        if errors[winner] < least:
            best, least = float(thresholds[winner]), errors[winner]
    return best


def squared_errors(histogram: MagnitudeHistogram, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the expected mean squared error over the non-zero values for each threshold.

    Args:
        histogram: of a tensor that is not always zero.
        thresholds: float64, shape (n,), from 2**-20 of the largest magnitude up to it.

    Returns:
        float64, shape (n,), in the tensor's unit squared.
    """
    return _Excess.of(histogram).errors(thresholds) / (histogram.count - histogram.zeros)


@dataclass(frozen=True, slots=True)
class _Excess:
    """The excess function of a histogram's non-zero values, one quadratic per bin, and the saturation error at each edge.

    Attributes:
        first_bin: number of the lowest resolved bin.
        first_threshold: index of the lowest edge that is searched.
        edges: upper edge of each bin; the last is the exact maximum. This and the following: float64, shape (bins,).
        above: number of values in higher bins.
        density: count / width of each bin.
        excess: E at the upper edge.
        saturation: V at the upper edge.
        second_moment: sum of x**2 over all values, resolved or not.
    """

    first_bin: int
    first_threshold: int
    edges: NDArray[np.float64]
    above: NDArray[np.float64]
    density: NDArray[np.float64]
    excess: NDArray[np.float64]
    saturation: NDArray[np.float64]
    second_moment: float

    @classmethod
    def of(cls, histogram: MagnitudeHistogram) -> _Excess:
        values = histogram.nonzero_counts().astype(np.float64)
        last_bin = int(histogram.bins[-1])
        first_bin = max(last_bin + 1 - _RESOLVED_OCTAVES * BINS_PER_OCTAVE, 0)

        lower = lower_edges(histogram.bins)
        upper = np.minimum(lower_edges(histogram.bins + 1), histogram.amax)
        second_moment = float(np.sum(values * (lower * lower + lower * upper + upper * upper) / 3))

        edges = np.minimum(lower_edges(np.arange(first_bin + 1, last_bin + 2)), histogram.amax)
        widths = np.diff(edges, prepend=lower_edges(np.array([first_bin])))
        counts = np.zeros(edges.size)
        resolved = histogram.bins >= first_bin
        counts[histogram.bins[resolved] - first_bin] = values[resolved]

        # The integral of the distribution's tail over a bin is the growth of E, that of 2 E the growth of V. Only positive
        # terms are added, from the top down, so nothing cancels.
        above = _sum_above(counts)
        excess = _sum_above(widths * (above + counts / 2))
        saturation = _sum_above(widths * (2 * excess + widths * (above + counts / 3)))
        return cls(
            first_bin=first_bin,
            first_threshold=0 if first_bin == 0 else (_RESOLVED_OCTAVES - _SEARCHED_OCTAVES) * BINS_PER_OCTAVE,
            edges=edges,
            above=above,
            # The largest value may lie on the lower edge of its bin, which then has no width: nothing in it exceeds anything.
            density=np.divide(counts, widths, out=np.zeros_like(counts), where=widths > 0),
            excess=excess,
            saturation=saturation,
            second_moment=second_moment,
        )

    def errors(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of squared errors for each threshold."""
        sums = _excess_at_boundaries(thresholds, self.first_bin, self.edges, self.above, self.density, self.excess)
        # What remains of the second moment when every value is exact is rounding of either sign.
        return np.maximum(self.second_moment - 2 / LEVELS * thresholds * sums, 0.0)


def _sum_above(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each bin the sum of the terms of all higher bins."""
    sums = np.zeros_like(terms)
    np.cumsum(terms[:0:-1], out=sums[-2::-1])
    return sums


@njit
def _excess_at_boundaries(
    thresholds: NDArray[np.float64],
    first_bin: int,
    edges: NDArray[np.float64],
    above: NDArray[np.float64],
    density: NDArray[np.float64],
    excess: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return for each threshold t the sum of E((j - 1/2) t / 127) over j = 1 .. 127."""
    sums = np.zeros(thresholds.size)
    for i in range(thresholds.size):
        step = thresholds[i] / LEVELS
        for j in range(LEVELS):
            boundary = (j + 0.5) * step
            # A boundary within float32's rounding of a bin's edge may count as the next bin, where the same quadratic holds
            # to that precision.
            k = (np.int64(np.float32(boundary).view(np.uint32)) >> SHIFT) - first_bin
            depth = edges[k] - boundary
            sums[i] += excess[k] + depth * (above[k] + 0.5 * density[k] * depth)
    return sums
