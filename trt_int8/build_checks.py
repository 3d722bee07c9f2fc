"""What a build is asked for, checked before anything slow: options, names, shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from calibrators.calibration import InputShapes
from engines.profiles import Profile, ShapeRange, batch_profile, check_profiles, dynamic_inputs, seen_profile
from engines.runner import TensorSpec
from engines.trt_types import Precision
from trt_int8.errors import ConfigError, UsageError

Shapes = ShapeRange | Sequence[Sequence[int]]
"""Smallest, optimal and largest shape of an input."""

_BOUNDS = 3


def check_combination(
    *,
    implicit: bool,
    typed: bool,
    calibration: bool,
    data: bool,
    of_data: Mapping[str, Any],
    of_calibration: Mapping[str, Any],
) -> None:
    """Check that options go together; one that would have no effect is refused.

    Args:
        implicit: whether a calibrator of TensorRT's is asked for.
        typed: whether the model holds the types of its engine already.
        calibration: whether a calibration was given.
        data: whether data were given.
        of_data: the options that say how data are read, by name; None for those that were not given.
        of_calibration: the same for "method" and "exclude", which say what becomes of a calibration.

    Raises:
        UsageError: they do not.
    """
    given = _given(of_data)
    if data and not implicit:
        raise UsageError(
            "data are read by TensorRT's own calibrators alone, which `implicit` asks for. Leave them out and give a "
            "calibration (`trt-int8 calibrate` makes one of data), or add --implicit on TensorRT 10 and older."
        )
    if given and not data:
        raise UsageError(
            f"{' and '.join(given)} {'say' if len(given) > 1 else 'says'} how TensorRT's own calibrators read data; "
            "there are none here. Leave it out, or add --implicit and --data."
        )
    if implicit and data == calibration:
        raise UsageError(
            f"implicit takes its scales from data or from a calibration; {'both were' if data else 'neither was'} "
            "given. Give --data DATA or --calibration FILE."
        )
    idle = _given(of_calibration)
    if idle and (data or typed):
        why = (
            "a calibrator that reads data has a method of its own, --calibrator"
            if data
            else "the model holds its types and scales already"
        )
        raise UsageError(
            f"{' and '.join(idle)} would change nothing: {why}. "
            "Leave it out, or give the FP32 model with a calibration."
        )
    if "exclude" in idle and implicit:
        raise UsageError(
            "exclude would change nothing: with implicit, TensorRT chooses the layers that run in INT8. Leave it "
            "out, or build without --implicit."
        )


def engine_stem(model: Path, name: str | None) -> str:
    """Return what a model's engines are called before ".PRECISION.engine".

    Args:
        model: its file: of "resnet.int8.onnx" and "resnet.int8.engine.onnx" it is "resnet".
        name: the user's choice in place of that.

    Raises:
        ConfigError: the name is no file name.
    """
    if name is not None:
        if not name or Path(name).name != name:
            raise ConfigError(f"name is {name!r}; expected the start of a file name, without a folder.")
        return name
    stem = model.name.removesuffix(".onnx").removesuffix(".engine")
    for precision in get_args(Precision):
        stem = stem.removesuffix(f".{precision}")
    return stem or model.name


def needs_calibration(model: Path, precision: Precision) -> ConfigError:
    """Make the error for an FP32 model that cannot be given its types without a calibration."""
    purpose = "the scales of INT8" if precision != "fp16" else "the guard that keeps values in the range of FP16"
    return ConfigError(
        f"Cannot build {str(model)!r} as {precision}: it is an FP32 model, and {purpose} needs a calibration. "
        f"Run `trt-int8 calibrate {model} --data DATA`, then build with --calibration calibration.npz."
    )


def given_ranges(
    shapes: Mapping[str, Shapes] | None, batch: Sequence[int] | None, inputs: Sequence[TensorSpec]
) -> dict[str, ShapeRange] | None:
    """Return the shapes that the user asked for; None where there are none.

    Raises:
        ConfigError: they are not three of each, or there is no dynamic batch for `batch`.
        EngineBuildError: an input has more dynamic axes than the batch.
    """
    if not shapes and batch is None:
        return None
    ranges = {name: _range(name, bounds) for name, bounds in (shapes or {}).items()}
    if batch is not None:
        if len(batch) != _BOUNDS or list(batch) != sorted(batch) or batch[0] < 1:
            raise ConfigError(f"batch is {tuple(batch)}; expected the smallest, optimal and largest one, ascending.")
        rest = [spec for spec in inputs if spec.name not in ranges]
        if not dynamic_inputs(rest):
            raise ConfigError(
                f"batch is {tuple(batch)}, and no input has a dynamic batch: {'; '.join(map(str, inputs))}. "
                "Leave it out, or export the model with a dynamic batch."
            )
        ranges |= batch_profile(rest, *batch)
    return ranges


def engine_profile(
    model: Path, inputs: Sequence[TensorSpec], ranges: Profile | None, seen: InputShapes | None
) -> Profile | None:
    """Return the optimization profile; None where a model has no dynamic axis.

    Args:
        model: for messages.
        inputs: the model's.
        ranges: what the user asked for; goes first.
        seen: the shapes of the calibration; None where there is none.

    Raises:
        ConfigError: nothing tells the shapes of a dynamic input.
        EngineBuildError: the shapes do not fit the model.
    """
    dynamic = dynamic_inputs(inputs)
    if ranges is None and not dynamic:
        return None
    if ranges is None and not seen:
        why = "nothing says" if seen is None else "the calibration's file, of an earlier version, does not say"
        raise ConfigError(
            f"Cannot build {str(model)!r}: input {dynamic[0]} has a dynamic axis, and {why} which shapes the engine is "
            "for. Give --batch MIN,OPT,MAX, or --shape NAME=MIN,OPT,MAX for each input, or a new calibration with "
            "--calibration, whose shapes are taken."
        )
    profile = ranges if ranges is not None else seen_profile(inputs, seen or {})
    check_profiles(repr(str(model)), inputs, [profile])
    return profile


def _given(options: Mapping[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


def _range(name: str, bounds: Shapes) -> ShapeRange:
    if isinstance(bounds, ShapeRange):
        return bounds
    if len(bounds) != _BOUNDS:
        raise ConfigError(f"The shapes of {name!r} are {bounds!r}; expected the smallest, optimal and largest one.")
    minimum, optimum, maximum = (tuple(int(length) for length in shape) for shape in bounds)
    return ShapeRange(minimum, optimum, maximum)
