"""Engines as candidates of a benchmark: times by the GPU's clock, clocks, temperature and energy.

Each turn of an engine has three parts, timed apart: runs queued two deep (compute time, throughput), runs one by one
with their transfers (latency), and calls of `Runner.infer` (what a Python program sees). The part that the table
compares comes first and has most of the time.

Nothing is read from NVML while a run is timed: a reading takes up to a millisecond and the driver's lock. Clocks and
temperature are read at the end of the queued runs of each turn, when the GPU was busy a moment ago; energy is measured
apart, see `trt_int8.gpu_energy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrators.protocols import Batch, FloatArray
from engines.gpu_monitor import GpuMonitor, GpuReading
from engines.trt_runner import TensorRTRunner
from engines.trt_timing import EngineTimer
from trt_int8.gpu_energy import Energy, measure_energy
from trt_int8.stopwatch import MIN_ITERATIONS, Clock, Timed, Times, iterations_in, time_infer

SIDE_SHARE = 0.2
"""Of a turn's time, for each of the two parts that the table does not compare."""

_CHUNK_NS = 20e6
"""Time of the runs between two looks at a clock or a counter; the GPU idles for some microseconds between them."""


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """What is known of an engine besides the times that its row compares. Times are medians over all turns.

    Attributes:
        compute_ms: a run on the GPU, runs queued two deep.
        compute_cv_percent: its coefficient of variation, population standard deviation / mean.
        h2d_ms: copying the inputs to the device.
        d2h_ms: copying the outputs to the host.
        latency_ms: host to device, run, device to host.
        host_ms: `Runner.infer`: arrays in, arrays out, by the host's clock.
        enqueue_ms: what the host takes to queue a run.
        throughput_qps: runs per second, queued two deep, without transfers.
        samples_per_s: the same, times the batch size.
        cuda_graph: whether runs were launched as a CUDA graph.
        graph_fallback: why not though it was asked for.
        energy_mj_per_inference: see `trt_int8.gpu_energy.Energy`; None where the GPU did not tell, as in what follows.
        energy_source: "energy counter" or "mean power".
        power_w: mean power of the board meanwhile.
        clock_sm_mhz: lowest, median and highest clock of the multiprocessors.
        clock_memory_mhz: the same of the memory.
        temperature_c: lowest and highest temperature.
        engine_bytes: size of the plan file.
        device_memory_bytes: scratch memory of its context; weights, inputs and outputs are not in it.
    """

    compute_ms: float
    compute_cv_percent: float
    h2d_ms: float
    d2h_ms: float
    latency_ms: float
    host_ms: float
    enqueue_ms: float
    throughput_qps: float
    samples_per_s: float
    cuda_graph: bool
    graph_fallback: str | None
    energy_mj_per_inference: float | None
    energy_source: str | None
    power_w: float | None
    clock_sm_mhz: tuple[int, float, int] | None
    clock_memory_mhz: tuple[int, float, int] | None
    temperature_c: tuple[int, int] | None
    engine_bytes: int
    device_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class EngineStopwatch:
    """Times an engine. Implements `trt_int8.stopwatch.Stopwatch`.

    Args:
        runner: the engine, entered, and run once on the first batch.
        feeds: batches of one shape; turn n feeds the n-th to the runs that are timed on the GPU.
        clock: the host's clock.
        timed: what `take_turn` returns.
        monitor: reads the GPU; None where it cannot be read.
    """

    def __init__(
        self,
        runner: TensorRTRunner,
        feeds: Sequence[Batch],
        clock: Clock,
        *,
        timed: Timed,
        monitor: GpuMonitor | None = None,
    ) -> None:
        self._runner = runner
        self._feeds = feeds
        self._clock = clock
        self._monitor = monitor
        self._timer = EngineTimer(runner.session, clock=clock)
        self._parts: dict[Timed, Callable[[Batch, int], Times]] = {
            "gpu compute": self._pipelined,
            "with transfers": self._stepped,
            "host": self._host,
        }
        self._order = sorted(self._parts, key=lambda part: part != timed)
        self._runs: dict[Timed, int] = dict.fromkeys(self._parts, MIN_ITERATIONS)
        self._chunk = MIN_ITERATIONS
        self._samples: dict[str, list[FloatArray]] = {}
        self._queued = 0
        self._wall_ms = 0.0
        self._readings: list[GpuReading] = []
        self._energy: Energy | None = None

    def warm_up(self, seconds: float, turn_ns: float) -> None:
        """See `Stopwatch.warm_up`; the GPU is kept busy, so that its clocks rise."""
        clock, feeds = self._clock, self._feeds[0]
        for _ in range(MIN_ITERATIONS):
            self._runner.infer(feeds)
        each: dict[Timed, float] = {}
        end = clock() + seconds * 1e9
        while True:
            queued = self._timer.pipelined(self._chunk)
            each["gpu compute"] = 1e9 / queued.per_second
            if clock() >= end:
                break
            self._chunk = iterations_in(_CHUNK_NS, each["gpu compute"])
        start = clock()
        self._timer.stepped(feeds, MIN_ITERATIONS)
        middle = clock()
        time_infer(self._runner, self._feeds, MIN_ITERATIONS, clock)
        each["with transfers"] = (middle - start) / MIN_ITERATIONS
        each["host"] = (clock() - middle) / MIN_ITERATIONS
        shares = dict.fromkeys(self._order, SIDE_SHARE) | {self._order[0]: 1 - 2 * SIDE_SHARE}
        self._runs = {part: iterations_in(shares[part] * turn_ns, each[part]) for part in self._order}

    def take_turn(self, number: int) -> Times:
        """See `Stopwatch.take_turn`; one untimed inference comes first and brings the inputs to the device."""
        feeds = self._feeds[number % len(self._feeds)]
        self._runner.infer(feeds)
        times = [self._parts[part](feeds, self._runs[part]) for part in self._order]
        return times[0]

    def measure_energy(self) -> None:
        """Run alone for a while; without a monitor do nothing. See `trt_int8.gpu_energy`."""
        if self._monitor is not None:
            self._energy = measure_energy(self._run_chunk, self._monitor, self._clock)

    def figures(self, batch_size: int) -> GpuFigures:
        """Summarize all turns.

        Args:
            batch_size: samples of a run.
        """
        session = self._runner.session
        compute = self._all("compute")
        throughput = 1000 * self._queued / self._wall_ms
        energy = self._energy
        temperature = _span(reading.temperature_c for reading in self._readings)
        return GpuFigures(
            compute_ms=float(np.median(compute)),
            compute_cv_percent=100 * float(compute.std() / compute.mean()),
            h2d_ms=float(np.median(self._all("h2d"))),
            d2h_ms=float(np.median(self._all("d2h"))),
            latency_ms=float(np.median(self._all("latency"))),
            host_ms=float(np.median(self._all("host"))),
            enqueue_ms=float(np.median(self._all("enqueue"))),
            throughput_qps=throughput,
            samples_per_s=throughput * batch_size,
            cuda_graph=session.captured,
            graph_fallback=self._runner.graph_fallback,
            energy_mj_per_inference=None if energy is None else energy.mj_per_inference,
            energy_source=None if energy is None else energy.source,
            power_w=None if energy is None else energy.power_w,
            clock_sm_mhz=_span(reading.clock_sm_mhz for reading in self._readings),
            clock_memory_mhz=_span(reading.clock_memory_mhz for reading in self._readings),
            temperature_c=None if temperature is None else (temperature[0], temperature[2]),
            engine_bytes=self._runner.path.stat().st_size,
            device_memory_bytes=session.device_memory_bytes,
        )

    def _pipelined(self, feeds: Batch, runs: int) -> Times:
        """Time queued runs; the first is dropped: the GPU was idle, so it shows what the host took to launch it."""
        queued = self._timer.pipelined(runs + 1)
        if self._monitor is not None:
            self._readings.append(self._monitor.read())
        self._queued += runs + 1
        self._wall_ms += queued.wall_ms
        self._keep(compute=queued.compute_ms[1:], enqueue=queued.enqueue_ms[1:])
        return _nanoseconds(queued.compute_ms[1:])

    def _stepped(self, feeds: Batch, runs: int) -> Times:
        steps = self._timer.stepped(feeds, runs)
        self._keep(h2d=steps.h2d_ms, d2h=steps.d2h_ms, latency=steps.latency_ms)
        return _nanoseconds(steps.latency_ms)

    def _host(self, feeds: Batch, runs: int) -> Times:
        times = time_infer(self._runner, self._feeds, runs, self._clock)
        self._keep(host=times / 1e6)
        return times

    def _run_chunk(self) -> int:
        self._timer.pipelined(self._chunk)
        return self._chunk

    def _keep(self, **samples: FloatArray) -> None:
        for name, values in samples.items():
            self._samples.setdefault(name, []).append(values)

    def _all(self, name: str) -> FloatArray:
        return np.concatenate(self._samples[name])


def _nanoseconds(milliseconds: FloatArray) -> Times:
    times: Times = np.rint(milliseconds * 1e6).astype(np.int64)
    return times


def _span(values: Iterable[int | None]) -> tuple[int, float, int] | None:
    """Return the lowest, the median and the highest of the values that are known."""
    known = [value for value in values if value is not None]
    return (min(known), float(np.median(known)), max(known)) if known else None
