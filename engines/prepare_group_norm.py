"""GroupNormalization as opsets 18 to 20 had it, with one scale per group; ONNX re-made it in opset 21."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engines.opset import nested_graphs

FIRST_WITH_CHANNELS = 21
"""The opset from which on GroupNormalization has one scale per channel."""


def write_group_norms_out(model: onnx.ModelProto) -> int:
    """Write each such GroupNormalization as Reshape, InstanceNormalization, Reshape, which computes the same.

    The groups [N, C, ...] -> [N, G, C / G * ...] become the channels of an InstanceNormalization, whose scale and bias
    are the groups'. The output keeps its name.

    Args:
        model: of an opset below 21; edited in place.

    Returns:
        How many there were.
    """
    count = 0
    for graph in nested_graphs(model.graph):
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.op_type != "GroupNormalization" or node.domain not in ("", "ai.onnx"):
                nodes.append(node)
                continue
            nodes += _written_out(graph, node)
            count += 1
        if len(nodes) != len(graph.node):
            copies = [_copy(node) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
    return count


def _written_out(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    x, scale, bias = node.input
    y = node.output[0]
    shape, grouped, normal, groups = (f"{y}_{part}" for part in ("shape", "grouped", "normal", "groups"))
    graph.initializer.append(numpy_helper.from_array(np.asarray([0, attributes["num_groups"], -1], np.int64), groups))
    return [
        helper.make_node("Reshape", [x, groups], [grouped], name=grouped),
        helper.make_node(
            "InstanceNormalization",
            [grouped, scale, bias],
            [normal],
            name=node.name or normal,
            epsilon=attributes.get("epsilon", 1e-5),
        ),
        helper.make_node("Shape", [x], [shape], name=shape),
        helper.make_node("Reshape", [normal, shape], [y], name=f"{y}_ungrouped"),
    ]


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
