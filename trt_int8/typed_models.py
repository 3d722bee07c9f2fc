"""The model as TensorRT is given it: an FP32 model with the types of the engine's precision written into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from calibrators.calibration import Calibration
from calibrators.protocols import Track
from engines.graph import prepare, save_model
from engines.placement_options import PlacementOptions
from engines.sidecar import Provenance
from engines.trt_types import Precision, held_types
from trt_int8.calibration import check_fits
from trt_int8.config import Method
from trt_int8.input_alarm import note_inputs
from trt_int8.placement_options import placement_of
from trt_int8.quantization import convert_fp16, method_name, quantize, range_notes
from trt_int8.quantize_result import CALIBRATION_KEY, METHOD_KEY

_LISTED = 3
"""Nodes that a note names before it only counts them."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Where the scales of an FP32 model come from, and which nodes take them; see `trt_int8.quantization.quantize`."""

    calibration: Calibration | None
    method: Method
    percentile: float
    placement: PlacementOptions
    force: bool


def write_typed(
    model: Path, precision: Precision, scales: Scales, *, output: str | os.PathLike[str], track: Track
) -> tuple[Provenance | None, tuple[str, ...]]:
    """Write an FP32 model with the types of a precision.

    Args:
        model: the FP32 model.
        precision: "fp32" and "tf32" only prepare the graph, and need no calibration; one of another model is refused
            all the same.
        scales: where the scales come from.
        output: the file to write.
        track: shows the progress.

    Returns:
        The origin of the scales, None where there are none; and what the user should know, one line each.

    Raises:
        CalibrationError: the calibration belongs to another model, or lacks a scale.
        ModelError: an expression of `exclude` or `include` matches nothing.
    """
    if scales.calibration is None or precision == "fp32" or precision == "tf32":
        prepared = prepare(model)
        if scales.calibration is not None and not scales.force:
            check_fits(scales.calibration, prepared)
        noted = prepared.editable()
        if scales.calibration is not None:
            note_inputs(noted, scales.calibration.input_statistics)
        save_model(noted, output)
        return None, ()
    if precision == "fp16":
        half = convert_fp16(model, scales.calibration, output=output, force=scales.force)
        held = [f"{node.node} ({node.reason})" for node in half.held]
        return None, (*_listed(f"{len(held)} of {half.nodes} nodes stay in FP32", held), *range_notes(half.held))
    quantized = quantize(
        model,
        scales.calibration,
        output=output,
        method=scales.method,
        percentile=scales.percentile,
        target="tensorrt",
        precision=precision,
        residual=scales.placement.residual,
        attention=scales.placement.attention,
        exclude=scales.placement.exclude,
        include=scales.placement.include,
        force=scales.force,
        track=track,
    )
    floating = [f"{decision.node} ({decision.reason})" for decision in quantized.held_back]
    summary = f"{len(floating)} of {len(quantized.placement.decisions)} weighted nodes stay in floating point"
    held = [f"{node.node} ({node.reason})" for node in quantized.held]
    notes = (*_listed(summary, floating), *_listed(f"{len(held)} nodes stay in FP32", held), *quantized.notes)
    method = method_name(scales.method, scales.percentile)
    return Provenance(method, scales.calibration.sha256, scales.placement), notes


def provenance_of(header: onnx.ModelProto) -> Provenance | None:
    """Say where the scales of a quantized model come from, as far as it tells; None for models without Q/DQ nodes."""
    quantized, _ = held_types(header)
    if not quantized:
        return None
    metadata = {entry.key: entry.value for entry in header.metadata_props}
    method = metadata.get(METHOD_KEY, "as in the model")
    return Provenance(method, metadata.get(CALIBRATION_KEY), placement_of(metadata))


def _listed(summary: str, items: Sequence[str]) -> tuple[str, ...]:
    if not items:
        return ()
    more = f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return (f"{summary}: {'; '.join(items[:_LISTED])}{more}",)
