"""Facts about `engines.prepare_layer_norm`: nine nodes become one that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.graph import prepare

SHAPE = (2, 5, 8)
FEEDS = {"x": 3 + np.random.default_rng(5).normal(0, 2, SHAPE).astype(np.float32)}


def centred(graph: Any, x: str, axes: str) -> str:
    return str(graph.node("Sub", [x, graph.node("ReduceMean", [x, axes])]))


def power(graph: Any, value: str) -> str:
    return str(graph.node("Pow", [value, graph.constant(np.float32(2))]))


def product(graph: Any, value: str) -> str:
    return str(graph.node("Mul", [value, value]))


def normalized(
    graph: Any, *, square: Callable[[Any, str], str] = power, twice: bool = False, axis: int = -1, first: bool = True
) -> str:
    """(x - mean) / sqrt(mean of squares + epsilon), as torch writes it; `twice` subtracts the mean anew."""
    x, axes = graph.input("x", SHAPE), graph.constant(np.int64([axis]))
    left = centred(graph, x, axes)
    variance = graph.node("ReduceMean", [square(graph, centred(graph, x, axes) if twice else left), axes])
    terms = [variance, graph.constant(np.float32(0.01))]
    deviation = graph.node("Sqrt", [graph.node("Add", terms if first else terms[::-1])])
    return str(graph.node("Div", [left, deviation], "normal"))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in prepare(path).proto.graph.node]


@pytest.mark.parametrize("form", [{}, {"square": product}, {"twice": True}, {"axis": 2}, {"first": False}])
@pytest.mark.parametrize("affine", [(), ((8,),), ((1, 1, 8), (8,)), ((8,), ())])
def test_all_forms_become_one_node(
    form: dict[str, Any], affine: tuple[tuple[int, ...], ...], graph_builder: Any, tmp_path: Path, run_model: Any
) -> None:
    """Without scale and bias, with the one, or with both, vectors or numbers; the answers stay."""
    graph = graph_builder()
    y = normalized(graph, **form)
    for operator, shape in zip(("Mul", "Add"), affine, strict=False):
        y = graph.node(operator, [y, graph.normal(shape)])
    graph.node("Tanh", [y], "y")
    path = graph.save(tmp_path / "m.onnx", ["y"])

    assert operators(path) == ["LayerNormalization", "Tanh"]
    expected, found = (run_model(model, FEEDS)["y"] for model in (path, prepare(path).proto))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_output_keeps_its_name(graph_builder: Any, tmp_path: Path) -> None:
    """That of the last node of the nine, as an output of the model too."""
    graph = graph_builder()
    graph.node("Add", [graph.node("Mul", [normalized(graph), graph.normal((8,))]), graph.normal((8,))], "y")
    node = prepare(graph.save(tmp_path / "m.onnx", ["y"])).proto.graph.node[0]

    assert (node.op_type, node.name, list(node.output)) == ("LayerNormalization", "n_y", ["y"])
    assert {attribute.name: attribute.i or attribute.f for attribute in node.attribute} == {
        "axis": -1, "epsilon": pytest.approx(0.01)
    }  # fmt: skip


def test_a_scale_that_others_do_not_see_stays_outside(graph_builder: Any, tmp_path: Path) -> None:
    """Another reader wants the tensor before the scale."""
    graph = graph_builder()
    y = normalized(graph)
    graph.node("Tanh", [y], "z")
    graph.node("Mul", [y, graph.normal((8,))], "y")

    assert operators(graph.save(tmp_path / "m.onnx", ["y", "z"])) == ["LayerNormalization", "Tanh", "Mul"]


@pytest.mark.parametrize("case", ["other axis", "another divisor", "no epsilon"])
def test_what_is_none_stays(case: str, graph_builder: Any, tmp_path: Path) -> None:
    """A mean over channels in the middle, a quotient by the deviation of something else, a sum of two activations."""
    graph = graph_builder()
    if case == "other axis":
        normalized(graph, axis=1)
    else:
        x, axes = graph.input("x", SHAPE), graph.constant(np.int64([-1]))
        other = graph.node("Tanh", [x]) if case == "another divisor" else x
        variance = graph.node("ReduceMean", [power(graph, centred(graph, other, axes)), axes])
        epsilon = variance if case == "no epsilon" else graph.constant(np.float32(0.01))
        graph.node(
            "Div", [centred(graph, x, axes), graph.node("Sqrt", [graph.node("Add", [variance, epsilon])])], "normal"
        )

    assert "LayerNormalization" not in operators(graph.save(tmp_path / "m.onnx", ["normal"]))
