"""The quantization stage: a calibration and a target become an INT8 model; and its sister, the FP16 model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from calibrators.calibration import Calibration
from calibrators.numerics import LEVELS
from calibrators.protocols import Track, untracked
from engines.fp16 import UNCALIBRATED, HeldNode, convert_to_fp16
from engines.garbage import garbage_collection_off
from engines.granularity import Activations, Weights, with_affine_activations, with_one_weight_scale
from engines.graph import PreparedModel, prepare, save_model
from engines.mixed import mixed_graph
from engines.onnxrt import tensor_specs
from engines.placement import Placement, Target
from engines.placement_cpu import place_for_cpu
from engines.placement_options import Attention, Residual
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import FULL_WEIGHT_RANGE, QuantizedModel, insert_qdq
from engines.scale_groups import without_silent
from trt_int8.auto import AutoChoice, choose_scales
from trt_int8.calibration import check_fits
from trt_int8.choices import check_choice
from trt_int8.config import Method
from trt_int8.data import DataSpec, open_data, same_data
from trt_int8.float_models import check_float
from trt_int8.idle_options import idle_wishes
from trt_int8.input_alarm import INPUTS_KEY, note_inputs, summary_text
from trt_int8.machine import saturates_unsigned_products
from trt_int8.placement_options import placement_entry, placement_options
from trt_int8.quantize_checks import Asked, check_asked
from trt_int8.quantize_modes import quantize_dynamically, quantize_weights_only
from trt_int8.quantize_result import CALIBRATION_KEY, METHOD_KEY, Fp16Result, Int8Precision, Mode, QuantizeResult
from trt_int8.saturation import saturation_note
from trt_int8.smoothing import Smoothed, check_smoothing, smooth_model

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing


def quantize(
    model: str | os.PathLike[str],
    calibration: Calibration | str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str],
    mode: Mode = "static",
    method: Method = "entropy",
    percentile: float = 99.99,
    target: Target = "tensorrt",
    precision: Int8Precision = "int8",
    weights: Weights = "per-channel",
    activations: Activations = "symmetric",
    residual: Residual = "int8",
    attention: Attention = "float",
    smooth: float | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    data: DataSpec | None = None,
    held_back: DataSpec | None = None,
    preprocessing: Preprocessing | None = None,
    reduce_range: bool | None = None,
    force: bool = False,
    auto: AutoChoice | None = None,
    smoothed: Smoothed | None = None,
    track: Track = untracked,
) -> QuantizeResult:
    """Write an INT8 model with explicit Q/DQ nodes.

    Args:
        model: the FP32 ONNX file that was calibrated.
        calibration: its calibration, or the file that holds it; the mode static alone takes one, and needs it.
        output: the file to write.
        mode: "static" fixes every scale by the calibration; "dynamic" finds those of activations at every run, on ONNX
            Runtime's CPU kernels alone; "weight-only" stores the weights as INT8 and computes in float.
        method: the calibration method. "auto" with `data` measures which does least harm; without, it equals "mse".
        percentile: of the percentile method.
        target: "tensorrt" (signed, zero point 0) or "cpu" (ONNX Runtime's integer kernels, the same scales).
        precision: "int8" leaves the layers that are not quantized in FP32; "int8+fp16" has them in FP16, and in FP32
            where calibration saw values near the end of FP16's range. For the TensorRT target only.
        weights: one scale for each output channel of a weight, or one for the whole weight.
        activations: symmetric codes, or affine ones, which spend no code beyond the values that occurred; affine for
            the CPU target only.
        residual: whether the skip input of residual Adds is quantized on the TensorRT target.
        attention: whether the operands of attention products are quantized on the TensorRT target, where the rules
            allow it.
        smooth: in [0, 1], how much of the difficulty of normalized activations goes into the weights behind them; see
            `trt_int8.smoothing`. None leaves the model as it is; else `data` is read twice.
        exclude: regular expressions; weighted nodes whose whole name matches stay float.
        include: the same for nodes to quantize against a rule about speed or accuracy; see `engines.node_rules`.
        data: calibration data for `smooth`, and held-back data for "auto" where nothing is smoothed.
        held_back: held-back data for "auto", which must not judge on what a model was smoothed by.
        preprocessing: of `data` and `held_back`, for image folders.
        reduce_range: 7-bit weights where products could saturate; None decides by this processor on the CPU target, and
            takes all 8 bits on TensorRT's.
        force: use a calibration of another graph where the tensor names fit.
        auto: a choice made before, for the other target; saves measuring again.
        smoothed: the model as `trt_int8.smoothing.smooth_model` left it, instead of `smooth`; saves its passes.
        track: shows progress.

    Raises:
        CalibrationError: the calibration belongs to another model, or lacks a scale.
        ModelError: the model is quantized already, an expression of `exclude` or `include` matches nothing, or the mode
            finds nothing to quantize.
        UsageError: "int8+fp16" for the CPU target, affine activations or dynamic quantization for TensorRT, a
            calibration that the mode lacks, one that cannot be smoothed, or an option that would have no effect beside
            the others. What has none in this model is told in the notes.
    """
    if isinstance(calibration, str | os.PathLike):
        calibration = Calibration.load(calibration)
    check_choice("mode", mode, Mode)
    check_choice("weights", weights, Weights)
    check_choice("activations", activations, Activations)
    check_choice("target", target, Target)
    check_choice("precision", precision, Int8Precision)
    options = placement_options(residual, attention, exclude, include)
    check_asked(
        Asked(
            mode=mode,
            target=target,
            precision=precision,
            activations=activations,
            placement=options,
            method=method,
            percentile=percentile,
            calibration=calibration is not None,
            smooth=smooth is not None,
            data=data is not None,
            held_back=held_back is not None,
            same_data=same_data(data, held_back),
            preprocessing=preprocessing is not None,
            chosen=auto is not None,
            reduce_range=reduce_range is not None,
            force=force,
        )
    )
    if mode == "dynamic":
        return quantize_dynamically(model, output, options=options, weights=weights, reduce_range=reduce_range)
    if calibration is None:
        return quantize_weights_only(model, output, options=options, target=target, weights=weights)
    if smooth is not None:
        check_smoothing(calibration, data, smooth)
    check_float(model, "quantize")
    calibration.scales(method, percentile=percentile)  # what it cannot serve is told before anything slow
    prepared = prepare(model)
    if not force:
        check_fits(calibration, prepared)
    if smooth is not None:
        smoothed = smooth_model(prepared, calibration, data, smooth, preprocessing=preprocessing, track=track)
    if smoothed is not None:
        prepared, calibration = smoothed.prepared, smoothed.calibration
    graph = prepared.ir()
    largest = calibration.amax("minmax")
    judging = held_back if held_back is not None or smooth is not None else data
    if method == "auto" and judging is not None and auto is None:
        judged = place_for_tensorrt(graph, options, amax=largest)
        auto = _choose(prepared, judged, calibration, judging, preprocessing, percentile, track)
    scales = calibration.scales(method, percentile=percentile)
    if method == "auto" and auto is not None:
        # Tensors that only the CPU placement quantizes take the method that won for the whole model.
        scales = calibration.scales(_majority(auto), percentile=percentile) | auto.scales
    place = partial(place_for_cpu if target == "cpu" else place_for_tensorrt, graph, amax=largest)
    placement = place(options)
    idle = idle_wishes(options, placement, place)
    reduced = target == "cpu" and saturates_unsigned_products() if reduce_range is None else reduce_range
    scales = without_silent(placement, scales, calibration.always_zero)
    if weights == "per-tensor":
        placement = with_one_weight_scale(placement)
    if activations == "affine":
        amax = {name: scale * LEVELS for name, scale in scales.items()}
        placement = with_affine_activations(placement, amax, {name: calibration.range(name) for name in amax})
    quantized, held = write_quantized(
        prepared,
        placement,
        scales,
        largest,
        output,
        precision=precision,
        reduce_range=reduced,
        metadata={
            METHOD_KEY: method_name(method, percentile),
            CALIBRATION_KEY: calibration.sha256,
            INPUTS_KEY: summary_text(calibration.input_statistics),
            **placement_entry(options),
        },
    )
    return QuantizeResult(
        Path(output),
        target,
        precision,
        mode,
        method,
        placement,
        quantized.scales,
        held,
        auto if method == "auto" else None,
        (
            *(() if smoothed is None else smoothed.notes),
            *idle,
            *_notes(quantized, calibration, method, auto),
            *range_notes(held),
            *_saturation(quantized.placement, calibration, method, percentile),
        ),
    )


@garbage_collection_off()
def write_quantized(
    prepared: PreparedModel,
    placement: Placement,
    scales: Mapping[str, float],
    largest: Mapping[str, float],
    output: str | os.PathLike[str],
    *,
    precision: Int8Precision,
    reduce_range: bool,
    metadata: Mapping[str, str],
) -> tuple[QuantizedModel, tuple[HeldNode, ...]]:
    """Write the INT8 model of a placement, once ONNX Runtime has taken it.

    Args:
        prepared: the FP32 model.
        placement: which tensors.
        scales: by tensor name; see `engines.qdq.insert_qdq`.
        largest: largest magnitude of the tensors that are known, by name.
        output: the file to write.
        precision: of the layers that are not quantized.
        reduce_range: see `engines.qdq.insert_qdq`.
        metadata: entries for the model's metadata.

    Returns:
        The model, and with "int8+fp16" the nodes kept in FP32.
    """
    mixed = mixed_graph(prepared, placement, largest) if precision == "int8+fp16" else None
    quantized = insert_qdq(
        prepared,
        placement,
        scales,
        typed=None if mixed is None else mixed.model,
        reduce_range=reduce_range,
        largest=largest,
        metadata=metadata,
    )
    save_model(quantized.model, output, loads=True)  # what ONNX Runtime refuses is not written
    return quantized, () if mixed is None else mixed.held


def convert_fp16(
    model: str | os.PathLike[str], calibration: Calibration, *, output: str | os.PathLike[str], force: bool = False
) -> Fp16Result:
    """Write an FP16 model with FP32 inputs and outputs, nodes that would leave the FP16 range held in FP32.

    Args:
        model: the FP32 ONNX file that was calibrated.
        calibration: its calibration; gives the largest magnitudes.
        output: the file to write.
        force: use a calibration of another graph where the tensor names fit.

    Raises:
        CalibrationError: the calibration belongs to another model.
    """
    prepared = prepare(model)
    if not force:
        check_fits(calibration, prepared)
    converted = convert_to_fp16(prepared, calibration.amax("minmax"))
    note_inputs(converted.model, calibration.input_statistics)
    save_model(converted.model, output)
    return Fp16Result(Path(output), converted.held, converted.nodes)


def range_notes(held: Sequence[HeldNode]) -> tuple[str, ...]:
    """Say how nodes that stay FP32 because nothing tells their values' range get one; nothing where there are none."""
    unknown = sum(UNCALIBRATED in node.reason for node in held)
    if not unknown:
        return ()
    nodes = "1 node" if unknown == 1 else f"{unknown} nodes"
    why = f"the calibration does not tell how large the values of {nodes} get, which FP32 holds whatever they are"
    return (f"{why}. Calibrate with --tensors all to know the range of every tensor.",)


def method_name(method: str, percentile: float) -> str:
    """Return a calibration method together with what it is told by: "percentile 99.99"."""
    return f"percentile {percentile:g}" if method == "percentile" else method


def _choose(
    prepared: PreparedModel,
    placement: Placement,
    calibration: Calibration,
    data: DataSpec,
    preprocessing: Preprocessing | None,
    percentile: float,
    track: Track,
) -> AutoChoice:
    inputs, _ = tensor_specs(prepared.proto)
    source = open_data(data, inputs, batch_size=None, preprocessing=preprocessing)
    return choose_scales(prepared, placement, calibration, source, percentile=percentile, track=track)


def _majority(auto: AutoChoice) -> str:
    return min(auto.whole_model, key=lambda method: auto.whole_model[method])


def _saturation(placement: Placement, calibration: Calibration, method: str, percentile: float) -> tuple[str, ...]:
    """Tell of what the methods cut off that do not look at the size of errors."""
    if method not in ("entropy", "percentile"):
        return ()
    thresholds = calibration.amax(method, percentile)
    note = saturation_note(placement, thresholds, calibration, method_name(method, percentile))
    return () if note is None else (note,)


def _notes(
    quantized: QuantizedModel, calibration: Calibration, method: str, auto: AutoChoice | None
) -> tuple[str, ...]:
    notes: list[str] = []
    if min(quantized.weight_ranges.values(), default=FULL_WEIGHT_RANGE) < FULL_WEIGHT_RANGE:
        notes.append(
            "This processor has neither VNNI nor AMX, and its 8-bit products saturate in pairs: weights use 7 bits "
            "where activations use all of their codes, and up to 8 where they use fewer."
        )
    if method == "auto" and auto is None:
        notes.append("auto had no held-back data to judge by and took mse; give it some with --data.")
    always_zero = set(calibration.always_zero)
    zero = [name for name in quantized.placement.tensors if name in always_zero]
    notes.extend(f"{name} was 0 throughout the calibration; its scale is 1." for name in zero)
    return tuple(notes)
