"""How long workers wait for data."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from calibrators.collector import collect
from calibrators.idle import IdleMeter
from calibrators.protocols import Activations
from trt_int8 import calibration_pass
from trt_int8.calibration import calibrate
from trt_int8.progress import Timed


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_idle_time_is_an_average_over_the_workers() -> None:
    """Both idle for 2 s, one of two for 3 s, none for 10 s, both again for 1 s: 2 + 1.5 + 1."""
    clock = Clock()
    meter = IdleMeter(2, clock)
    clock.now = 2
    with meter.working():
        clock.now = 5
        assert meter.idle_s() == 3.5
        with meter.working():
            clock.now = 15
    clock.now = 16

    assert meter.idle_s() == 4.5


def test_a_worker_that_failed_is_idle() -> None:
    """Its exception passes through."""
    clock = Clock()
    meter = IdleMeter(1, clock)

    def fail() -> None:
        with meter.working():
            clock.now = 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now = 5

    assert meter.idle_s() == 1


class TwoWorkers:
    """A source of two workers; while its second batch is read for 10 s, one of them is still busy with the first."""

    tensors = ("x",)
    workers = 2

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running, self._read = threading.Event(), threading.Event()

    def batches(self) -> Iterator[Any]:
        yield 0
        assert self._running.wait(60)
        self._clock.now += 10
        self._read.set()
        yield 1

    def run(self, index: int, batch: Any) -> Activations:
        if index == 0:
            self._running.set()
            assert self._read.wait(60)
        return Activations(index, 1, {"x": np.ones(1, np.float32)})

    def producer(self, tensor: str) -> str:
        return tensor


def test_data_that_one_worker_waits_for_while_the_other_is_busy() -> None:
    """Ten seconds of reading have cost five: half of the workers had something to do."""
    clock = Clock()
    meter = IdleMeter(2, clock)

    collect(TwoWorkers(clock), meter=meter)

    assert meter.idle_s() == 5


def test_the_bar_is_told_how_long_the_model_waited(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches behind the first take 2 s each to read; for the second, one thread of two at least is idle."""
    clock = Clock()
    monkeypatch.setattr(calibration_pass, "IdleMeter", lambda workers: IdleMeter(workers, clock))
    seen: list[float] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for index in range(6):
            clock.now += 2
            yield {"input": np.full((1, 3, 8, 8), index + 1, np.float32)}

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        yield from items
        if isinstance(items, Timed):
            seen.append(items.waited_s())

    calibrate(tiny_model, batches(), threads=2, track=track)

    assert len(seen) == 1
    assert 1 <= seen[0] <= 10
