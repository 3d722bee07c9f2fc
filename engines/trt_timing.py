"""Times of an engine's runs, taken by CUDA events as trtexec takes them.

Compute time is what lies between two events directly around a run on the stream, its inputs already on the device.
Runs are queued two deep: the next one is queued before the last one is waited for, so the GPU never waits for the host
as long as queueing a run takes less than the run. The wall time of such a series gives the throughput. Transfers are
timed apart from that, one run at a time: host to device, run, device to host, and their sum is the latency.

Source of the definitions: TensorRT, samples/common/sampleInference.cpp and sampleReporting.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from calibrators.protocols import Array, FloatArray
from engines.device import Event
from engines.errors import DeviceError, InferenceError
from engines.trt_session import EngineSession

DEPTH = 2
"""Runs in the stream at a time."""


@dataclass(frozen=True, slots=True)
class PipelinedRuns:
    """Runs queued `DEPTH` deep, without transfers.

    Attributes:
        compute_ms: time of each run on the GPU, shape (runs,).
        enqueue_ms: time that the host took to queue each run, shape (runs,).
        wall_ms: from before the first run was queued until the last one was done, by the host's clock.
    """

    compute_ms: FloatArray
    enqueue_ms: FloatArray
    wall_ms: float

    @property
    def per_second(self) -> float:
        """Runs per second."""
        return 1000 * len(self.compute_ms) / self.wall_ms


@dataclass(frozen=True, slots=True)
class SteppedRuns:
    """Runs one after the other, with transfers.

    Attributes:
        h2d_ms: copies of the inputs to the device, shape (runs,).
        compute_ms: the runs themselves; what the host takes to queue one may show in them.
        d2h_ms: copies of the outputs to the host.
    """

    h2d_ms: FloatArray
    compute_ms: FloatArray
    d2h_ms: FloatArray

    @property
    def latency_ms(self) -> FloatArray:
        """Inputs to the device, run, outputs to the host, shape (runs,)."""
        latency: FloatArray = self.h2d_ms + self.compute_ms + self.d2h_ms
        return latency


class EngineTimer:
    """Times the runs of a live engine.

    The session must have run once at the shapes to be timed: that run binds them, fills the inputs, and does what
    TensorRT does but once.

    Args:
        session: the engine; its `execute` is what is timed, as a CUDA graph where it captured one.
        clock: nanoseconds from any fixed point.
    """

    def __init__(self, session: EngineSession, *, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._session = session
        self._device = session.device
        self._clock = clock
        self._marks = [session.device.record() for _ in range(2 * DEPTH)]

    def pipelined(self, runs: int) -> PipelinedRuns:
        """Time runs on the inputs that are on the device.

        Args:
            runs: how many, at least 1.

        Raises:
            InferenceError: a run failed.
        """
        compute, enqueue = np.empty(runs), np.empty(runs)
        record, execute, clock = self._device.record, self._session.execute, self._clock
        with self._errors():
            begin = clock()
            for run in range(runs):
                start, end = self._slot(run)
                if run >= DEPTH:
                    compute[run - DEPTH] = self._finish(run - DEPTH)
                record(start)
                before = clock()
                execute()
                enqueue[run] = clock() - before
                record(end)
            for run in range(max(runs - DEPTH, 0), runs):
                compute[run] = self._finish(run)
            wall = clock() - begin
        return PipelinedRuns(compute, enqueue / 1e6, max(wall, 1) / 1e6)

    def stepped(self, feeds: Mapping[str, Array], runs: int) -> SteppedRuns:
        """Time runs with their transfers, from and to pinned host memory.

        Args:
            feeds: the inputs, of the shapes that are bound.
            runs: how many, at least 1.

        Raises:
            InferenceError: a run failed.
        """
        times = np.empty((3, runs))
        device, session, marks = self._device, self._session, self._marks
        with self._errors():
            session.stage(feeds)
            for run in range(runs):
                for mark, step in zip(marks, (session.upload, session.execute, session.copy_out), strict=False):
                    device.record(mark)
                    step()
                device.record(marks[3])
                device.wait(marks[3])
                times[:, run] = [device.elapsed_ms(marks[i], marks[i + 1]) for i in range(3)]
        return SteppedRuns(*times)

    def _slot(self, run: int) -> list[Event]:
        """Return the events around a run; those of run n serve run n + `DEPTH` again."""
        first = 2 * (run % DEPTH)
        return self._marks[first : first + 2]

    def _finish(self, run: int) -> float:
        start, end = self._slot(run)
        self._device.wait(end)
        return self._device.elapsed_ms(start, end)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DeviceError as error:  # a kernel's error comes up in whatever call is next
            raise InferenceError(f"{self._session.name} failed on the GPU: {error}") from error
