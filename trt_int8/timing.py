"""Statistics of inference times.

The speed-up of a candidate is the median over the rounds of

    (median time of the reference in that round) / (median time of the candidate in the same round)

and its 95 % interval comes from a bootstrap that draws whole rounds: inferences that follow each other share the clock,
the caches and the neighbours on the machine, so they are no independent samples; rounds nearly are. A speed-up whose
interval holds 1.0, to the two decimals that are printed, is not called one. Where the ratio of all the time taken is
another one, the interval spans that too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Probability with which the interval of a speed-up is to hold the true one."""

RESAMPLES = 10_000
"""Draws of the bootstrap."""

DISAGREEMENT = 1.25
"""Where the ratio of medians and that of all the time taken differ by more than this factor, an interval spans both."""

NO_VERDICT = ": no verdict, "
"""Stands between two models and the reason why their times are not compared."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one call of `infer`, in milliseconds.

    Attributes:
        median_ms: median; the average of the middle pair for an even count.
        p90_ms: 90th percentile by trtexec's definition, see `percentile`.
        p95_ms: 95th.
        p99_ms: 99th.
        mean_ms: arithmetic mean.
        cv_percent: coefficient of variation, population standard deviation / mean.
        iterations: number of timed calls.
    """

    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    cv_percent: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast as the first candidate.

    Attributes:
        ratio: median over the rounds of the ratio of the two medians; above 1 is faster.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
    """

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        """Give `1.85x (1.80 to 1.92)`."""
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"

    def verdict(self, name: str, reference: str) -> str:
        """Say plainly whether `name` is faster than `reference`; the interval as printed decides."""
        if round(self.low, 2) > 1.0:
            return f"{name} is faster than {reference} here: {self}"
        if round(self.high, 2) < 1.0:
            return f"{name} is slower than {reference} here: {self}"
        return f"{name} is not faster than {reference} here, the two cannot be told apart: {self}"


def percentile(ascending: NDArray[np.float64], percent: int) -> float:
    """Return a percentile as trtexec defines it: ascending[max(n - 1 - floor((1 - percent / 100) * n), 0)].

    It is always a value that occurred. The index is computed in whole numbers, because (1 - 0.9) * 10 is below 1 in
    floating point.

    Args:
        ascending: sorted values, shape (n,), n > 0.
        percent: 0 to 100.
    """
    count = len(ascending)
    return float(ascending[max(count - 1 - (100 - percent) * count // 100, 0)])


def summarize(times_ns: NDArray[np.int64]) -> Latency:
    """Summarize the times of single calls, in nanoseconds, of any shape but empty."""
    ascending = np.sort(times_ns, axis=None) / 1e6
    mean = float(ascending.mean())
    return Latency(
        median_ms=float(np.median(ascending)),
        p90_ms=percentile(ascending, 90),
        p95_ms=percentile(ascending, 95),
        p99_ms=percentile(ascending, 99),
        mean_ms=mean,
        cv_percent=100 * float(ascending.std()) / mean,
        iterations=ascending.size,
    )


def estimate_speedup(reference: NDArray[np.float64], candidate: NDArray[np.float64], seed: int) -> Speedup:
    """Estimate a speed-up and its 95 % interval by a percentile bootstrap over rounds.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
        reference: the reference's median time in each round, shape (rounds,).
        candidate: the candidate's in the same rounds.
        seed: seed of the resampling.
    """
    ratios = reference / candidate
    rounds = len(ratios)
    draws = np.random.default_rng(seed).integers(rounds, size=(RESAMPLES, rounds))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Speedup(float(np.median(ratios)), float(low), float(high))


def with_all_time(speedup: Speedup, reference: NDArray[np.int64], candidate: NDArray[np.int64]) -> Speedup:
    """Widen the interval of a speed-up to the ratio of all the time taken, where medians disagree with that.

    Work of others on the same cores comes in slices of a few milliseconds. Short inferences fit between two of them,
    so that their median shows nothing of it, and longer ones do not: the medians of all rounds are then wrong alike,
    and a bootstrap over rounds sees nothing of it.

    Args:
        speedup: by the medians of the rounds.
        reference: times of single calls, of any shape.
        candidate: times of single calls, of any shape.

    Returns:
        The speed-up; the same object where the two ratios are within `DISAGREEMENT`.
    """
    whole = time_ratio(reference, candidate)
    if not disagree(speedup, whole):
        return speedup
    return replace(speedup, low=min(speedup.low, whole), high=max(speedup.high, whole))


def time_ratio(reference: NDArray[np.int64], candidate: NDArray[np.int64]) -> float:
    """Return the speed-up by the mean times of single calls: by all the time that as many calls take."""
    return float(reference.mean() / candidate.mean())


def disagree(speedup: Speedup, whole: float) -> bool:
    """Tell whether the speed-up by medians is another one than that by all the time taken."""
    return not 1 / DISAGREEMENT <= speedup.ratio / whole <= DISAGREEMENT
