"""Energy of an engine's runs.

A turn of an interleaved benchmark is too short for it: energy counters step every 20 to 100 ms, and power readings are
means of up to a second, over whoever ran. So an engine runs alone for a stretch, from one step of the counter to
another, in short chunks between which the counter is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engines.gpu_monitor import GpuMonitor
from trt_int8.stopwatch import Clock

SETTLE_S = 0.2
"""Seconds that an engine runs before its energy is measured."""

STRETCH_S = 1.0
"""Seconds that energy is measured for, at least: ten steps of the slowest counters."""

STEP_S = 0.5
"""A counter that has not moved after so many seconds does not count."""

RunChunk = Callable[[], int]
"""Makes some runs, some tens of milliseconds' worth, and returns how many."""


@dataclass(frozen=True, slots=True)
class Energy:
    """What runs took.

    Attributes:
        mj_per_inference: millijoules per run of the whole board, what it takes when idle included.
        power_w: its mean power.
        source: "energy counter", or "mean power" where the GPU has no such counter (before Volta).
    """

    mj_per_inference: float
    power_w: float
    source: str


def measure_energy(run_chunk: RunChunk, monitor: GpuMonitor, clock: Clock) -> Energy | None:
    """Measure the energy of runs; takes `SETTLE_S` + `STRETCH_S` and some steps of the counter.

    Args:
        run_chunk: makes runs.
        monitor: reads the GPU.
        clock: the host's clock.

    Returns:
        None where the GPU tells neither energy nor power.
    """
    settled = clock() + SETTLE_S * 1e9
    while clock() < settled:
        run_chunk()
    return _count(run_chunk, monitor, clock) or _integrate(run_chunk, monitor, clock)


def _count(run_chunk: RunChunk, monitor: GpuMonitor, clock: Clock) -> Energy | None:
    first = _next_step(run_chunk, monitor, clock, 0.0)
    last = _next_step(run_chunk, monitor, clock, STRETCH_S) if first is not None else None
    if first is None or last is None:
        return None
    millijoules = last.counter - first.counter
    return Energy(millijoules / last.runs, 1e6 * millijoules / (last.now - first.now), "energy counter")


@dataclass(frozen=True, slots=True)
class _Step:
    counter: int
    now: int
    runs: int


def _next_step(run_chunk: RunChunk, monitor: GpuMonitor, clock: Clock, seconds: float) -> _Step | None:
    """Run until the counter steps for the first time after `seconds`; None where it does not, or there is none."""
    start, runs = clock(), 0
    before = monitor.energy_mj()
    while before is not None:
        runs += run_chunk()
        counter, now = monitor.energy_mj(), clock()
        if counter is not None and counter != before and now - start >= seconds * 1e9:
            return _Step(counter, now, runs)
        if now - start > (seconds + STEP_S) * 1e9:
            return None
        before = counter
    return None


def _integrate(run_chunk: RunChunk, monitor: GpuMonitor, clock: Clock) -> Energy | None:
    """Take the mean of power readings, times the time."""
    watts: list[float] = []
    runs = 0
    start = now = clock()
    while now - start < STRETCH_S * 1e9:
        runs += run_chunk()
        power = monitor.power_w()
        if power is None:
            return None
        watts.append(power)
        now = clock()
    mean = sum(watts) / len(watts)
    return Energy(mean * (now - start) / 1e6 / runs, mean, "mean power")
