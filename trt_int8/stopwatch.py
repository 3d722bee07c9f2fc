"""What times one candidate of a benchmark: by the host's clock here, by the GPU's in `trt_int8.gpu_timing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Batch
from engines.runner import Runner

MIN_ITERATIONS = 3
"""Inferences of a turn, however slow the model: their median shrugs off one hiccup."""

Clock = Callable[[], int]
"""Nanoseconds from any fixed point."""

Timed = Literal["gpu compute", "with transfers", "host"]
"""What a row's times are.

"gpu compute" is a run on the GPU, its inputs already there; "with transfers" is host to device, run, device to host,
one after the other; "host" is one call of `Runner.infer`, arrays in, arrays out, by the host's clock.
"""

Times = NDArray[np.int64]
"""Nanoseconds of single inferences."""


class Stopwatch(Protocol):
    """Times one candidate, turn by turn, as often in each turn as fits into the time it is given."""

    def warm_up(self, seconds: float, turn_ns: float) -> None:
        """Run untimed for `seconds`, and find out how many inferences make a turn of `turn_ns` nanoseconds."""
        ...

    def take_turn(self, number: int) -> Times:
        """Time the inferences of one turn.

        Args:
            number: of the turn, from 0.

        Returns:
            One time for each, as many in every turn.
        """
        ...


class HostStopwatch:
    """Times `Runner.infer` by the host's clock. Implements `Stopwatch`.

    Args:
        runner: the candidate, entered.
        feeds: batches to cycle through; every turn starts with the first one.
        clock: the host's clock.
    """

    def __init__(self, runner: Runner, feeds: Sequence[Batch], clock: Clock) -> None:
        self._runner = runner
        self._feeds = feeds
        self._clock = clock
        self._iterations = MIN_ITERATIONS

    def warm_up(self, seconds: float, turn_ns: float) -> None:
        """See `Stopwatch.warm_up`."""
        times: list[int] = []
        clock = self._clock
        end = clock() + seconds * 1e9
        for batch in cycle(self._feeds):
            start = clock()
            self._runner.infer(batch)
            stop = clock()
            times.append(stop - start)
            if stop >= end and len(times) >= MIN_ITERATIONS:
                break
        self._iterations = iterations_in(turn_ns, float(np.median(times[len(times) // 2 :])))

    def take_turn(self, number: int) -> Times:
        """See `Stopwatch.take_turn`; the turn's first inference finds other models' weights in the caches, untimed."""
        self._runner.infer(self._feeds[0])
        return time_infer(self._runner, self._feeds, self._iterations, self._clock)


def iterations_in(budget_ns: float, each_ns: float) -> int:
    """Return how many inferences fit into a time, but at least `MIN_ITERATIONS`."""
    return max(MIN_ITERATIONS, int(budget_ns / max(each_ns, 1.0)))


def time_infer(runner: Runner, feeds: Sequence[Batch], iterations: int, clock: Clock) -> Times:
    """Return the nanoseconds of each of `iterations` inferences, the first of them on the first batch."""
    infer = runner.infer
    times: list[int] = []
    for batch in islice(cycle(feeds), iterations):
        start = clock()
        infer(batch)
        times.append(clock() - start)
    return np.array(times, dtype=np.int64)
