"""onnxslim's passes in the order and with the results of `onnxslim.slim`, in a time that grows with the graph alone.

`onnxslim.slim` lists all tensors of the graph for each fusion that it makes, which takes minutes on a graph of ten
thousand nodes, and reads the graph twice a round, once of them to see whether the round has changed anything. It also
leaves the graph objects of each round, which hold all weights, to the garbage collector.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxslim.third_party.onnx_graphsurgeon as gs
from onnxslim.core import shape_infer
from onnxslim.core.optimization import find_matches
from onnxslim.core.optimization.dead_node_elimination import dead_node_elimination
from onnxslim.core.optimization.subexpression_elimination import subexpression_elimination
from onnxslim.core.pattern.registry import get_fusion_patterns
from onnxslim.utils import TensorInfo, init_logging, update_outputs_dims

_MOST_ROUNDS = 10


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, fuse and drop nodes, and infer shapes, until nothing changes any more.

    Equal constants are left apart: onnxslim's search compares all of them with each other.

    Args:
        model: left alone. Inputs that are initializers as well become constants.

    Raises:
        Exception: whatever the passes meet.
    """
    init_logging(verbose=False)
    lengths = {info.name: info.shape for info in map(TensorInfo, model.graph.output)}
    before: object = None
    with _collecting_at_the_end():
        for _ in range(_MOST_ROUNDS):
            optimised = _optimised(model)
            gc.collect(0)  # the graph objects, which refer to each other and to the weights; all of them are young
            if before is not None and _structure(optimised) == before:
                break  # the shapes that were inferred for the same nodes stay
            model = shape_infer(optimised)
            after = _structure(model)
            if after == before:
                break
            before = after
    named: onnx.ModelProto = update_outputs_dims(model, output_dims=lengths)
    return named


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run each pass once."""
    graph = gs.import_onnx(model).toposort()
    graph.fold_constants().cleanup(remove_unused_graph_inputs=True).toposort()
    wiring = _wiring(graph)
    for change in (_fuse, dead_node_elimination, subexpression_elimination):
        change(graph)
        changed = _wiring(graph)
        if changed is None or changed != wiring:
            graph.cleanup(remove_unused_graph_inputs=True).toposort()
            wiring = _wiring(graph)
    optimised: onnx.ModelProto = gs.export_onnx(graph)
    return optimised


def _fuse(graph: gs.Graph) -> None:
    """Replace what matches onnxslim's patterns, in branches and loop bodies first."""
    for subgraph in graph.subgraphs():
        _fuse(subgraph)
        subgraph.cleanup().toposort()
    for match in find_matches(graph, get_fusion_patterns(None)).values():
        if all(isinstance(value, gs.Tensor) for value in [*match["inputs"], *match["outputs"]]):
            graph.nodes.append(gs.Node(**{"domain": "ai.onnx.contrib", **match}))
        else:  # it is given tensors of its own, with names that are looked for in the whole graph
            graph.replace_custom_layer(**match)


def _wiring(graph: gs.Graph) -> list[Any] | None:
    """Return what is connected with what; None where branches and loop bodies would have to be looked at, too."""
    if next(graph.subgraphs(), None) is not None:
        return None
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


@contextmanager
def _collecting_at_the_end() -> Iterator[None]:
    """Keep the garbage collector from walking through hundreds of thousands of objects that are in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
