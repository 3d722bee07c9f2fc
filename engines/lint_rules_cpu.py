"""Rules about what ONNX Runtime's integer kernels on the CPU want: unsigned activations, and both sides quantized."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.lint_graph import LintGraph
from engines.lint_rules import ONNX_RUNTIME, Hit, Rule
from engines.placement import sole_consumer
from engines.placement_cpu import tail


def signed_activation(graph: LintGraph) -> Iterator[Hit]:
    """Find activations with signed codes."""
    for record in graph.heads:
        if record.quantizes and record.codes == ir.DataType.INT8 and record.data not in graph.constants:
            yield Hit(record.node, "INT8 codes on an activation")


def unsigned_weight(graph: LintGraph) -> Iterator[Hit]:
    """Find weights with unsigned codes."""
    for found in graph.weighted:
        record = found.weight.dequantizer
        if record is not None and found.constant_weight and record.codes == ir.DataType.UINT8:
            yield Hit(found.node, "its weight has UINT8 codes")


def float_output(graph: LintGraph) -> Iterator[Hit]:
    """Find quantized convolutions whose output is not quantized. One whose kernel is computed is no integer kernel."""
    for found in graph.weighted:
        if found.node.op_type == "Conv" and found.quantized and found.constant_weight:
            reader = sole_consumer(tail(found.node.outputs[0]))
            if reader is None or reader.op_type != "QuantizeLinear":
                yield Hit(found.node, "its output is not quantized, or read by others beside its Q")


def float_bias(graph: LintGraph) -> Iterator[Hit]:
    """Find quantized convolutions with a float bias."""
    for found in graph.weighted:
        bias = found.node.inputs[2] if len(found.node.inputs) > 2 else None
        integer = found.node.op_type == "Conv" and found.quantized and found.constant_weight
        if integer and bias is not None and bias not in graph.by_output:
            yield Hit(found.node, "its bias is float")


CPU_RULES = (
    Rule(
        "signed-activation",
        "warning",
        "the fast kernels (VNNI, AMX) multiply unsigned activations with signed weights; signed activations run "
        "slower than FP32 on x86.",
        "`trt-int8 quantize --target cpu` writes unsigned activations.",
        ONNX_RUNTIME,
        signed_activation,
        targets=("cpu",),
    ),
    Rule(
        "unsigned-weight",
        "note",
        "the fast kernels take signed weights; unsigned ones are converted, or run on slower kernels.",
        "`trt-int8 quantize --target cpu` writes signed weights.",
        ONNX_RUNTIME,
        unsigned_weight,
        targets=("cpu",),
    ),
    Rule(
        "conv-float-output",
        "warning",
        "a convolution becomes an integer kernel only where both sides are quantized; this one runs in float.",
        "quantize its output, behind the Relu or Clip, for all of its readers.",
        ONNX_RUNTIME,
        float_output,
        targets=("cpu",),
    ),
    Rule(
        "conv-float-bias",
        "warning",
        "an integer convolution adds an INT32 bias with the scale of its products; a float bias keeps it float.",
        "store the bias as INT32 with scale s_x * s_w.",
        ONNX_RUNTIME,
        float_bias,
        targets=("cpu",),
    ),
)
