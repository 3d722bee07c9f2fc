"""engines.trt_timing: the order of its calls, and times by hand, over a GPU made of arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import DeviceError, InferenceError
from engines.trt_timing import EngineTimer


def timer(gpu: Any, **how: Any) -> EngineTimer:
    engine = gpu.engine("e", **how)
    made = EngineTimer(engine.__enter__().session, clock=gpu.clock)
    gpu.log.clear()
    return made


def test_the_next_run_is_queued_before_the_last_is_waited_for(fake_gpu: Any) -> None:
    """Events lie directly around each run; two runs are in the stream from the second one on."""
    timer(fake_gpu).pipelined(4)

    assert fake_gpu.log == [
        "record 0", "execute e", "record 1",
        "record 2", "execute e", "record 3",
        "wait 1", "record 0", "execute e", "record 1",
        "wait 3", "record 2", "execute e", "record 3",
        "wait 1", "wait 3",
    ]  # fmt: skip


def test_queued_runs_by_hand(fake_gpu: Any) -> None:
    """1 ms of kernels and 0.1 ms to queue them: only the first run shows that the GPU waited for the host."""
    runs = timer(fake_gpu, compute_ms=1.0, enqueue_ms=0.1).pipelined(4)

    np.testing.assert_allclose(runs.compute_ms, [1.1, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(runs.enqueue_ms, [0.1] * 4)
    assert runs.wall_ms == pytest.approx(4.1)
    assert runs.per_second == pytest.approx(4 / 4.1e-3)


def test_a_slow_host_shows_in_both_times(fake_gpu: Any) -> None:
    """Queueing takes longer than the kernels: the GPU waits, and what trtexec calls compute time is the host's."""
    runs = timer(fake_gpu, compute_ms=0.5, enqueue_ms=1.0).pipelined(5)

    np.testing.assert_allclose(runs.compute_ms[1:], [1.0] * 4)
    np.testing.assert_allclose(runs.enqueue_ms, [1.0] * 5)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_few_runs_are_all_waited_for(fake_gpu: Any, runs: int) -> None:
    """A series shorter than the pipeline is complete too."""
    timed = timer(fake_gpu).pipelined(runs)

    np.testing.assert_allclose(timed.compute_ms, [1.0] * runs)
    assert fake_gpu.now == fake_gpu.free_at


def test_stepped_runs_by_hand(fake_gpu: Any) -> None:
    """0.2 ms in, 1 ms of kernels, 0.1 ms out; the host's own copy is made once, before the first event."""
    runs = timer(fake_gpu).stepped({"x": np.zeros((4, 2), np.float32)}, 2)

    assert fake_gpu.log == [
        "stage",
        *["record 0", "upload", "record 1", "execute e", "record 2", "copy_out", "record 3", "wait 3"] * 2,
    ]
    np.testing.assert_allclose([runs.h2d_ms, runs.compute_ms, runs.d2h_ms], [[0.2] * 2, [1.0] * 2, [0.1] * 2])
    np.testing.assert_allclose(runs.latency_ms, [1.3, 1.3])


def test_a_failure_on_the_gpu_names_the_engine(fake_gpu: Any) -> None:
    """What CUDA reports while runs are timed is an error of inference."""
    timed = timer(fake_gpu)

    def fail(event: object) -> None:
        raise DeviceError("CUDA failed with CUDA_ERROR_ILLEGAL_ADDRESS")

    fake_gpu.wait = fail
    for run in (lambda: timed.pipelined(3), lambda: timed.stepped({}, 1)):
        with pytest.raises(InferenceError, match="e failed on the GPU: CUDA failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
            run()


@given(
    compute=st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
    enqueue=st.integers(0, 10**6),
)
def test_a_gpu_that_never_waits_works_all_the_time(compute: list[int], enqueue: int) -> None:
    """Whatever runs take: their times add up to the wall time, but for what lies before the first kernel."""
    from types import SimpleNamespace

    now = free_at = 0
    durations = iter(compute)

    def execute() -> None:
        nonlocal now, free_at
        now += enqueue
        free_at = max(free_at, now) + next(durations)

    def record(event: Any = None) -> Any:
        event = event or SimpleNamespace(at=0)
        event.at = max(free_at, now)
        return event

    def wait(event: Any) -> None:
        nonlocal now
        now = max(now, event.at)

    device = SimpleNamespace(record=record, wait=wait, elapsed_ms=lambda start, end: (end.at - start.at) / 1e6)
    session: Any = SimpleNamespace(device=device, execute=execute, name="e")
    runs = EngineTimer(session, clock=lambda: now).pipelined(len(compute))

    assert len(runs.compute_ms) == len(runs.enqueue_ms) == len(compute)
    assert runs.compute_ms.sum() <= runs.wall_ms * (1 + 1e-9)
    assert runs.wall_ms * 1e6 >= sum(compute) + enqueue - 1e-3
    if enqueue <= min(compute):
        assert runs.compute_ms.sum() == pytest.approx(runs.wall_ms)
        np.testing.assert_allclose(runs.compute_ms[1:] * 1e6, compute[1:])
