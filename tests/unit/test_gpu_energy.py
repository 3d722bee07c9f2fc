"""Energy of runs, from a counter or from power, by a clock that only runs move."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_int8.gpu_energy import Energy, measure_energy


class Board:
    """Takes `watts` all the time; its counter steps every `step_ms`; a chunk is `runs` runs of `run_ms`."""

    def __init__(self, watts: float, *, step_ms: float | None = 50, run_ms: float = 1, runs: int = 20) -> None:
        self.now = 0
        self.watts, self.step_ms, self.run_ms, self.runs = watts, step_ms, run_ms, runs
        self.power: float | None = watts

    def clock(self) -> int:
        return self.now

    def run_chunk(self) -> int:
        self.now += int(self.runs * self.run_ms * 1e6)
        return self.runs

    def energy_mj(self) -> int | None:
        if self.step_ms is None:
            return None
        return round(self.now // int(self.step_ms * 1e6) * self.step_ms * self.watts)

    def power_w(self) -> float | None:
        return self.power

    def measure(self) -> Energy | None:
        monitor: Any = self
        return measure_energy(self.run_chunk, monitor, self.clock)


def test_energy_by_hand() -> None:
    """100 W and 1 ms a run are 100 mJ; 50 ms of chunks between steps of 50 ms make that exact."""
    board = Board(100, runs=50)

    assert board.measure() == Energy(100.0, 100.0, "energy counter")
    assert board.now == pytest.approx(1.3e9, abs=0.05e9)  # settling, a step, and a second


def test_without_a_counter_power_is_integrated() -> None:
    """50 W and 2 ms a run are 100 mJ as well."""
    assert Board(50, step_ms=None, run_ms=2).measure() == Energy(100.0, 50.0, "mean power")


def test_a_counter_that_stands_still_is_no_counter() -> None:
    """It is given up after half a second, and power taken instead."""
    board = Board(50, step_ms=1e9)

    found = board.measure()
    assert found == Energy(50.0, 50.0, "mean power")
    assert board.now < 2e9


def test_a_gpu_that_tells_nothing_has_no_energy() -> None:
    """Neither counter nor power: there is no figure."""
    board = Board(50, step_ms=None)
    board.power = None

    assert board.measure() is None


@given(
    watts=st.floats(20, 1000),
    step_ms=st.floats(1, 100),
    run_ms=st.floats(0.01, 5),
    chunk_ms=st.floats(10, 30),
)
def test_energy_is_power_times_time(watts: float, step_ms: float, run_ms: float, chunk_ms: float) -> None:
    """Whatever the counter's steps and the runs: within one chunk and one step of a second."""
    board = Board(watts, step_ms=step_ms, run_ms=run_ms, runs=max(3, int(chunk_ms / run_ms)))

    found = board.measure()
    assert found is not None
    assert found.source == "energy counter"
    assert found.power_w == pytest.approx(watts, rel=0.05)
    assert found.mj_per_inference == pytest.approx(watts * run_ms, rel=0.05)
