"""Mean, deviation and range of what a model was fed."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.input_statistics import (
    InputStatistics,
    ValueStatistics,
    merge_inputs,
    statistics_of,
    statistics_of_feeds,
)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=floats)
image_shapes = st.tuples(st.integers(1, 4), st.just(3), st.integers(1, 3), st.just(2))
images = hnp.arrays(np.float32, image_shapes, elements=floats)


def test_numbers_by_hand() -> None:
    """1, 2, 3, 6: mean 3, variance 50/4 - 9 = 3.5."""
    overall = statistics_of(np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)).overall

    assert (overall.count, overall.total, overall.squares) == (4, 12, 50)
    assert (overall.mean, overall.minimum, overall.maximum) == (3.0, 1.0, 6.0)
    assert overall.deviation == pytest.approx(3.5**0.5)


def test_channels_of_images_are_kept_apart() -> None:
    """Axis 1 of a 4-D input; overall is all of them together."""
    values = np.random.default_rng(0).normal([[[[1]], [[5]], [[9]]]], 2, (6, 3, 8, 7)).astype(np.float32)
    statistics = statistics_of(values)

    for index, channel in enumerate(statistics.channels):
        exact = values[:, index].astype(np.float64)
        assert channel.mean == pytest.approx(exact.mean(), rel=1e-12)
        assert channel.deviation == pytest.approx(exact.std(), rel=1e-9)
        assert (channel.minimum, channel.maximum) == (exact.min(), exact.max())
    assert statistics.overall.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)


@pytest.mark.parametrize(("shape", "channels"), [((), 1), ((5,), 1), ((2, 3), 1), ((2, 9, 4), 1), ((2, 224, 4, 3), 1)])
def test_other_inputs_have_one_entry(shape: tuple[int, ...], channels: int) -> None:
    """Scalars, vectors, sequences, and images whose channels come last."""
    statistics = statistics_of(np.ones(shape, np.float32))

    assert len(statistics.channels) == channels
    assert statistics.overall.count == np.prod(shape)


def test_long_rows_are_summed_as_float64_sums() -> None:
    """More values than are summed side by side, and a rest."""
    values = np.random.default_rng(1).normal(size=(2, 1001)).astype(np.float32)
    overall = statistics_of(values).overall

    assert float(overall.total) == pytest.approx(values.astype(np.float64).sum(), rel=1e-12)
    assert float(overall.squares) == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-12)


@given(rows, st.data())
def test_cut_and_order_do_not_matter(values: np.ndarray, data: Any) -> None:
    """Any cut into batches of the samples in any order gives exactly the same numbers."""
    order = data.draw(st.permutations(range(len(values))))
    cut = data.draw(st.integers(0, len(values) - 1))
    parts = [part for part in np.split(values[list(order)], [cut]) if len(part)]
    merged = statistics_of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(statistics_of(part))

    assert merged == statistics_of(values)


@given(images, images, rows)
def test_merging_is_commutative_and_associative(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    """Also where one has channels and another has none."""
    x, y, z = (statistics_of(values) for values in (a, b, c))

    assert x.merge(y) == y.merge(x)
    assert x.merge(z) == z.merge(x)
    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(y).overall == x.overall.merge(y.overall)


@given(rows)
def test_json_is_exact(values: np.ndarray) -> None:
    """What is read back is equal, whatever the magnitudes."""
    (channel,) = statistics_of(values).channels

    assert ValueStatistics.from_json(json.loads(json.dumps(channel.to_json()))) == channel


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0, 0, 0, 0, 0, 0.0, 0.0],
        [1, 0, -1, 0, 0, 0.0, 0.0],
        [1, 0, 10**9, 0, 0, 0.0, 0.0],
        [1, 1 << 5000, 0, 0, 0, 0.0, 0.0],
        [1, 0.5, 0, 0, 0, 0.0, 0.0],
        [1, 0, 0, 0, 0, 2.0, 1.0],
        [1, 0, 0, 0, 0, float("nan"), 1.0],
    ],
)
def test_impossible_numbers_are_refused(values: list[float]) -> None:
    """A damaged or hostile file cannot make them up, nor numbers that fill the memory."""
    with pytest.raises(ValueError):
        ValueStatistics.from_json(values)


def test_padding_and_whole_numbers_are_left_out() -> None:
    """Rows beyond the samples, token ids; an input without rows counts whole."""
    feeds = {
        "x": np.array([[1.0], [2.0], [100.0]], np.float32),
        "ids": np.array([[1], [2], [3]]),
        "gain": np.float32(7).reshape(()),
        "none": np.zeros((3, 0), np.float32),
    }
    found = statistics_of_feeds(feeds, 2)

    assert set(found) == {"x", "gain"}
    assert (found["x"].overall.count, found["x"].overall.maximum) == (2, 2.0)
    assert found["gain"].overall.mean == 7.0


def test_other_dtypes() -> None:
    """Half precision is exact; doubles beyond float32 count as its largest."""
    assert statistics_of(np.array([0.5, 1.5], np.float16)).overall.mean == 1.0
    assert statistics_of(np.array([1e300, 0.0])).overall.maximum == np.finfo(np.float32).max


def test_signed_zeros_do_not_show() -> None:
    """The first of -0.0 and 0.0 in the data does not decide what is written."""
    assert str(statistics_of(np.array([-0.0, -0.0], np.float32)).overall.maximum) == "0.0"


def test_inputs_merge_by_name() -> None:
    """An input that only one stream fed stays as it is."""
    one, two = (statistics_of(np.full(2, value, np.float32)) for value in (1, 3))
    merged = merge_inputs({"x": one, "y": one}, {"x": two, "z": two})

    assert merged["x"].overall.mean == 2.0
    assert (merged["y"], merged["z"]) == (one, two)


def test_an_input_has_a_channel() -> None:
    """Only a damaged file says otherwise."""
    with pytest.raises(ValueError, match="no channel"):
        InputStatistics(())


def test_deviation_of_equal_values_is_zero() -> None:
    """The difference of two large sums is exact, and never negative under the root."""
    value = Fraction(float(np.float32(0.1)))
    overall = statistics_of(np.full((100, 7), 0.1, np.float32)).overall

    assert overall.deviation < 1e-8
    assert overall.mean == pytest.approx(float(value), rel=1e-15)
