"""The quantization stage: a calibration and a target become an INT8 model; and its sister, the FP16 model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from calibrators.calibration import Calibration
from calibrators.protocols import Track, untracked
from engines.fp16 import HeldNode, convert_to_fp16
from engines.graph import PreparedModel, open_session, prepare, save_model
from engines.mixed import mixed_graph
from engines.onnxrt import tensor_specs
from engines.placement import Decision, Placement, Residual, Target
from engines.placement_cpu import place_for_cpu
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import FULL_WEIGHT_RANGE, QuantizedModel, insert_qdq
from trt_int8.auto import AutoChoice, choose_scales
from trt_int8.calibration import check_fits
from trt_int8.choices import check_choice
from trt_int8.config import Method
from trt_int8.data import DataSpec, open_data
from trt_int8.errors import UsageError
from trt_int8.input_alarm import INPUTS_KEY, summary_text
from trt_int8.machine import saturates_unsigned_products

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

Int8Precision = Literal["int8", "int8+fp16"]
"""What an INT8 model computes in: its other layers in FP32, or in FP16."""

METHOD_KEY = "trt_int8.method"
"""Metadata key of quantized models: the calibration method."""

CALIBRATION_KEY = "trt_int8.calibration"
"""Metadata key of quantized models: the hash of the calibration."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """An INT8 model.

    Attributes:
        path: the file.
        target: the placement it was made for.
        precision: what it computes in.
        method: the calibration method.
        placement: what was done where, and why.
        scales: scale of every Q/DQ pair.
        held: with "int8+fp16", the nodes kept in FP32, and why.
        auto: what `auto` chose, where it had data to choose by.
        notes: what a user should know: reduced weight range, nodes held back.
    """

    path: Path
    target: Target
    precision: Int8Precision
    method: str
    placement: Placement
    scales: Mapping[str, float]
    held: tuple[HeldNode, ...]
    auto: AutoChoice | None
    notes: tuple[str, ...]

    @property
    def held_back(self) -> tuple[Decision, ...]:
        """The weighted nodes that stay float."""
        return tuple(decision for decision in self.placement.decisions if not decision.quantized)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "file": self.path.name,
            "target": self.target,
            "precision": self.precision,
            "method": self.method,
            "scales": dict(self.scales),
            "pairs": [
                {"tensor": point.tensor, "scale_of": point.scale_of, "rule": point.rule, "reason": point.reason}
                for point in self.placement.activations
            ],
            "decisions": [asdict(decision) for decision in self.placement.decisions],
            "held": [asdict(node) for node in self.held],
            "auto": None if self.auto is None else {**asdict(self.auto), "scales": None},
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Fp16Result:
    """An FP16 model.

    Attributes:
        path: the file.
        held: the nodes kept in FP32, and why.
        nodes: number of nodes of the FP32 graph.
    """

    path: Path
    held: tuple[HeldNode, ...]
    nodes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"file": self.path.name, "held": [asdict(node) for node in self.held], "nodes": self.nodes}


def quantize(
    model: str | os.PathLike[str],
    calibration: Calibration,
    *,
    output: str | os.PathLike[str],
    method: Method = "entropy",
    percentile: float = 99.99,
    target: Target = "tensorrt",
    precision: Int8Precision = "int8",
    residual: Residual = "int8",
    exclude: Sequence[str] = (),
    data: DataSpec | None = None,
    preprocessing: Preprocessing | None = None,
    reduce_range: bool | None = None,
    force: bool = False,
    auto: AutoChoice | None = None,
    track: Track = untracked,
) -> QuantizeResult:
    """Write an INT8 model with explicit Q/DQ nodes.

    Args:
        model: the FP32 ONNX file that was calibrated.
        calibration: its calibration.
        output: the file to write.
        method: the calibration method. "auto" with `data` measures which does least harm; without, it equals "mse".
        percentile: of the percentile method.
        target: "tensorrt" (signed, zero point 0) or "cpu" (ONNX Runtime's integer kernels, the same scales).
        precision: "int8" leaves the layers that are not quantized in FP32; "int8+fp16" has them in FP16, and in FP32
            where calibration saw values near the end of FP16's range. For the TensorRT target only.
        residual: whether the skip input of residual Adds is quantized on the TensorRT target.
        exclude: regular expressions; weighted nodes whose whole name matches stay float.
        data: held-back data for "auto".
        preprocessing: of `data`, for image folders.
        reduce_range: 7-bit weights on the CPU target where products could saturate; None decides by this processor.
        force: use a calibration of another graph where the tensor names fit.
        auto: a choice made before, for the other target; saves measuring again.
        track: shows progress.

    Raises:
        CalibrationError: the calibration belongs to another model, or lacks a scale.
        ModelError: an expression of `exclude` matches nothing.
        UsageError: "int8+fp16" for the CPU target.
    """
    check_choice("target", target, Target)
    check_choice("precision", precision, Int8Precision)
    check_choice("residual", residual, Residual)
    if precision == "int8+fp16" and target == "cpu":
        raise UsageError(
            "Cannot write int8+fp16 for the target cpu: ONNX Runtime's CPU kernels compute the layers that are not "
            "quantized in FP32. Take the precision int8, or the target tensorrt."
        )
    prepared = prepare(model)
    if not force:
        check_fits(calibration, prepared)
    graph = prepared.ir()
    if method == "auto" and data is not None and auto is None:
        judged = place_for_tensorrt(graph, residual=residual, exclude=exclude)
        auto = _choose(prepared, judged, calibration, data, preprocessing, percentile, track)
    scales = calibration.scales(method, percentile=percentile)
    if method == "auto" and auto is not None:
        # Tensors that only the CPU placement quantizes take the method that won for the whole model.
        scales = calibration.scales(_majority(auto), percentile=percentile) | auto.scales
    if target == "cpu":
        placement = place_for_cpu(graph, exclude=exclude)
        reduced = saturates_unsigned_products() if reduce_range is None else reduce_range
    else:
        placement = place_for_tensorrt(graph, residual=residual, exclude=exclude)
        reduced = bool(reduce_range)
    quantized, held = write_quantized(
        prepared,
        placement,
        scales,
        calibration.amax("minmax"),
        output,
        precision=precision,
        reduce_range=reduced,
        metadata={
            METHOD_KEY: method_name(method, percentile),
            CALIBRATION_KEY: calibration.sha256,
            INPUTS_KEY: summary_text(calibration.input_statistics),
        },
    )
    return QuantizeResult(
        Path(output),
        target,
        precision,
        method,
        placement,
        quantized.scales,
        held,
        auto if method == "auto" else None,
        _notes(quantized, calibration, method, auto),
    )


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
    proto = ir.to_proto(quantized.model)
    open_session(proto, execution="exact")  # what ONNX Runtime refuses is not written
    save_model(proto, output)
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
    save_model(converted.model, output)
    return Fp16Result(Path(output), converted.held, converted.nodes)


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
    zero = [name for name in quantized.placement.tensors if name in set(calibration.always_zero)]
    notes.extend(f"{name} was 0 throughout the calibration; its scale is 1." for name in zero)
    return tuple(notes)
