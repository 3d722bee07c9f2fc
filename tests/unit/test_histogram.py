"""Histograms whose bins are bit patterns, and the linear histogram in them."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.counter import histogram_of
from calibrators.histogram import BINS, FINITE_BINS, MagnitudeHistogram, bins_of, lower_edges

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(0, 60), elements=float32s)


def assert_equal(a: MagnitudeHistogram, b: MagnitudeHistogram) -> None:
    for field in dataclasses.fields(MagnitudeHistogram):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_bins_are_the_upper_bits() -> None:
    """8 bits of exponent and 10 of mantissa: an octave has 1024 bins, and zero is bin 0."""
    magnitudes = np.array([0.0, 1.0, -1.0, 1 + 2**-10, 1.5, 2.0, np.inf])

    assert bins_of(magnitudes).tolist() == [0, 130048, 130048, 130049, 130560, 131072, FINITE_BINS]
    assert lower_edges(np.array([130048, 130049, 131072])).tolist() == [1.0, 1 + 2**-10, 2.0]


@given(float32s)
def test_a_magnitude_lies_between_the_edges_of_its_bin(x: float) -> None:
    """Lower edge included, upper edge not, and a bin is 2**-10 of its octave wide."""
    bin_of_x = bins_of(np.array([x]))
    (lower,), (upper,) = lower_edges(bin_of_x), lower_edges(bin_of_x + 1)

    assert lower <= abs(x) < upper
    assert upper - lower <= max(lower, 2**-126) * 2**-10 or upper == np.inf
    assert 0 <= bin_of_x[0] < FINITE_BINS < BINS


def test_linear_histogram_by_hand() -> None:
    """An amax of 3.5 gives the range [0, 4) and 2048 bins of 1/512, cut behind the last."""
    linear = histogram_of(np.array([3.5, -1.0, 1.0, 0.25, 0.0, 1 / 600, 1e-30])).linear()

    assert linear.width == 1 / 512
    assert linear.counts.size == 3.5 * 512 + 1
    assert {int(k): int(linear.counts[k]) for k in np.flatnonzero(linear.counts)} == {0: 2, 128: 1, 512: 2, 1792: 1}


@given(arrays)
@example(np.array([1e-40, 3e-45, 0.0], dtype=np.float32))
@example(np.array([2**-126, 2**-127, 2**-136, 2**-137], dtype=np.float32))
@example(np.array([2**-125, 2**-126, 1.5 * 2**-127], dtype=np.float32))
@example(np.array([np.finfo(np.float32).max, 1.0], dtype=np.float32))
def test_linear_histogram_is_exact(values: np.ndarray) -> None:
    """Its counts are those of dividing each non-zero magnitude by the width, in float64."""
    magnitudes = np.abs(values[values != 0].astype(np.float64))
    amax = magnitudes.max(initial=0.0)

    linear = histogram_of(values).linear()

    np.testing.assert_array_equal(linear.counts, np.bincount((magnitudes / linear.width).astype(int)))
    assert linear.counts.dtype == np.int64
    if amax >= 2**-126:
        assert 1024 <= amax / linear.width < 2048
    else:
        assert linear.width == 2**-136


def test_zeros_are_not_in_the_linear_histogram() -> None:
    """A ReLU's zeros do not count; the smallest value beside them does."""
    linear = histogram_of(np.array([0.0, -0.0, 1e-45, 1.0])).linear()

    assert linear.counts[0] == 1
    assert linear.counts.sum() == 2


@pytest.mark.parametrize("values", [[], [0.0, -0.0]])
def test_linear_histogram_of_nothing_is_empty(values: list[float]) -> None:
    """Without a non-zero value there is no bin."""
    assert histogram_of(np.array(values)).linear().counts.tolist() == []


@given(arrays, arrays, arrays)
def test_merging_is_counting_everything_at_once(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    """Merged in any order and grouping, the parts give the histogram of the whole."""
    whole = histogram_of(np.concatenate([a, b, c]))
    parts = [histogram_of(part) for part in (a, b, c)]

    assert_equal(parts[0].merge(parts[1]).merge(parts[2]), whole)
    assert_equal(parts[2].merge(parts[0].merge(parts[1])), whole)


def test_merging_adds_up_non_finite_values() -> None:
    """Merged parts keep their number of NaN and infinities."""
    bad = histogram_of(np.array([np.nan, np.inf, -2.0]))

    merged = bad.merge(bad)

    assert (merged.nonfinite, merged.count, merged.minimum, merged.maximum) == (4, 2, -2.0, -2.0)


def test_a_histogram_cannot_be_changed() -> None:
    """Neither its fields nor its arrays can be written to."""
    histogram = histogram_of(np.array([1.0]))

    with pytest.raises(dataclasses.FrozenInstanceError):
        histogram.zeros = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        histogram.counts[0] = 5


def test_a_histogram_can_be_sent_to_another_process() -> None:
    """Pickled and restored, it is the same."""
    histogram = histogram_of(np.array([1.0, -3.0, 0.0]))

    assert_equal(pickle.loads(pickle.dumps(histogram)), histogram)


@pytest.mark.parametrize(
    "change",
    [
        {"bins": np.array([0, 5, 3], dtype=np.int32)},
        {"bins": np.array([0, 130048], dtype=np.int32)},
        {"bins": np.array([-1, 0, 131072], dtype=np.int32)},
        {"counts": np.array([1, 0, 1])},
        {"counts": np.array([1, -1, 1])},
        {"counts": np.array([1, 2**61, 1])},
        {"zeros": 2},
        {"zeros": -1},
        {"nonfinite": -1},
        {"maximum": 4.0},
        {"maximum": float("nan")},
        {"minimum": 3.0},
    ],
)
def test_numbers_that_contradict_each_other_are_refused(change: dict[str, object]) -> None:
    """Bins that do not ascend, empty bins, too many values, more zeros than bin 0 holds, wrong extremes."""
    good = histogram_of(np.array([0.0, 1.0, 2.0]))

    with pytest.raises(ValueError, match="contradict"):
        dataclasses.replace(good, **change)
