"""Thresholds with the least expected squared error of symmetric INT8.

With threshold t and step s = t / 127, a magnitude x is rounded to s * n(x), where n(x) counts the rounding boundaries
x_j = (j - 1/2) s, j = 1 .. 127, that lie below x. Each boundary that x has passed takes 2 s (x - x_j) off the squared
error:

    (x - s n(x))**2 = x**2 - 2 s * (sum over j of max(x - x_j, 0))

So the error of a whole distribution, rounding and saturation together, needs its second moment and 127 values of its
excess function E(y) = sum over x of max(x - y, 0):

    error(t) = sum of x**2 - 2 s * (sum over j of E(x_j))

Values are taken as spread evenly over their bin. Then E is a quadratic within each bin, with sums over the higher
bins as coefficients, and a threshold costs 127 short evaluations however many bins there are.

Saturation alone, V(t) = sum of max(x - t, 0)**2, bounds error(t) from below and grows as t falls. The search goes
down from the largest magnitude and ends where V has reached the least error found, since no smaller threshold can be
better. It thus goes as far down as the tail of the tensor calls for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import BINS_PER_OCTAVE, SHIFT, MagnitudeHistogram, lower_edges
from calibrators.numerics import LEVELS

_SEARCHED_OCTAVES = 20
"""Thresholds down to 2**-20 of the largest magnitude are tried. For a lower one to win, the other values would have to
outnumber the outliers by 2**40: fewer lose less when all of them are rounded to zero."""

_RESOLVED_OCTAVES = _SEARCHED_OCTAVES + 8
"""The lowest rounding boundary, t / 254, is not quite 8 octaves below the threshold."""

_STRIDE = 16


def mse_amax(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the least expected squared error, among all edges of bins and the exact maximum.

    Returns:
        The threshold in the tensor's unit; 0.0 for a tensor that is always zero.
    """
    if histogram.amax == 0:
        return 0.0
    tail = _Tail.of(histogram)
    best = histogram.amax
    least = tail.errors(np.array([best]))[0]
    for stop in range(tail.edges.size, tail.lowest_threshold, -BINS_PER_OCTAVE):
        if tail.saturation[stop - 1] >= least:
            break
        start = max(stop - BINS_PER_OCTAVE, tail.lowest_threshold)
        # A few thresholds tell how far down the others of this octave need be tried.
        reached = min(least, tail.errors(tail.edges[start:stop:_STRIDE]).min())
        start += int(np.count_nonzero(tail.saturation[start : stop - 1] > reached))
        thresholds = tail.edges[start:stop]
        errors = tail.errors(thresholds)
        winner = int(np.argmin(errors))
        if errors[winner] < least:
            best, least = float(thresholds[winner]), errors[winner]
    return best


def expected_squared_errors(histogram: MagnitudeHistogram, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the expected squared error of a value, zeros included, under each threshold.

    Args:
        histogram: of a tensor that is not always zero.
        thresholds: float64, shape (n,), > 0; meaningful from 2**-20 of the largest magnitude.

    Returns:
        float64, shape (n,), in the tensor's unit squared.
    """
    return _Tail.of(histogram).errors(thresholds) / histogram.count


@dataclass(frozen=True, slots=True, eq=False)
class _Tail:
    """What a threshold's error needs to know of the distribution above each bin.

    Arrays are float64 of shape (bins,), one entry for each bin from `first_bin` to that of the largest magnitude.

    Attributes:
        first_bin: number of the lowest bin that is resolved.
        lowest_threshold: index of the lowest edge to be tried as a threshold.
        edges: upper edge of the bin; the last is the largest magnitude itself.
        above: number of values in higher bins.
        density: number of values in the bin, divided by its width.
        excess: E at the upper edge.
        saturation: V at the upper edge.
        second_moment: sum of x**2 over all values.
    """

    first_bin: int
    lowest_threshold: int
    edges: NDArray[np.float64]
    above: NDArray[np.float64]
    density: NDArray[np.float64]
    excess: NDArray[np.float64]
    saturation: NDArray[np.float64]
    second_moment: float

    @classmethod
    def of(cls, histogram: MagnitudeHistogram) -> _Tail:
        values = histogram.nonzero_counts().astype(np.float64)
        lower = lower_edges(histogram.bins)
        upper = np.minimum(lower_edges(histogram.bins + 1), histogram.amax)

        last_bin = int(histogram.bins[-1])
        first_bin = max(last_bin + 1 - _RESOLVED_OCTAVES * BINS_PER_OCTAVE, 0)
        all_edges = np.minimum(lower_edges(np.arange(first_bin, last_bin + 2)), histogram.amax)
        widths = np.diff(all_edges)
        counts = np.zeros(widths.size)
        resolved = histogram.bins >= first_bin
        counts[histogram.bins[resolved] - first_bin] = values[resolved]

        above, density, excess, saturation = _sums_from_the_top(counts, widths)
        return cls(
            first_bin=first_bin,
            lowest_threshold=0 if first_bin == 0 else (_RESOLVED_OCTAVES - _SEARCHED_OCTAVES) * BINS_PER_OCTAVE,
            edges=all_edges[1:],
            above=above,
            density=density,
            excess=excess,
            saturation=saturation,
            second_moment=float(np.sum(values * (lower * lower + lower * upper + upper * upper))) / 3,
        )

    def errors(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of squared errors under each threshold."""
        sums = _sums_of_excess(thresholds, self.first_bin, self.edges, self.above, self.density, self.excess)
        # Where every value is exact, rounding leaves a remainder of either sign.
        return np.maximum(self.second_moment - 2 / LEVELS * thresholds * sums, 0.0)


@njit
def _sums_from_the_top(
    counts: NDArray[np.float64], widths: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return for each bin the number of values above, the density, and E and V at its upper edge.

    E grows by the integral of the number of values above, V by that of 2 E, both from the top down. All terms are
    positive, so that nothing cancels.

    Args:
        counts: (bins,), number of values.
        widths: (bins,); the last has none where the largest magnitude is its lower edge, and nothing in it exceeds
            anything.
    """
    above = np.empty(counts.size)
    density = np.empty(counts.size)
    excess = np.empty(counts.size)
    saturation = np.empty(counts.size)
    values_above, e, v = 0.0, 0.0, 0.0
    for k in range(counts.size - 1, -1, -1):
        count, width = counts[k], widths[k]
        above[k] = values_above
        density[k] = count / width if width > 0 else 0.0
        excess[k] = e
        saturation[k] = v
        v += width * (2 * e + width * (values_above + count / 3))
        e += width * (values_above + count / 2)
        values_above += count
    return above, density, excess, saturation


@njit
def _sums_of_excess(
    thresholds: NDArray[np.float64],
    first_bin: int,
    edges: NDArray[np.float64],
    above: NDArray[np.float64],
    density: NDArray[np.float64],
    excess: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return for each threshold t the sum over j = 1 .. 127 of E((j - 1/2) t / 127)."""
    sums = np.zeros(thresholds.size)
    for i in range(thresholds.size):
        step = thresholds[i] / LEVELS
        for j in range(LEVELS):
            boundary = (j + 0.5) * step
            if boundary >= edges[-1]:
                break
            # Rounding to float32 may move a boundary across an edge beside it, where the quadratics of both bins agree.
            k = max(np.int64(np.float32(boundary).view(np.uint32) >> SHIFT) - first_bin, np.int64(0))
            depth = edges[k] - boundary
            sums[i] += excess[k] + depth * (above[k] + 0.5 * density[k] * depth)
    return sums
