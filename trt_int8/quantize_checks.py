"""What a quantization is asked for, checked before anything slow: what contradicts itself, and what has no effect."""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.calibration import DEFAULT_METHOD, DEFAULT_PERCENTILE
from engines.granularity import Activations
from engines.placement import Target
from engines.placement_options import PlacementOptions
from trt_int8.errors import UsageError
from trt_int8.idle_options import refuse_idle, refuse_idle_percentile
from trt_int8.quantize_result import Int8Precision, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of `trt_int8.quantization.quantize`, as far as one decides whether another one has an effect.

    Attributes:
        mode: when activations are quantized.
        target: whose kernels.
        precision: of the layers that are not quantized.
        activations: codes of activations.
        placement: wishes about where Q/DQ goes.
        method: the calibration method.
        percentile: of the percentile method.
        calibration: whether a calibration was given.
        smooth: whether the model is to be smoothed here.
        data: whether data were given.
        held_back: whether data for the method auto alone were given.
        same_data: whether those are the others.
        preprocessing: whether a preprocessing of data was given.
        chosen: whether a choice of the method auto was given.
        reduce_range: whether the range of the weights was said.
        force: whether a calibration of another model is allowed.
    """

    mode: Mode
    target: Target
    precision: Int8Precision
    activations: Activations
    placement: PlacementOptions
    method: str
    percentile: float
    calibration: bool
    smooth: bool
    data: bool
    held_back: bool
    same_data: bool
    preprocessing: bool
    chosen: bool
    reduce_range: bool
    force: bool


def check_asked(asked: Asked) -> None:
    """Check that options go together; one that would have no effect is refused.

    Raises:
        UsageError: they do not.
    """
    if asked.precision == "int8+fp16" and asked.target == "cpu":
        raise UsageError(
            "Cannot write int8+fp16 for the target cpu: ONNX Runtime's CPU kernels compute the layers that are not "
            "quantized in FP32. Take the precision int8, or the target tensorrt."
        )
    if asked.activations == "affine" and asked.target != "cpu":
        raise UsageError(
            "Cannot write affine activations for the target tensorrt: TensorRT's INT8 is symmetric, with zero point 0. "
            "Take the target cpu, or symmetric activations."
        )
    if asked.placement.attention == "int8" and asked.target != "tensorrt":
        raise UsageError(
            "Cannot quantize attention products for the target cpu: they stay float there. Take the target tensorrt, "
            "or attention float."
        )
    if asked.mode == "static":
        _check_static(asked)
    else:
        _check_uncalibrated(asked)


def _check_static(asked: Asked) -> None:
    if not asked.calibration:
        raise UsageError(
            "Cannot quantize in the mode static without a calibration: the scales of activations come from it. Make "
            "one with `trt-int8 calibrate`, or take the mode dynamic or weight-only."
        )
    auto = asked.method == "auto"
    if auto and asked.smooth and asked.data and (asked.same_data or not asked.held_back) and not asked.chosen:
        raise UsageError(
            "Cannot smooth and choose by the method auto on the same data: auto would judge on what the model was "
            "fitted to. Give calibration data with --data, which smooth the model, and others with --held-back, which "
            "auto judges on."
        )
    if asked.target == "cpu":
        refuse_idle(
            {"--residual float": asked.placement.residual != "int8"},
            "the Adds of the target cpu compute on INT8 in any case",
            "take the target tensorrt",
        )
    if not auto:
        refuse_idle_percentile(asked.percentile, asked.method)
    elif not (asked.data or asked.held_back or asked.chosen):
        refuse_idle(
            {"--percentile": asked.percentile != DEFAULT_PERCENTILE},
            "without data, the method auto is mse",
            "give data that auto judges on (--data)",
        )
    refuse_idle(
        {"--data": asked.data and not (auto or asked.smooth)},
        "--method auto and --smooth alone read data",
        "add one of them",
    )
    refuse_idle({"--held-back": asked.held_back and not auto}, "the method auto alone reads it", "add --method auto")
    refuse_idle(
        {"--data": asked.data and asked.held_back and not asked.smooth},
        "the method auto judges on those of --held-back",
        "add --smooth, which reads them",
    )
    refuse_idle(
        {"--preprocessing": asked.preprocessing and not (asked.data or asked.held_back)},
        "there are no data that it could prepare",
        "add --data",
    )


def _check_uncalibrated(asked: Asked) -> None:
    mode = asked.mode
    if mode == "dynamic" and asked.target != "cpu":
        raise UsageError(
            "Cannot quantize dynamically for the target tensorrt: TensorRT has no INT8 kernels that find their scales "
            "at run time. Take the target cpu, or the mode static."
        )
    unused = {
        "a calibration": asked.calibration,
        f"the method {asked.method}": asked.method != DEFAULT_METHOD,
        f"the percentile {asked.percentile:g}": asked.percentile != DEFAULT_PERCENTILE,
        "the precision int8+fp16": asked.precision != "int8",
        "affine activations (dynamic ones always are)": asked.activations != "symmetric",
        "smoothing": asked.smooth,
        "data": asked.data,
        "held-back data": asked.held_back,
        "a preprocessing": asked.preprocessing,
        "residual float": asked.placement.residual != "int8",
        "attention int8": asked.placement.attention != "float",
        "force, which is about calibrations": asked.force,
    }
    for what, given in unused.items():
        if given:
            raise UsageError(f"The mode {mode} does not take {what}: that is for the mode static. Leave it out.")
    if mode == "weight-only" and asked.reduce_range:
        raise UsageError(
            "The mode weight-only does not take reduce_range: its products are float and do not saturate. Leave it out."
        )
