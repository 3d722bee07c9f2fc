"""Several models timed side by side.

All runners stay open in one process and take turns: A B C, C B A, A B C, ... A machine that slows down for a second
then slows every candidate alike, and a comparison *within* a round still holds; `trt_int8.timing` draws its speed-ups
and their intervals from the rounds.

Among engines a time is a run on the GPU, by the GPU's clock (`trt_int8.gpu_timing`). As soon as one candidate is run by
ONNX Runtime, a time is one call of `Runner.infer` for all of them, arrays in, arrays out, so that like is compared with
like. Warm-up is dropped, and so is the first inference of each turn, which finds the caches full of another model's
weights. Python's garbage collector is off meanwhile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from calibrators.protocols import Batch, Track, untracked
from engines.garbage import garbage_collection_off
from engines.gpu_monitor import GpuMonitor
from engines.runner import Runner
from engines.trt_runner import TensorRTRunner
from trt_int8.benchmark_result import BenchmarkResult, TimedCandidate
from trt_int8.errors import ConfigError, DataError, DeviceError, MissingDependencyError, UsageError
from trt_int8.feeds import batch_input, describe
from trt_int8.gpu_timing import EngineStopwatch, GpuFigures
from trt_int8.machine import describe_machine
from trt_int8.stopwatch import Clock, HostStopwatch, Stopwatch, Timed, Times
from trt_int8.timing import NO_VERDICT, estimate_speedup, summarize, with_all_time
from trt_int8.timing_warnings import (
    clock_warnings,
    engine_warnings,
    median_warnings,
    shape_warnings,
    spread_warnings,
)

BENCHMARK_BATCHES = 16
"""Batches to cycle through: enough that no cache knows them, few enough to hold."""

MIN_ROUNDS = 5
"""Fewer rounds give the bootstrap nothing to draw from."""


def time_side_by_side(
    runners: Sequence[Runner],
    feeds: Sequence[Batch],
    *,
    transfers: bool | None = None,
    rounds: int = 20,
    budget_s: float = 10.0,
    warmup_s: float = 0.2,
    seed: int = 0,
    shapes_meant: bool = False,
    track: Track = untracked,
    clock: Clock = time.perf_counter_ns,
) -> BenchmarkResult:
    """Time `runners` side by side on the same batches.

    Args:
        runners: the candidates; the first is what the others are compared with.
        feeds: batches, used in turn. Those of another batch size than the first are left out, with a warning; with an
            engine among the runners, those of another shape.
        transfers: of engines: whether a time holds the copies to and from the GPU. None leaves them out among engines,
            and times everything by the host's clock beside a runner of another kind.
        rounds: how often each runner takes its turn.
        budget_s: seconds for all rounds together, shared evenly. A slow model takes longer: each turn has at least
            `trt_int8.stopwatch.MIN_ITERATIONS` inferences. The energy of each engine takes a second or two more.
        warmup_s: seconds of untimed inference per runner before the first round.
        seed: seed of the bootstrap.
        shapes_meant: do not warn of shapes that kernels were not chosen for: they are timed on purpose.
        track: shows the progress.
        clock: the host's clock.

    Raises:
        ConfigError: no runners, too few rounds, a time that is not positive, or runners with different inputs.
        UsageError: transfers are to be left out of the times of a runner that is no engine.
        DataError: no batches.
        InferenceError: a runner does not take the batches.
    """
    if not runners:
        raise ConfigError("Cannot benchmark: no models were given; expected at least one.")
    if rounds < MIN_ROUNDS:
        raise ConfigError(f"Cannot benchmark in {rounds} rounds: expected at least {MIN_ROUNDS}, for an interval.")
    if budget_s <= 0 or warmup_s <= 0:
        raise ConfigError(f"Cannot benchmark for {budget_s} s after {warmup_s} s: expected times above 0.")
    if not feeds:
        raise DataError("Cannot benchmark: the data gave no batches; expected at least one.")
    _check_same_inputs(runners)
    timed = _what_is_timed(runners, transfers)
    batch_size = _batch_size(runners[0], feeds[0])
    used, left_out = _alike(runners, feeds, batch_size)
    turn_ns = budget_s * 1e9 / (rounds * len(runners))
    turns: list[list[Times]] = [[] for _ in runners]
    with ExitStack() as stack:
        opened = [stack.enter_context(runner) for runner in runners]
        gc.collect()
        stack.enter_context(garbage_collection_off())
        for runner in opened:  # one that cannot run is found before any is timed
            runner.infer(used[0])
        monitor, notes = _open_monitor(stack, opened)
        stopwatches = [_stopwatch(runner, used, clock, timed, monitor) for runner in opened]
        for stopwatch in stopwatches:
            stopwatch.warm_up(warmup_s, turn_ns)
        for number in track(range(rounds), "benchmark", rounds):
            order = range(len(opened)) if number % 2 == 0 else reversed(range(len(opened)))
            for index in order:
                turns[index].append(stopwatches[index].take_turn(number))
        engines = {
            index: stopwatch for index, stopwatch in enumerate(stopwatches) if isinstance(stopwatch, EngineStopwatch)
        }
        if monitor is not None:
            for engine in track(engines.values(), "energy", len(engines)):
                engine.measure_energy()
        figures = {index: engine.figures(batch_size) for index, engine in engines.items()}

    times = [np.stack(turn) for turn in turns]
    candidates = tuple(
        _candidate(runners, times, index, batch_size, seed, timed, figures.get(index)) for index in range(len(runners))
    )
    disturbed = median_warnings([runner.name for runner in runners], times, [row.speedup for row in candidates])
    return BenchmarkResult(
        candidates=candidates,
        timed=timed,
        rounds=rounds,
        batch_size=batch_size,
        inputs=_shapes(used[0]),
        seed=seed,
        machine=describe_machine(),
        warnings=(
            *_warnings(runners, times, figures, None if shapes_meant else used[0], timed),
            *disturbed,
            *left_out,
        ),
        notes=notes,
    )


def built_for(runners: Sequence[Runner]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of dynamic inputs that the first engine has its kernels for; none where there is no engine."""
    engine = next((runner for runner in runners if isinstance(runner, TensorRTRunner)), None)
    if engine is None:
        return {}
    return {name: optimum for profile in engine.profiles[:1] for name, (_, optimum, _) in profile.items()}


def _candidate(
    runners: Sequence[Runner],
    times: Sequence[Times],
    index: int,
    batch_size: int,
    seed: int,
    timed: Timed,
    gpu: GpuFigures | None,
) -> TimedCandidate:
    """Make the row of `runners[index]` out of the times of all, each of shape (rounds, iterations of a turn)."""
    runner, reference = runners[index], runners[0]
    latency = summarize(times[index])
    by_medians = estimate_speedup(np.median(times[0], axis=1), np.median(times[index], axis=1), seed)
    speedup = with_all_time(by_medians, times[0], times[index])
    verdict = ""
    if index:
        why_none = _no_verdict(runner, reference)
        pair = f"{runner.name} against {reference.name}"
        verdict = f"{pair}{NO_VERDICT}{why_none}" if why_none else speedup.verdict(runner.name, reference.name)
    queued = timed == "gpu compute" and gpu is not None
    return TimedCandidate(
        name=runner.name,
        execution=runner.execution,
        simulated=runner.simulated,
        precision=_precision(runner),
        threads=getattr(runner, "threads", None),  # no part of the protocol: a GPU has no such setting
        latency=latency,
        samples_per_s=gpu.samples_per_s if gpu is not None and queued else 1000 * batch_size / latency.mean_ms,
        speedup=speedup,
        verdict=verdict,
        note=_note(runner),
        gpu=gpu,
    )


def _no_verdict(*pair: Runner) -> str:
    """Say why the times of two runners tell nothing of which is faster; empty where they do."""
    if any(map(_on_simulated_device, pair)):
        return "the device is SIMULATED"
    simulated = [runner.name for runner in pair if runner.simulated]
    return f"ONNX Runtime only simulates the INT8 of {' and '.join(simulated)}" if simulated else ""


def _note(runner: Runner) -> str:
    if _on_simulated_device(runner):
        return "run on a SIMULATED device: its figures say nothing about any GPU"
    if runner.simulated:
        return "INT8 simulated in float on ONNX Runtime: this time says nothing about TensorRT"
    if runner.execution == "exact":
        return "run with graph optimizations off, slower than ONNX Runtime can"
    if _precision(runner) == "tf32":
        return "TF32: inputs of matrix products are rounded to 10 bits of mantissa; FP32 proper is slower"
    return ""


def _warnings(
    runners: Sequence[Runner],
    times: Sequence[Times],
    figures: dict[int, GpuFigures],
    feeds: Batch | None,
    timed: Timed,
) -> Iterator[str]:
    if timed != "gpu compute":  # compute times have a rule of their own
        yield from spread_warnings([runner.name for runner in runners], times)
    for index, gpu in figures.items():
        runner = runners[index]
        if feeds is not None and isinstance(runner, TensorRTRunner):
            yield from shape_warnings(runner.name, runner.profiles, feeds)
        if gpu.graph_fallback is not None:
            yield f"{runner.name} ran without a CUDA graph: {gpu.graph_fallback}"
        if not runner.simulated:
            yield from engine_warnings(runner.name, gpu)
    yield from clock_warnings(list(figures.values()))


def _stopwatch(
    runner: Runner, feeds: Sequence[Batch], clock: Clock, timed: Timed, monitor: GpuMonitor | None
) -> Stopwatch:
    if isinstance(runner, TensorRTRunner):
        return EngineStopwatch(runner, feeds, clock, timed=timed, monitor=monitor)
    return HostStopwatch(runner, feeds, clock)


def _open_monitor(stack: ExitStack, runners: Sequence[Runner]) -> tuple[GpuMonitor | None, tuple[str, ...]]:
    """Open the monitor of the GPU that engines run on, or say why it cannot be; a simulated one has none."""
    engine = next((runner for runner in runners if isinstance(runner, TensorRTRunner)), None)
    if engine is None or engine.simulated:
        return None, ()
    try:
        return stack.enter_context(GpuMonitor(engine.session.device.pci_bus_id)), ()
    except (MissingDependencyError, DeviceError) as error:
        return None, (str(error),)


def _what_is_timed(runners: Sequence[Runner], transfers: bool | None) -> Timed:
    other = next((runner.name for runner in runners if not isinstance(runner, TensorRTRunner)), None)
    if other is None:
        return "with transfers" if transfers else "gpu compute"
    if transfers is False:
        raise UsageError(
            f"Cannot leave transfers out of the times (transfers=False, --no-transfers): {other} is no TensorRT "
            "engine, and its times hold all copies. Time engines alone, or leave the option out."
        )
    return "host"


def _check_same_inputs(runners: Sequence[Runner]) -> None:
    first = runners[0]
    expected = {spec.name: spec.dtype for spec in first.inputs}
    for runner in runners[1:]:
        if {spec.name: spec.dtype for spec in runner.inputs} != expected:
            raise ConfigError(
                f"Cannot time {runner.name} beside {first.name}: its inputs are {describe(runner.inputs)}; expected "
                f"the names and types of {describe(first.inputs)}, as both are fed the same batches. Time them apart."
            )


def _alike(runners: Sequence[Runner], feeds: Sequence[Batch], batch_size: int) -> tuple[list[Batch], tuple[str, ...]]:
    """Return the batches that all can be timed on, and a warning where some are left out.

    An engine binds its buffers, and captures its graph, for one shape; doing so anew would be timed.
    """
    used = [batch for batch in feeds if _batch_size(runners[0], batch) == batch_size]
    what = f"{batch_size} samples"
    if any(isinstance(runner, TensorRTRunner) for runner in runners):
        used = [batch for batch in used if _shapes(batch) == _shapes(feeds[0])]
        what = "the first one's shapes"
    if len(used) == len(feeds):
        return used, ()
    return used, (f"{len(feeds) - len(used)} of {len(feeds)} batches do not have {what} and were left out",)


def _batch_size(runner: Runner, feeds: Batch) -> int:
    """Count the samples of one batch; 1 where the model takes scalars only."""
    spec = batch_input(runner.inputs)
    value = None if spec is None else feeds.get(spec.name)
    return 1 if value is None or value.ndim == 0 else len(value)


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in batch.items()}


def _on_simulated_device(runner: Runner) -> bool:
    return isinstance(runner, TensorRTRunner) and runner.simulated


def _precision(runner: Runner) -> str | None:
    sidecar = runner.sidecar if isinstance(runner, TensorRTRunner) else None
    return None if sidecar is None else sidecar.precision
