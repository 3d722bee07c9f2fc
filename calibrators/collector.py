"""One pass over the calibration data, in which every activation of every batch is counted once and none is kept."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from queue import SimpleQueue
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from calibrators.counter import Counting, MagnitudeCounter, RangeCounter, count_together, is_countable
from calibrators.errors import CalibrationError, EmptyCalibrationSetError, NonFiniteActivationError
from calibrators.histogram import MagnitudeHistogram
from calibrators.idle import IdleMeter
from calibrators.magnitude_range import MagnitudeRange
from calibrators.protocols import (
    Activations,
    ActivationSource,
    CalibrationBatch,
    ConcurrentSource,
    CountingSource,
    GroupedSource,
    Track,
    untracked,
)

Statistics = Literal["histogram", "minmax"]
"""What is kept of a tensor: the histogram that every method takes its scales from, or its range, for min-max alone."""


@dataclass(frozen=True, slots=True, eq=False)
class ActivationStatistics:
    """What one pass over the calibration data found.

    Attributes:
        histograms: tensor name to histogram, in the order of the source; empty if only ranges were asked for.
        batches: number of batches.
        samples: number of samples in them.
        input_shapes: model input to the shapes that were fed, each with its number of batches.
        ranges: tensor name to range, in the order of the source; empty if histograms were asked for.
    """

    histograms: Mapping[str, MagnitudeHistogram]
    batches: int
    samples: int
    input_shapes: Mapping[str, Mapping[tuple[int, ...], int]]
    ranges: Mapping[str, MagnitudeRange] = field(default_factory=dict)

    def reduced(self) -> ActivationStatistics:
        """Return the same with ranges alone."""
        ranges = {**self.ranges, **{name: MagnitudeRange.of(found) for name, found in self.histograms.items()}}
        return ActivationStatistics({}, self.batches, self.samples, self.input_shapes, ranges)


Review = Callable[[ActivationStatistics], bool]
"""Looks at what was counted so far; True ends the pass there."""

Due = Callable[[int], bool]
"""Is told the number of batches so far; True asks for a review of them."""


def collect(
    source: ActivationSource | ConcurrentSource | CountingSource,
    track: Track = untracked,
    total: int | None = None,
    *,
    interval: int | Due | None = None,
    review: Review | None = None,
    statistics: Statistics = "histogram",
    meter: IdleMeter | None = None,
) -> ActivationStatistics:
    """Run `source` once and count the magnitudes of all its tensors.

    Memory does not grow with the number of batches. A `ConcurrentSource` is run in as many threads as it has workers,
    and counted there; the sum of exact counts does not depend on who counted what. The data are read in the caller's
    thread, in order, at most two batches for each worker ahead, or one group of a `GroupedSource`. Of several batches
    that are wrong the first is reported, as if one were run after the other. A `CountingSource` counts for itself, and
    works on a batch while the next one is read.

    Args:
        source: runs the model over the data.
        track: shows the progress.
        total: number of batches, where it is known.
        interval: number of batches between two reviews, or a function that says after which batches there is one; None
            for no review.
        review: is given the statistics of all batches so far, which are complete: none of a later batch is in them, nor
            has one been read.
        statistics: what is kept of each tensor.
        meter: is told when the workers of a `ConcurrentSource` are busy; None for nobody.

    Raises:
        EmptyCalibrationSetError: the source held no sample.
        NonFiniteActivationError: an activation is NaN or infinite; names the tensor, the batch and the node.
        CalibrationError: a tensor is not of a floating dtype.
    """
    due = interval if callable(interval) else lambda count: interval is not None and count % interval == 0
    tallies: list[_Tally] = []
    if not isinstance(source, CountingSource):
        workers = source.workers if isinstance(source, ConcurrentSource) else 1
        tallies = [_Tally(source, statistics) for _ in range(workers)]
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    batches = 0
    samples = 0

    def reviewed_after(count: int) -> bool:
        return review is not None and due(count)

    def found() -> ActivationStatistics:
        if isinstance(source, CountingSource):
            whole = ActivationStatistics(source.histograms(), batches, samples, shapes)
            return whole.reduced() if statistics == "minmax" else whole
        if statistics == "minmax":
            return ActivationStatistics({}, batches, samples, shapes, _joint_ranges(tallies))
        return ActivationStatistics(_sum(tallies), batches, samples, shapes)

    if isinstance(source, CountingSource):
        counted = _count_at_the_source(source, reviewed_after)
    elif isinstance(source, ConcurrentSource):
        counted = _count_in_threads(source, tallies, reviewed_after, total, meter)
    else:
        counted = _count_in_turn(source, tallies[0], reviewed_after)
    with closing(counted):
        for done in track(counted, "calibrate", total):
            for name, shape in done.input_shapes.items():
                shapes.setdefault(name, Counter())[shape] += 1
            batches += 1
            samples += done.samples
            if done.reviewed and review is not None and review(found()):
                break
    if samples == 0:
        raise EmptyCalibrationSetError(
            f"Cannot calibrate: the calibration data held no sample in {batches} batches; expected at least one. "
            "Check the path of the data and the limit on batches."
        )
    return found()


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

    def __init__(self, source: ActivationSource | ConcurrentSource, statistics: Statistics) -> None:
        kind = RangeCounter if statistics == "minmax" else MagnitudeCounter
        self.counters: dict[str, RangeCounter] = {tensor: kind() for tensor in source.tensors}
        self._producer = source.producer
        self._known: WeakKeyDictionary[object, Counting] = WeakKeyDictionary()

    def count(self, activations: Activations) -> None:
        """Count the tensors that there are."""
        known = None if activations.buffers is None else self._known.get(activations.buffers)
        if self._count_new(activations) if known is None else known.count():
            self._find_nonfinite(activations)

    def _count_new(self, activations: Activations) -> int:
        names = [tensor for tensor in self.counters if tensor in activations.values]
        arrays = [activations.values[tensor] for tensor in names]
        for tensor, values in zip(names, arrays, strict=True):
            if values.dtype.kind != "f":
                raise CalibrationError(
                    f"Cannot calibrate tensor {tensor!r} of {self._producer(tensor)}: its dtype is {values.dtype}; "
                    "expected a floating dtype. Leave it out of the tensors to calibrate."
                )
        counters = [self.counters[tensor] for tensor in names]
        if activations.buffers is None or not all(is_countable(values) for values in arrays):
            return count_together(counters, arrays)
        counting = self._known[activations.buffers] = Counting(counters, arrays)
        return counting.count()

    def _find_nonfinite(self, activations: Activations) -> None:
        for tensor, counter in self.counters.items():
            if tensor in activations.values and counter.nonfinite:
                raise _nonfinite(tensor, activations.batch, self._producer(tensor), activations.values[tensor])


def _sum(tallies: Sequence[_Tally]) -> dict[str, MagnitudeHistogram]:
    found = {}
    for tensor in tallies[0].counters:
        counters = (tally.counters[tensor] for tally in tallies)
        histograms = (counter.histogram() for counter in counters if isinstance(counter, MagnitudeCounter))
        found[tensor] = reduce(MagnitudeHistogram.merge, histograms)
    return found


def _joint_ranges(tallies: Sequence[_Tally]) -> dict[str, MagnitudeRange]:
    return {
        tensor: reduce(MagnitudeRange.merge, (tally.counters[tensor].range() for tally in tallies))
        for tensor in tallies[0].counters
    }


def _count_in_turn(
    source: ActivationSource, tally: _Tally, reviewed_after: Callable[[int], bool]
) -> Generator[_Counted]:
    for count, activations in enumerate(source.activations(), start=1):
        tally.count(activations)
        yield _Counted(activations.batch, activations.samples, activations.input_shapes, reviewed_after(count))


def _count_in_threads(
    source: ConcurrentSource,
    tallies: Sequence[_Tally],
    reviewed_after: Callable[[int], bool],
    total: int | None,
    meter: IdleMeter | None,
) -> Generator[_Counted]:
    """Run and count groups of batches in a thread for each tally; yield the batches in order."""
    idle: SimpleQueue[_Tally] = SimpleQueue()
    for tally in tallies:
        idle.put(tally)

    def count(first: int, group: Sequence[CalibrationBatch], reviewed: bool) -> list[_Counted]:
        tally = idle.get()
        done: dict[int, _Counted] = {}

        def take(activations: Activations) -> None:
            tally.count(activations)
            index = activations.batch
            done[index] = _Counted(index, activations.samples, activations.input_shapes, reviewed=False)

        try:
            with nullcontext() if meter is None else meter.working():
                if isinstance(source, GroupedSource):
                    source.run_group(first, group, take)
                else:
                    for index, batch in enumerate(group, start=first):
                        take(source.run(index, batch))
        finally:
            idle.put(tally)
        *earlier, last = (done[index] for index in sorted(done))
        return [*earlier, replace(last, reviewed=reviewed)]

    pending: deque[Future[list[_Counted]]] = deque()
    pool = ThreadPoolExecutor(max_workers=len(tallies), thread_name_prefix="calibrate")
    groups = _groups(source, len(tallies), reviewed_after, total)
    try:
        while True:
            try:
                group = next(groups, None)
            except Exception:
                # What is wrong with a batch before comes first, as it would if one were run after the other.
                while pending:
                    yield from pending.popleft().result()
                raise
            if group is None:
                break
            pending.append(pool.submit(count, group.first, group.batches, group.reviewed))
            ahead = len(tallies) if len(group.batches) > 1 else 2 * len(tallies)
            while len(pending) > (0 if group.reviewed else ahead):
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Group:
    """Consecutive batches that one thread runs together; `reviewed`: whether a review is due after the last."""

    first: int
    batches: Sequence[CalibrationBatch]
    reviewed: bool


def _groups(
    source: ConcurrentSource, workers: int, reviewed_after: Callable[[int], bool], total: int | None
) -> Iterator[_Group]:
    """Read the stream in groups, which become smaller towards its end, so that all threads are done at the same time.

    What was read before a batch that cannot be read is a group of its own.
    """
    batches = iter(source.batches())
    first = 0
    while True:
        size = source.group_size if isinstance(source, GroupedSource) else 1
        if total is not None:
            size = max(1, min(size, (total - first) // (2 * workers)))
        group: list[CalibrationBatch] = []
        wrong: Exception | None = None
        reviewed = False
        while len(group) < size and not reviewed:
            try:
                batch = next(batches, None)
            except Exception as error:
                wrong = error
                break
            if batch is None:
                break
            group.append(batch)
            reviewed = reviewed_after(first + len(group))
        if group:
            yield _Group(first, group, reviewed)
        if wrong is not None:
            raise wrong
        if not group:
            return
        first += len(group)


def _count_at_the_source(source: CountingSource, reviewed_after: Callable[[int], bool]) -> Generator[_Counted]:
    """Have batches counted one after the other; read the next one in the meantime, unless a review is due."""

    def finished(*, reviewed: bool) -> _Counted:
        activations = source.finish()
        return _Counted(activations.batch, activations.samples, activations.input_shapes, reviewed)

    running = False
    batches = enumerate(source.batches())
    while True:
        try:
            index, batch = next(batches, (None, None))
        except Exception:
            if running:  # what is wrong with the batch before comes first
                yield finished(reviewed=False)
            raise
        if running:
            yield finished(reviewed=False)
        if index is None or batch is None:
            return
        source.start(index, batch)
        running = not reviewed_after(index + 1)
        if not running:
            yield finished(reviewed=True)


def _nonfinite(tensor: str, batch: int, node: str, values: NDArray[Any]) -> NonFiniteActivationError:
    with np.errstate(over="ignore"):
        bad = int(np.count_nonzero(~np.isfinite(values.astype(np.float32))))
    return nonfinite_error(tensor, batch, node, bad, values.size)


def nonfinite_error(tensor: str, batch: int, node: str, bad: int, size: int) -> NonFiniteActivationError:
    """Make the error for an activation that cannot be calibrated.

    Args:
        tensor: its name.
        batch: index of the batch.
        node: what produces it.
        bad: number of its values that are NaN or infinite.
        size: number of its values in the batch.
    """
    return NonFiniteActivationError(
        f"Cannot calibrate tensor {tensor!r} of {node}: {bad} of its {size} values are NaN "
        f"or infinite in batch {batch}; expected finite activations. Check the samples of that batch, then the model.",
        tensor=tensor,
        batch=batch,
        node=node,
    )
