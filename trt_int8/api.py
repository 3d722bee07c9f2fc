"""The Python API behind `from trt_int8 import ...`: the stages, taking model files and data.

from trt_int8 import export_onnx, calibrate, quantize, benchmark, compare, Pipeline, Calibration
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.calibration import Calibration
from calibrators.protocols import Array, Track, untracked
from engines.onnxrt import Execution, OnnxRuntimeRunner
from trt_int8.accuracy import AccuracyResult
from trt_int8.accuracy import compare as compare_runners
from trt_int8.benchmarking import BENCHMARK_BATCHES, BenchmarkResult, time_side_by_side
from trt_int8.calibration import calibrate
from trt_int8.choices import check_choice
from trt_int8.data import DataSpec, open_data
from trt_int8.errors import ConfigError
from trt_int8.export import export_onnx
from trt_int8.pipeline import Pipeline
from trt_int8.quantization import convert_fp16, quantize
from trt_int8.random_data import random_feeds

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

__all__ = [
    "Calibration",
    "Pipeline",
    "benchmark",
    "calibrate",
    "compare",
    "convert_fp16",
    "export_onnx",
    "quantize",
]

Model = str | os.PathLike[str]


def benchmark(
    models: Model | Sequence[Model],
    data: DataSpec | None = None,
    *,
    batch_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
    threads: int | None = None,
    rounds: int = 20,
    budget_s: float = 10.0,
    names: Sequence[str] | None = None,
    track: Track = untracked,
) -> BenchmarkResult:
    """Time models side by side on the same batches; speed-ups are against the first one.

    Args:
        models: ONNX files, or a single one.
        data: what to feed; random numbers of the model's shapes where None (an INT8 kernel takes the same time whatever
            the values are).
        batch_size: samples per inference, 1 by default.
        preprocessing: how images become arrays, for image folders.
        execution: "exact" or "native" for all models; None lets each model's own rule decide, see
            `engines.onnxrt.execution_of`.
        threads: ONNX Runtime's threads inside an operator; None takes its default.
        rounds: number of interleaved rounds.
        budget_s: seconds for all rounds together.
        names: names in the table; the file names where None.
        track: shows progress.

    Raises:
        ConfigError: a dynamic axis other than the batch needs data to give it a length.
        DataError: the data do not fit.
    """
    models = _listed(models)
    if not models:
        raise ConfigError("Cannot benchmark: no models were given; expected at least one.")
    runners = _runners(models, names, execution, threads)
    inputs = runners[0].inputs
    if data is None:
        feeds: list[dict[str, Array]] = [random_feeds(inputs, batch_size or 1)]
    else:
        source = open_data(data, inputs, batch_size=batch_size, preprocessing=preprocessing)
        feeds = [batch.feeds for batch in islice(source, BENCHMARK_BATCHES)]
    return time_side_by_side(runners, feeds, rounds=rounds, budget_s=budget_s, track=track)


def compare(
    reference: Model,
    candidates: Model | Sequence[Model],
    data: DataSpec,
    *,
    labels: str | None = None,
    batch_size: int | None = None,
    max_batches: int | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
    threads: int | None = None,
    names: Sequence[str] | None = None,
    save_to: Model | None = None,
    track: Track = untracked,
) -> AccuracyResult:
    """Compare models' outputs with a reference's on the same data, and with labels where there are any.

    Args:
        reference: the FP32 ONNX file.
        candidates: ONNX files with the same inputs and outputs, or a single one.
        data: what to feed.
        labels: name of the array of class labels; None compares outputs only.
        batch_size: samples per batch, where the data is cut here; 1 by default.
        max_batches: use only so many batches.
        preprocessing: how images become arrays, for image folders.
        execution: how the candidates are run; None lets each model's own rule decide.
        threads: ONNX Runtime's threads inside an operator; None takes its default.
        names: names of the candidates; the file names where None.
        save_to: folder for Polygraphy's inputs, outputs and commands; None saves none.
        track: shows progress.

    Raises:
        DataError: the data or the labels do not fit.
    """
    candidates = _listed(candidates)
    titles = _titles([reference, *candidates])
    runner = OnnxRuntimeRunner(reference, name=titles[0], threads=threads)
    runners = _runners(candidates, titles[1:] if names is None else names, execution, threads)
    source = open_data(
        data,
        runner.inputs,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=preprocessing,
        label=labels,
    )
    return compare_runners(
        runner,
        runners,
        source,
        labels=labels,
        total=source.batches,
        save_to=save_to,
        track=track,
    )


def _runners(
    models: Sequence[Model], names: Sequence[str] | None, execution: Execution | None, threads: int | None
) -> list[OnnxRuntimeRunner]:
    if names is not None and len(names) != len(models):
        raise ConfigError(f"{len(names)} names were given for {len(models)} models; expected one each.")
    if execution is not None:
        check_choice("execution", execution, Execution)
    titles = _titles(models) if names is None else names
    return [
        OnnxRuntimeRunner(model, name=title, execution=execution, threads=threads)
        for model, title in zip(models, titles, strict=True)
    ]


def _listed(models: Model | Sequence[Model]) -> Sequence[Model]:
    return [models] if isinstance(models, str | os.PathLike) else models


def _titles(models: Sequence[Model]) -> list[str]:
    """Name models by their files, and by their whole paths where two files have one name."""
    files = [Path(model).name for model in models]
    return files if len(set(files)) == len(files) else [os.fspath(model) for model in models]
