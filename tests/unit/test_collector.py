"""Collecting activations from a source that replays arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.collector import ActivationStatistics, collect
from calibrators.counter import histogram_of
from calibrators.errors import CalibrationError, EmptyCalibrationSetError, NonFiniteActivationError
from calibrators.protocols import Activations


class Replay:
    """An `ActivationSource` that hands out given batches, and forgets each one when the next is asked for."""

    def __init__(self, tensors: Sequence[str], batches: Iterable[Mapping[str, np.ndarray]]) -> None:
        self.tensors = tensors
        self._batches = batches

    def activations(self) -> Iterator[Activations]:
        for index, values in enumerate(self._batches):
            buffers = {name: np.array(array) for name, array in values.items()}
            yield Activations(batch=index, samples=len(next(iter(buffers.values()))), values=buffers)
            for buffer in buffers.values():
                buffer[...] = -1  # an ActivationSource may use its memory again

    def producer(self, tensor: str) -> str:
        return f"node {tensor}_node"


def test_statistics_of_every_tensor() -> None:
    """Batches of different sizes add up, tensor by tensor, in the order of the source."""
    source = Replay(
        ("b", "a"),
        [
            {"a": np.array([[1.0, -3.0], [0.0, 2.0]]), "b": np.array([0.5, 0.25])},
            {"a": np.array([[7.0, 0.0]]), "b": np.array([0.125])},
        ],
    )

    statistics = collect(source)

    assert (statistics.batches, statistics.samples) == (2, 3)
    assert list(statistics.histograms) == ["b", "a"]
    a, b = statistics.histograms["a"], statistics.histograms["b"]
    assert (a.minimum, a.maximum, a.count, a.zeros) == (-3.0, 7.0, 6, 2)
    expected = histogram_of(np.array([0.5, 0.25, 0.125]))
    assert b.bins.tolist() == expected.bins.tolist()
    assert b.counts.tolist() == [1, 1, 1]


def test_batches_of_each_input_shape_are_counted() -> None:
    """An input that only some batches have is counted in those."""

    class Shaped(Replay):
        def activations(self) -> Iterator[Activations]:
            for shapes in ({"x": (4, 3), "y": ()}, {"x": (4, 3)}, {"x": (1, 3)}):
                yield Activations(0, 1, {"a": np.ones(1)}, shapes)

    statistics = collect(Shaped(("a",), []))

    assert statistics.input_shapes == {"x": {(4, 3): 2, (1, 3): 1}, "y": {(): 1}}
    assert collect(Replay(("a",), [{"a": np.ones(1)}])).input_shapes == {}


def test_only_the_tensors_asked_for() -> None:
    """What a batch holds besides is ignored, whatever its dtype."""
    statistics = collect(Replay(("x",), [{"x": np.ones(1), "ids": np.array([1])}]))

    assert list(statistics.histograms) == ["x"]


def test_progress_is_tracked() -> None:
    """The tracker sees each batch, and the total where it is known."""
    seen: list[object] = []

    def track(items: Iterable[Activations], description: str, total: int | None = None) -> Iterable[Activations]:
        seen.append((description, total))
        for item in items:
            seen.append(item.batch)
            yield item

    collect(Replay(("x",), [{"x": np.ones(1)}] * 3), track=track, total=3)

    assert seen == [("calibrate", 3), 0, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_activation_stops_at_once(bad: float) -> None:
    """The error names tensor, batch and node, and no later batch is run."""
    batches_run = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for index in range(5):
            batches_run.append(index)
            yield {"x": np.ones(3), "y": np.array([1.0, bad if index == 2 else 0.0, bad if index == 2 else 0.0])}

    with pytest.raises(NonFiniteActivationError, match=r"'y' of node y_node: 2 of its 3 values.*batch 2") as caught:
        collect(Replay(("x", "y"), batches()))

    assert (caught.value.tensor, caught.value.batch, caught.value.node) == ("y", 2, "node y_node")
    assert batches_run == [0, 1, 2]


@pytest.mark.parametrize("batches", [[], [{"x": np.zeros((0, 3))}]], ids=["no batch", "an empty batch"])
def test_calibration_needs_a_sample(batches: list[dict[str, np.ndarray]]) -> None:
    """Without a sample there is nothing to calibrate on."""
    with pytest.raises(EmptyCalibrationSetError, match=f"no sample in {len(batches)} batches"):
        collect(Replay(("x",), batches))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_, np.complex64])
def test_tensors_that_are_not_floats_are_refused(dtype: type[np.generic]) -> None:
    """Token ids and masks have no scale; the message names tensor, node and dtype."""
    with pytest.raises(CalibrationError, match=rf"'ids' of node ids_node: its dtype is {np.dtype(dtype).name}"):
        collect(Replay(("ids",), [{"ids": np.ones(2, dtype=dtype)}]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_dtype_is_taken(dtype: type[np.generic]) -> None:
    """Half, single and double precision."""
    assert collect(Replay(("x",), [{"x": np.full(2, 0.5, dtype=dtype)}])).histograms["x"].amax == 0.5


class Shared:
    """A `ConcurrentSource` over given batches. `gate`, where given, is called in each run with the batch's index."""

    def __init__(
        self,
        batches: Iterable[np.ndarray],
        workers: int,
        gate: Callable[[int], object] = lambda index: None,
    ) -> None:
        self.tensors = ("x",)
        self.workers = workers
        self.read: list[int] = []
        self.readers: set[int] = set()
        self.done: list[int] = []
        self._batches = batches
        self._gate = gate

    def batches(self) -> Iterator[Batch]:
        for index, values in enumerate(self._batches):
            self.readers.add(threading.get_ident())
            self.read.append(index)
            yield Batch({"in": values}, len(values))

    def run(self, index: int, batch: Batch) -> Activations:
        self._gate(index)
        self.done.append(index)
        return Activations(index, batch.samples, {"x": batch.feeds["in"]}, {"in": batch.feeds["in"].shape})

    def producer(self, tensor: str) -> str:
        return f"node {tensor}_node"


@dataclass
class Batch:
    feeds: Mapping[str, np.ndarray]
    samples: int


class TestWorkers:
    """Several batches at a time, with the result of one after the other."""

    @settings(max_examples=25)
    @given(
        batches=st.lists(
            hnp.arrays(
                np.float32,
                st.integers(1, 40),
                elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
            ),
            min_size=1,
            max_size=12,
        ),
        workers=st.integers(1, 5),
    )
    def test_counts_are_those_of_numpy_over_all_batches(self, batches: list[np.ndarray], workers: int) -> None:
        """However the batches are dealt to the workers, whatever their sizes."""
        statistics = collect(Shared(batches, workers))

        values = np.concatenate(batches)
        bins, counts = np.unique(np.abs(values).view(np.uint32) >> 13, return_counts=True)
        histogram = statistics.histograms["x"]
        np.testing.assert_array_equal(histogram.bins, bins)
        np.testing.assert_array_equal(histogram.counts, counts)
        assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
        assert (histogram.zeros, histogram.nonfinite) == (np.count_nonzero(values == 0), 0)
        assert (statistics.batches, statistics.samples) == (len(batches), values.size)
        assert sum(statistics.input_shapes["in"].values()) == len(batches)

    def test_as_many_batches_at_a_time_as_there_are_workers(self) -> None:
        """Three runs wait for each other: with fewer threads none would go on."""
        together = threading.Barrier(3, timeout=20)

        assert collect(Shared([np.ones(1)] * 6, 3, lambda index: together.wait())).batches == 6

    def test_the_data_are_read_in_one_thread_and_not_far_ahead(self) -> None:
        """It is the caller's, and memory holds two batches for each worker besides the one that is taken up next."""
        source = Shared([np.ones(1)] * 30, 2)
        seen: list[int] = []

        def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
            for item in items:
                seen.append(item.batch)
                assert len(source.read) <= len(seen) + 2 * source.workers
                yield item

        collect(source, track=track)

        assert seen == list(range(30))
        assert source.readers == {threading.get_ident()}

    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_a_review_sees_exactly_the_batches_before_it(self, workers: int) -> None:
        """Nothing of a later batch is counted, nor has it been read."""
        source = Shared((np.full(2, index + 1.0) for index in range(20)), workers)
        seen: list[tuple[int, float, int, int]] = []

        def review(statistics: ActivationStatistics) -> bool:
            histogram = statistics.histograms["x"]
            seen.append((statistics.batches, histogram.maximum, histogram.count, len(source.read)))
            return statistics.batches == 12

        statistics = collect(source, interval=lambda count: count in (1, 5, 12, 15), review=review)

        assert seen == [(1, 1.0, 2, 1), (5, 5.0, 10, 5), (12, 12.0, 24, 12)]
        assert (statistics.batches, statistics.histograms["x"].count, source.read[-1]) == (12, 24, 11)

    def test_the_first_wrong_batch_is_reported(self) -> None:
        """Although a later one is found out before it."""
        found = threading.Event()

        def gate(index: int) -> None:
            if index == 3:
                assert found.wait(20)
            if index == 4:
                found.set()

        batches = [np.array([np.nan if index in (3, 4) else 1.0]) for index in range(10)]

        with pytest.raises(NonFiniteActivationError, match="batch 3"):
            collect(Shared(batches, 2, gate))

    def test_an_error_of_the_data_comes_after_those_of_batches_before(self) -> None:
        """As if one batch were run after the other; where those are fine it passes through unchanged."""

        def batches(bad: float) -> Iterator[np.ndarray]:
            yield np.ones(1)
            yield np.array([bad])
            raise RuntimeError("the loader's own")

        with pytest.raises(NonFiniteActivationError, match="batch 1"):
            collect(Shared(batches(np.inf), 2))
        with pytest.raises(RuntimeError, match="the loader's own"):
            collect(Shared(batches(2.0), 2))

    @pytest.mark.parametrize("interrupted", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_ends_the_pass(self, interrupted: type[BaseException]) -> None:
        """No thread is left behind, and what waits is not begun."""

        def batches() -> Iterator[np.ndarray]:
            yield from [np.ones(1)] * 3
            raise interrupted

        before = threading.active_count()
        with pytest.raises(interrupted):
            collect(Shared(batches(), 2))
        assert threading.active_count() == before

    def test_stopping_the_progress_stops_the_workers(self) -> None:
        """An error in the caller's tracker leaves no thread behind."""

        def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
            for item in items:
                yield item
                raise ValueError("the terminal is gone")

        before = threading.active_count()
        with pytest.raises(ValueError, match="terminal"):
            collect(Shared([np.ones(1)] * 50, 2), track=track)
        assert threading.active_count() == before

    def test_no_sample(self) -> None:
        """Without a batch there is nothing to calibrate on."""
        with pytest.raises(EmptyCalibrationSetError, match="no sample in 0 batches"):
            collect(Shared([], 2))
