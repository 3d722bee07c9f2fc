"""Rules about types: codes that are no INT8, and what the type of a scale makes of the layers around it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.lint_graph import LintGraph, Quantizer
from engines.lint_rules import GUIDE, IMPORTER, MODELOPT, ONNX, SYMMETRIC, Hit, Rule, Severity
from engines.onnxrt import PRECISION_KEY
from engines.opset import MINIMUM_OPSET

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_NO_KERNEL = (ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT4)

_OTHERS = (
    ir.DataType.INT4,
    ir.DataType.FLOAT4E2M1,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
)


def other_codes(graph: LintGraph) -> Iterator[Hit]:
    """Find codes of other types than 8-bit integers and the INT32 of biases."""
    for record in graph.heads:
        if record.codes in _NO_KERNEL and record.codes is not None:
            yield Hit(record.node, f"{record.codes.name} codes", "error")
        elif record.codes == ir.DataType.INT4 and record.data not in graph.constants:
            yield Hit(record.node, "INT4 codes on an activation", "error")
        elif record.codes in _OTHERS and record.codes is not None:
            yield Hit(record.node, f"{record.codes.name} codes: not INT8, and not checked further")


def half_scale_opset(graph: LintGraph) -> Iterator[Hit]:
    """Find FP16 scales in an opset that has none."""
    if graph.opset < MINIMUM_OPSET:
        for record in graph.quantizers:
            if record.scale_type in _HALVES and record.scale_type is not None:
                yield Hit(record.node, f"{record.scale_type.name} scale in opset {graph.opset}")


def scale_type(graph: LintGraph) -> Iterator[Hit]:
    """Find Qs whose scale is of another type than what they read."""
    for record in graph.quantizers:
        read, stated = record.data.dtype, record.scale_type
        if not record.quantizes or read is None or stated is None or stated == read:
            continue
        if graph.opset < MINIMUM_OPSET:
            yield Hit(record.node, f"reads {read.name} with a {stated.name} scale: the parser casts the scale", "note")
        else:
            yield Hit(record.node, f"reads {read.name} with a {stated.name} scale")


def wide_scales(graph: LintGraph) -> Iterator[Hit]:
    """Find FP32 scales that hold layers of an FP16 graph in FP32."""
    if not graph.half:
        return
    seen: set[ir.Node] = set()
    for record in graph.quantizers:
        if record.scale_type == ir.DataType.FLOAT and (meets_half(record) or leaves_half(record)):
            seen.add(record.node)
            yield Hit(record.node, "FP32 scale between casts from and to FP16")
    if any(record.scale_type in _HALVES for record in graph.quantizers):
        return  # the others are kept in FP32 on purpose
    severity: Severity | None = "note" if graph.metadata.get(PRECISION_KEY) == "int8+fp16" else None
    for found in graph.weighted:
        pair = found.activation.dequantizer
        wide = pair is not None and pair.scale_type == ir.DataType.FLOAT and pair.node not in seen
        if found.quantized and wide and found.node.outputs[0].dtype == ir.DataType.FLOAT:
            yield Hit(found.node, "computes INT8 + FP32 in a graph of FP16", severity)


def beside_fp32(graph: LintGraph) -> Iterator[Hit]:
    """Find models whose layers that are not quantized compute in FP32."""
    if not graph.half and any(found.quantized for found in graph.weighted):
        yield Hit(None, "all scales are FP32, and so is every layer that is not quantized")


def meets_half(record: Quantizer) -> bool:
    """Tell whether a Q reads what was cast from FP16 to FP32."""
    producer = record.data.producer()
    if not record.quantizes or producer is None or producer.op_type != "Cast":
        return False
    source = producer.inputs[0]
    return source is not None and source.dtype == ir.DataType.FLOAT16 and record.data.dtype == ir.DataType.FLOAT


def leaves_half(record: Quantizer) -> bool:
    """Tell whether everything that reads a DQ casts it to FP16."""
    uses = list(record.output.uses())
    return (
        not record.quantizes
        and bool(uses)
        and not record.output.is_graph_output()
        and all(use.node.op_type == "Cast" and use.node.outputs[0].dtype == ir.DataType.FLOAT16 for use in uses)
    )


TYPE_RULES = (
    Rule(
        "code-type",
        "note",
        "TensorRT has no 16-bit integer and no unsigned 4-bit kernels, INT4 for weights alone, and FP8 and FP4 only "
        "on newer GPUs.",
        f"{SYMMETRIC} where INT8 is meant.",
        "NvInfer.h, DataType",
        other_codes,
    ),
    Rule(
        "fp16-scale-opset",
        "error",
        "before opset 19 a scale is FP32: no runtime has to take this file.",
        "export again with opset 19 or above.",
        f"{ONNX}; {IMPORTER}",
        half_scale_opset,
    ),
    Rule(
        "scale-type",
        "error",
        "in a strongly typed network a Q reads the type of its scale; TensorRT refuses another one.",
        "store the scale in the type that the Q reads.",
        IMPORTER,
        scale_type,
        mendable=True,
    ),
    Rule(
        "fp32-scales",
        "warning",
        "a DQ gives the type of its scale: these layers are INT8 + FP32, not INT8 + FP16, and the casts stay in "
        "the engine.",
        "store the scales in FP16 and drop the casts.",
        f"{IMPORTER}; {MODELOPT}",
        wide_scales,
        mendable=True,
    ),
    Rule(
        "int8-beside-fp32",
        "note",
        "strongly typed, this is INT8 + FP32: layers that are not quantized run slower than in an FP16 engine.",
        "`trt-int8 quantize --precision int8+fp16` writes INT8 + FP16.",
        f"{IMPORTER}; {GUIDE}",
        beside_fp32,
    ),
)
