"""Layer normalizations in one node, as opset 17 has them; exports of older opsets write them with nine.

    y = (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + epsilon) * scale + bias        over the last axis

TensorRT has a layer for the one node, which sums in FP32 in an FP16 engine too; of the nine, the squares leave FP16's
range first. Rules of placement and smoothing know a normalization by the one node as well.

Source: Ba et al., "Layer Normalization", 2016; ONNX, LayerNormalization.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibrators.protocols import Array
from engines.free_names import FreeNames

AXIS = -1


@dataclass(frozen=True, slots=True)
class _Normalization:
    """What is computed of `data`, up to and with `last`, whose output is the normalized tensor."""

    data: ir.Value
    epsilon: float
    last: ir.Node


def join_layer_norms(model: ir.Model) -> int:
    """Replace written-out layer normalizations by LayerNormalization; the output keeps its name.

    Args:
        model: with shapes; edited in place, in the main graph. What nothing reads any more is left to others.

    Returns:
        How many there were.
    """
    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    names = FreeNames(value.name for value in (*graph.inputs, *graph.initializers.values(), *made))
    count = 0
    for node in list(graph):
        found = _normalization(node)
        length = None if found is None or found.data.shape is None else found.data.shape[AXIS]
        if found is None or not isinstance(length, int):
            continue
        last, scale = _affine(found.last, "Mul", length)
        last, bias = _affine(last, "Add", length)
        # Quantizers name the scale of a tensor TENSOR_scale.
        constants = {"gamma": np.ones(length, np.float32) if scale is None else scale, "beta": bias}
        inputs = [found.data]
        for part, array in constants.items():
            if array is not None:
                inputs.append(_initializer(graph, names.take(f"{last.outputs[0].name}_{part}"), array))
        joined = ir.node("LayerNormalization", inputs, {"axis": AXIS, "epsilon": found.epsilon}, name=last.name)
        joined.outputs[0].type, joined.outputs[0].shape = last.outputs[0].type, last.outputs[0].shape
        ir.convenience.replace_nodes_and_values(graph, last, [last], [joined], last.outputs, joined.outputs)
        count += 1
    return count


def _normalization(node: ir.Node) -> _Normalization | None:
    """Return the normalization that a Div by the deviation ends, without scale and bias."""
    if node.op_type != "Div" or node.domain != "" or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    centred, deviation = node.inputs
    difference, root = _made_by(centred, "Sub"), _made_by(deviation, "Sqrt")
    if difference is None or root is None:
        return None
    data, mean = difference.inputs
    if data is None or data.dtype != ir.DataType.FLOAT or _mean_of(mean) is not data:
        return None
    total = _made_by(root.inputs[0], "Add")
    for variance, constant in (total.inputs, total.inputs[::-1]) if total is not None else ():
        epsilon, square = _constant(constant), _mean_of(variance)
        if epsilon is not None and epsilon.size == 1 and square is not None and _squares(square, data, centred):
            return _Normalization(data, float(epsilon.numpy().reshape(-1)[0]), node)
    return None


def _squares(value: ir.Value, data: ir.Value, centred: ir.Value | None) -> bool:
    """Tell whether a value is the square of what is left of `data` without its mean."""
    power, product = _made_by(value, "Pow"), _made_by(value, "Mul")
    if power is not None:
        exponent = _constant(power.inputs[1])
        bases = [power.inputs[0]] if exponent is not None and (exponent.numpy() == 2).all() else []
    else:
        bases = [] if product is None or product.inputs[0] is not product.inputs[1] else [product.inputs[0]]
    if not bases:
        return False
    again = _made_by(bases[0], "Sub")  # some exporters subtract a second time
    return bases[0] is centred or (again is not None and again.inputs[0] is data and _mean_of(again.inputs[1]) is data)


def _mean_of(value: ir.Value | None) -> ir.Value | None:
    """Return what a value is the mean of along the last axis, the axis kept; None for other values."""
    node = _made_by(value, "ReduceMean")
    data = None if node is None else node.inputs[0]
    if node is None or data is None or data.shape is None:
        return None
    keep, axes = node.attributes.get("keepdims"), _constant(node.inputs[1] if len(node.inputs) > 1 else None)
    if (keep is not None and not keep.as_int()) or axes is None or axes.size != 1:
        return None
    return data if int(axes.numpy().reshape(-1)[0]) % len(data.shape) == len(data.shape) - 1 else None


def _affine(node: ir.Node, kind: str, length: int) -> tuple[ir.Node, Array | None]:
    """Return the Mul or Add by constants along the last axis that alone reads a node, and those; else the node."""
    output = node.outputs[0]
    uses = list(output.uses())
    reader = uses[0].node if len(uses) == 1 and not output.is_graph_output() else None
    if reader is None or reader.op_type != kind or reader.domain != "" or len(reader.inputs) != 2:
        return node, None
    constant = _constant(reader.inputs[1 - uses[0].idx])
    if constant is None or constant.dtype != ir.DataType.FLOAT:
        return node, None
    *leading, last = constant.shape.numpy() or (1,)
    if last not in (1, length) or any(size != 1 for size in leading) or len(leading) >= len(output.shape or ()):
        return node, None
    return reader, np.broadcast_to(constant.numpy().reshape(-1), (length,)).astype(np.float32)


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and node.domain == "" else None


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else value.const_value or ir.convenience.get_const_tensor(value)


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
