"""Collecting activations from a source that replays arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pytest

from calibrators.collector import collect
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
