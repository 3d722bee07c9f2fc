"""Transposes of a graph that was drawn with its channels last, around operators that want them first.

A converter from such a framework writes Transpose, Conv, Transpose for every convolution. What lies between two of them
is mostly element-wise and does not care, so it is computed with the channels first, and the Transposes meet and cancel.
Otherwise they keep a convolution from its activation, and the two branches of a residual Add from each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from calibrators.protocols import Array

_UNARY = frozenset(
    {
        "Abs", "Cast", "Ceil", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu",
        "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign",
        "Sqrt", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
"""Element-wise in their first input; the others are scalars."""

_BROADCASTING = frozenset({"Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "PRelu", "Sub", "Sum"})
"""Element-wise in all inputs."""

_ALONG_AN_AXIS = frozenset({"Concat", "LogSoftmax", "Softmax"})
"""Element-wise but for the axis that an attribute names."""


@dataclass(slots=True)
class _Region:
    """Nodes that could all be computed before a Transpose instead of behind it."""

    permutation: tuple[int, ...]
    inverse: tuple[int, ...]
    sources: dict[ir.Value, ir.Node] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)


def cancel_transposes(model: ir.Model) -> int:
    """Move element-wise nodes before the Transposes that they read, where fewer Transposes remain then.

    Exact: no value changes, only the order in which a tensor holds it. A tensor that is kept keeps its name; one whose
    order changes takes the name of the transposed tensor that it becomes equal to, if there is one.

    Args:
        model: with shapes and constants as initializers; edited in place, in the main graph.

    Returns:
        The number of Transposes that went, less those that were added.
    """
    total = 0
    while True:
        # A Transpose that ends one region may begin another; what is left of that is seen in the next round.
        saved = sum(_rewrite(model.graph, region) for region in _regions(model.graph))
        if not saved:
            return total
        total += saved


def _regions(graph: ir.Graph) -> list[_Region]:
    """Find the regions, in one pass along the graph."""
    found: dict[int, _Region] = {}
    belongs: dict[ir.Value, int] = {}

    def merged(keys: set[int]) -> int:
        # The smaller regions join the largest, so that no value moves more than log2(n) times.
        first, *others = sorted(keys, key=lambda key: (-len(found[key].nodes), key))
        for key in others:
            other = found.pop(key)
            found[first].sources.update(other.sources)
            found[first].nodes.extend(other.nodes)
            for value in [*other.sources, *(output for node in other.nodes for output in node.outputs)]:
                belongs[value] = first
        return first

    for node in graph:
        permutation = _permutation(node)
        if permutation is not None:
            key = len(belongs)  # grows with every node, so it is new
            found[key] = _Region(permutation, _inverse(permutation), {node.outputs[0]: node})
            belongs[node.outputs[0]] = key
            continue
        carried = _carried_inputs(node)
        if not carried or any(value not in belongs for value in carried):
            continue
        keys = {belongs[value] for value in carried}
        permutations = {found[key].permutation for key in keys}
        if len(permutations) != 1 or not _fits(node, carried, len(next(iter(permutations)))):
            continue
        key = merged(keys)
        found[key].nodes.append(node)
        belongs[node.outputs[0]] = key
    return list(found.values())


def _rewrite(graph: ir.Graph, region: _Region) -> int:
    """Move a region before its Transposes where that pays; return the number of Transposes saved."""
    if any(transpose.graph is not graph for transpose in region.sources.values()):
        return 0  # it went with the region before
    inside = set(region.nodes)
    values = [node.outputs[0] for node in region.nodes]
    undone = {value: list(_undoing(value, region, graph)) for value in [*region.sources, *values]}
    for value in region.sources:  # an output of the graph is no name for a tensor that others read
        undone[value] = [node for node in undone[value] if not node.outputs[0].is_graph_output()]
    for value in values:
        if sum(node.outputs[0].is_graph_output() for node in undone[value]) > 1:
            return 0
    others = {
        value: [use for use in value.uses() if use.node not in inside and use.node not in nodes]
        for value, nodes in undone.items()
    }
    kept = [value for value in undone if others[value] or value.is_graph_output()]
    removed = sum(value not in kept for value in region.sources) + sum(map(len, undone.values()))
    saved = removed - sum(value not in region.sources for value in kept)
    if saved <= 0:
        return 0
    for value, transpose in region.sources.items():
        inner = transpose.inputs[0]
        if inner is None:
            raise AssertionError("a Transpose without an input")
        for use in list(value.uses()):
            if use.node in inside:
                use.node.replace_input_with(use.idx, inner)
        for node in undone[value]:
            node.outputs[0].replace_all_uses_with(inner)
            graph.remove(node, safe=True)
        if value not in kept:
            graph.remove(transpose, safe=True)
    for node in region.nodes:
        _turn(graph, node, region)
    for value in values:
        name = value.name
        if value in kept:
            outer = _transposed(graph, value, region.permutation)
            graph.outputs[:] = [outer if output is value else output for output in graph.outputs]
            for use in others[value]:
                use.node.replace_input_with(use.idx, outer)
            value.name, outer.name = f"{name}_transposed", name
        for node in sorted(undone[value], key=lambda node: not node.outputs[0].is_graph_output()):
            output = node.outputs[0]
            if value.name in (name, f"{name}_transposed"):
                value.name, output.name = output.name, None
            output.replace_all_uses_with(value, replace_graph_outputs=True)
            graph.remove(node, safe=True)
    return saved


def _undoing(value: ir.Value, region: _Region, graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the Transposes that bring a value of a region back into the order before it."""
    for use in value.uses():
        if _permutation(use.node) == region.inverse and use.node.graph is graph:
            yield use.node


def _turn(graph: ir.Graph, node: ir.Node, region: _Region) -> None:
    """Make a node compute in the order before the Transposes."""
    rank = len(region.permutation)
    if node.op_type in _BROADCASTING:
        for index, value in enumerate(node.inputs):
            array = _constant(value)
            if value is None or array is None or array.size == 1:
                continue
            turned = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(region.inverse)
            while turned.shape[0] == 1:
                turned = turned[0]
            node.replace_input_with(index, _initializer(graph, f"{value.name}_transposed", turned))
    if node.op_type in _ALONG_AN_AXIS:
        attribute = node.attributes.get("axis")
        axis = -1 if attribute is None else attribute.as_int()
        node.attributes["axis"] = ir.AttrInt64("axis", region.permutation[axis % rank])
    output = node.outputs[0]
    if output.shape is not None:
        output.shape = ir.Shape([output.shape[axis] for axis in region.inverse])


def _transposed(graph: ir.Graph, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
    producer = value.producer()
    if producer is None:
        raise AssertionError("a region computes its values")
    node = ir.node("Transpose", [value], attributes={"perm": list(permutation)}, name=f"{producer.name}_Transpose")
    output = node.outputs[0]
    output.type = value.type
    if value.shape is not None:
        output.shape = ir.Shape([value.shape[axis] for axis in permutation])
    graph.insert_after(producer, node)
    return output


def _initializer(graph: ir.Graph, stem: str, array: Array) -> ir.Value:
    name, number = stem, 1
    while (existing := graph.initializers.get(name)) is not None:
        if existing.const_value is not None and np.array_equal(existing.const_value.numpy(), array):
            return existing
        number += 1
        name = f"{stem}_{number}"
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _carried_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs whose order decides about the order of the output; none for nodes that care for the order."""
    if node.domain != "" or len(node.outputs) != 1:
        return []
    if node.op_type in _UNARY:
        taken = node.inputs[:1]
    elif node.op_type in _ALONG_AN_AXIS:
        taken = node.inputs
    elif node.op_type in _BROADCASTING:
        taken = [value for value in node.inputs if _constant(value) is None]
    else:
        return []
    return [] if None in taken else [value for value in taken if value is not None]


def _fits(node: ir.Node, carried: Sequence[ir.Value], rank: int) -> bool:
    if any(value.shape is None or len(value.shape) != rank for value in [*carried, *node.outputs]):
        return False
    constants = [] if node.op_type not in _BROADCASTING else [_constant(value) for value in node.inputs]
    return all(array is None or array.ndim <= rank for array in constants)


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    attribute = node.attributes.get("perm")
    if node.op_type != "Transpose" or node.domain != "" or attribute is None:
        return None
    return tuple(attribute.as_ints())


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value.numpy()
