"""The Python API behind `from trt_int8 import ...`: the stages, taking model files and data.

from trt_int8 import export_onnx, calibrate, quantize, build_engine, benchmark, compare, Pipeline, Calibration
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.calibration import Calibration
from calibrators.protocols import Batch, Track, untracked
from engines.lint import lint
from engines.onnxrt import Execution
from engines.profiles import ShapeRange, dynamic_inputs
from engines.runner import TensorSpec
from engines.sidecar import is_engine
from trt_int8.accuracy import AccuracyResult
from trt_int8.accuracy import compare as compare_runners
from trt_int8.benchmark_result import BenchmarkResult
from trt_int8.benchmarking import BENCHMARK_BATCHES, built_for, time_side_by_side
from trt_int8.building import build_engine
from trt_int8.calibration import calibrate
from trt_int8.choices import check_choice
from trt_int8.data import DataSpec, open_data
from trt_int8.errors import ConfigError, UsageError
from trt_int8.export import export_onnx
from trt_int8.feeds import fixed_batch
from trt_int8.idle_options import refuse_idle, refuse_unread_preprocessing
from trt_int8.input_alarm import InputWatch
from trt_int8.outputs import check_output
from trt_int8.pipeline import Pipeline
from trt_int8.polygraphy_files import FOLDER as POLYGRAPHY_FOLDER
from trt_int8.quantization import convert_fp16, quantize
from trt_int8.random_data import id_tables, random_feeds
from trt_int8.runners import AnyRunner, open_runner, titles
from trt_int8.shaped_benchmark import ShapesChoice, check_calibration, points_of, time_at_shapes, with_shapes
from trt_int8.shaped_benchmark import shape_ranges as ranges_of
from trt_int8.shared_inputs import shared_inputs

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

__all__ = [
    "Calibration",
    "Pipeline",
    "benchmark",
    "build_engine",
    "calibrate",
    "compare",
    "convert_fp16",
    "export_onnx",
    "lint",
    "quantize",
]

Model = str | os.PathLike[str]


def benchmark(
    models: Model | Sequence[Model],
    data: DataSpec | None = None,
    *,
    batch_size: int | None = None,
    shapes: ShapesChoice | None = None,
    shape_ranges: Mapping[str, ShapeRange] | None = None,
    calibration: Calibration | Model | None = None,
    preprocessing: Preprocessing | None = None,
    execution: Execution | None = None,
    threads: int | None = None,
    transfers: bool | None = None,
    cuda_graph: bool = True,
    trust: bool = False,
    force: bool = False,
    rounds: int = 20,
    budget_s: float = 10.0,
    names: Sequence[str] | None = None,
    track: Track = untracked,
) -> BenchmarkResult:
    """Time models side by side on the same batches; speed-ups are against the first one.

    Args:
        models: ONNX files and TensorRT engines, or a single one.
        data: what to feed; random numbers of the model's shapes where None (an INT8 kernel takes the same time whatever
            the values are).
        batch_size: samples per inference; None takes 1, and with random numbers what an engine was built for.
        shapes: "min", "opt" or "max" times models with dynamic axes at the smallest, the usual or the largest shapes
            that they are meant for, "all" at each of them: `BenchmarkResult.shapes` holds a result for each, and the
            result itself is the one of "opt". The shapes are what engines were built for, else what `calibration` has
            seen. The values are repeated from the data's first batch, or random. None takes the shapes of the data; or
            "opt" where one of the next two is given.
        shape_ranges: name of an input to its smallest, usual and largest shape, in place of theirs.
        calibration: a calibration of the models, or its file; of one of the FP32 models, where there are any.
        preprocessing: how images become arrays, for image folders.
        execution: "exact" or "native" for all ONNX files; None lets each model's own rule decide, see
            `engines.onnxrt.execution_of`.
        threads: ONNX Runtime's threads inside an operator; None takes its default.
        transfers: of engines: whether a time holds the copies to and from the GPU, see
            `trt_int8.benchmarking.time_side_by_side`.
        cuda_graph: launch the runs of engines as CUDA graphs, where they can be captured.
        trust: load engines that no sidecar covers.
        force: take the shapes of a calibration of another graph or other weights, as far as they fit the inputs.
        rounds: number of interleaved rounds.
        budget_s: seconds for all rounds together, at each shape.
        names: names in the table; the file names where None.
        track: shows progress.

    Raises:
        ConfigError: a dynamic axis other than the batch needs data to give it a length, or the models' inputs differ.
        CalibrationError: the calibration belongs to another model.
        UsageError: an option would have no effect, such as one that is for engines, or for ONNX files, and there are
            none; or several shapes are to be timed and nothing tells them.
        DataError: the data do not fit.
    """
    models = _listed(models)
    if not models:
        raise ConfigError("Cannot benchmark: no models were given; expected at least one.")
    _check_options(
        models,
        of_engines={
            "transfers": transfers is True,
            "no-transfers": transfers is False,
            "no-cuda-graph": not cuda_graph,
            "trust": trust,
        },
        of_onnx={"execution": execution is not None, "threads": threads is not None},
    )
    refuse_unread_preprocessing(preprocessing, data)
    refuse_idle({"--force": force and calibration is None}, "it is about a calibration", "give one with --calibration")
    runners = _runners(models, names, execution, threads, trust, cuda_graph=cuda_graph)
    inputs = shared_inputs(runners)
    notes: tuple[str, ...] = ()
    ranges: dict[str, ShapeRange] | None = None
    if shapes is not None:
        check_choice("shapes", shapes, ShapesChoice)
    if shapes is not None or shape_ranges is not None or calibration is not None:
        if batch_size is not None:
            raise UsageError("--batch-size contradicts --shapes, --shape and --calibration, which tell the batch.")
        found = None if calibration is None else _loaded(calibration)
        if found is not None and dynamic_inputs(inputs):
            check_calibration(models, runners, inputs, found, given=shape_ranges is not None, force=force)
        seen = None if found is None else found.input_shapes
        ranges = ranges_of(inputs, runners, given=shape_ranges, seen=seen)
    tables = _tables(models, inputs) if data is None else {}
    feeds: list[Batch] = []
    unlike: tuple[str, ...] = ()
    if data is None and ranges is None:
        fixed = fixed_batch(inputs)
        if batch_size is not None and fixed not in (None, batch_size):
            notes = (f"the models fix their batch: timed with {fixed} samples, not the {batch_size} of --batch-size",)
        feeds = [random_feeds(inputs, batch_size, built_for=built_for(runners), tables=tables)]
    elif data is not None:
        source = open_data(data, inputs, batch_size=batch_size, preprocessing=preprocessing)
        watch = InputWatch(runners)
        read = islice(source, BENCHMARK_BATCHES if ranges is None else 1)
        feeds = [batch.feeds for batch in watch.batches(read)]
        unlike = watch.warnings()

    timed = partial(time_side_by_side, runners, transfers=transfers, rounds=rounds, budget_s=budget_s, track=track)
    if ranges is None:
        result = timed(feeds)
    else:
        sample = feeds[0] if feeds else None
        points = points_of(shapes or "opt")
        result = with_shapes(time_at_shapes(timed, inputs, ranges, points, sample=sample, tables=tables))
    return replace(result, notes=(*notes, *result.notes), warnings=(*result.warnings, *unlike))


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
    trust: bool = False,
    names: Sequence[str] | None = None,
    save_to: Model | None = None,
    track: Track = untracked,
) -> AccuracyResult:
    """Compare models' outputs with a reference's on the same data, and with labels where there are any.

    Args:
        reference: the FP32 ONNX file or engine.
        candidates: ONNX files and engines with the same inputs and outputs, or a single one.
        data: what to feed.
        labels: name of the array of class labels; None compares outputs only.
        batch_size: samples per batch, where the data is cut here; 1 by default. A model that fixes its batch overrides
            it.
        max_batches: use only so many batches.
        preprocessing: how images become arrays, for image folders.
        execution: how the candidates are run; None lets each model's own rule decide.
        threads: ONNX Runtime's threads inside an operator; None takes its default.
        trust: load engines that no sidecar covers.
        names: names of the candidates; the file names where None.
        save_to: folder for Polygraphy's inputs, outputs and commands; None saves none.
        track: shows progress.

    Raises:
        UsageError: an option is for engines, or for ONNX files, and there are none.
        ModelError: the models do not take the same inputs, or give other outputs.
        EngineLoadError: an engine cannot be loaded here.
        DataError: the data or the labels do not fit.
        InferenceError: a model does not take the data, or fails on it.
        FileAccessError: `save_to` cannot be written to.
    """
    candidates = _listed(candidates)
    _check_options(candidates, of_onnx={"execution": execution is not None})
    _check_options([reference, *candidates], of_engines={"trust": trust}, of_onnx={"threads": threads is not None})
    if save_to is not None:
        check_output(Path(save_to) / POLYGRAPHY_FOLDER / "inputs.json", data, option="--save")
    own = titles([reference, *candidates])
    runner = open_runner(reference, name=own[0], threads=threads, trust=trust)
    runners = _runners(candidates, own[1:] if names is None else names, execution, threads, trust)
    source = open_data(
        data,
        shared_inputs([runner, *runners]),
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


def _check_options(
    models: Sequence[Model], *, of_engines: Mapping[str, bool] | None = None, of_onnx: Mapping[str, bool] | None = None
) -> None:
    """Refuse options that would do nothing: name to whether it is given."""
    kinds = [is_engine(model) for model in models]
    for options, there, meant, found in (
        (of_engines, any(kinds), "TensorRT engines", "ONNX files"),
        (of_onnx, not all(kinds), "ONNX files", "engines"),
    ):
        useless = [f"--{name}" for name, given in (options or {}).items() if given and not there]
        if useless:
            one = len(useless) == 1
            raise UsageError(
                f"{' and '.join(useless)} {'does' if one else 'do'} nothing here: only for {meant}, and all models are "
                f"{found}. Leave {'it' if one else 'them'} out."
            )


def _runners(
    models: Sequence[Model],
    names: Sequence[str] | None,
    execution: Execution | None,
    threads: int | None,
    trust: bool,
    *,
    cuda_graph: bool = False,
) -> list[AnyRunner]:
    if names is not None and len(names) != len(models):
        raise ConfigError(f"{len(names)} names were given for {len(models)} models; expected one each.")
    if execution is not None:
        check_choice("execution", execution, Execution)
    return [
        open_runner(model, name=title, execution=execution, threads=threads, trust=trust, cuda_graph=cuda_graph)
        for model, title in zip(models, titles(models) if names is None else names, strict=True)
    ]


def _loaded(calibration: Calibration | Model) -> Calibration:
    return calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)


def _tables(models: Sequence[Model], inputs: Sequence[TensorSpec]) -> dict[str, int]:
    """Return the tables that ids are looked up in, as the first ONNX file among the models tells."""
    model = next((model for model in models if not is_engine(model)), None)
    if model is None or all(spec.dtype.kind == "f" for spec in inputs):
        return {}
    return id_tables(model)


def _listed(models: Model | Sequence[Model]) -> Sequence[Model]:
    return [models] if isinstance(models, str | os.PathLike) else models
