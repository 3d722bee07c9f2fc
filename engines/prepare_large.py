"""Weights that the simplifier did not see, behind operators that only move or convert them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from calibrators.protocols import Array
from engines.opset import MINIMUM_OPSET

_MOVING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def fold_moved_weights(model: ir.Model, keep: Callable[[ir.Value], None]) -> int:
    """Compute what stands between a large weight and the node that reads it, one weight at a time.

    Args:
        model: whose large weights are `ir.ExternalTensor`s; edited in place, in the main graph.
        keep: called with every new constant, as soon as it is made.

    Returns:
        The number of nodes that were folded.
    """
    folded = 0
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in _MOVING or node.domain != "" or source is None:
            continue
        arrays = [_constant(value) for value in node.inputs]
        output = node.outputs[0]
        if not isinstance(source.const_value, ir.ExternalTensor) or output.is_graph_output():
            continue
        if any(array is None for array in arrays):
            continue
        values = [array for array in arrays if array is not None]
        result = _evaluate(node, values, int(model.opset_imports.get("", MINIMUM_OPSET)))
        new = ir.Value(name=output.name, const_value=ir.tensor(np.ascontiguousarray(result), name=output.name))
        new.shape, new.dtype = ir.Shape(result.shape), ir.DataType.from_numpy(result.dtype)
        output.replace_all_uses_with(new)
        output.name = None
        graph.remove(node, safe=True)
        graph.register_initializer(new)
        keep(new)
        if not source.uses():
            graph.initializers.pop(str(source.name))
        folded += 1
    return folded


def _evaluate(node: ir.Node, arrays: list[Array], opset: int) -> Array:
    """Run one node in ONNX's reference implementation."""
    names = [f"input_{index}" for index in range(len(arrays))]
    proto: onnx.NodeProto = ir.serde.serialize_node(node)
    del proto.input[:]
    proto.input.extend(names)
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    graph = onnx.helper.make_graph([proto], "weight", inputs, [onnx.ValueInfoProto(name=proto.output[0])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    results: Any = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    result: Array = results[0]
    return result


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()
