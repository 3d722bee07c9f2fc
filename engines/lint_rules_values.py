"""Rules about the numbers of a Q or DQ: zero point, scale, axis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calibrators.numerics import SMALLEST_SCALE
from engines.lint_graph import LintGraph, Quantizer
from engines.lint_rules import BOTH_TARGETS, GUIDE, IMPORTER, ONNX, SYMMETRIC, Hit, Rule

SMALLEST_HALF = 2.0**-24
"""Smallest FP16 number above 0; what is at most half of it rounds to 0."""

SMALLEST_NORMAL_HALF = 2.0**-14


def uint8_codes(graph: LintGraph) -> Iterator[Hit]:
    """Find codes that are unsigned."""
    for record in graph.heads:
        if record.codes == ir.DataType.UINT8 and (record.has_zero_point or not record.quantizes):
            zero = record.zero_point
            symmetric = zero is None or ((zero == zero[0]).all() and zero[0] in (0, 128))
            shown = "an asymmetric zero point" if not symmetric else f"zero point {0 if zero is None else zero[0]:g}"
            yield Hit(record.node, f"UINT8 codes, {shown}")


def nonzero_zero_point(graph: LintGraph) -> Iterator[Hit]:
    """Find zero points other than 0 beside signed codes."""
    for record in graph.heads:
        if record.codes != ir.DataType.UINT8 and record.zero_point is not None and record.zero_point.any():
            yield Hit(record.node, f"zero point {_span(record.zero_point)}")


def missing_zero_point(graph: LintGraph) -> Iterator[Hit]:
    """Find zero points that are left out; only for a Q without a type of its own do the readings differ."""
    for record in graph.quantizers:
        if record.has_zero_point:
            continue
        if record.quantizes and record.codes == ir.DataType.UINT8:
            yield Hit(record.node, "no zero point, so no type: UINT8 to ONNX, INT8 to TensorRT")
        elif record.codes == ir.DataType.INT8:
            yield Hit(record.node, "no zero point; INT8 and 0 to both ONNX and TensorRT", "note")


def missing_axis(graph: LintGraph) -> Iterator[Hit]:
    """Find several scales without the axis that they belong to."""
    for record in graph.quantizers:
        if record.per_channel and record.axis is None and graph.opset >= 13:
            size = 0 if record.scale is None else record.scale.size
            yield Hit(record.node, f"{size} scales and no axis")


def old_per_channel(graph: LintGraph) -> Iterator[Hit]:
    """Find several scales in an opset that knows one per tensor."""
    if graph.opset < 13:
        for record in graph.heads:
            if record.per_channel:
                yield Hit(record.node, f"scales per channel in opset {graph.opset}")


def per_channel_activation(graph: LintGraph) -> Iterator[Hit]:
    """Find several scales on a tensor that is computed at run time."""
    for record in graph.heads:
        if record.per_channel and record.data not in graph.constants:
            size = 0 if record.scale is None else record.scale.size
            yield Hit(record.node, f"{size} scales on an activation")


def scale_not_positive(graph: LintGraph) -> Iterator[Hit]:
    """Find scales that are 0, negative, NaN or infinite."""
    for record, scale in _scales(graph):
        bad = scale[~((scale > 0) & np.isfinite(scale))]
        if bad.size:
            count = "the scale is" if scale.size == 1 else f"{bad.size} of {scale.size} scales are not usable:"
            yield Hit(record.node, f"{count} {bad[0]:g}")


def scale_subnormal(graph: LintGraph) -> Iterator[Hit]:
    """Find scales that lost bits, or would lose all of them in FP16."""
    for record, scale in _scales(graph):
        if record.scale_type == ir.DataType.FLOAT16:
            low = int(np.count_nonzero((scale > 0) & (scale < SMALLEST_NORMAL_HALF)))
            what, severity = "subnormal in FP16", "note"
        else:
            low = int(np.count_nonzero((scale > 0) & (scale < SMALLEST_SCALE)))
            what, severity = "subnormal in FP32", "warning"
            if not low:
                low = int(np.count_nonzero((scale > 0) & (scale <= SMALLEST_HALF / 2)))
                what = "0 in FP16, if the model is converted to it"
                severity = "warning" if graph.half else "note"
        if low:
            count = "the scale is" if scale.size == 1 else f"some of {scale.size} scales are"
            yield Hit(record.node, f"{count} {what}", "warning" if severity == "warning" else "note")


def scale_at_run_time(graph: LintGraph) -> Iterator[Hit]:
    """Find scales and zero points that are computed at run time."""
    for record in graph.quantizers:
        for name, value in _parameters(record):
            if value not in graph.constants:
                yield Hit(record.node, f"its {name} is computed at run time")


def scale_behind_nodes(graph: LintGraph) -> Iterator[Hit]:
    """Find scales and zero points that stand behind more than one Cast."""
    for record in graph.quantizers:
        for name, value in _parameters(record):
            steps = [node.op_type for node in graph.steps(value)] if value in graph.constants else []
            if steps not in ([], ["Cast"]):
                what = f"its {name} is a constant behind {', '.join(reversed(steps))}"
                yield Hit(record.node, what, "error" if name == "zero point" else None)


def zero_point_size(graph: LintGraph) -> Iterator[Hit]:
    """Find zero points that are not as many as the scales."""
    for record in graph.quantizers:
        scale, zero = record.scale, record.zero_point
        if scale is not None and zero is not None and scale.size != zero.size:
            yield Hit(record.node, f"{scale.size} scale{'s' * (scale.size != 1)}, {zero.size} zero points")


def scalar_data(graph: LintGraph) -> Iterator[Hit]:
    """Find Q and DQ of single numbers without an axis."""
    for record in graph.heads:
        if record.data.shape is not None and len(record.data.shape) == 0:
            yield Hit(record.node, "its data have no axis (0-D)")


def unequal_pair(graph: LintGraph) -> Iterator[Hit]:
    """Find DQs that give back other values than their Q read."""
    for record in graph.quantizers:
        first = graph.source(record)
        if first is None:
            continue
        if not _same(first, record):
            yield Hit(record.node, "its scale is not that of its QuantizeLinear")
        elif not _same_zero(first, record):
            yield Hit(record.node, "its zero point is not that of its QuantizeLinear")
        elif first.per_channel and first.axis != record.axis:
            yield Hit(record.node, "its axis is not that of its QuantizeLinear")


def same_scale(one: Quantizer, other: Quantizer) -> bool:
    """Tell whether two Q or DQ have equal scales, up to the rounding of FP16 where their types differ."""
    return _same(one, other)


def _same(one: Quantizer, other: Quantizer) -> bool:
    if one.scale is None or other.scale is None:
        return one.node.inputs[1] is other.node.inputs[1]
    if one.scale.size != other.scale.size:
        return False
    tolerance = 0.0 if one.scale_type == other.scale_type else 2.0**-10
    return bool(np.allclose(one.scale, other.scale, rtol=tolerance, atol=0.0, equal_nan=True))


def _same_zero(one: Quantizer, other: Quantizer) -> bool:
    if one.zero_point is None or other.zero_point is None:
        given = one.zero_point if one.zero_point is not None else other.zero_point
        return given is None or not given.any()
    return one.zero_point.size != other.zero_point.size or bool((one.zero_point == other.zero_point).all())


def _scales(graph: LintGraph) -> Iterator[tuple[Quantizer, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    """Give every scale once: that of a DQ only where it is not the constant that its Q reads."""
    for record in graph.quantizers:
        first = graph.source(record)
        if record.scale is not None and (first is None or first.node.inputs[1] is not record.node.inputs[1]):
            yield record, record.scale


def _parameters(record: Quantizer) -> Iterator[tuple[str, ir.Value]]:
    for index, name in ((1, "scale"), (2, "zero point")):
        value = record.node.inputs[index] if len(record.node.inputs) > index else None
        if value is not None:
            yield name, value


def _span(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


VALUE_RULES = (
    Rule(
        "uint8-codes",
        "error",
        "TensorRT has no UINT8 kernels on GPUs: its parser refuses such pairs, or reads them as INT8.",
        f"store INT8 codes with zero point 0, where no code is lost by it; else {SYMMETRIC}.",
        IMPORTER,
        uint8_codes,
        mendable=True,
    ),
    Rule(
        "zero-point",
        "error",
        "TensorRT computes with symmetric INT8 only and refuses a zero point other than 0.",
        f"shift the codes of weights so that 0 stands for 0; for activations {SYMMETRIC}.",
        IMPORTER,
        nonzero_zero_point,
        mendable=True,
    ),
    Rule(
        "missing-zero-point",
        "error",
        "ONNX takes a missing zero point for UINT8, TensorRT for INT8: the same file computes two different things.",
        "write an INT8 zero point of 0.",
        f"{ONNX}; {IMPORTER}",
        missing_zero_point,
        mendable=True,
    ),
    Rule(
        "missing-axis",
        "error",
        "ONNX takes a missing axis for 1, TensorRT for 0: the scales would be applied to other channels.",
        "write the axis that ONNX means.",
        f"{ONNX}; {IMPORTER}",
        missing_axis,
        mendable=True,
    ),
    Rule(
        "per-channel-opset",
        "error",
        "before opset 13 Q and DQ know one scale per tensor: no runtime agrees on what this means.",
        "export again with opset 19 or above.",
        ONNX,
        old_per_channel,
        targets=BOTH_TARGETS,
    ),
    Rule(
        "per-channel-activation",
        "error",
        "TensorRT takes scales per channel for weights alone, and refuses them on activations.",
        f"{SYMMETRIC}: it gives activations one scale.",
        IMPORTER,
        per_channel_activation,
    ),
    Rule(
        "scale-not-positive",
        "error",
        "a scale must be above 0: TensorRT refuses it, other runtimes compute infinities or NaN.",
        "calibrate again; a tensor that is always 0 takes scale 1.",
        f"{ONNX}; {IMPORTER}",
        scale_not_positive,
        targets=BOTH_TARGETS,
    ),
    Rule(
        "scale-subnormal",
        "warning",
        "a subnormal scale has lost bits, and an engine that flushes it to 0 divides by 0.",
        "raise it to the smallest normal number; the tensor is practically always 0.",
        "IEEE 754; FP16 is normal from 2^-14 on and above 0 from 2^-24 on",
        scale_subnormal,
    ),
    Rule(
        "scale-at-run-time",
        "error",
        "TensorRT needs scale and zero point when it builds the engine; it refuses dynamic quantization to INT8.",
        f"calibrate: {SYMMETRIC}.",
        IMPORTER,
        scale_at_run_time,
    ),
    Rule(
        "scale-behind-nodes",
        "warning",
        "TensorRT takes a zero point that is a constant, or one behind a Cast; a scale computed of constants is left "
        "to the folding of whoever reads the file.",
        "fold it into an initializer.",
        IMPORTER,
        scale_behind_nodes,
        mendable=True,
    ),
    Rule(
        "zero-point-size",
        "error",
        "there must be as many zero points as scales: TensorRT refuses the node.",
        "write one zero point of 0 for each scale.",
        IMPORTER,
        zero_point_size,
        mendable=True,
        targets=BOTH_TARGETS,
    ),
    Rule(
        "scalar-data",
        "warning",
        "TensorRT has no Q/DQ for data without an axis; its parser reshapes them, which nothing fuses with.",
        "leave single numbers float.",
        IMPORTER,
        scalar_data,
    ),
    Rule(
        "unequal-pair",
        "warning",
        "Q and DQ of a pair that differ multiply the values by a factor; TensorRT fuses no such pair into a layer.",
        "give both the scale, zero point and axis of the Q, unless the factor is meant.",
        GUIDE,
        unequal_pair,
        targets=BOTH_TARGETS,
    ),
)
