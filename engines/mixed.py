"""INT8 beside FP16: the types of a graph whose quantized layers compute in INT8 and whose other layers in FP16.

A strongly typed engine takes its types from the model, and the output of a layer in INT8 has the type of the scales
that dequantize its inputs. With FP32 scales everything between the quantized layers would be FP32, and such an engine
loses against FP16. So the graph is converted to FP16 first, under the same guard of the range as an FP16 model, and
`engines.qdq` then writes Q and DQ into it in the types that it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from engines.fp16 import HeldNode, held_in_fp32, in_fp16
from engines.graph import PreparedModel
from engines.placement import Placement


@dataclass(frozen=True, slots=True)
class MixedGraph:
    """A graph in FP16 and FP32 that Q/DQ nodes can be written into.

    Attributes:
        model: the graph; the argument `typed` of `engines.qdq.insert_qdq`.
        held: the nodes kept in FP32, and why.
    """

    model: ir.Model
    held: tuple[HeldNode, ...]


def mixed_graph(prepared: PreparedModel, placement: Placement, amax: Mapping[str, float]) -> MixedGraph:
    """Convert a prepared FP32 model to FP16 for a placement.

    A node stays FP32 where `engines.fp16.held_in_fp32` says so. A Pad and the convolutions that it fuses with stay FP32
    together: a cast between them would split them.

    Args:
        prepared: the model.
        placement: which tensors will be quantized, for TensorRT.
        amax: largest magnitude that calibration saw, by tensor name; see `engines.fp16.convert_to_fp16`.
    """
    held = {node.node: node for node in held_in_fp32(prepared, amax)}
    graph = prepared.ir().graph
    nodes = {node.name: node for node in graph}
    for point in placement.activations:
        for name, _ in point.uses or ():
            together = _fused_with(nodes[name]) if nodes[name].op_type == "Pad" else []
            first = next((node for node in together if node.name in held), None)
            if first is None:
                continue
            for node in together:
                reason = f"it fuses with {first.name!r}, which stays FP32; a cast between them would split them"
                held.setdefault(str(node.name), HeldNode(str(node.name), node.op_type, reason))
    ordered = tuple(held[str(node.name)] for node in graph if node.name in held)
    return MixedGraph(in_fp16(prepared, ordered), ordered)


def _fused_with(pad: ir.Node) -> list[ir.Node]:
    """Return a Pad, and the Pads and convolutions behind it."""
    fused = [pad]
    for node in fused:  # grows on the way
        if node.op_type == "Pad":
            fused.extend(use.node for use in node.outputs[0].uses())
    return fused
