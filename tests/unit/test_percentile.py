"""Percentiles of magnitudes, against sorting them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.counter import histogram_of
from calibrators.errors import CalibrationError
from calibrators.percentile import percentile_amax

BIN = 2**-10
"""Relative width of the widest bins."""

normal_float32 = st.floats(2.0**-100, 2.0**100, width=32)


def nearest_rank(magnitudes: np.ndarray, percentile: float) -> float:
    rank = math.ceil(Fraction(str(percentile)) / 100 * magnitudes.size)
    return float(np.sort(magnitudes)[rank - 1])


@pytest.mark.parametrize(("percentile", "expected"), [(50, 50), (99, 99), (99.1, 100), (0.5, 1), (100, 100)])
def test_percentile_by_hand(percentile: float, expected: int) -> None:
    """Of the magnitudes 1 .. 100 each is one per cent; the result is the upper edge of the bin."""
    values = np.arange(1.0, 101.0) * np.tile([1, -1], 50)

    edge = expected + 2.0 ** (math.floor(math.log2(expected)) - 10)
    assert percentile_amax(histogram_of(values), percentile) == min(edge, 100)


@given(
    hnp.arrays(np.float32, st.integers(1, 200), elements=normal_float32),
    st.integers(0, 50),
    st.sampled_from([1.0, 37.5, 50, 90, 99, 99.9, 99.99, 100]),
)
def test_percentile_is_within_a_bin_above_the_nearest_rank(values: np.ndarray, zeros: int, percentile: float) -> None:
    """Never below the sorted values' nearest rank, at most one bin above."""
    magnitudes = np.concatenate([np.zeros(zeros), values.astype(np.float64)])
    exact = nearest_rank(magnitudes, percentile) or nearest_rank(values.astype(np.float64), percentile)

    threshold = percentile_amax(histogram_of(magnitudes), percentile)

    assert exact <= threshold <= min(exact * (1 + BIN), values.max())


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999, 99.9999])
def test_percentile_is_that_of_numpy(percentile: float) -> None:
    """numpy's inverted_cdf is the same rank."""
    values = np.random.default_rng(4).laplace(size=123_457).astype(np.float32)
    exact = np.percentile(np.abs(values), percentile, method="inverted_cdf")

    assert exact <= percentile_amax(histogram_of(values), percentile) <= exact * (1 + BIN)


def test_rank_is_exact() -> None:
    """55 % of 100 values are 55 of them, although 55 / 100 * 100 is above 55 in floats."""
    assert math.ceil(55 / 100 * 100) == 56
    assert 55 <= percentile_amax(histogram_of(np.arange(1.0, 101.0)), 55) < 56


def test_hundred_is_the_exact_maximum() -> None:
    """No rounding to a bin's edge."""
    assert percentile_amax(histogram_of(np.array([0.1, -1.2345, 0.7])), 100) == np.float32(1.2345)


def test_mostly_zeros() -> None:
    """Where the percentile itself is 0, that of the non-zero values is taken."""
    values = np.concatenate([np.zeros(10_000), np.arange(1.0, 101.0)])

    assert 50 <= percentile_amax(histogram_of(values), 50) <= 50 * (1 + BIN)
    assert percentile_amax(histogram_of(np.array([0.0, 0.0, 0.0, 1e-44])), 50) > 0


def test_tensor_that_is_always_zero() -> None:
    """Zero is its percentile."""
    assert percentile_amax(histogram_of(np.zeros(5)), 99.99) == 0.0


@pytest.mark.parametrize("percentile", [0, -1, 100.001, float("nan"), float("inf")])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    """The message names the number, even for a tensor that is always zero."""
    with pytest.raises(CalibrationError, match=f"percentile {percentile}"):
        percentile_amax(histogram_of(np.zeros(1)), percentile)
