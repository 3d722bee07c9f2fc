"""Weights that the simplifier did not see, behind operators that only move or convert them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from calibrators.protocols import Array
from engines.one_node import evaluate
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
        arrays = {str(value.name): _constant(value) for value in node.inputs if value is not None}
        output = node.outputs[0]
        if not isinstance(source.const_value, ir.ExternalTensor) or output.is_graph_output():
            continue
        known = {name: array for name, array in arrays.items() if array is not None}
        if len(known) < len(arrays):
            continue
        result = evaluate(node, known, str(output.name), int(model.opset_imports.get("", MINIMUM_OPSET)))
        if result is None:
            continue
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


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()
