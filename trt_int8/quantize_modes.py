"""Quantization without a calibration: dynamic, and of the weights alone."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from engines.dynamic import place_dynamically, write_dynamic
from engines.errors import ModelError
from engines.granularity import Weights, with_one_weight_scale
from engines.graph import PreparedModel, open_session, prepare, save_model
from engines.placement import Placement, Target
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.qdq import insert_qdq
from trt_int8.float_models import check_float
from trt_int8.idle_options import idle_wishes
from trt_int8.machine import saturates_unsigned_products
from trt_int8.placement_options import placement_entry
from trt_int8.quantize_result import METHOD_KEY, MODE_KEY, WEIGHT_ONLY, Mode, QuantizeResult

DYNAMIC_NOTE = (
    "Each run finds the ranges of the inputs anew, on ONNX Runtime's CPU kernels; TensorRT has no such INT8 kernels: "
    "its scales are fixed when an engine is built."
)

WEIGHT_ONLY_NOTE = (
    "The weights lie in the file as INT8 and are multiplied as floats: the file is smaller, the arithmetic is not INT8."
)


def quantize_dynamically(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: PlacementOptions,
    weights: Weights = "per-channel",
    reduce_range: bool | None = None,
) -> QuantizeResult:
    """Write a dynamically quantized model for ONNX Runtime on the CPU; see `engines.dynamic`.

    Args:
        model: the FP32 ONNX file.
        output: the file to write.
        options: which nodes the user excludes or includes.
        weights: granularity of the weight scales.
        reduce_range: 7-bit weights; None decides by this processor.

    Raises:
        ModelError: the model holds nothing that dynamic quantization serves, or an expression matches nothing.
    """
    check_float(model, "quantize")
    prepared = prepare(model)
    placement = place_dynamically(prepared, options)
    idle = idle_wishes(options, placement, partial(place_dynamically, prepared))
    proto = write_dynamic(
        prepared,
        placement,
        per_channel=weights == "per-channel",
        reduce_range=saturates_unsigned_products() if reduce_range is None else reduce_range,
        metadata={METHOD_KEY: "dynamic", MODE_KEY: "dynamic", **placement_entry(options)},
    )
    open_session(proto, execution="native")
    save_model(proto, output)
    return _result(output, placement, "dynamic", (DYNAMIC_NOTE, *idle))


def quantize_weights_only(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: PlacementOptions,
    target: Target = "tensorrt",
    weights: Weights = "per-channel",
) -> QuantizeResult:
    """Write a model whose weights are stored as INT8, each with a DequantizeLinear; activations stay float.

    Args:
        model: the FP32 ONNX file.
        output: the file to write.
        options: which nodes the user excludes or includes.
        target: where it will run. Every weight that can be is stored as INT8: rules about kernels do not matter here.
        weights: granularity of the weight scales.

    Raises:
        ModelError: the model holds no weight to quantize, or an expression matches nothing.
    """
    check_float(model, "quantize")
    prepared = prepare(model)
    place = partial(place_for_cpu, prepared.ir())
    placed = replace(place(options), target=target)
    idle = idle_wishes(options, placed, place)
    placement = _weights_of(prepared, with_one_weight_scale(placed) if weights == "per-tensor" else placed)
    metadata = {METHOD_KEY: "weight-only", MODE_KEY: "weight-only", **placement_entry(options)}
    quantized = insert_qdq(prepared, placement, {}, metadata=metadata)
    proto = ir.to_proto(quantized.model)
    open_session(proto, execution="exact")
    save_model(proto, output)
    return _result(output, placement, "weight-only", (WEIGHT_ONLY_NOTE, *idle))


def _weights_of(prepared: PreparedModel, placement: Placement) -> Placement:
    """Return the part of a placement that concerns the weights, with float biases."""
    if not placement.weights:
        raise ModelError(
            f"Cannot quantize the weights of {str(prepared.path)!r}: none of its "
            f"{len(placement.decisions)} weighted nodes can be quantized. `trt-int8 inspect` lists them."
        )
    reason = "its weight is stored as INT8 and computed with as float"
    return replace(
        placement,
        activations=(),
        weights=tuple(replace(weight, integer_bias=False) for weight in placement.weights),
        decisions=tuple(
            replace(decision, rule=WEIGHT_ONLY, reason=reason) if decision.quantized else decision
            for decision in placement.decisions
        ),
    )


def _result(output: str | os.PathLike[str], placement: Placement, mode: Mode, notes: tuple[str, ...]) -> QuantizeResult:
    return QuantizeResult(
        path=Path(output),
        target=placement.target,
        precision="int8",
        mode=mode,
        method=mode,
        placement=placement,
        scales={},
        held=(),
        auto=None,
        notes=notes,
    )
