"""Thresholds by least information loss: the search of TensorRT's entropy calibrator.

Szymon Migacz, "8-bit Inference with TensorRT", GPU Technology Conference, 2017 (talk S7310), pages 17-39.

For each i = 128 .. N, saturating a linear histogram of N bins at its first i bins gives

    P = counts[0:i], with everything above added to its last bin           the distribution that a saturated tensor has
    Q = counts[0:i] in 128 levels, each spread evenly over its             what 128 codes can tell of the unsaturated part
        non-empty bins

and, both normalised, the i with the least KL(P || Q) = sum P log(P / Q) wins. The outliers are in P and not in Q: that is what
saturation costs; few levels for many bins is what the wider range costs.

Details on which implementations differ, and what is done here:
- Level k covers the bins [ceil(k i / 128), ceil((k + 1) i / 128)): levels differ by one bin at most.
- Where P > 0 and Q = 0 (outliers piled onto an empty last bin) the divergence is infinite; nothing is smoothed.
- The first of equal minima wins, that is the smallest threshold.
- Exact zeros are not in the histogram (`MagnitudeHistogram.linear`).
- The threshold is the centre of the first bin that saturates, (i + 0.5) * width, as in TensorRT's own caches. It lies at most one and a
  half bins above the largest value.

The criterion looks at the shape of the distribution alone, not at how far outliers are moved: a tensor with a handful of
distinct values can lose its largest ones at a divergence of 0. Minimum-maximum or MSE fit such tensors.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import MagnitudeHistogram

LEVELS = 128


def entropy_amax(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the least information loss, in the tensor's unit; 0.0 for a tensor that is always zero."""
    linear = histogram.linear()
    if not linear.counts.size:
        return 0.0
    divergences = kl_divergences(linear.counts)
    saturated_from = LEVELS + int(np.argmin(divergences)) if divergences.size else linear.counts.size
    return (saturated_from + 0.5) * linear.width


def kl_divergences(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return KL(P || Q) in nats of each candidate.

    Args:
        counts: int64, shape (N,), of a linear histogram; the last is not 0.

    Returns:
        float64, shape (max(N - 127, 0),): entry k is the candidate that keeps 128 + k bins. Infinite where P > 0 and Q = 0.
        The last one keeps everything and is always finite.
    """
    sums = np.concatenate(([0], np.cumsum(counts)))
    filled = np.concatenate(([0], np.cumsum(counts > 0)))
    logs = np.log(counts, out=np.zeros(counts.size), where=counts > 0)
    entropies = np.concatenate(([0.0], np.cumsum(counts * logs)))
    return _divergences(counts, sums, filled, entropies)


@njit
def _divergences(
    counts: NDArray[np.int64], sums: NDArray[np.int64], filled: NDArray[np.int64], entropies: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Evaluate all candidates in O(N * 128) by prefix sums over the bins below each index.

    With unnormalised P and Q, T = sum(P) = all counts and I = sum(Q) = the counts kept,

        KL = 1/T (sum P log P - sum P log Q) + log(I / T),

    where sum P log P is a prefix sum with its last term replaced, and Q is constant over the non-empty bins of a level.

    Args:
        counts: (N,).
        sums: (N + 1,), of the counts.
        filled: (N + 1,), of the non-empty bins.
        entropies: (N + 1,), of count * log(count).
    """
    total = sums[-1]
    divergences = np.full(max(counts.size - LEVELS + 1, 0), np.inf)
    for candidate in range(divergences.size):
        size = LEVELS + candidate
        kept = sums[size]
        outliers = total - kept
        last = counts[size - 1]
        if last == 0 and outliers > 0:
            continue
        p_log_p = entropies[size - 1]
        if last + outliers > 0:
            p_log_p += (last + outliers) * math.log(last + outliers)
        p_log_q = 0.0
        log_q = 0.0
        start = 0
        for level in range(1, LEVELS + 1):
            stop = (level * size + LEVELS - 1) // LEVELS
            mass = sums[stop] - sums[start]
            if mass > 0:
                log_q = math.log(mass / (filled[stop] - filled[start]))
                p_log_q += mass * log_q
            start = stop
        p_log_q += (
            outliers * log_q
        )  # they are in the last bin; where there are any it is not empty, so log_q is its level's
        divergences[candidate] = (p_log_p - p_log_q) / total + math.log(kept / total)
    return divergences
