"""Several models timed side by side.

All runners stay open in one process and take turns: A B C, C B A, A B C, ... A machine that slows down for a second
then slows every candidate alike, and a comparison *within* a round still holds; `trt_int8.timing` draws its speed-ups
and their intervals from the rounds.

A time is one call of `Runner.infer`, arrays in, arrays out. Warm-up is dropped, and so is the first inference of each
turn, which finds the caches full of another model's weights. Python's garbage collector is off meanwhile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Batch, Track, untracked
from engines.runner import Runner
from trt_int8.errors import ConfigError, DataError
from trt_int8.feeds import batch_input
from trt_int8.machine import describe_machine
from trt_int8.timing import CONFIDENCE, Latency, Speedup, estimate_speedup, summarize

BENCHMARK_BATCHES = 16
"""Batches to cycle through: enough that no cache knows them, few enough to hold."""

MIN_ROUNDS = 5
"""Fewer rounds give the bootstrap nothing to draw from."""

MIN_ITERATIONS = 3
"""Inferences of a turn, however slow the model: their median shrugs off one hiccup."""

STEADY_CV_PERCENT = 2.5
"""Above this spread trtexec warns of unstable clocks."""

Clock = Callable[[], int]


@dataclass(frozen=True, slots=True)
class TimedCandidate:
    """One model's row.

    Attributes:
        name: the runner's name.
        execution: "exact" or "native", see `engines.runner.Runner`.
        simulated: whether another machine's model was only simulated here.
        threads: threads inside an operator; None for the runtime's default (ONNX Runtime: one per physical core) and
            where the word has no meaning.
        latency: times over all rounds.
        samples_per_s: samples per second over all timed calls: batch size / mean time, so late calls count.
        speedup: against the first candidate.
        verdict: the speed-up in words; empty for the first candidate.
        note: what the reader of these times must know; empty where there is nothing.
    """

    name: str
    execution: str
    simulated: bool
    threads: int | None
    latency: Latency
    samples_per_s: float
    speedup: Speedup
    verdict: str
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, in the shape of `benchmark.json`'s candidates."""
        return {
            "name": self.name,
            "median_ms": self.latency.median_ms,
            "p90_ms": self.latency.p90_ms,
            "p95_ms": self.latency.p95_ms,
            "p99_ms": self.latency.p99_ms,
            "mean_ms": self.latency.mean_ms,
            "cv_percent": self.latency.cv_percent,
            "iterations": self.latency.iterations,
            "samples_per_s": self.samples_per_s,
            "speedup": self.speedup.ratio,
            "speedup_low": self.speedup.low,
            "speedup_high": self.speedup.high,
            "simulated": self.simulated,
            "execution": self.execution,
            "threads": self.threads,
            "verdict": self.verdict,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """Several models' times, taken together.

    Attributes:
        candidates: one row per model, in the order given; the first is the reference.
        rounds: number of rounds.
        batch_size: samples per inference.
        inputs: input name to the shape that was fed; of the first batch where several differ.
        seed: seed of the bootstrap.
        machine: `describe_machine()`.
        warnings: what speaks against trusting the figures, one sentence each.
    """

    candidates: tuple[TimedCandidate, ...]
    rounds: int
    batch_size: int
    inputs: dict[str, tuple[int, ...]]
    seed: int
    machine: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def reference(self) -> TimedCandidate:
        """The candidate that the others are measured against."""
        return self.candidates[0]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: the content of `benchmark.json`."""
        return {
            "rounds": self.rounds,
            "machine": self.machine,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "reference": self.reference.name,
            "batch_size": self.batch_size,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "confidence": CONFIDENCE,
            "seed": self.seed,
            "warnings": list(self.warnings),
        }


def time_side_by_side(
    runners: Sequence[Runner],
    feeds: Sequence[Batch],
    *,
    rounds: int = 20,
    budget_s: float = 10.0,
    warmup_s: float = 0.2,
    seed: int = 0,
    track: Track = untracked,
    clock: Clock = time.perf_counter_ns,
) -> BenchmarkResult:
    """Time `runners` side by side on the same batches.

    Args:
        runners: the candidates; the first is what the others are compared with.
        feeds: batches, used in turn. Those of another batch size than the first are left out, with a warning.
        rounds: how often each runner takes its turn.
        budget_s: seconds for all rounds together, shared evenly. A slow model takes longer: each turn has at least
            `MIN_ITERATIONS` inferences.
        warmup_s: seconds of untimed inference per runner before the first round.
        seed: seed of the bootstrap.
        track: shows the progress.
        clock: nanoseconds from any fixed point.

    Raises:
        ConfigError: no runners, too few rounds, or a time that is not positive.
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
    batch_size = _batch_size(runners[0], feeds[0])
    used = [batch for batch in feeds if _batch_size(runners[0], batch) == batch_size]
    turn_ns = budget_s * 1e9 / (rounds * len(runners))
    turns: list[list[NDArray[np.int64]]] = [[] for _ in runners]
    with ExitStack() as stack:
        opened = [stack.enter_context(runner) for runner in runners]
        stack.enter_context(_garbage_collection_off())
        iterations = [max(MIN_ITERATIONS, int(turn_ns / _warm_up(runner, used, warmup_s, clock))) for runner in opened]
        for number in track(range(rounds), "benchmark", rounds):
            order = range(len(opened)) if number % 2 == 0 else reversed(range(len(opened)))
            for index in order:
                opened[index].infer(used[0])
                turns[index].append(_timed(opened[index], used, iterations[index], clock))

    times = [np.stack(turn) for turn in turns]
    warnings = [_spread_warning([runner.name for runner in runners], times)]
    if len(used) < len(feeds):
        warnings.append(
            f"{len(feeds) - len(used)} of {len(feeds)} batches do not have {batch_size} samples and were left out"
        )
    return BenchmarkResult(
        candidates=tuple(_candidate(runners, times, index, batch_size, seed) for index in range(len(runners))),
        rounds=rounds,
        batch_size=batch_size,
        inputs={name: value.shape for name, value in used[0].items()},
        seed=seed,
        machine=describe_machine(),
        warnings=tuple(filter(None, warnings)),
    )


def _candidate(
    runners: Sequence[Runner], times_ns: Sequence[NDArray[np.int64]], index: int, batch_size: int, seed: int
) -> TimedCandidate:
    """Make the row of `runners[index]` out of the times of all, each of shape (rounds, iterations of a turn)."""
    runner, reference = runners[index], runners[0]
    latency = summarize(times_ns[index])
    speedup = estimate_speedup(np.median(times_ns[0], axis=1), np.median(times_ns[index], axis=1), seed)
    return TimedCandidate(
        name=runner.name,
        execution=runner.execution,
        simulated=runner.simulated,
        threads=getattr(runner, "threads", None),  # no part of the protocol: a GPU has no such setting
        latency=latency,
        samples_per_s=1000 * batch_size / latency.mean_ms,
        speedup=speedup,
        verdict=speedup.verdict(runner.name, reference.name) if index else "",
        note=_note(runner),
    )


def _note(runner: Runner) -> str:
    if runner.simulated:
        return "INT8 simulated in float on ONNX Runtime: this time says nothing about TensorRT"
    if runner.execution == "exact":
        return "run with graph optimizations off, slower than ONNX Runtime can"
    return ""


def _spread_warning(names: Sequence[str], times_ns: Sequence[NDArray[np.int64]]) -> str:
    """Warn where median times wander from round to round; single late calls are the percentiles' business."""
    medians = [np.median(times, axis=1) for times in times_ns]
    spreads = [100 * float(values.std() / values.mean()) for values in medians]
    unsteady = [
        f"{name} by {spread:.1f} %" for name, spread in zip(names, spreads, strict=True) if spread > STEADY_CV_PERCENT
    ]
    if not unsteady:
        return ""
    return (
        f"median times varied from round to round: {', '.join(unsteady)} (coefficient of variation; steady clocks stay "
        f"within {STEADY_CV_PERCENT} %): other work or changing clocks on this machine. "
        "Trust the ratios and their intervals, not the milliseconds"
    )


def _batch_size(runner: Runner, feeds: Batch) -> int:
    """Count the samples of one batch; 1 where the model takes scalars only."""
    spec = batch_input(runner.inputs)
    value = None if spec is None else feeds.get(spec.name)
    return 1 if value is None or value.ndim == 0 else len(value)


def _warm_up(runner: Runner, feeds: Sequence[Batch], seconds: float, clock: Clock) -> float:
    """Run untimed for `seconds`; return the median nanoseconds of an inference once it is warm."""
    times: list[int] = []
    end = clock() + seconds * 1e9
    for batch in cycle(feeds):
        start = clock()
        runner.infer(batch)
        stop = clock()
        times.append(stop - start)
        if stop >= end and len(times) >= MIN_ITERATIONS:
            break
    return max(float(np.median(times[len(times) // 2 :])), 1.0)


def _timed(runner: Runner, feeds: Sequence[Batch], iterations: int, clock: Clock) -> NDArray[np.int64]:
    """Return the nanoseconds of each of `iterations` inferences; every turn starts with the first batch."""
    infer = runner.infer
    times: list[int] = []
    for batch in islice(cycle(feeds), iterations):
        start = clock()
        infer(batch)
        times.append(clock() - start)
    return np.array(times, dtype=np.int64)


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
