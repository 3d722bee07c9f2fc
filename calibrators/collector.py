"""One pass over the calibration data, in which every activation of every batch is counted once and none is kept."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.counter import MagnitudeCounter
from calibrators.errors import CalibrationError, EmptyCalibrationSetError, NonFiniteActivationError
from calibrators.histogram import MagnitudeHistogram
from calibrators.protocols import (
    Activations,
    ActivationSource,
    CalibrationBatch,
    ConcurrentSource,
    Track,
    untracked,
)


@dataclass(frozen=True, slots=True, eq=False)
class ActivationStatistics:
    """What one pass over the calibration data found.

    Attributes:
        histograms: tensor name to histogram, in the order of the source.
        batches: number of batches.
        samples: number of samples in them.
        input_shapes: model input to the shapes that were fed, each with its number of batches.
    """

    histograms: Mapping[str, MagnitudeHistogram]
    batches: int
    samples: int
    input_shapes: Mapping[str, Mapping[tuple[int, ...], int]]


Review = Callable[[ActivationStatistics], bool]
"""Looks at what was counted so far; True ends the pass there."""

Due = Callable[[int], bool]
"""Is told the number of batches so far; True asks for a review of them."""


def collect(
    source: ActivationSource | ConcurrentSource,
    track: Track = untracked,
    total: int | None = None,
    *,
    interval: int | Due | None = None,
    review: Review | None = None,
) -> ActivationStatistics:
    """Run `source` once and count the magnitudes of all its tensors.

    Memory does not grow with the number of batches. A `ConcurrentSource` is run in as many threads as it has workers,
    and counted there; the sum of exact counts does not depend on who counted what. The data are read in the caller's
    thread, in order, at most two batches for each worker ahead. Of several batches that are wrong the first is
    reported, as if one were run after the other.

    Args:
        source: runs the model over the data.
        track: shows the progress.
        total: number of batches, where it is known.
        interval: number of batches between two reviews, or a function that says after which batches there is one; None
            for no review.
        review: is given the statistics of all batches so far, which are complete: none of a later batch is in them, nor
            has one been read.

    Raises:
        EmptyCalibrationSetError: the source held no sample.
        NonFiniteActivationError: an activation is NaN or infinite; names the tensor, the batch and the node.
        CalibrationError: a tensor is not of a floating dtype.
    """
    due = interval if callable(interval) else lambda count: interval is not None and count % interval == 0
    tallies = [_Tally(source) for _ in range(source.workers if isinstance(source, ConcurrentSource) else 1)]
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    batches = 0
    samples = 0

    def reviewed_after(count: int) -> bool:
        return review is not None and due(count)

    def statistics() -> ActivationStatistics:
        return ActivationStatistics(_sum(tallies), batches, samples, shapes)

    if isinstance(source, ConcurrentSource):
        counted = _count_in_threads(source, tallies, reviewed_after)
    else:
        counted = _count_in_turn(source, tallies[0], reviewed_after)
    with closing(counted):
        for done in track(counted, "calibrate", total):
            for name, shape in done.input_shapes.items():
                shapes.setdefault(name, Counter())[shape] += 1
            batches += 1
            samples += done.samples
            if done.reviewed and review is not None and review(statistics()):
                break
    if samples == 0:
        raise EmptyCalibrationSetError(
            f"Cannot calibrate: the calibration data held no sample in {batches} batches; expected at least one. "
            "Check the path of the data and the limit on batches."
        )
    return statistics()


@dataclass(frozen=True, slots=True)
class _Counted:
    """A batch that has been counted, and all before it.

    Attributes:
        batch: its index.
        samples: number of real samples in it.
        input_shapes: model input to the shape that was fed.
        reviewed: whether a review is due; then no later batch has been counted.
    """

    batch: int
    samples: int
    input_shapes: Mapping[str, tuple[int, ...]]
    reviewed: bool


class _Tally:
    """The counters of one thread."""

    def __init__(self, source: ActivationSource | ConcurrentSource) -> None:
        self.counters = {tensor: MagnitudeCounter() for tensor in source.tensors}
        self._producer = source.producer

    def count(self, activations: Activations) -> None:
        for tensor, counter in self.counters.items():
            values = activations.values[tensor]
            if values.dtype.kind != "f":
                raise CalibrationError(
                    f"Cannot calibrate tensor {tensor!r} of {self._producer(tensor)}: its dtype is {values.dtype}; "
                    "expected a floating dtype. Leave it out of the tensors to calibrate."
                )
            counter.update(values)
            if counter.nonfinite:
                raise _nonfinite(tensor, activations.batch, self._producer(tensor), values)


def _sum(tallies: Sequence[_Tally]) -> dict[str, MagnitudeHistogram]:
    return {
        tensor: reduce(MagnitudeHistogram.merge, (tally.counters[tensor].histogram() for tally in tallies))
        for tensor in tallies[0].counters
    }


def _count_in_turn(
    source: ActivationSource, tally: _Tally, reviewed_after: Callable[[int], bool]
) -> Generator[_Counted]:
    for count, activations in enumerate(source.activations(), start=1):
        tally.count(activations)
        yield _Counted(activations.batch, activations.samples, activations.input_shapes, reviewed_after(count))


def _count_in_threads(
    source: ConcurrentSource, tallies: Sequence[_Tally], reviewed_after: Callable[[int], bool]
) -> Generator[_Counted]:
    """Run and count batches in a thread for each tally; yield them in order."""
    idle: SimpleQueue[_Tally] = SimpleQueue()
    for tally in tallies:
        idle.put(tally)

    def count(index: int, batch: CalibrationBatch, reviewed: bool) -> _Counted:
        tally = idle.get()
        try:
            activations = source.run(index, batch)
            tally.count(activations)
        finally:
            idle.put(tally)
        return _Counted(activations.batch, activations.samples, activations.input_shapes, reviewed)

    pending: deque[Future[_Counted]] = deque()
    pool = ThreadPoolExecutor(max_workers=len(tallies), thread_name_prefix="calibrate")
    try:
        batches = enumerate(source.batches())
        while True:
            try:
                index, batch = next(batches, (None, None))
            except Exception:
                # What is wrong with a batch before comes first, as it would if one were run after the other.
                while pending:
                    yield pending.popleft().result()
                raise
            if index is None or batch is None:
                break
            reviewed = reviewed_after(index + 1)
            pending.append(pool.submit(count, index, batch, reviewed))
            while len(pending) > (0 if reviewed else 2 * len(tallies)):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _nonfinite(tensor: str, batch: int, node: str, values: NDArray[Any]) -> NonFiniteActivationError:
    with np.errstate(over="ignore"):
        bad = np.count_nonzero(~np.isfinite(values.astype(np.float32)))
    return NonFiniteActivationError(
        f"Cannot calibrate tensor {tensor!r} of {node}: {bad} of its {values.size} values are NaN "
        f"or infinite in batch {batch}; expected finite activations. Check the samples of that batch, then the model.",
        tensor=tensor,
        batch=batch,
        node=node,
    )
