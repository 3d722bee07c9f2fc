"""Calibration batches as TensorRT's calibrators hand them to the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.errors import EmptyCalibrationSetError
from calibrators.tensorrt_batches import ShortBatch, device_batches


@dataclass(frozen=True)
class Feeds:
    feeds: Mapping[str, np.ndarray[Any, Any]]
    samples: int


def fitted(batches: list[Feeds], names: list[str], batch_size: int, short_batch: ShortBatch) -> tuple[Any, list[str]]:
    told: list[str] = []
    found = device_batches(batches, names, batch_size=batch_size, short_batch=short_batch, report=told.append)
    return list(found), told


def test_padding_repeats_the_real_rows_in_order() -> None:
    """Two real samples of a batch of five become 0 1 0 1 0; an input without a batch axis stays."""
    feeds = {"x": np.array([[0.0], [1.0], [9.0]]), "offset": np.float32(7)}
    (batch,), told = fitted([Feeds(feeds, 2)], ["x", "offset"], 5, "pad")
    assert batch["x"].tolist() == [[0], [1], [0], [1], [0]]
    assert batch["offset"] == 7
    assert told == ["Batches with fewer than 5 samples were filled up by repeating their samples: 1, with 2 samples."]


def test_the_order_is_that_of_the_names_and_further_arrays_are_left_out() -> None:
    """TensorRT's names decide, not the order of the data."""
    feeds = {"label": np.zeros(1), "b": np.ones(1), "a": np.zeros(1)}
    (batch,), _ = fitted([Feeds(feeds, 1)], ["a", "b"], 1, "drop")
    assert list(batch) == ["a", "b"]


def test_floats_become_float32_and_index_types_stay() -> None:
    """As TensorRT calibrates a float32 build, and reads index inputs in their own type."""
    for dtype, expected in [("f2", "f4"), ("f8", "f4"), ("i4", "i4"), ("i8", "i8"), ("?", "?")]:
        (batch,), _ = fitted([Feeds({"x": np.ones((2, 3), dtype).T}, 3)], ["x"], 3, "drop")
        assert batch["x"].dtype == np.dtype(expected)
        assert batch["x"].flags.c_contiguous


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(lambda sizes: 5 in sizes),
    st.sampled_from(["drop", "pad"]),
)
def test_every_batch_is_full_and_made_of_real_samples(sizes: list[int], short_batch: ShortBatch) -> None:
    """Whatever the cut, each batch holds 5 samples; padded ones hold the batch's own and all of them."""
    ends = np.cumsum(sizes)
    batches = [
        Feeds({"x": np.arange(end - size, end, dtype=np.float32)}, size) for size, end in zip(sizes, ends, strict=True)
    ]
    found, told = fitted(batches, ["x"], 5, short_batch)
    kept = [batch for batch in batches if batch.samples == 5 or (short_batch == "pad" and batch.samples)]
    assert [set(batch["x"]) for batch in found] == [set(batch.feeds["x"]) for batch in kept]
    assert all(batch["x"].shape == (5,) for batch in found)
    assert bool(told) == any(size < 5 for size in sizes)


def test_what_was_dropped_can_be_kept() -> None:
    """The option that pads is named, where batches were dropped and where nothing else was left."""
    full, short = Feeds({"x": np.zeros((4, 1))}, 4), Feeds({"x": np.zeros((3, 1))}, 3)
    _, told = fitted([full, short], ["x"], 4, "drop")
    assert told == [
        "Batches with fewer than 4 samples were dropped: 1, with 3 samples. Keep them with --short-batch pad."
    ]
    with pytest.raises(EmptyCalibrationSetError, match=r"none of the 1 batches held 4 samples.*--short-batch pad"):
        fitted([short], ["x"], 4, "drop")
