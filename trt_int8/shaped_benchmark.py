"""Models with dynamic shapes, timed at the smallest, the usual and the largest shapes that they are meant for.

These are the ones that an engine was built for (its optimization profile), or those that a calibration has seen, or
what the user names. Each is a benchmark of its own, interleaved in itself, as a speed-up may differ from one to the
other: small batches wait for memory, large ones for arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from calibrators.calibration import Calibration, InputShapes
from calibrators.errors import CalibrationError
from calibrators.protocols import Array, Batch
from engines.graph import prepare
from engines.onnxrt import load_header, shape_fits
from engines.profiles import Shape, ShapeRange, dynamic_inputs, quoted, seen_profile
from engines.runner import Runner, TensorSpec
from engines.sidecar import is_engine
from engines.trt_runner import TensorRTRunner
from engines.trt_types import held_types
from trt_int8.benchmark_result import BenchmarkResult
from trt_int8.build_checks import check_calibrated_inputs
from trt_int8.calibration import check_fits
from trt_int8.errors import ConfigError, UsageError
from trt_int8.idle_options import refuse_idle
from trt_int8.quantize_result import METHOD_KEY
from trt_int8.random_data import random_feeds

Point = Literal["min", "opt", "max"]
ShapesChoice = Literal["min", "opt", "max", "all"]

POINTS: tuple[Point, ...] = ("min", "opt", "max")


def points_of(choice: ShapesChoice) -> tuple[Point, ...]:
    """Return which shapes are timed, in order."""
    return POINTS if choice == "all" else (choice,)


def shape_ranges(
    inputs: Sequence[TensorSpec],
    runners: Sequence[Runner],
    *,
    given: Mapping[str, ShapeRange] | None = None,
    seen: InputShapes | None = None,
) -> dict[str, ShapeRange]:
    """Return the smallest, the usual and the largest shape of every input with a free axis.

    Args:
        inputs: of the models, from `trt_int8.shared_inputs`.
        runners: the models. What engines among them were built for goes before what a calibration has seen; where they
            were built for different shapes, what all of them take.
        given: what the user names, which goes before all else.
        seen: model input to the shapes that a calibration has fed.

    Raises:
        UsageError: there is no free axis, or nothing tells its lengths, or a shape does not fit its input.
        ConfigError: engines have no shape in common.
        EngineBuildError: the calibration has not fed an input.
    """
    free = dynamic_inputs(inputs)
    if not free:
        raise UsageError(
            f"Cannot time several shapes: all are fixed ({'; '.join(map(str, inputs))}). Leave --shapes, --shape and "
            "--calibration out, or export and build the model with dynamic axes."
        )
    if given:
        return _checked(inputs, free, given)
    profiles = [
        (runner.name, {name: ShapeRange(*bounds) for name, bounds in runner.profiles[0].items()})
        for runner in runners
        if isinstance(runner, TensorRTRunner) and runner.profiles
    ]
    if profiles:
        return {spec.name: _common(spec, profiles) for spec in free}
    if seen is None:
        raise UsageError(
            f"Cannot time shapes of {runners[0].name}: nothing tells the lengths of {', '.join(map(str, free))}. Give "
            "a calibration, whose shapes are taken (--calibration FILE), or name them: --shape NAME=MIN,OPT,MAX, as in "
            "--shape ids=1x8,1x32,8x128."
        )
    return seen_profile(inputs, seen)


def check_calibration(
    models: Sequence[str | os.PathLike[str]],
    runners: Sequence[Runner],
    inputs: Sequence[TensorSpec],
    calibration: Calibration,
    *,
    given: bool = False,
    force: bool = False,
) -> None:
    """Refuse a calibration whose shapes say nothing of the models: one of others, or one that is not asked.

    A model whose scales are in it does not tell which FP32 model it was made from: where there is no FP32 model beside
    it, the inputs alone are compared.

    Args:
        models: the files, ONNX and engines.
        runners: the models.
        inputs: of the models.
        calibration: the calibration.
        given: whether the user names the shapes.
        force: take it though it is of another FP32 model.

    Raises:
        CalibrationError: it is of none of the FP32 models among them, or of other inputs.
        UsageError: the shapes are told by the user, or by what an engine was built for.
    """
    refuse_idle({"--calibration": given}, "--shape names the shapes", "leave --shape out")
    built = [runner.name for runner in runners if isinstance(runner, TensorRTRunner) and runner.profiles]
    if built:
        why = f"the shapes that {built[0]} was built for are timed"
        refuse_idle({"--calibration": True}, why, "time the ONNX files without the engine")
    refusal: CalibrationError | None = None
    for model in [] if force else models:
        header = None if is_engine(model) else load_header(model)
        if header is None or any(held_types(header)) or METHOD_KEY in {entry.key for entry in header.metadata_props}:
            continue
        try:
            check_fits(calibration, prepare(model))
        except CalibrationError as error:
            refusal = refusal or error
        else:
            return
    if refusal is not None:
        raise refusal
    check_calibrated_inputs(Path(models[0]), inputs, calibration.input_shapes)


def time_at_shapes(
    time: Callable[..., BenchmarkResult],
    inputs: Sequence[TensorSpec],
    ranges: Mapping[str, ShapeRange],
    points: Sequence[Point],
    *,
    sample: Batch | None = None,
    tables: Mapping[str, int] | None = None,
) -> tuple[tuple[Point, BenchmarkResult], ...]:
    """Time models at several shapes; one that comes twice is timed once.

    Args:
        time: runs a benchmark on some batches: `trt_int8.benchmarking.time_side_by_side` of the models.
        inputs: of the models.
        ranges: from `shape_ranges`.
        points: which shapes.
        sample: a batch whose values are repeated, or cut, to each shape; None takes random numbers.
        tables: see `trt_int8.random_data.random_feeds`.
    """
    timed: dict[tuple[Shape, ...], BenchmarkResult] = {}
    results: list[tuple[Point, BenchmarkResult]] = []
    for point in points:
        shapes = {name: _at(bounds, point) for name, bounds in ranges.items()}
        key = tuple(shapes.values())
        if key not in timed:
            timed[key] = time([feeds_of_shape(inputs, shapes, sample=sample, tables=tables)], shapes_meant=True)
        results.append((point, timed[key]))
    return tuple(results)


def timed_beside(
    result: BenchmarkResult,
    time: Callable[..., BenchmarkResult],
    runners: Sequence[Runner],
    choice: ShapesChoice,
    *,
    sample: Batch,
    seen: InputShapes,
) -> BenchmarkResult:
    """Time the models of a benchmark at other shapes too, and return it with what was found there.

    Args:
        result: of the benchmark.
        time: runs one on some batches: `trt_int8.benchmarking.time_side_by_side` of the models.
        runners: the models.
        choice: which shapes.
        sample: a batch whose values are repeated, or cut, to each shape.
        seen: model input to the shapes that a calibration has fed.
    """
    inputs = runners[0].inputs
    ranges = shape_ranges(inputs, runners, seen=seen)
    return replace(result, shapes=time_at_shapes(time, inputs, ranges, points_of(choice), sample=sample))


def with_shapes(results: Sequence[tuple[Point, BenchmarkResult]]) -> BenchmarkResult:
    """Return the result at the usual shapes, or at the first where they were not timed, with all beside it."""
    main = dict(results).get("opt", results[0][1])
    return replace(main, shapes=tuple(results))


def feeds_of_shape(
    inputs: Sequence[TensorSpec],
    shapes: Mapping[str, Shape],
    *,
    sample: Batch | None = None,
    tables: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Make a batch of some shapes.

    Args:
        inputs: of the models.
        shapes: of the inputs with free axes.
        sample: a batch whose values are repeated along each axis, or cut; None takes random numbers.
        tables: see `trt_int8.random_data.random_feeds`.
    """
    fixed = [replace(spec, shape=shapes.get(spec.name, spec.shape)) for spec in inputs]
    if sample is None:
        return random_feeds(fixed, tables=tables)
    feeds = {}
    for spec in fixed:
        value = sample[spec.name]
        for axis, length in enumerate(shapes.get(spec.name, ())):
            value = value.take(np.arange(length) % value.shape[axis], axis=axis)
        feeds[spec.name] = np.ascontiguousarray(value)
    return feeds


def _at(bounds: ShapeRange, point: Point) -> Shape:
    return {"min": bounds.minimum, "opt": bounds.optimum, "max": bounds.maximum}[point]


def _checked(
    inputs: Sequence[TensorSpec], free: Sequence[TensorSpec], given: Mapping[str, ShapeRange]
) -> dict[str, ShapeRange]:
    known = {spec.name: spec for spec in inputs}
    for name, bounds in given.items():
        if name not in known:
            raise UsageError(
                f"Cannot time shapes of {name!r}, which is no input; the models take {'; '.join(map(str, inputs))}."
            )
        for shape in (bounds.minimum, bounds.optimum, bounds.maximum):
            if not shape_fits(shape, known[name].shape):
                raise UsageError(f"Cannot time the shape {shape}: it does not fit the input {quoted(known[name])}.")
    missing = [spec for spec in free if spec.name not in given]
    if missing:
        raise UsageError(
            f"Cannot time the shapes that are given: none is of the input {quoted(missing[0])}, which has a free axis. "
            f"Name it too: --shape {missing[0].name}=MIN,OPT,MAX."
        )
    return dict(given)


def _common(spec: TensorSpec, profiles: Sequence[tuple[str, Mapping[str, ShapeRange]]]) -> ShapeRange:
    """Return the shapes of an input that all engines take; kernels of the first decide which is the usual one."""
    bounds = [(name, profile[spec.name]) for name, profile in profiles if spec.name in profile]
    least = tuple(map(max, zip(*(item.minimum for _, item in bounds), strict=True)))
    most = tuple(map(min, zip(*(item.maximum for _, item in bounds), strict=True)))
    if any(low > high for low, high in zip(least, most, strict=True)):
        raise ConfigError(
            f"Cannot time the engines at the same shapes: input {spec.name!r} was built for "
            f"{' and '.join(f'{item} ({name})' for name, item in bounds)}, which have none in common. Time them apart."
        )
    usual = tuple(
        min(max(length, low), high) for length, low, high in zip(bounds[0][1].optimum, least, most, strict=True)
    )
    return ShapeRange(least, usual, most)
