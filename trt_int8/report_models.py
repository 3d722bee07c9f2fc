"""The models of a run as the report shows them: one row each, joined from the result files.

The files name a model in two ways: `quantization.json` by its file, the measurements by the name of its runner. A row
goes by either. Figures that a file does not hold are None here and a dash in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from calibrators.calibration import METHODS

Json = Mapping[str, Any]

INT8_PRECISIONS = ("int8", "int8+fp16")
PRECISIONS = ("fp32", "tf32", "fp16", *INT8_PRECISIONS)
"""In the order of the report."""

TARGETS = ("cpu", "tensorrt")
"""In the order of the report: what was measured comes before what was simulated."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A row of `accuracy.json`; per cent and dB. None where it is not known."""

    samples: int | None
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float | None
    cosine: float | None
    max_abs: float | None
    identical: bool
    nonfinite: int
    simulated: bool
    execution: str


@dataclass(frozen=True, slots=True)
class Timing:
    """A row of `benchmark.json`; milliseconds. The speed-up is None for the reference.

    Of engines also the latency with transfers to and from the GPU, and the energy of an inference in millijoules.
    """

    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    samples_per_s: float | None
    speedup: float | None
    low: float | None
    high: float | None
    simulated: bool
    execution: str
    threads: int | None
    note: str
    latency_ms: float | None = None
    energy_mj: float | None = None
    cuda_graph: bool | None = None

    @property
    def faster(self) -> bool | None:
        """True for faster than the reference, False for slower, None where the interval, as printed, holds 1."""
        if self.low is not None and round(self.low, 2) > 1.0:
            return True
        if self.high is not None and round(self.high, 2) < 1.0:
            return False
        return None


@dataclass(frozen=True, slots=True)
class Size:
    """A row of `sizes.json`."""

    file_bytes: int
    weight_bytes: dict[str, int]
    ratio: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of the run.

    Attributes:
        name: its name in the tables.
        file: its file, relative to the run's folder; empty where no result file says.
        precision: "fp32", "tf32", "fp16", "int8", "int8+fp16" or "other".
        method: the calibration method of an INT8 model, else empty.
        target: "cpu" or "tensorrt" for an INT8 model, else empty.
        accuracy: its row of `accuracy.json`.
        timing: its row of `benchmark.json`.
        size: its row of `sizes.json`.
        reference: whether the others are compared with it.
    """

    name: str
    file: str
    precision: str
    method: str
    target: str
    accuracy: Accuracy | None
    timing: Timing | None
    size: Size | None
    reference: bool

    @property
    def short_name(self) -> str:
        """The name in a sentence: "INT8 (entropy)"."""
        return f"{self.precision.upper()} ({self.method})" if self.is_int8 else self.name

    @property
    def is_int8(self) -> bool:
        """Whether its weighted layers are quantized."""
        return self.precision in INT8_PRECISIONS


def model_rows(
    quantization: Json | None,
    benchmark: Json | None,
    accuracy: Json | None,
    sizes: Json | None,
    engines: Json | None = None,
) -> tuple[ModelRow, ...]:
    """Join the result files to one row per model: the reference, FP16, INT8 by target and method, then all others."""
    timings = _by_name(_list(benchmark, "candidates"))
    scores = _by_name(_list(accuracy, "candidates"))
    measured = _by_name(_list(sizes, "models"))
    reference = _reference(benchmark, accuracy, sizes)
    if reference and accuracy is not None and reference not in scores:
        scores[reference] = dict(accuracy.get("reference_scores") or {})
    int8 = {str(model.get("file", "")): model for model in _list(quantization, "models")}
    half = (quantization or {}).get("fp16") or {}

    kinds: dict[str, tuple[str, str, str, str]] = {}  # name -> file, precision, method, target
    aliases: dict[str, str] = {}
    for file, model in int8.items():
        method, target = str(model.get("method", "")), str(model.get("target", ""))
        precision = str(model.get("precision", "int8"))
        name = f"{precision.upper()} {method}, {target}"
        kinds[name] = (file, precision, method, target)
        aliases |= dict.fromkeys((name, file, PurePath(file).name), name)
    if half:
        file = str(half.get("file", ""))
        kinds["FP16"] = (file, "fp16", "", "")
        aliases |= dict.fromkeys(("FP16", file, PurePath(file).name), "FP16")
    for engine in _list(engines, "engines"):  # an engine goes by the name of the model that it was built from
        name = str(engine.get("name", ""))
        _, _, method, target = kinds.get(name, ("", "", "", ""))
        kinds[name] = (str(engine.get("file", "")), str(engine.get("precision", "other")), method, target)
    tables = [{aliases.get(name, name): row for name, row in table.items()} for table in (timings, scores, measured)]
    known = [name for table in tables for name in table]
    for name in dict.fromkeys([reference, *known] if reference else known):
        file = str((tables[2].get(name) or {}).get("file", ""))
        kinds.setdefault(name, (file, "fp32" if name == reference else "other", "", ""))

    rows = [
        ModelRow(
            name=name,
            file=file,
            precision=precision,
            method=method,
            target=target,
            accuracy=_accuracy(tables[1].get(name)),
            timing=_timing(tables[0].get(name), is_reference=name == reference),
            size=_size(tables[2].get(name)),
            reference=name == reference,
        )
        for name, (file, precision, method, target) in kinds.items()
    ]
    return tuple(sorted(rows, key=_order))


def _order(row: ModelRow) -> tuple[int, int, int]:
    rank = PRECISIONS.index(row.precision) if row.precision in PRECISIONS else len(PRECISIONS)
    target = TARGETS.index(row.target) if row.target in TARGETS else len(TARGETS)
    return -1 if row.reference else rank, target, METHODS.index(row.method) if row.method in METHODS else len(METHODS)


def _reference(benchmark: Json | None, accuracy: Json | None, sizes: Json | None) -> str:
    for source in (accuracy, benchmark):
        if source is not None and source.get("reference"):
            return str(source["reference"])
    first = [*_list(benchmark, "candidates")[:1], *_list(sizes, "models")[:1]]
    return str(first[0].get("name", "")) if first else ""


def _accuracy(row: Json | None) -> Accuracy | None:
    if not row:
        return None
    samples = number(row, "samples")
    return Accuracy(
        samples=None if samples is None else int(samples),
        top1=number(row, "top1"),
        top5=number(row, "top5"),
        agreement=number(row, "agreement"),
        sqnr_db=number(row, "sqnr_db"),
        cosine=number(row, "cosine"),
        max_abs=number(row, "max_abs"),
        identical=bool(row.get("identical", False)),
        nonfinite=int(number(row, "nonfinite") or 0),
        simulated=bool(row.get("simulated", False)),
        execution=str(row.get("execution", "")),
    )


def _timing(row: Json | None, *, is_reference: bool) -> Timing | None:
    median = number(row or {}, "median_ms")
    if row is None or median is None:
        return None
    gpu: Json = row.get("gpu") or {}
    p90, p95, p99 = (number(row, key) for key in ("p90_ms", "p95_ms", "p99_ms"))
    threads = number(row, "threads")
    speedups = [None if is_reference else number(row, key) for key in ("speedup", "speedup_low", "speedup_high")]
    if None in speedups:  # a speed-up without its interval is not shown
        speedups = [None, None, None]
    return Timing(
        median_ms=median,
        p90_ms=p90 if p90 is not None else median,
        p95_ms=p95 if p95 is not None else median,
        p99_ms=p99 if p99 is not None else median,
        samples_per_s=number(row, "samples_per_s"),
        speedup=speedups[0],
        low=speedups[1],
        high=speedups[2],
        simulated=bool(row.get("simulated", False)),
        execution=str(row.get("execution", "")),
        threads=None if threads is None else int(threads),
        note=str(row.get("note") or ""),
        latency_ms=number(gpu, "latency_ms"),
        energy_mj=number(gpu, "energy_mj_per_inference"),
        cuda_graph=gpu.get("cuda_graph"),
    )


def _size(row: Json | None) -> Size | None:
    count = number(row or {}, "file_bytes")
    if row is None or count is None:
        return None
    weights = {str(kind): int(size) for kind, size in (row.get("weight_bytes") or {}).items()}
    return Size(int(count), weights, number(row, "ratio"))


def number(row: Json, key: str) -> float | None:
    """Return a finite number of a JSON object; None where it is absent, null or no number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _list(source: Json | None, key: str) -> list[Json]:
    return list((source or {}).get(key) or [])


def _by_name(rows: Iterable[Json]) -> dict[str, Json]:
    return {str(row.get("name", "")): row for row in rows}
