"""Q/DQ where ONNX Runtime's integer kernels on the CPU read them, from the same scales.

ONNX Runtime turns DQ -> operator -> Q into an integer kernel only where both sides are quantized, and its fast kernels
(VNNI, AMX) multiply unsigned activations with signed weights. So this placement differs from TensorRT's in three ways:

1. Every convolution's output is quantized, behind the Relu or Clip that nothing else reads: ONNX Runtime drops a Relu
   before a Q whose zero point is the lowest code, and the convolution becomes QLinearConv.
2. Activations are uint8: zero point 0 where the graph guarantees values >= 0, else 128. The scale is the same amax /
   127, so inside the threshold the codes carry the same values as TensorRT's; above it they saturate later. Behind a
   Clip with an upper bound the scale is amax / 255, or the Clip would not be dropped.
3. Pools, Adds, Concats and the operators that only move values carry INT8 on, with a pair on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from engines.graph import constant_array, is_activation, name_of
from engines.placement import (
    ActivationPoint,
    Placement,
    WeightPoint,
    clip_bounds,
    commutes,
    main_graph_uses,
    never_negative,
    operands,
    root,
    scale_tensor,
    sole_consumer,
    weight_axis,
    weighted_nodes,
)

Want = Callable[[ir.Value | None, str, str], None]
"""Asks for a pair on a tensor: value, rule, reason."""

CARRIERS = ("Add", "AveragePool", "GlobalAveragePool", "Concat", "Resize")
"""Operators with integer kernels in ONNX Runtime that compute new values: quantized on both sides."""


def place_for_cpu(model: ir.Model, *, exclude: Sequence[str] = ()) -> Placement:
    """Plan unsigned activations and signed weights for ONNX Runtime's integer kernels.

    Args:
        model: a prepared model; it is not changed.
        exclude: regular expressions; weighted nodes whose whole name matches stay float.
    """
    chosen, decisions = weighted_nodes(model, exclude)
    names = {node.name for node in chosen}
    rules: dict[str, tuple[ir.Value, str, str]] = {}

    def want(value: ir.Value | None, rule: str, reason: str) -> None:
        if value is not None and is_activation(value):
            rules.setdefault(name_of(value), (value, rule, reason))

    for node in chosen:
        data, _ = operands(node)
        source = node.inputs[data]
        if source is None:
            raise AssertionError(f"{node.name} has no data input")
        want(root(source), "weighted-inputs", f"data input of {node.op_type}")
        if node.op_type == "Conv":
            want(tail(node.outputs[0]), "conv-output", "a convolution becomes QLinearConv only with a quantized output")
    for node in model.graph:
        _carry(node, names, rules, want)
    points = tuple(
        _point(value, rule, reason) for value, rule, reason in (rules[name] for name in _in_graph_order(model, rules))
    )
    weights = tuple(_weight(node) for node in chosen)
    return Placement("cpu", points, weights, tuple(decisions))


def tail(value: ir.Value) -> ir.Value:
    """Return the output of the Relu or Clip that fuses with the producer of `value`, or `value` itself."""
    consumer = sole_consumer(value)
    if consumer is None:
        return value
    fuses = consumer.op_type == "Relu"
    if consumer.op_type == "Clip" and consumer.inputs[0] is value:
        low, high = clip_bounds(consumer)
        unlimited = len(consumer.inputs) < 3 or consumer.inputs[2] is None
        fuses = low == 0.0 and (unlimited or (high is not None and high > 0))
    return consumer.outputs[0] if fuses else value


def _carry(
    node: ir.Node,
    chosen: set[str | None],
    rules: dict[str, tuple[ir.Value, str, str]],
    want: Want,
) -> None:
    """Extend the quantized region across a node that can compute on INT8, or only moves values."""
    if node.domain != "":
        return
    if commutes(node):
        source = node.inputs[0]
        if source is not None and name_of(source) in rules:
            for output in node.outputs:
                if _reaches_quantized(output, chosen):
                    want(output, "commuting", f"{node.op_type} moves INT8 values on, with the scale of its input")
        return
    if node.op_type not in CARRIERS:
        return
    data = [value for value in node.inputs[: 1 if node.op_type == "Resize" else None] if is_activation(value)]
    constants = node.op_type == "Add" and len(data) < len(node.inputs)
    if constants or not data or not any(value is not None and name_of(value) in rules for value in data):
        return
    if node.op_type in ("Add", "Concat") or all(value is not None and name_of(value) in rules for value in data):
        for value in data:
            want(value, "integer-operator", f"input of {node.op_type}, which computes on INT8")
        want(tail(node.outputs[0]), "integer-operator", f"output of {node.op_type}, which computes on INT8")


def _reaches_quantized(value: ir.Value, chosen: set[str | None]) -> bool:
    """Tell whether an operator that computes on INT8 reads a value, directly or across commuting operators."""
    return any(
        node.name in chosen
        or node.op_type in CARRIERS
        or (commutes(node) and index == 0 and any(_reaches_quantized(output, chosen) for output in node.outputs))
        for node, index in main_graph_uses(value)
    )


def _point(value: ir.Value, rule: str, reason: str) -> ActivationPoint:
    nonnegative = never_negative(value)
    producer = root(value).producer()
    ceiling = clip_bounds(producer)[1] if producer is not None and producer.op_type == "Clip" else None
    if not nonnegative or (ceiling is not None and ceiling <= 0):
        ceiling = None  # nothing above zero is left that a code could stand for
    return ActivationPoint(
        tensor=name_of(value),
        scale_of=scale_tensor(value),
        uses=None,
        rule=rule,
        reason=reason,
        unsigned=True,
        nonnegative=nonnegative,
        divisor=127 if ceiling is None else 255,
        ceiling=ceiling,
    )


def _weight(node: ir.Node) -> WeightPoint:
    data, weight = operands(node)
    source = node.inputs[data]
    if source is None:
        raise AssertionError(f"{node.name} has no data input")
    # The integer convolution and Gemm add an INT32 bias of scale s_x * s_w; a float one would keep them float.
    return WeightPoint(node.name or "", weight, weight_axis(node), scale_tensor(source), _has_channel_bias(node))


def _has_channel_bias(node: ir.Node) -> bool:
    """Tell whether a Conv or Gemm adds one constant for each output channel, and scales neither part."""
    if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3:
        return False
    if any(node.attributes[name].as_float() != 1.0 for name in ("alpha", "beta") if name in node.attributes):
        return False
    weight, bias, axis = constant_array(node.inputs[1]), constant_array(node.inputs[2]), weight_axis(node)
    if weight is None or bias is None or axis is None or bias.dtype != ir.DataType.FLOAT:
        return False
    *leading, last = bias.shape.numpy() or (0,)
    return all(length == 1 for length in leading) and last in (1, weight.shape.numpy()[axis])


def _in_graph_order(model: ir.Model, rules: dict[str, tuple[ir.Value, str, str]]) -> list[str]:
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return [value.name for value in values if value.name in rules and value.name is not None]
