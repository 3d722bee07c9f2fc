"""The build stage of a run: a TensorRT engine for each of its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calibrators.calibration import Calibration, InputShapes
from calibrators.protocols import Track, untracked
from engines.device import open_device
from engines.onnxrt import load_header, tensor_specs
from engines.profiles import (
    ShapeRange,
    batch_axes,
    batch_profile,
    check_profiles,
    dynamic_inputs,
    seen_profile,
    seen_range,
)
from engines.runner import TensorSpec
from trt_int8.building import build_engine
from trt_int8.config import RunConfig
from trt_int8.errors import ConfigError, EngineError
from trt_int8.inspection import inspect
from trt_int8.run_plan import MODEL, PlannedEngine

TIMING_CACHE = "timing.cache"
"""Kernel times that the engines of a run share: the second INT8 engine has the kernels of the first."""


def build_engines(
    config: RunConfig,
    engines: Sequence[PlannedEngine],
    calibration: Calibration,
    folder: Path,
    *,
    judged_shapes: InputShapes = MappingProxyType({}),
    track: Track = untracked,
) -> list[dict[str, Any]]:
    """Build every engine of a run.

    Args:
        config: the configuration.
        engines: the engines; their ONNX models lie in `folder`.
        calibration: tells the shapes that engines are built for where the configuration does not.
        folder: the run's folder.
        judged_shapes: see `planned_shapes`.
        track: shows the progress.

    Returns:
        What is known of each engine, as plain JSON data: its name and its sidecar.

    Raises:
        EngineBuildError: TensorRT refused; see `trt_int8.building.build_engine`.
    """
    options = config.build
    inputs, _ = tensor_specs(load_header(folder / MODEL))
    shapes = planned_shapes(config, calibration, inputs, judged_shapes)
    built = []
    with open_device() as device:
        for engine in engines:
            result = build_engine(
                folder / engine.source,
                folder / engine.folder,
                precision=engine.precision,
                name=engine.stem,
                shapes=shapes,
                batch=options.batch,
                workspace_bytes=None if options.workspace_mib is None else options.workspace_mib * 2**20,
                optimization_level=options.optimization_level,
                timing_cache=folder / TIMING_CACHE,
                hardware_compatibility=options.hardware_compatibility,
                version_compatible=options.version_compatible,
                device=device,
                track=track,
            )
            built.append({**result.to_json(), "name": engine.name, "file": engine.file})
    return built


def inspect_engines(engines: Sequence[PlannedEngine], folder: Path) -> list[dict[str, Any]]:
    """Tell which layers of each INT8 engine run in which precision, and how long they take on random inputs.

    Args:
        engines: the engines of a run, built.
        folder: the run's folder.

    Returns:
        A table for each, as plain JSON data; see `trt_int8.inspection.Inspection.to_json`. Of an engine that tells
        nothing of its layers the table is empty, and its summary says why: a run of hours is not lost for that.
    """
    tables = []
    for engine in engines:
        if not engine.precision.startswith("int8"):
            continue
        try:
            table = inspect(folder / engine.file).to_json()
        except EngineError as error:
            table = {"summary": str(error), "rows": [], "layers": []}
        tables.append({**table, "engine": engine.name})
    return tables


def check_shapes(config: RunConfig, inputs: Sequence[TensorSpec]) -> None:
    """Check that the shapes of a configuration fit the model and hold its batches, before anything slow is done.

    Args:
        config: the configuration.
        inputs: the model's inputs.

    Raises:
        ConfigError: a batch size of the data lies outside of the shapes.
        EngineBuildError: the shapes do not fit the model's inputs.
    """
    options = config.build
    if options.batch is None and options.ranges is None:
        return
    profile = options.ranges if options.batch is None else batch_profile(inputs, *options.batch)
    check_profiles(repr(MODEL), inputs, [profile or {}])
    key = "build.shapes" if options.batch is None else "build.batch"
    sizes = {"data.batch_size": config.data.batch_size, "accuracy.batch_size": config.accuracy.batch_size}
    for spec in inputs:
        bounds = (profile or {}).get(spec.name)
        if bounds is None or not bounds.minimum or spec.fixed_batch is not None:
            continue
        low, high = bounds.minimum[0], bounds.maximum[0]
        for name, size in sizes.items():
            if size is not None and not low <= size <= high:
                raise ConfigError(
                    f"Cannot run with {name} = {size}: {key} builds engines that take batches of {low} to {high} for "
                    f"input {spec.name!r}. Change one of the two."
                )


def check_timed_shapes(config: RunConfig, inputs: Sequence[TensorSpec]) -> None:
    """Check that a model has several shapes to be timed at, before anything slow is done.

    Raises:
        ConfigError: all of its shapes are fixed.
    """
    if not dynamic_inputs(inputs):
        raise ConfigError(
            f"Cannot run with benchmark.shapes = {config.benchmark.shapes}: all shapes of the model are fixed "
            f"({'; '.join(map(str, inputs))}). Leave it out, or export the model with dynamic axes."
        )


def planned_shapes(
    config: RunConfig,
    calibration: Calibration,
    inputs: Sequence[TensorSpec],
    judged_shapes: InputShapes = MappingProxyType({}),
) -> dict[str, ShapeRange] | None:
    """Return the shapes that the engines of a run are built for; None where the configuration names batch sizes.

    Without shapes in the configuration they are those that calibration saw, with room for the batches that accuracy is
    judged on.

    Args:
        config: the configuration.
        calibration: knows the shapes that were fed.
        inputs: the model's inputs.
        judged_shapes: model input to the shapes that accuracy is judged on, where more than the batch is free.

    Raises:
        ConfigError: accuracy is judged on shapes outside of those in the configuration.
    """
    if config.build.batch is not None:
        return None
    if config.build.ranges is not None:
        for name, bounds in config.build.ranges.items():
            outside = [shape for shape in judged_shapes.get(name, ()) if shape not in bounds]
            if outside:
                raise ConfigError(
                    f"Cannot judge engines on input {name!r} of shape {outside[0]}: build.shapes builds them for "
                    f"{bounds}. Widen them, or leave build.shapes out: the data tell the shapes then."
                )
        return config.build.ranges
    profile = seen_profile(inputs, calibration.input_shapes)
    for name, shapes in judged_shapes.items():
        if name in profile:
            found, bounds = seen_range(shapes), profile[name]
            profile[name] = replace(
                bounds,
                minimum=tuple(map(min, bounds.minimum, found.minimum)),
                maximum=tuple(map(max, bounds.maximum, found.maximum)),
            )
    judged = config.accuracy.batch_size or 1
    for spec in inputs:
        if spec.name in profile:
            bounds, batch = profile[spec.name], batch_axes(spec, inputs)
            largest = (max(length, judged) if axis in batch else length for axis, length in enumerate(bounds.maximum))
            profile[spec.name] = replace(bounds, maximum=tuple(largest))
    return profile
