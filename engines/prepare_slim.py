"""onnxslim's passes in the order and with the results of `onnxslim.slim`, in a time that grows with the graph alone.

`onnxslim.slim` lists all tensors of the graph for each fusion that it makes, which takes minutes on a graph of ten
thousand nodes, and reads the graph twice a round, once of them to see whether the round has changed anything. It also
leaves the graph objects of each round, which hold all weights, to the garbage collector.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import onnx
import onnx.numpy_helper
import onnxslim.third_party.onnx_graphsurgeon as gs
from onnxslim.core import shape_infer
from onnxslim.core.optimization import find_matches
from onnxslim.core.optimization.dead_node_elimination import dead_node_elimination
from onnxslim.core.optimization.subexpression_elimination import subexpression_elimination
from onnxslim.core.pattern import PatternMatcher
from onnxslim.core.pattern.registry import get_fusion_patterns
from onnxslim.third_party.onnx_graphsurgeon.ir.tensor import LazyValues
from onnxslim.utils import TensorInfo, init_logging, update_outputs_dims

from calibrators.protocols import Array
from engines.garbage import garbage_collection_off
from engines.outside_weights import hide_outside, is_outside, read_inside, restore_outside

_MOST_ROUNDS = 10


def slim(model: onnx.ModelProto, take: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None) -> onnx.ModelProto:
    """Fold constants, fuse and drop nodes, and infer shapes, until nothing changes any more.

    Equal constants are left apart: onnxslim's search compares all of them with each other.

    Args:
        model: left alone. Inputs that are initializers as well become constants. Weights that are outside are read
            when a pass asks for their values; a model that has some has no branches or loop bodies.
        take: moves large weights that a pass has made out of a model; None where they may stay.

    Raises:
        Exception: whatever the passes meet.
    """
    init_logging(verbose=False)
    lengths = {info.name: info.shape for info in map(TensorInfo, model.graph.output)}
    before: object = None
    with garbage_collection_off():
        for _ in range(_MOST_ROUNDS):
            optimised = _optimised(model, in_order=before is not None)
            gc.collect(0)  # the graph objects, which refer to each other and to the weights; all of them are young
            if before is not None and _structure(optimised) == before:
                break  # the shapes that were inferred for the same nodes stay
            if take is not None:
                optimised = take(optimised)
            hidden = hide_outside(optimised)
            model = shape_infer(optimised)
            restore_outside(model, hidden)
            after = _structure(model)
            if after == before:
                break
            before = after
    named: onnx.ModelProto = update_outputs_dims(model, output_dims=lengths)
    return named


def _optimised(model: onnx.ModelProto, *, in_order: bool) -> onnx.ModelProto:
    """Run each pass once.

    Args:
        model: see `slim`.
        in_order: whether its nodes stand in the order that sorting gives, as they do when this function returns.
    """
    graph = _imported(model)
    has_bodies = next(graph.subgraphs(), None) is not None
    if has_bodies or not in_order:
        graph.toposort()
    wiring = _wiring(graph)
    for change in (_fold, _fuse, dead_node_elimination, subexpression_elimination):
        change(graph)
        if has_bodies or _wiring(graph) != wiring:  # what changes in branches and loop bodies is not looked at
            graph.cleanup(remove_unused_graph_inputs=True).toposort()
            wiring = _wiring(graph)
    optimised: onnx.ModelProto = gs.export_onnx(graph)
    return optimised


class _OutsideValues(LazyValues):  # type: ignore[misc]
    """The values of a weight that is outside, read when they are asked for."""

    def load(self) -> Array:
        """Return the values."""
        inside = onnx.TensorProto()
        inside.CopyFrom(self.tensor)
        read_inside(inside)
        values: Array = np.array(onnx.numpy_helper.to_array(inside))
        return values


def _imported(model: onnx.ModelProto) -> gs.Graph:
    """Return a model as onnxslim's graph; weights that are outside stay there as long as nothing computes with them."""
    graph = gs.import_onnx(model)
    outside = {tensor.name: tensor for tensor in model.graph.initializer if is_outside(tensor)}
    folded = _read_by_folding(model.graph) if outside else set()
    for name, constant in graph.tensors().items() if outside else ():
        if name in outside:
            constant.data_location = None  # it would be written beside values that have been read
            constant.values = _OutsideValues(outside[name])
            if name in folded:
                constant.values = constant.values  # ONNX Runtime, which folds, gets values and no place
    return graph


def _read_by_folding(graph: onnx.GraphProto) -> set[str]:
    """Name the constants that nodes read that may be folded."""
    constants = {tensor.name for tensor in graph.initializer}
    read: set[str] = set()
    for node in graph.node:
        inputs = {name for name in node.input if name}
        if node.op_type in ("Shape", "Size") or inputs <= constants:
            constants.update(node.output)
            read |= inputs
    return read


def _fold(graph: gs.Graph) -> None:
    """Fold constants, and drop what nothing reads; a graph without anything to fold is not copied for it."""
    bodies = next(graph.subgraphs(), None) is not None
    if bodies or graph.functions or any(map(_may_fold, graph.nodes)):
        graph.fold_constants()
    graph.cleanup(remove_unused_graph_inputs=True)


def _may_fold(node: gs.Node) -> bool:
    """Tell whether a node stands for a constant, asks for a shape, or reads nothing but constants."""
    return node.op in ("Constant", "Shape") or all(
        isinstance(value, gs.Constant) or value.is_empty() for value in node.inputs
    )


def _fuse(graph: gs.Graph) -> None:
    """Replace what matches onnxslim's patterns, in branches and loop bodies first."""
    for subgraph in graph.subgraphs():
        _fuse(subgraph)
        subgraph.cleanup().toposort()
    operators = {node.op for node in graph.nodes}
    found = {
        name: [matcher for matcher in matchers if operators.issuperset(_operators(matcher))]
        for name, matchers in get_fusion_patterns(None).items()
    }
    for match in find_matches(graph, found).values():
        if all(isinstance(value, gs.Tensor) for value in [*match["inputs"], *match["outputs"]]):
            graph.nodes.append(gs.Node(**{"domain": "ai.onnx.contrib", **match}))
        else:  # it is given tensors of its own, with names that are looked for in the whole graph
            graph.replace_custom_layer(**match)


def _operators(matcher: PatternMatcher) -> set[str]:
    """Return the operators that a pattern is made of, all of which it needs."""
    return {node.op for node in matcher.pattern.nodes} - {"input", "output"}


def _wiring(graph: gs.Graph) -> list[int]:
    """Return what is connected with what; branches and loop bodies are left out."""
    return [id(value) for node in graph.nodes for values in (node.inputs, node.outputs) for value in (node, *values)]


def _structure(model: onnx.ModelProto) -> object:
    """Return what tells two states of a graph apart: nodes and shapes; constants change with the nodes alone."""
    graph = model.graph
    boundary = {value.name for value in (*graph.input, *graph.output)}
    return (
        [node.SerializeToString(deterministic=True) for node in graph.node],
        [value.SerializeToString(deterministic=True) for value in (*graph.input, *graph.output)],
        {
            value.name: value.SerializeToString(deterministic=True)
            for value in graph.value_info
            if value.name not in boundary
        },
    )
