"""Collecting from a source that counts for itself, as one on a GPU does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from calibrators.collector import ActivationStatistics, collect
from calibrators.counter import MagnitudeCounter
from calibrators.errors import EmptyCalibrationSetError, NonFiniteActivationError
from calibrators.histogram import MagnitudeHistogram
from calibrators.protocols import Activations


@dataclass(frozen=True)
class Batch:
    feeds: Mapping[str, np.ndarray]
    samples: int


class Counting:
    """A `CountingSource` of one tensor; `calls` tells what was done in which order."""

    tensors = ("x",)

    def __init__(self, values: list[float], *, ends_with: Exception | None = None, bad: int | None = None) -> None:
        self.calls: list[str] = []
        self._values = values
        self._ends_with = ends_with
        self._bad = bad
        self._counter = MagnitudeCounter()
        self._running: tuple[int, Batch] | None = None

    def batches(self) -> Iterator[Batch]:
        for index, value in enumerate(self._values):
            self.calls.append(f"read {index}")
            yield Batch({"x": np.full((2, 1), value, np.float32)}, 2)
        if self._ends_with is not None:
            raise self._ends_with

    def start(self, index: int, batch: Batch) -> None:
        assert self._running is None
        self.calls.append(f"start {index}")
        self._running = index, batch

    def finish(self) -> Activations:
        assert self._running is not None
        (index, batch), self._running = self._running, None
        self.calls.append(f"finish {index}")
        if index == self._bad:
            raise NonFiniteActivationError("not finite", tensor="x", batch=index, node="node")
        self._counter.update(batch.feeds["x"])
        return Activations(index, batch.samples, {}, {"x": batch.feeds["x"].shape})

    def histograms(self) -> dict[str, MagnitudeHistogram]:
        assert self._running is None
        self.calls.append("look")
        return {"x": self._counter.histogram()}

    def producer(self, tensor: str) -> str:
        return "node"


def test_the_next_batch_is_read_while_one_is_counted() -> None:
    """Read 1 comes before finish 0; what is counted is looked at once, in the end."""
    source = Counting([1.0, 2.0, 3.0])
    statistics = collect(source)

    assert source.calls == [
        "read 0", "start 0", "read 1", "finish 0", "start 1", "read 2", "finish 1", "start 2", "finish 2", "look",
    ]  # fmt: skip
    assert (statistics.batches, statistics.samples) == (3, 6)
    assert statistics.histograms["x"].maximum == 3.0
    assert statistics.input_shapes == {"x": {(2, 1): 3}}


def test_a_review_sees_all_batches_before_it_and_none_behind() -> None:
    """The next batch has not been read by then; True ends the pass there."""
    source = Counting([1.0, 2.0, 3.0, 4.0])
    seen: list[tuple[int, float]] = []

    def review(statistics: ActivationStatistics) -> bool:
        seen.append((statistics.batches, statistics.histograms["x"].maximum))
        return statistics.batches == 2

    statistics = collect(source, interval=1, review=review)

    assert seen == [(1, 1.0), (2, 2.0)]
    assert statistics.batches == 2
    assert "read 2" not in source.calls


def test_of_two_errors_the_first_batch_has_its_own() -> None:
    """A batch that cannot be counted comes before one that cannot be read."""
    gone = OSError("the disk is gone")
    with pytest.raises(NonFiniteActivationError):
        collect(Counting([1.0, 2.0], ends_with=gone, bad=1))
    source = Counting([1.0, 2.0], ends_with=gone)
    with pytest.raises(OSError, match="the disk is gone"):
        collect(source)
    assert source.calls[-1] == "finish 1"


def test_no_batch_is_an_error() -> None:
    """As it is for every source."""
    with pytest.raises(EmptyCalibrationSetError):
        collect(Counting([]))
