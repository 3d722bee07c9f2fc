"""Q/DQ where ONNX Runtime's integer kernels on the CPU read them, from the same scales.

ONNX Runtime turns DQ -> operator -> Q into an integer kernel only where both sides are quantized, and its fast kernels
(VNNI, AMX) multiply unsigned activations with signed weights. So this placement differs from TensorRT's in four ways:

1. Every convolution's output is quantized, behind the Relu or Clip that nothing else reads: ONNX Runtime drops a Relu
   before a Q whose zero point is the lowest code, and the convolution becomes QLinearConv.
2. Activations are uint8: zero point 0 where the graph guarantees values >= 0, else 128. The scale is the same amax /
   127, so inside the threshold the codes carry the same values as TensorRT's; above it they saturate later. Behind a
   Clip with an upper bound the scale is amax / 255, or the Clip would not be dropped.
3. Pools, Concats, Adds whose sum goes on into integer kernels, and the operators that only move values carry INT8 on,
   with a pair on both sides.
4. A matrix product needs no quantized output: its kernel scales the sums and adds the bias in float. So between the
   products of a transformer everything stays float: the residual stream, whose Add fuses with the LayerNormalization
   behind it, and every reader but the integer kernels of a tensor that was computed in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from engines.graph import constant_array, is_activation, name_of
from engines.node_rules import weighted_nodes
from engines.placement import (
    ActivationPoint,
    Origins,
    Placement,
    WeightPoint,
    clip_bounds,
    commutes,
    main_graph_uses,
    operands,
    sole_consumer,
    weight_axis,
)
from engines.placement_options import PlacementOptions

Want = Callable[[ir.Value | None, str, str], None]
"""Asks for a pair on a tensor: value, rule, reason."""

CARRIERS = ("Add", "AveragePool", "GlobalAveragePool", "Concat", "Resize")
"""Operators with integer kernels in ONNX Runtime that compute new values: quantized on both sides."""


def place_for_cpu(
    model: ir.Model,
    options: PlacementOptions | None = None,
    *,
    amax: Mapping[str, float] | None = None,
) -> Placement:
    """Plan unsigned activations and signed weights for ONNX Runtime's integer kernels.

    Args:
        model: a prepared model; it is not changed.
        options: what the user wants.
        amax: largest magnitude that calibration saw, by tensor name; serves the rule for detection heads.
    """
    chosen, decisions = weighted_nodes(model, options, target="cpu", amax=amax)
    origins = Origins()
    reaching = _reaching(model, {node.name for node in chosen})
    kernels, computed = set(chosen), set[ir.Value]()
    rules: dict[str, tuple[ir.Value, str, str]] = {}

    def want(value: ir.Value | None, rule: str, reason: str) -> None:
        if value is not None and is_activation(value):
            rules.setdefault(name_of(value), (value, rule, reason))

    for node in chosen:
        data, _ = operands(node)
        source = node.inputs[data]
        if source is None:
            raise AssertionError(f"{node.name} has no data input")
        want(origins.root(source), "weighted-inputs", f"data input of {node.op_type}")
        if node.op_type == "Conv":
            want(tail(node.outputs[0]), "conv-output", "a convolution becomes QLinearConv only with a quantized output")
            computed.add(tail(node.outputs[0]))
    for node in model.graph:
        if carried := _carry(node, reaching, rules, want):
            kernels.add(node)
            computed.update(carried)
    points = tuple(
        _point(value, rule, reason, origins, None if value in computed else _integer_uses(value, kernels))
        for value, rule, reason in (rules[name] for name in _in_graph_order(model, rules))
    )
    weights = tuple(_weight(node, origins) for node in chosen)
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
    reaching: set[ir.Value],
    rules: dict[str, tuple[ir.Value, str, str]],
    want: Want,
) -> list[ir.Value]:
    """Extend the quantized region across a node that can compute on INT8, or only moves values.

    Returns:
        What it gives as INT8 then; nothing where it stays float.
    """
    if node.domain != "":
        return []
    if commutes(node):
        source = node.inputs[0]
        if source is None or name_of(source) not in rules:
            return []
        moved = [output for output in node.outputs if output in reaching]
        for output in moved:
            want(output, "commuting", f"{node.op_type} moves INT8 values on, with the scale of its input")
        return moved
    if node.op_type not in CARRIERS:
        return []
    data = [value for value in node.inputs[: 1 if node.op_type == "Resize" else None] if is_activation(value)]
    output = tail(node.outputs[0])
    floating = node.op_type == "Add" and (len(data) < len(node.inputs) or output not in reaching)
    if floating or not data or not any(value is not None and name_of(value) in rules for value in data):
        return []
    if node.op_type not in ("Add", "Concat") and any(value is None or name_of(value) not in rules for value in data):
        return []
    for value in data:
        want(value, "integer-operator", f"input of {node.op_type}, which computes on INT8")
    want(output, "integer-operator", f"output of {node.op_type}, which computes on INT8")
    return [output]


def _reaching(model: ir.Model, chosen: set[str | None]) -> set[ir.Value]:
    """Find the values that an operator that computes on INT8 reads, directly or across commuting operators.

    An Add counts where its sum is one of them: what is only summed up further and read in float stays float.
    """
    found: set[ir.Value] = set()
    for node in reversed(model.graph):
        for output in node.outputs:
            if any(
                reader.name in chosen
                or (reader.op_type in CARRIERS and (reader.op_type != "Add" or tail(reader.outputs[0]) in found))
                or (commutes(reader) and index == 0 and any(moved in found for moved in reader.outputs))
                for reader, index in main_graph_uses(output)
            ):
                found.add(output)
    return found


def _integer_uses(value: ir.Value, kernels: set[ir.Node]) -> tuple[tuple[str, int], ...]:
    """Return the edges on which integer kernels read a value that was computed in float; the others read that."""
    return tuple((node.name or "", index) for node, index in main_graph_uses(value) if node in kernels)


def _point(
    value: ir.Value, rule: str, reason: str, origins: Origins, uses: tuple[tuple[str, int], ...] | None
) -> ActivationPoint:
    nonnegative = origins.never_negative(value)
    producer = origins.root(value).producer()
    ceiling = clip_bounds(producer)[1] if producer is not None and producer.op_type == "Clip" else None
    if not nonnegative or (ceiling is not None and ceiling <= 0):
        ceiling = None  # nothing above zero is left that a code could stand for
    return ActivationPoint(
        tensor=name_of(value),
        scale_of=name_of(origins.root(value)),
        uses=uses,
        rule=rule,
        reason=reason,
        unsigned=True,
        nonnegative=nonnegative,
        divisor=127 if ceiling is None else 255,
        ceiling=ceiling,
    )


def _weight(node: ir.Node, origins: Origins) -> WeightPoint:
    data, weight = operands(node)
    source = node.inputs[data]
    if source is None:
        raise AssertionError(f"{node.name} has no data input")
    # The integer convolution and Gemm add an INT32 bias of scale s_x * s_w; a float one would keep them float.
    scale_of = name_of(origins.root(source))
    return WeightPoint(node.name or "", weight, weight_axis(node), scale_of, _has_channel_bias(node))


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
