"""Several models' times, as `trt_int8.benchmarking` takes them and `benchmark.json` holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trt_int8.gpu_timing import GpuFigures
from trt_int8.stopwatch import Timed
from trt_int8.timing import CONFIDENCE, Latency, Speedup

_OF_ALL_SHAPES = ("machine", "shapes")
"""What a result says once for all its shapes."""


@dataclass(frozen=True, slots=True)
class TimedCandidate:
    """One model's row.

    Attributes:
        name: the runner's name.
        execution: "exact" or "native", see `engines.runner.Runner`.
        simulated: whether another machine's model, or the machine itself, was only simulated here.
        precision: of an engine: "fp32", "tf32", "fp16", "int8" or "int8+fp16"; None where it is not known.
        threads: threads inside an operator; None for the runtime's default (ONNX Runtime: one per physical core) and
            where the word has no meaning.
        latency: times over all rounds.
        samples_per_s: samples per second over all timed calls: batch size / mean time, so late calls count; where
            compute time is timed, the throughput of the queued runs.
        speedup: against the first candidate.
        verdict: the speed-up in words; empty for the first candidate.
        note: what the reader of these times must know; empty where there is nothing.
        gpu: what else is known of an engine; None for other models.
    """

    name: str
    execution: str
    simulated: bool
    precision: str | None
    threads: int | None
    latency: Latency
    samples_per_s: float
    speedup: Speedup
    verdict: str
    note: str
    gpu: GpuFigures | None

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
            "precision": self.precision,
            "threads": self.threads,
            "verdict": self.verdict,
            "note": self.note,
            "gpu": None if self.gpu is None else self.gpu.to_json(),
        }


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """Several models' times, taken together.

    Attributes:
        candidates: one row per model, in the order given; the first is the reference.
        timed: what the times are: "gpu compute", "with transfers" or "host", see `trt_int8.stopwatch.Timed`.
        rounds: number of rounds.
        batch_size: samples per inference.
        inputs: input name to the shape that was fed; of the first batch where several differ.
        seed: seed of the bootstrap.
        machine: `describe_machine()`.
        warnings: what speaks against trusting the figures, one sentence each.
        notes: what could not be measured, and why.
        shapes: the same models timed at other shapes: "min", "opt" or "max" and the result there, see
            `trt_int8.shaped_benchmark`; empty where one shape was timed.
    """

    candidates: tuple[TimedCandidate, ...]
    timed: Timed
    rounds: int
    batch_size: int
    inputs: dict[str, tuple[int, ...]]
    seed: int
    machine: dict[str, Any]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    shapes: tuple[tuple[str, BenchmarkResult], ...] = ()

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
            "timed": self.timed,
            "batch_size": self.batch_size,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "confidence": CONFIDENCE,
            "seed": self.seed,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "shapes": [
                {"shape": name, **{key: value for key, value in result.to_json().items() if key not in _OF_ALL_SHAPES}}
                for name, result in self.shapes
            ],
        }
