"""Facts about `engines.epilogues`: what belongs to a convolution's kernel, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from engines.epilogues import epilogues, same_shape, self_gated
from engines.graph import prepare


def nodes_of(graph: Any, folder: Path, outputs: list[str]) -> list[ir.Node]:
    return list(prepare(graph.save(folder / "m.onnx", outputs)).ir().graph)


def mish(graph: Any, x: str) -> str:
    return str(graph.node("Mul", [x, graph.node("Tanh", [graph.node("Softplus", [x])])], "y"))


def gelu(graph: Any, x: str) -> str:
    inner = graph.node("Erf", [graph.node("Div", [x, graph.constant(np.float32(1.414))])])
    return str(graph.node("Mul", [x, graph.node("Add", [inner, graph.constant(np.float32(1))])], "y"))


def square(graph: Any, x: str) -> str:
    return str(graph.node("Mul", [x, x], "y"))


def gated_by_another(graph: Any, x: str) -> str:
    return str(graph.node("Mul", [x, graph.node("Sigmoid", [graph.input("other", ("N", 16, 8, 8))])], "y"))


def gated_by_an_average(graph: Any, x: str) -> str:
    return str(graph.node("Mul", [x, graph.node("Sigmoid", [graph.node("GlobalAveragePool", [x])])], "y"))


@pytest.mark.parametrize(
    ("draw", "expected"),
    [(mish, True), (gelu, True), (square, False), (gated_by_another, False), (gated_by_an_average, False)],
)
def test_what_is_an_activation_written_with_a_mul(
    draw: Callable[..., str], expected: bool, graph_builder: Any, tmp_path: Path
) -> None:
    """x times a pointwise function of x, and nothing else; only that is computed together with the convolution."""
    graph = graph_builder()
    draw(graph, graph.conv(graph.input("x", ("N", 16, 8, 8)), (16, 16), "a"))
    nodes = nodes_of(graph, tmp_path, ["y"])
    gated = self_gated(nodes)

    assert [node.outputs[0].name for node in gated] == (["y"] if expected else [])
    assert ("y" in {value.name for value in epilogues(nodes, {"n_a"}, gated)}) is expected


def test_a_kernel_ends_at_a_second_reader(graph_builder: Any, tmp_path: Path) -> None:
    """Conv, Relu (which two nodes read), Tanh: the Relu belongs to the convolution, the Tanh does not."""
    graph = graph_builder()
    relu = graph.node("Relu", [graph.conv(graph.input("x", ("N", 16, 8, 8)), (16, 16), "a")], "relu")
    outputs = [graph.node(operator, [relu], operator) for operator in ("Tanh", "Neg")]
    nodes = nodes_of(graph, tmp_path, outputs)
    found = {value.name: node.name for value, node in epilogues(nodes, {"n_a"}, set()).items()}

    assert found == {"a": "n_a", "relu": "n_a"}
    assert epilogues(nodes, set(), set()) == {}


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ((1, 16, 8), (1, 16, 8), True),
        (("N", 16, "H"), ("N", 16, "W"), True),
        (("N", 16, "H"), (4, 16, 8), True),
        (("N", 16, "H"), ("N", 16, 1), False),
        ((1, 16, 8), (1, 16, 1), False),
        ((16, 8), (1, 16, 8), False),
        ((1, None), (1, 1), False),
    ],
)
def test_shapes_that_may_be_the_same(left: Any, right: Any, expected: bool) -> None:
    """An open size may be any, but a 1 beside it is a broadcast."""
    assert same_shape(ir.Shape(left), ir.Shape(right)) is expected
    assert same_shape(ir.Shape(right), ir.Shape(left)) is expected
    assert same_shape(None, ir.Shape(right))
