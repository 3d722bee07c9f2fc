"""Facts about `engines.value_bounds`: what the graph alone says of the size of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.graph import prepare
from engines.placement import Origins
from engines.value_bounds import largest_magnitude


def constant(graph: Any, value: float) -> str:
    return str(graph.constant(np.float32(value)))


DRAWN = {
    "sigmoid": (lambda g, x: g.node("Sigmoid", [x]), 1.0),
    "softmax, moved": (lambda g, x: g.node("Transpose", [g.node("Softmax", [x])], perm=[1, 0]), 1.0),
    "clip": (lambda g, x: g.clip(x, -2, 6), 6.0),
    "hard sigmoid written out": (lambda g, x: g.node("Div", [g.clip(x, 0, 6), constant(g, 6)]), 1.0),
    "tanh doubled": (lambda g, x: g.node("Mul", [g.node("Tanh", [x]), constant(g, -2)]), 2.0),
    "relu": (lambda g, x: g.node("Relu", [x]), None),
    "clip without an upper bound": (lambda g, x: g.node("Clip", [x, constant(g, 0)]), None),
    "constant over sigmoid": (lambda g, x: g.node("Div", [constant(g, 1), g.node("Sigmoid", [x])]), None),
    "two sigmoids added": (lambda g, x: g.node("Add", [g.node("Sigmoid", [x]), g.node("Sigmoid", [x])]), None),
    "input": (lambda g, x: x, None),
}


@pytest.mark.parametrize("name", DRAWN)
def test_largest_magnitudes(name: str, graph_builder: Any, tmp_path: Path) -> None:
    """Bounded operators, constant clips and constant factors; nothing else, whatever would follow from arithmetic."""
    draw, expected = DRAWN[name]
    graph = graph_builder()
    graph.gemm(draw(graph, graph.input("x", (16, 16))), (16, 16), "y")
    model = prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir()
    read = next(node for node in model.graph if node.name == "n_y").inputs[0]

    assert read is not None
    assert largest_magnitude(read, Origins()) == expected
