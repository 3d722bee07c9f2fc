"""Q/DQ where TensorRT's fusions read them.

Rules, from NVIDIA's guide to explicit quantization and ModelOpt's placement:

1. Every input of a weighted operator is quantized: the activation per tensor, the weight per output channel. Biases
stay float.
2. Outputs are not quantized; the Q of the next consumer does it, after the fused activation.
3. Residual rule: of an Add that a convolution feeds, the skip input is quantized and the convolution's is not. TensorRT
   fuses Conv + Add (+ Relu) into one kernel that reads the skip as INT8; a Q between Conv and Add would split it.
4. Pad is fused with the convolution behind it only where nothing stands between them, so the pair goes before the Pad.
5. Operators that commute with Q/DQ (MaxPool, Reshape, ...) get no pair of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from engines.graph import is_activation, name_of
from engines.placement import (
    ActivationPoint,
    Placement,
    Residual,
    WeightPoint,
    commutes,
    operands,
    scale_tensor,
    sole_consumer,
    weight_axis,
    weighted_nodes,
)


@dataclass(slots=True)
class _Pair:
    """A pair in the making: several edges of one tensor share it."""

    value: ir.Value
    rule: str
    reason: str
    uses: list[tuple[str, int]] = field(default_factory=list)


def place_for_tensorrt(model: ir.Model, *, residual: Residual = "int8", exclude: Sequence[str] = ()) -> Placement:
    """Plan signed INT8 with zero point 0 for TensorRT.

    Args:
        model: a prepared model; it is not changed.
        residual: "int8" quantizes the skip input of residual Adds, as TensorRT's Conv + Add fusion wants it; "float"
            leaves it alone, which is more exact and slower.
        exclude: regular expressions; weighted nodes whose whole name matches stay float.
    """
    chosen, decisions = weighted_nodes(model, exclude)
    quantized = {node.name for node in chosen}
    pairs: dict[str, _Pair] = {}
    weights: list[WeightPoint] = []
    for node in chosen:
        data, weight = operands(node)
        edge_node, index = _before_pads(node, data, quantized)
        value = edge_node.inputs[index]
        if value is None:
            raise AssertionError(f"{node.name} has no data input")
        rule, reason = "weighted-inputs", f"input of {node.op_type}"
        if edge_node is not node:
            rule, reason = "before-pad", f"before the Pad that fuses with {node.op_type} {node.name!r}"
        _add(pairs, value, edge_node, index, rule, reason)
        weights.append(WeightPoint(node.name or "", weight, weight_axis(node), scale_tensor(value)))
    if residual == "int8":
        for node in model.graph:
            skip = residual_input(node, quantized)
            if skip is not None:
                value = node.inputs[skip]
                if value is None:
                    raise AssertionError(f"{node.name} has no input {skip}")
                reason = "skip input of a residual Add: Conv + Add fuse into one kernel that reads it as INT8"
                _add(pairs, value, node, skip, "residual-skip", reason)
    points = tuple(
        ActivationPoint(name, scale_tensor(pair.value), tuple(pair.uses), pair.rule, pair.reason)
        for name, pair in pairs.items()
    )
    return Placement("tensorrt", points, tuple(weights), tuple(decisions))


def residual_input(node: ir.Node, quantized: set[str | None]) -> int | None:
    """Return the index of the skip input of a residual Add, or None where `node` is none.

    One input of a residual Add comes straight from a quantized convolution that nothing else reads: the branch. The
    other one, of the same shape, is the skip; an Add that broadcasts does not fuse. Where both inputs are such
    convolutions (a projection shortcut), the one with the longer way back to the common ancestor is the branch.
    """
    if node.op_type != "Add" or node.domain != "" or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if left is None or right is None or not (is_activation(left) and is_activation(right)):
        return None
    if not _may_be_alike(left.shape, right.shape):
        return None
    branches = [_is_branch(value, quantized) for value in (left, right)]
    if branches == [True, True]:
        ways = _ways_to_common_ancestor(left, right)
        return 0 if ways is not None and ways[0] < ways[1] else 1
    if branches == [True, False]:
        return 1
    if branches == [False, True]:
        return 0
    return None


def _is_branch(value: ir.Value, quantized: set[str | None]) -> bool:
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type in ("Conv", "ConvTranspose")
        and producer.name in quantized
        and sole_consumer(value) is not None
    )


def _ways_to_common_ancestor(left: ir.Value, right: ir.Value) -> tuple[int, int] | None:
    """Count the nodes from each value back to the nearest value that both depend on; None where there is none."""
    first, second = _distances(left), _distances(right)
    common = first.keys() & second.keys()
    if not common:
        return None
    nearest = min(common, key=lambda name: (first[name] + second[name], name))
    return first[nearest], second[nearest]


def _distances(value: ir.Value, limit: int = 400) -> dict[str, int]:
    """Breadth-first distances to the activations that `value` depends on, at most `limit` of them.

    The limit bounds the work on deep graphs: blocks are tens of nodes long, and the nearest ancestor is what counts.
    """
    distances = {name_of(value): 0}
    frontier = [value]
    while frontier and len(distances) < limit:
        following: list[ir.Value] = []
        for current in frontier:
            producer = current.producer()
            for source in producer.inputs if producer is not None else ():
                if source is not None and is_activation(source) and name_of(source) not in distances:
                    distances[name_of(source)] = distances[name_of(current)] + 1
                    following.append(source)
        frontier = following
    return distances


def _may_be_alike(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    """Tell whether two shapes can be the same, as far as they are known."""
    if left is None or right is None:
        return True
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and not any(
        isinstance(one, int) and isinstance(other, int) and one != other for one, other in pairs
    )


def _before_pads(node: ir.Node, index: int, quantized: set[str | None]) -> tuple[ir.Node, int]:
    """Move an edge back across the Pads right before a convolution, where they serve quantized convolutions alone."""
    while node.op_type in ("Conv", "ConvTranspose", "Pad"):
        value = node.inputs[index]
        producer = value.producer() if value is not None else None
        if value is None or producer is None or producer.op_type != "Pad" or not commutes(producer):
            break
        if not _feeds_only(value, quantized):
            break
        node, index = producer, 0
    return node, index


def _feeds_only(value: ir.Value, quantized: set[str | None]) -> bool:
    """Tell whether a value reaches nothing but quantized convolutions, directly or across further Pads."""
    return not value.is_graph_output() and all(
        use.idx == 0
        and (
            (use.node.op_type in ("Conv", "ConvTranspose") and use.node.name in quantized)
            or (use.node.op_type == "Pad" and commutes(use.node) and _feeds_only(use.node.outputs[0], quantized))
        )
        for use in value.uses()
    )


def _add(pairs: dict[str, _Pair], value: ir.Value, node: ir.Node, index: int, rule: str, reason: str) -> None:
    pair = pairs.setdefault(name_of(value), _Pair(value, rule, reason))
    edge = (node.name or "", index)
    if edge not in pair.uses:
        pair.uses.append(edge)
