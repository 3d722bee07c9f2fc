"""Rules about the operands of weighted operators: weights, their axis, biases, and operands left float."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.lint_graph import LintGraph, Quantizer, WeightedNode
from engines.lint_rules import BOTH_TARGETS, GUIDE, IMPORTER, MODELOPT, Hit, Rule


def weight_axis(graph: LintGraph) -> Iterator[Hit]:
    """Find weights with scales along another axis than the output channels."""
    for found in graph.weighted:
        record = found.weight.dequantizer
        if record is None or not found.constant_weight or not record.per_channel or record.axis is None:
            continue
        axis, expected = _axis_at_node(found, record), _expected_axis(found)
        if axis is not None and expected is not None and axis != expected:
            yield Hit(found.node, f"its weight has scales along axis {axis}; its output channels are axis {expected}")


def grouped_transpose(graph: LintGraph) -> Iterator[Hit]:
    """Find grouped ConvTranspose whose weights have several scales."""
    for found in graph.weighted:
        record = found.weight.dequantizer
        if found.node.op_type != "ConvTranspose" or record is None or not record.per_channel:
            continue
        group = found.node.attributes.get("group")
        if group is not None and group.as_int() != 1:
            yield Hit(found.node, f"{group.as_int()} groups, and a weight with several scales")


def foldable_weight(graph: LintGraph) -> Iterator[Hit]:
    """Find float weights that are quantized in the graph."""
    for record in graph.quantizers:
        if record.quantizes and record.data in graph.constants:
            yield Hit(record.node, "a float constant behind Q and DQ")


def float_weight(graph: LintGraph) -> Iterator[Hit]:
    """Find weighted nodes with a quantized activation and a float weight."""
    for found in graph.weighted:
        if found.activation.dequantizer is not None and found.weight.dequantizer is None:
            what = "its weight" if found.constant_weight else "its other operand, computed at run time,"
            yield Hit(found.node, f"{what} is float, its activation is quantized")


def float_activation(graph: LintGraph) -> Iterator[Hit]:
    """Find weighted nodes with a quantized weight and a float activation."""
    weight_only = not graph.activation_pairs
    for found in graph.weighted:
        if found.activation.dequantizer is None and found.weight.dequantizer is not None:
            what = "its activation is float, its weight is quantized"
            if not found.constant_weight:
                what = "one operand is float, the other one is quantized"
            yield Hit(found.node, what, "note" if weight_only else None)


def int32_dq(graph: LintGraph) -> Iterator[Hit]:
    """Find DQs that read INT32."""
    for record in graph.quantizers:
        if not record.quantizes and record.codes == ir.DataType.INT32:
            uses = [use for use in record.output.uses() if use.idx == 2]
            yield Hit(record.node, "an INT32 bias" if uses else "INT32 codes")


def quantized_bias(graph: LintGraph) -> Iterator[Hit]:
    """Find biases that are stored in, or pass through, INT8."""
    for node, record in bias_pairs(graph):
        yield Hit(node, f"its bias is {record.codes.name if record.codes is not None else 'quantized'}")


def bias_pairs(graph: LintGraph) -> Iterator[tuple[ir.Node, Quantizer]]:
    """Give the nodes whose constant bias comes from a DQ of another type than INT32, with that DQ."""
    for found in graph.weighted:
        bias = found.node.inputs[2] if len(found.node.inputs) > 2 else None
        record = graph.by_output.get(bias) if bias is not None and bias in graph.constants else None
        if record is not None and not record.quantizes and record.codes != ir.DataType.INT32:
            yield found.node, record


def _expected_axis(found: WeightedNode) -> int | None:
    """Return the axis of the output channels of a weight, as the node reads it; None where it has none."""
    node = found.node
    shape = found.weight.value.shape
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        group = node.attributes.get("group")
        return 1 if group is None or group.as_int() == 1 else None
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    if shape is None or len(shape) < 2:
        return None
    return len(shape) - (1 if found.weight.index == 1 else 2)


def _axis_at_node(found: WeightedNode, record: Quantizer) -> int | None:
    """Return the axis of the scales as the node reads the weight, behind Transposes; None behind anything else."""
    shape = record.data.shape
    if record.axis is None or (record.axis < 0 and shape is None):
        return None
    axis = record.axis if record.axis >= 0 else record.axis + len(shape or ())
    for node in reversed(found.weight.path):
        if node.op_type == "Transpose":
            order = node.attributes.get("perm")
            rank = len(shape) if shape is not None else None
            axes = list(order.as_ints()) if order is not None else list(reversed(range(rank or 0)))
            if axis not in axes:
                return None
            axis = axes.index(axis)
        elif node.op_type not in ("Identity", "Cast", "Dropout"):
            return None
    return axis


WEIGHT_RULES = (
    Rule(
        "weight-axis",
        "warning",
        "an integer product has one scale for each output channel: with scales along another axis the layer "
        "cannot run in INT8.",
        "quantize the weights along Conv 0, ConvTranspose 1, Gemm 0 with transB and 1 without, MatMul the last axis.",
        f"{MODELOPT}; {GUIDE}",
        weight_axis,
        targets=BOTH_TARGETS,
    ),
    Rule(
        "grouped-transpose-weight",
        "note",
        "axis 1 of a grouped ConvTranspose's weight is shared by its groups, so its scales are not those of output "
        "channels.",
        "give such a weight one scale.",
        "inferred from the shape of the weight, [C, K / groups, ...]",
        grouped_transpose,
        verified=False,
    ),
    Rule(
        "foldable-weight",
        "note",
        "the file is about four times as large as with INT8 weights, and a constant folder would undo the "
        "quantization.",
        "store INT8 initializers behind a DQ, as `trt-int8 quantize` does, and fold constants before quantizing.",
        MODELOPT,
        foldable_weight,
    ),
    Rule(
        "float-weight",
        "warning",
        "a layer with one quantized operand runs in float, and the pair costs time for nothing.",
        "quantize the other operand too, or read the activation before its Q.",
        GUIDE,
        float_weight,
    ),
    Rule(
        "float-activation",
        "warning",
        "a layer with one quantized operand runs in float: INT8 weights alone save memory, not arithmetic.",
        "quantize its activation too, or keep its weight float.",
        GUIDE,
        float_activation,
    ),
    Rule(
        "int32-dq",
        "error",
        'TensorRT refuses a DequantizeLinear of INT32 ("only activation types allowed").',
        "keep biases float; ONNX Runtime's quantizer does with QuantizeBias=False.",
        IMPORTER,
        int32_dq,
        mendable=True,
    ),
    Rule(
        "quantized-bias",
        "warning",
        "a bias is added in FP32 or INT32 at no cost; in 8 bits it loses exactness and gains nothing.",
        "keep biases float.",
        GUIDE,
        quantized_bias,
        mendable=True,
    ),
)
