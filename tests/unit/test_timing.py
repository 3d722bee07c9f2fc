"""Percentiles, speed-ups and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_int8.timing import Speedup, estimate_speedup, percentile, summarize, with_all_time
from trt_int8.timing_warnings import median_warnings


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [(100, 90, 90), (100, 95, 95), (100, 99, 99), (10, 90, 9), (10, 99, 10), (1, 50, 1), (20, 95, 19), (3, 0, 1)],
)
def test_percentile_is_trtexecs(count: int, percent: int, expected: int) -> None:
    """Of 1 .. n, the p-th percentile leaves out the floor((1 - p) n) largest, exactly."""
    assert percentile(np.arange(1.0, count + 1), percent) == expected


def test_summary_by_hand() -> None:
    """1, 2, 3 and 10 ms: median 2.5, mean 4, population deviation sqrt(12.5), percentiles the largest value."""
    latency = summarize(np.array([[10_000_000, 1_000_000], [3_000_000, 2_000_000]]))

    assert latency.median_ms == 2.5
    assert latency.mean_ms == 4.0
    assert latency.cv_percent == pytest.approx(100 * 12.5**0.5 / 4)
    assert (latency.p90_ms, latency.p95_ms, latency.p99_ms) == (10.0, 10.0, 10.0)
    assert latency.iterations == 4


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_occur(times: list[int]) -> None:
    """Percentiles never fall with the percentage, and each is a time that was measured."""
    latency = summarize(np.array(times))

    assert latency.p90_ms <= latency.p95_ms <= latency.p99_ms <= max(times) / 1e6
    assert {latency.p90_ms, latency.p95_ms, latency.p99_ms} <= {time / 1e6 for time in times}


def test_speedup_of_constant_times_is_exact() -> None:
    """Half the time in every round is 2.0, with an interval of no width."""
    assert estimate_speedup(np.full(20, 8.0), np.full(20, 4.0), seed=0) == Speedup(2.0, 2.0, 2.0)


def test_speedup_is_paired_by_round() -> None:
    """A machine that slows down tenfold for half of the rounds slows both: the ratio stays 2.0 throughout."""
    load = np.where(np.arange(20) % 2 == 0, 1.0, 10.0)

    assert estimate_speedup(3.0 * load, 1.5 * load, seed=0) == Speedup(2.0, 2.0, 2.0)


def test_speedup_interval_against_all_resamples() -> None:
    """For three rounds the bootstrap has 27 equally likely draws; the interval is their 2.5 % and 97.5 % quantile."""
    ratios = np.array([1.0, 2.0, 4.0])
    draws = np.stack(np.meshgrid(ratios, ratios, ratios), axis=-1).reshape(-1, 3)
    exact = np.quantile(np.median(draws, axis=1), [0.025, 0.975])

    speedup = estimate_speedup(ratios, np.ones(3), seed=0)

    assert speedup.ratio == 2.0
    np.testing.assert_allclose([speedup.low, speedup.high], exact)


def test_interval_covers_the_true_ratio() -> None:
    """Of 200 experiments on noisy rounds with a true ratio of 1, at least 90 % of the intervals hold 1."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        reference, candidate = rng.lognormal(0, 0.1, (2, 20))
        speedup = estimate_speedup(reference, candidate, seed)
        covered += speedup.low <= 1.0 <= speedup.high

    assert covered >= 180


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=20), st.integers(0, 99))
def test_interval_holds_the_estimate(ratios: list[float], seed: int) -> None:
    """The estimate lies inside its interval, and the interval inside the rounds' own range."""
    speedup = estimate_speedup(np.array(ratios), np.ones(len(ratios)), seed)

    assert min(ratios) <= speedup.low <= speedup.ratio <= speedup.high <= max(ratios)


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [
        (Speedup(1.85, 1.80, 1.92), "INT8 is faster than FP32 here: 1.85x (1.80 to 1.92)"),
        (Speedup(0.60, 0.58, 0.61), "INT8 is slower than FP32 here: 0.60x (0.58 to 0.61)"),
        (
            Speedup(0.98, 0.95, 1.02),
            "INT8 is not faster than FP32 here, the two cannot be told apart: 0.98x (0.95 to 1.02)",
        ),
        (
            Speedup(1.012, 1.003, 1.02),
            "INT8 is not faster than FP32 here, the two cannot be told apart: 1.01x (1.00 to 1.02)",
        ),
    ],
)
def test_verdict_is_plain(speedup: Speedup, expected: str) -> None:
    """An interval that holds 1.0 as printed is never called a speed-up."""
    assert speedup.verdict("INT8", "FP32") == expected


def test_same_seed_gives_the_same_interval() -> None:
    """The bootstrap is reproducible."""
    rng = np.random.default_rng(0)
    reference, candidate = rng.lognormal(0, 0.1, (2, 20))

    assert estimate_speedup(reference, candidate, seed=5) == estimate_speedup(reference, candidate, seed=5)


def test_work_that_falls_into_longer_calls_alone() -> None:
    """Calls of 3 ms wait 5 ms for others twice out of three times, calls of 2 ms do so once: 8 / 2, and 19 / 11."""
    reference = np.tile([3, 8, 8], (5, 1)) * 1_000_000
    candidate = np.tile([2, 7, 2], (5, 1)) * 1_000_000
    by_medians = estimate_speedup(np.median(reference, axis=1), np.median(candidate, axis=1), seed=0)
    found = with_all_time(by_medians, reference, candidate)
    (warning,) = median_warnings(["fp32", "int8"], [reference, candidate], [by_medians, found])

    assert (by_medians.low, by_medians.ratio, by_medians.high) == (4.0, 4.0, 4.0)
    assert (found.ratio, found.high) == (4.0, 4.0)
    assert found.low == pytest.approx(19 / 11)
    assert warning.startswith("int8: the medians give 4.00x and all the time taken 1.73x: other work")


def test_a_late_call_now_and_then_widens_nothing() -> None:
    """A tenth of the calls takes twice as long, of one model alone: medians are there to leave that out."""
    steady = np.full((5, 10), 1_000_000)
    late = steady.copy()
    late[:, 3] *= 2
    speedup = Speedup(1.0, 1.0, 1.0)

    assert with_all_time(speedup, late, steady) is speedup
    assert list(median_warnings(["fp32", "int8"], [late, steady], [speedup, speedup])) == []
