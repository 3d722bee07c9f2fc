"""Facts about onnxslim's passes as we run them: its own results, and no walk through the graph for each fusion."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import onnx
import onnxslim
import onnxslim.third_party.onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.prepare_slim import slim


def convolutions(graph_builder: Any, count: int) -> onnx.ModelProto:
    """A chain of convolutions, each with a BatchNormalization that can be folded."""
    graph = graph_builder(1)
    x = graph.input("x", ("N", 4, 8, 8))
    for index in range(count):
        statistics = [graph.constant(graph.rng.uniform(0.5, 2, 4).astype(np.float32)) for _ in "sbmv"]
        x = graph.node("BatchNormalization", [graph.conv(x, (4, 4), f"conv{index}"), *statistics])
        x = graph.node("Relu", [x], f"relu{index}")
    model: onnx.ModelProto = graph.model([x], opset=20)
    return model


def attention(graph_builder: Any) -> onnx.ModelProto:
    """Shapes computed at run time, a projection with its bias, an exact GELU, and the same projection twice."""
    graph = graph_builder(2)
    x = graph.input("x", ("N", 6, 8))
    length = graph.node("Gather", [graph.node("Shape", [x]), graph.constant(np.int64([0]))], axis=0)
    shape = graph.node("Concat", [length, graph.constant(np.int64([6, 2, 4]))], axis=0)
    heads = graph.node("Transpose", [graph.node("Reshape", [x, shape])], perm=[0, 2, 1, 3])
    back = graph.node(
        "Reshape", [graph.node("Transpose", [heads], perm=[0, 2, 1, 3]), graph.constant(np.int64([-1, 8]))]
    )
    weight, bias = graph.normal((8, 16), 0.3), graph.normal((16,), 0.1)
    first, second = (graph.node("Add", [graph.node("MatMul", [back, weight]), bias]) for _ in "ab")
    error = graph.node("Erf", [graph.node("Div", [first, graph.constant(np.float32(2**0.5))])])
    halved = graph.node("Mul", [first, graph.node("Add", [error, graph.constant(np.float32(1))])])
    gelu = graph.node("Mul", [halved, graph.constant(np.float32(0.5))])
    graph.node("Sub", [gelu, graph.node("Identity", [second])], "y")
    model: onnx.ModelProto = graph.model(["y"], opset=20)
    return model


def branches() -> onnx.ModelProto:
    """An If whose branches read the outer graph, and fold."""

    def branch(name: str, operator: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Identity", ["x"], [f"{name}_same"]),
            helper.make_node(operator, [f"{name}_same", "shift"], [f"{name}_out"]),
        ]
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [4])]
        )

    nodes = [
        helper.make_node("Add", ["one", "one"], ["shift"]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "one"], ["condition"]),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch("a", "Add"), else_branch=branch("b", "Sub")),
    ]
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("kind", ["convolutions", "attention", "branches"])
def test_the_graph_is_the_one_of_onnxslim(kind: str, graph_builder: Any) -> None:
    """Node by node, value by value."""
    model = {
        "convolutions": lambda: convolutions(graph_builder, 3),
        "attention": lambda: attention(graph_builder),
        "branches": branches,
    }[kind]()
    original = model.SerializeToString(deterministic=True)
    found = slim(model).graph

    assert model.SerializeToString(deterministic=True) == original
    expected = onnxslim.slim(onnx.ModelProto.FromString(original), skip_optimizations=["weight_tying"]).graph
    assert list(found.node) == list(expected.node)
    assert list(found.output) == list(expected.output)
    assert {value.name: value for value in found.value_info} == {value.name: value for value in expected.value_info}
    constants, others = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer} for graph in (found, expected)
    )
    assert constants.keys() == others.keys()
    for name, values in constants.items():
        np.testing.assert_array_equal(values, others[name])
    assert len(found.node) < len(model.graph.node)


def test_the_tensors_are_not_listed_for_each_fusion(graph_builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as many fusions, and no walk through the graph more."""
    walks: list[int] = []
    original = gs.Graph.tensors
    monkeypatch.setattr(gs.Graph, "tensors", lambda *args, **kwargs: walks.append(1) or original(*args, **kwargs))

    def count(fusions: int) -> int:
        walks.clear()
        slim(convolutions(graph_builder, fusions))
        return len(walks)

    assert 0 < count(2) == count(20)


def test_a_graph_with_nothing_to_fold_is_not_copied(graph_builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding works on a copy, which is made where a graph asks for shapes or computes with constants alone."""
    copies: list[int] = []
    original = gs.Graph.copy
    monkeypatch.setattr(gs.Graph, "copy", lambda *args, **kwargs: copies.append(1) or original(*args, **kwargs))

    slim(convolutions(graph_builder, 2))
    assert copies == []
    slim(attention(graph_builder))
    assert copies


def test_the_garbage_collector_is_left_as_it_was(graph_builder: Any) -> None:
    """It rests meanwhile; one who had switched it off finds it off."""
    slim(convolutions(graph_builder, 1))
    assert gc.isenabled()
    gc.disable()
    try:
        slim(convolutions(graph_builder, 1))
        assert not gc.isenabled()
    finally:
        gc.enable()
