"""Thresholds with the least loss of information: the search of TensorRT's entropy calibrator.

Szymon Migacz, "8-bit Inference with TensorRT", NVIDIA GPU Technology Conference 2017.

Take a linear histogram of N bins. For each i = 128 .. N compare two distributions over its first i bins:

    P = the counts, with those of all higher bins added to the last          the tensor, saturated at i bins
    Q = the counts merged into 128 levels, each level spread evenly          what the codes tell of the tensor
        over its non-empty bins

Both normalised, the least Kullback-Leibler divergence KL(P || Q) = sum of P log(P / Q) wins. A narrow range costs
because the saturated values are in P but not in Q, a wide one because its levels are wide.

Where implementations differ, this one does the following:
- Level k holds the bins from ceil(k i / 128) to ceil((k + 1) i / 128), so that levels differ by one bin at most.
- Where P > 0 and Q = 0 (saturated values on top of an empty bin), the divergence is infinite; nothing is smoothed.
- Of equal divergences the smallest threshold wins.
- Exact zeros do not count (see `MagnitudeHistogram.linear`).
- The threshold is the centre of the first bin that saturates, (i + 0.5) * width, as in TensorRT's calibration caches. A
  tensor that is not saturated gets one a little above its largest value, by one and a half bins at most.

Few values make a ragged histogram, whatever the tensor's distribution: bins of one level differ by chance, a wide range
merges more of them, and the search would saturate a tensor only to tell its noise apart. So it begins where there is
something to be gained: where the unsaturated candidate loses more than chance alone takes. If the values of a level
were spread evenly, N of them in K non-empty bins and L non-empty levels would leave on average (the bias of an entropy
that is estimated from counts, K - L of its terms being free)

    KL(P || Q) = (K - L) / 2N

S. S. Wilks, "The large-sample distribution of the likelihood ratio for testing composite hypotheses", 1938: 2N KL has
the chi-squared distribution of K - L degrees of freedom. G. A. Miller, "Note on the bias of information estimates",
1955. Where the divergence of the full range is no larger, the tensor is not saturated. The term falls with 1 / N: it
decides for a classifier's input or its logits, and leaves the feature maps of a calibration set to the search.
TensorRT's own calibrator saturates such tensors.

The search looks at the shape of the distribution and not at the size of errors. A tensor with a handful of frequent
values may lose the largest of them, since a few spikes fit a few levels perfectly; minmax or mse suit it better.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.compiled import njit
from calibrators.histogram import MagnitudeHistogram

LEVELS = 128
"""Levels that the magnitudes are merged into, as in the paper."""

_ROUNDING = 1e-9
"""More than the rounding of a divergence, in nats: sums over the whole histogram are subtracted from each other."""


def entropy_amax(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the least loss of information.

    Returns:
        The threshold in the tensor's unit; 0.0 for a tensor that is always zero. A tensor whose full range loses no
        more than chance takes is not saturated, nor is a subnormal one that fills fewer than 128 bins.
    """
    linear = histogram.linear()
    if not linear.counts.size:
        return 0.0
    whole = linear.counts.size < LEVELS or is_within_noise(linear.counts)
    kept = linear.counts.size if whole else least_divergent(linear.counts)
    return (kept + 0.5) * linear.width


def is_within_noise(counts: NDArray[np.int64]) -> bool:
    """Tell whether the full range loses no more than chance alone takes: KL(P || Q) <= (K - L) / 2N.

    Args:
        counts: int64, shape (bins,) with at least 128 bins, of a linear histogram; the last is not 0.
    """
    sums = _prefix_sums(counts)
    _, mass_below, filled_below, _ = sums
    starts = -(-np.arange(LEVELS + 1) * counts.size // LEVELS)
    levels = np.count_nonzero(np.diff(filled_below[starts]))
    noise = (filled_below[-1] - levels) / (2 * mass_below[-1])
    return bool(_divergence(counts.size, *sums) <= noise)


def least_divergent(counts: NDArray[np.int64]) -> int:
    """Return the smallest number of bins whose candidate has the least divergence.

    The same as evaluating all of them. Going down from the widest range, most candidates are ruled out by a bound that
    takes no level: merging cells of two distributions never makes them more different, and with all levels but the last
    in one cell, P and Q have two cells each.

    Args:
        counts: int64, shape (N,) with N >= 128, of a linear histogram; the last is not 0.
    """
    return int(_least(*_prefix_sums(counts)))


def kl_divergences(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the divergence of every candidate.

    Args:
        counts: int64, shape (N,), of a linear histogram; the last is not 0.

    Returns:
        float64, shape (max(N - 127, 0),), in nats: entry k is KL(P || Q) for 128 + k bins. The last, which keeps all
        bins, is finite.
    """
    return _divergences(*_prefix_sums(counts))


def _prefix_sums(
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the counts, and the sums of counts, of non-empty bins and of count * log(count) below each bin."""
    logs = np.log(counts, out=np.zeros(counts.size), where=counts > 0)
    return counts, _sums_below(counts), _sums_below(counts > 0), _sums_below(counts * logs)


def _sums_below(terms: NDArray[Any]) -> NDArray[Any]:
    """Return for k = 0 .. N the sum of the first k terms."""
    return np.concatenate(([0], np.cumsum(terms)))


@njit
def _divergences(
    counts: NDArray[np.int64],
    mass_below: NDArray[np.int64],
    filled_below: NDArray[np.int64],
    entropy_below: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Evaluate all candidates in O(N * 128)."""
    divergences = np.empty(max(counts.size - LEVELS + 1, 0))
    for candidate in range(divergences.size):
        divergences[candidate] = _divergence(LEVELS + candidate, counts, mass_below, filled_below, entropy_below)
    return divergences


@njit
def _least(
    counts: NDArray[np.int64],
    mass_below: NDArray[np.int64],
    filled_below: NDArray[np.int64],
    entropy_below: NDArray[np.float64],
) -> int:
    """Return the size of the best candidate, of equal ones the smallest."""
    total = mass_below[-1]
    best = counts.size
    least = np.inf
    for size in range(counts.size, LEVELS - 1, -1):
        kept = mass_below[size]
        saturated = total - kept
        in_last_level = kept - mass_below[((LEVELS - 1) * size + LEVELS - 1) // LEVELS]
        if saturated > 0 and in_last_level > 0:
            last = in_last_level + saturated
            bound = math.log(kept / total) + last / total * math.log(last / in_last_level)
            if bound > least + _ROUNDING:
                continue
        divergence = _divergence(size, counts, mass_below, filled_below, entropy_below)
        if divergence <= least:
            best, least = size, divergence
    return best


@njit
def _divergence(
    size: int,
    counts: NDArray[np.int64],
    mass_below: NDArray[np.int64],
    filled_below: NDArray[np.int64],
    entropy_below: NDArray[np.float64],
) -> float:
    """Evaluate the candidate that keeps `size` bins, in O(128).

    With P and Q not normalised, sum(P) = all counts and sum(Q) = the counts kept, so

        KL = (sum of P log P - sum of P log Q) / all + log(kept / all)

    where the first sum is one over bins below an index with its last term replaced, and Q is the same for all
    non-empty bins of a level.

    Args:
        size: number of bins.
        counts: (N,).
        mass_below: (N + 1,), sums of the counts.
        filled_below: (N + 1,), numbers of non-empty bins.
        entropy_below: (N + 1,), sums of count * log(count).
    """
    total = mass_below[-1]
    kept = mass_below[size]
    saturated = total - kept
    last = counts[size - 1]
    if last == 0 and saturated > 0:
        return math.inf
    p_log_p = entropy_below[size - 1]
    if last > 0:
        p_log_p += (last + saturated) * math.log(last + saturated)
    p_log_q = 0.0
    log_q = 0.0
    start = 0
    for level in range(1, LEVELS + 1):
        stop = (level * size + LEVELS - 1) // LEVELS
        mass = mass_below[stop] - mass_below[start]
        if mass > 0:
            log_q = math.log(mass / (filled_below[stop] - filled_below[start]))
            p_log_q += mass * log_q
        start = stop
    # Saturated values share the last bin, which is not empty: log_q is that of its level.
    p_log_q += saturated * log_q
    return float((p_log_p - p_log_q) / total + math.log(kept / total))
