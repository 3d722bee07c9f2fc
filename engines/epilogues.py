"""What TensorRT computes in one kernel with a convolution: bias, batch norm, activation, and the sum of a residual.

A Q belongs behind all of that and never between: the kernel then writes INT8 itself, and inside it nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir

from engines.graph import constant_array, is_activation
from engines.placement import sole_consumer

UNARY = frozenset((
    "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Elu", "Selu", "Celu",
    "Softplus", "Softsign", "Mish", "ThresholdedRelu", "BatchNormalization", "Erf", "Gelu", "Neg", "Abs", "Exp", "Sqrt",
))  # fmt: skip
"""Operators that turn each value into another one by itself; batch norm by constants for each channel."""

BINARY = frozenset(("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"))
"""The same where one of the operands is a constant."""


def self_gated(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Find the Muls of activations that are written with several operators: x * gate(x).

    SiLU is x * Sigmoid(x), HardSwish x * HardSigmoid(x) or x * Clip(x + 3, 0, 6) / 6, Mish x * Tanh(Softplus(x)), GELU
    x * (1 + Erf(x / sqrt 2)) / 2. The gate is a chain of pointwise operators that nothing else reads. (The gate of a
    squeeze-and-excitation block is none: it comes from an average.)
    """
    gate_of: dict[ir.Value, ir.Value] = {}
    found: set[ir.Node] = set()
    for node in nodes:
        source = pointwise_source(node)
        if source is not None:
            gate_of[node.outputs[0]] = gate_of[source] if source in gate_of and _only(source, node) else source
        elif node.op_type == "Mul" and node.domain == "":
            left, right = node.inputs
            if any(
                gate is not None and gate_of.get(gate) is gated and _only(gate, node)
                for gated, gate in ((left, right), (right, left))
            ):
                found.add(node)
    return found


def epilogues(
    nodes: Iterable[ir.Node],
    quantized: Collection[str | None],
    gated: Collection[ir.Node],
    skips: Mapping[ir.Node, int] | None = None,
) -> dict[ir.Value, ir.Node]:
    """Name the quantized convolution that computes each value, for those that one computes.

    Args:
        nodes: of the main graph, producers before consumers.
        quantized: names of the nodes that compute on INT8.
        gated: what `self_gated` finds.
        skips: the residual Adds that fuse too, and the index of the skip of each.
    """
    computed: dict[ir.Value, ir.Node] = {}
    for node in nodes:
        if node.op_type in ("Conv", "ConvTranspose") and node.domain == "" and node.name in quantized:
            computed[node.outputs[0]] = node
            continue
        source: ir.Value | None
        if skips is not None and node in skips:
            source = node.inputs[1 - skips[node]]
        elif node in gated:
            # The input of the gate has two readers: the gate and this Mul.
            source = next((value for value in node.inputs if value in computed and _gates(value)), None)
            if source is not None:
                computed[node.outputs[0]] = computed[source]
            continue
        else:
            source = pointwise_source(node)
        if source is not None and source in computed and _only(source, node):
            computed[node.outputs[0]] = computed[source]
    return computed


def pointwise_source(node: ir.Node) -> ir.Value | None:
    """Return the activation that a pointwise operator turns value by value into its output; None for other nodes."""
    if node.domain != "" or node.op_type not in UNARY | BINARY:
        return None
    values = [value for value in node.inputs if value is not None and constant_array(value) is None]
    if len(values) != 1 or not is_activation(values[0]):
        return None
    if node.op_type in UNARY and values[0] is not node.inputs[0]:
        return None
    return values[0] if same_shape(values[0].shape, node.outputs[0].shape) else None


def same_shape(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    """Tell whether two shapes can be the same, as far as they are known.

    A size of 1 beside one that is only known at run time counts as another one: that is how broadcasts are drawn.
    """
    if left is None or right is None:
        return True
    return len(left) == len(right) and not any(
        one != other and ((isinstance(one, int) and isinstance(other, int)) or 1 in (one, other))
        for one, other in zip(left, right, strict=True)
    )


def _gates(value: ir.Value) -> bool:
    return len(value.uses()) == 2 and not value.is_graph_output()


def _only(value: ir.Value, node: ir.Node) -> bool:
    return sole_consumer(value) is node
