"""Detection heads, found by what they do and by the ranges of their values, whatever they are called.

Behind a detector's last convolutions nothing is learned any more: their outputs, one map of predictions for each of
several resolutions, are written into lists of boxes and class scores and decoded with fixed arithmetic. A decoded
coordinate is an offset times the stride of its map, or the exponential of a prediction, so that a rounding step of INT8
becomes pixels, and no later layer averages it away; and coordinates in hundreds of pixels share a tensor with scores
between 0 and 1. The last convolutions are a small part of the work, and stay float.

Two signs, each enough by itself:

1. Structure. Convolutions with nothing learned behind them, at two or more resolutions, whose maps are flattened into
   lists of positions. Segmentation networks bring such maps to one size before they are joined, classifiers average
   them, pyramids hand them out as maps: none of those are flattened.
2. Value ranges, where calibration gave them. A tensor behind convolutions with nothing learned in between holds scores
   of at most 1 (outputs of Sigmoid or Softmax) beside values that are more than `RANGE_RATIO` times larger.

Everything here walks the graph a fixed number of times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engines.graph import constant_array, is_activation, name_of
from engines.node_facts import (
    holds_weights,
    int_attribute,
    ints_attribute,
    is_embedding,
    is_expectation,
    weight_shape,
)
from engines.placement import WEIGHTED, commutes

RANGE_RATIO = 16.0
"""Ratio of two ranges from which one scale for both leaves the smaller one fewer than 8 of 127 codes."""

_SCORES = ("Sigmoid", "Softmax", "HardSigmoid")
_REDUCING = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Resize", "Upsample", "ArgMax", "ArgMin",
)  # fmt: skip
"""Operators behind which a map no longer holds a prediction for every position of the convolution's own map."""

Resolution = tuple[int, ...] | float
"""Sizes of a map's axes where they are known, else how many input samples one step stands for; never mixed."""


@dataclass(frozen=True, slots=True)
class _Tail:
    """What follows the last convolutions.

    Attributes:
        ends: convolutions with nothing learned behind them, in graph order.
        nodes: the nodes behind those, in graph order.
    """

    ends: tuple[ir.Node, ...]
    nodes: tuple[ir.Node, ...]


def detection_heads(nodes: Sequence[ir.Node], amax: Mapping[str, float]) -> dict[str, str]:
    """Find the last convolutions of a detector.

    Args:
        nodes: the nodes of the main graph, producers before consumers.
        amax: largest magnitude that calibration saw, by tensor name; empty where nothing is known.

    Returns:
        The reason, by the name of the node.
    """
    tail = _tail(nodes)
    if not tail.ends:
        return {}
    return _by_ranges(tail, amax) | _by_structure(tail, nodes)


def _tail(nodes: Sequence[ir.Node]) -> _Tail:
    """Split off what has nothing learned behind it."""
    learned = {node: _is_learned(node) for node in nodes}
    ahead: set[str] = set()  # tensors that something learned reads, directly or later
    for node in reversed(nodes):
        leads = learned[node] or any(_leads(output, ahead) for output in node.outputs)
        for value in node.inputs:
            if value is not None and leads:
                ahead.add(name_of(value))
    ends = tuple(
        node
        for node in nodes
        if learned[node] and node.op_type == "Conv" and weight_shape(node) and not _leads(node.outputs[0], ahead)
    )
    reached = {name_of(node.outputs[0]) for node in ends}
    behind: list[ir.Node] = []
    for node in nodes:
        if any(name_of(value) in reached for value in _data(node)):
            behind.append(node)
            reached.update(name_of(output) for output in node.outputs if output.name)
    return _Tail(ends, tuple(behind))


def _leads(value: ir.Value, ahead: Set[str]) -> bool:
    """Tell whether a value may reach something learned: a branch or loop body that reads it may hold anything."""
    return value.name in ahead or any(use.node.graph is not value.graph for use in value.uses())


def _is_learned(node: ir.Node) -> bool:
    """Tell whether a node holds trained weights; products of activations, tables and fixed averages do not."""
    if not holds_weights(node) or is_embedding(node):
        return False
    if node.op_type in WEIGHTED and node.domain == "" and weight_shape(node) is None:
        return node.op_type != "MatMul"  # a kernel that is computed at run time
    return not is_expectation(node)


def _by_structure(tail: _Tail, nodes: Sequence[ir.Node]) -> dict[str, str]:
    flattened = _flattened(tail)
    steps = _steps(nodes)
    heads = [node for node in tail.ends if name_of(node.outputs[0]) in flattened]
    found = {node: _resolution(node.outputs[0], steps) for node in heads}
    known = [resolution for resolution in found.values() if resolution is not None]
    sizes = {resolution for resolution in known if isinstance(resolution, tuple)}
    scales = {resolution for resolution in known if not isinstance(resolution, tuple)}
    resolutions = max(len(sizes), len(scales))
    if resolutions < 2:
        return {}
    reason = (
        f"one of {len(heads)} convolutions whose predictions at {resolutions} resolutions are flattened into lists, "
        "with nothing learned behind them: in a detection head rounding moves boxes by pixels"
    )
    return {node.name or "": reason for node in heads}


def _flattened(tail: _Tail) -> set[str]:
    """Name the tensors whose positions are written into lists before anything reduces or resizes the map."""
    found: set[str] = set()
    for node in reversed(tail.nodes):
        if node.op_type in _REDUCING:
            continue
        if _flattens(node) or any(output.name in found for output in node.outputs):
            found.update(name_of(value) for value in _data(node))
    return found


def _flattens(node: ir.Node) -> bool:
    """Tell whether a node merges the axes of a map: a Reshape or Flatten from rank 4 or more to 3 or less.

    One that only drops axes of length 1, and leaves the two of the map, does not.
    """
    if node.op_type not in ("Reshape", "Flatten") or node.domain != "":
        return False
    before = node.inputs[0].shape if node.inputs[0] is not None else None
    after = node.outputs[0].shape
    if before is None or after is None or len(before) < 4 or len(after) > 3:
        return False
    kept = [size for size in after if size != 1]
    return len(kept) < 2 or kept != [size for size in before if size != 1]


def _resolution(value: ir.Value, steps: Mapping[str, float | None]) -> Resolution | None:
    """Return the resolution of a convolution's output; None where it is unknown, or a single position."""
    shape = value.shape
    if shape is not None and len(shape) > 2 and all(isinstance(size, int) for size in shape[2:]):
        sizes = tuple(int(size) for size in shape[2:] if isinstance(size, int))
        return None if math.prod(sizes) == 1 else sizes
    step = steps.get(name_of(value))
    return None if step is None or math.isinf(step) else step


def _steps(nodes: Sequence[ir.Node]) -> dict[str, float | None]:
    """Follow how many input samples one step along a map stands for; infinity for averages over the whole map.

    Where several inputs meet, they have one resolution, and the finest that is known is it. None where it is unknown.
    """
    steps: dict[str, float | None] = {}
    for node in nodes:
        given = [
            1.0 if value.is_graph_input() else steps.get(name_of(value))
            for value in (node.inputs[:1] if node.op_type in ("Resize", "Upsample") else node.inputs)
            if is_activation(value) and value is not None
        ]
        known = [step for step in given if step is not None]
        step = min(known) if known else None
        factor = _step_factor(node)
        result = None if step is None or factor is None else step * factor
        for output in node.outputs:
            if output.name:
                steps[output.name] = result
    return steps


def _step_factor(node: ir.Node) -> float | None:
    """Return by how much a node makes the steps of a map coarser; None where that is only known at run time."""
    kind = node.op_type
    if kind in ("Conv", "MaxPool", "AveragePool", "LpPool"):
        return float((ints_attribute(node, "strides") or (1,))[0])
    if kind == "ConvTranspose":
        return 1.0 / (ints_attribute(node, "strides") or (1,))[0]
    if kind in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        return math.inf
    if kind == "SpaceToDepth":
        return float(int_attribute(node, "blocksize", 1))
    if kind == "DepthToSpace":
        return 1.0 / int_attribute(node, "blocksize", 1)
    if kind == "Slice" and len(node.inputs) > 4 and node.inputs[4] is not None:
        taken = constant_array(node.inputs[4])
        return None if taken is None else float(np.abs(taken.numpy()).max(initial=1))
    if kind in ("Resize", "Upsample"):
        index = 2 if kind == "Resize" else 1
        scales = constant_array(node.inputs[index]) if len(node.inputs) > index else None
        return 1.0 / float(scales.numpy()[2]) if scales is not None and scales.size > 2 else None
    if kind.startswith("Reduce"):
        return None
    return 1.0


def _by_ranges(tail: _Tail, amax: Mapping[str, float]) -> dict[str, str]:
    if not amax:
        return {}
    scores = _scores(tail)
    largest = _largest(tail, amax)
    group = _groups(tail)
    reasons: dict[str, str] = {}
    for node in tail.nodes:
        if node.op_type != "Concat":
            continue
        parts = [name_of(value) in scores for value in node.inputs if value is not None]
        name = name_of(node.outputs[0])
        reach = largest.get(name, 0.0)
        if all(parts) or not any(parts) or reach < RANGE_RATIO:
            continue
        reasons.setdefault(
            group[name],
            f"its predictions end in {name!r}, where values up to {reach:.4g} stand beside scores of at most 1: in a "
            "detection head rounding moves boxes by pixels",
        )
    return {
        node.name or "": reasons[group[name_of(node.outputs[0])]]
        for node in tail.ends
        if group[name_of(node.outputs[0])] in reasons
    }


def _scores(tail: _Tail) -> set[str]:
    """Name the tensors that hold nothing above 1: what Sigmoid and Softmax give, their products and selections."""
    found: set[str] = set()
    for node in tail.nodes:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in ("Mul", "Concat"):
            bounded = all(name_of(value) in found for value in inputs)
        else:
            bounded = node.op_type in _SCORES or (commutes(node) and name_of(inputs[0]) in found)
        if bounded:
            found.update(name_of(output) for output in node.outputs if output.name)
    return found


def _largest(tail: _Tail, amax: Mapping[str, float]) -> dict[str, float]:
    """Bound tensors by what calibration saw of them, or of those that their values are moved to and joined in."""
    found: dict[str, float] = {}
    for node in reversed(tail.nodes):
        outputs = [name_of(output) for output in node.outputs if output.name]
        for name in outputs:
            if name in amax:
                found[name] = amax[name]
        if node.op_type == "Concat" or commutes(node):
            reach = max((found.get(name, 0.0) for name in outputs), default=0.0)
            for value in _data(node) if node.op_type == "Concat" else node.inputs[:1]:
                if value is not None:
                    found[name_of(value)] = max(found.get(name_of(value), 0.0), reach)
    return found


def _groups(tail: _Tail) -> dict[str, str]:
    """Give the tensors behind the last convolutions that are connected to each other one name (union-find)."""
    parents: dict[str, str] = {}

    def top(name: str) -> str:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    inside = {name_of(node.outputs[0]) for node in tail.ends}
    inside |= {name_of(output) for node in tail.nodes for output in node.outputs if output.name}
    for node in tail.nodes:
        connected = [name_of(value) for value in _data(node) if name_of(value) in inside]
        for name in (*connected, *(name_of(output) for output in node.outputs if output.name)):
            parents[top(name)] = top(connected[0])
    return {name: top(name) for name in sorted(inside)}


def _data(node: ir.Node) -> Iterator[ir.Value]:
    """Return the float activations that a node reads."""
    return (value for value in node.inputs if value is not None and is_activation(value))
