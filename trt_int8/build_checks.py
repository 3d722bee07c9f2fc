"""What a build is asked for, checked before anything slow: options, names, shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from calibrators.calibration import InputShapes
from calibrators.errors import CalibrationError
from engines.profiles import Profile, ShapeRange, batch_profile, check_profiles, dynamic_inputs, quoted, seen_profile
from engines.runner import TensorSpec
from engines.trt_types import Precision
from trt_int8.errors import ConfigError, UsageError
from trt_int8.idle_options import refuse_idle

Shapes = ShapeRange | Sequence[Sequence[int]]
"""Smallest, optimal and largest shape of an input."""

_BOUNDS = 3


def check_combination(
    *,
    precision: Precision,
    implicit: bool,
    typed: bool,
    calibration: bool,
    data: bool,
    of_data: Mapping[str, Any],
    of_scales: Mapping[str, Any],
    percentile: bool | None = None,
) -> None:
    """Check that options go together; one that would have no effect is refused.

    Args:
        precision: what the engine is to compute in.
        implicit: whether a calibrator of TensorRT's is asked for.
        typed: whether the model holds the types of its engine already.
        calibration: whether a calibration was given.
        data: whether data were given.
        of_data: the options that say how data are read, as the command line has them; None for those that were not
            given.
        of_scales: the same for "--method" and the options of the placement, which say what becomes of a calibration.
        percentile: whether method or calibrator takes a percentile; None where none was given.

    Raises:
        UsageError: they do not.
    """
    given = _given(of_data)
    if data and not implicit:
        raise UsageError(
            "--data are read by TensorRT's own calibrators alone, which --implicit asks for. Leave them out and give a "
            "calibration (`trt-int8 calibrate` makes one of data), or add --implicit on TensorRT 10 and older. A "
            "smoothed model is made of data by `trt-int8 quantize --smooth`, and built from that file."
        )
    if given and not data:
        raise UsageError(
            f"{' and '.join(given)} {'say' if len(given) > 1 else 'says'} how TensorRT's own calibrators read data; "
            f"there are none here. Leave {'them' if len(given) > 1 else 'it'} out, or "
            + ("give --data in place of --calibration." if implicit else "add --implicit and --data.")
        )
    if implicit and data == calibration:
        raise UsageError(
            f"--implicit takes its scales from data or from a calibration; {'both were' if data else 'neither was'} "
            "given. Give --data DATA or --calibration FILE."
        )
    idle = _given(of_scales)
    if implicit and not data:
        idle = [name for name in idle if name != "--method"]
        why, advice = "with --implicit, TensorRT chooses the layers that run in INT8", "build without --implicit"
    elif data:
        why = "a calibrator that reads data has a method of its own, --calibrator"
        advice = "give a calibration in place of the data"
    elif typed:
        why, advice = "the model holds its types and scales already", "give the FP32 model with a calibration"
    elif not precision.startswith("int8"):
        why, advice = f"{precision} has no scales", "build as int8 or int8+fp16"
    else:
        idle, why, advice = [], "", ""
    refuse_idle(dict.fromkeys(idle, True), why, advice)
    if percentile is False:
        what = "calibrator" if data else "method"
        refuse_idle({"--percentile": True}, f"the {what} is not percentile", f"add --{what} percentile")


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
    purpose = "the scales of INT8 need" if precision != "fp16" else "the guard that keeps values in FP16's range needs"
    return ConfigError(
        f"Cannot build {str(model)!r} as {precision}: it is an FP32 model, and {purpose} a calibration. "
        f"Run `trt-int8 calibrate {model} --data DATA`, then build with --calibration calibration.npz."
    )


def given_ranges(
    shapes: Mapping[str, Shapes] | None, batch: Sequence[int] | None, inputs: Sequence[TensorSpec]
) -> dict[str, ShapeRange] | None:
    """Return the shapes that the user asked for; None where there are none.

    Raises:
        ConfigError: they are not three of each, name no input, or there is no dynamic batch for `batch`.
        EngineBuildError: an input has more dynamic axes than the batch.
    """
    if not shapes and batch is None:
        return None
    ranges = {name: _range(name, bounds) for name, bounds in (shapes or {}).items()}
    for name in ranges:
        if name not in {spec.name for spec in inputs}:
            raise ConfigError(
                f"There are shapes for {name!r}, which is no input; the model's are {'; '.join(map(quoted, inputs))}."
            )
    if batch is not None:
        if len(batch) != _BOUNDS or list(batch) != sorted(batch) or batch[0] < 1:
            raise ConfigError(f"batch is {tuple(batch)}; expected the smallest, optimal and largest one, ascending.")
        rest = [spec for spec in inputs if spec.name not in ranges]
        if not dynamic_inputs(rest) and dynamic_inputs(inputs):
            raise ConfigError(
                f"The batch {','.join(map(str, batch))} would change nothing: shapes were given for every input with a "
                "dynamic axis. Leave --batch or --shape out."
            )
        if not dynamic_inputs(rest):
            raise ConfigError(
                f"A batch of {','.join(map(str, batch))} was asked for, and no input has a dynamic batch: "
                f"{'; '.join(map(quoted, inputs))}. "
                "Leave it out, or export the model with a dynamic batch."
            )
        ranges |= batch_profile(rest, *batch)
    return ranges


def check_calibrated_inputs(model: Path, inputs: Sequence[TensorSpec], seen: InputShapes) -> None:
    """Check that a calibration saw a model's inputs: all that a model tells whose types and scales are in it.

    Args:
        model: for messages.
        inputs: the model's.
        seen: the shapes of the calibration; a calibration of an earlier version has none, and passes.

    Raises:
        CalibrationError: a dynamic input is not among them, or one has another rank or other fixed lengths.
    """
    if not seen:
        return
    dynamic = dynamic_inputs(inputs)
    for spec in inputs:
        shapes = seen.get(spec.name)
        if shapes is None and spec in dynamic:
            found = f"{', '.join(map(repr, seen))} and no {spec.name!r}"
        else:
            other = next((shape for shape in shapes or () if not _fits(shape, spec)), None)
            if other is None:
                continue
            found = f"{spec.name!r} of shape {other}"
        raise CalibrationError(
            f"The calibration does not belong to {str(model)!r}: the calibration saw other inputs, {found}; the model "
            f"has {'; '.join(map(quoted, inputs))}. Calibrate this model."
        )


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
            f"Cannot build {str(model)!r}: input {quoted(dynamic[0])} has a dynamic axis, and {why} which "
            "shapes the engine is for. Give --batch MIN,OPT,MAX, or --shape NAME=MIN,OPT,MAX for each input, or a new "
            "calibration with --calibration, whose shapes are taken."
        )
    profile = ranges if ranges is not None else seen_profile(inputs, seen or {})
    check_profiles(repr(str(model)), inputs, [profile])
    return profile


def _given(options: Mapping[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


def _fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    if spec.shape is None:
        return True
    return len(shape) == len(spec.shape) and all(
        length == axis for length, axis in zip(shape, spec.shape, strict=True) if isinstance(axis, int)
    )


def _range(name: str, bounds: Shapes) -> ShapeRange:
    if isinstance(bounds, ShapeRange):
        return bounds
    if len(bounds) != _BOUNDS:
        raise ConfigError(f"The shapes of {name!r} are {bounds!r}; expected the smallest, optimal and largest one.")
    minimum, optimum, maximum = (tuple(int(length) for length in shape) for shape in bounds)
    return ShapeRange(minimum, optimum, maximum)
