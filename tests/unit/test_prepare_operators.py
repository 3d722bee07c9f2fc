"""Facts about operators that preparation writes in another form, with the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.graph import PreparedModel, prepare

X = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)


@pytest.fixture
def prepared(
    graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
) -> Callable[[Callable[[Any, str], list[str]]], PreparedModel]:
    """Draws a graph, prepares it, and checks that the answers are those of the file."""

    def made(draw: Callable[[Any, str], list[str]]) -> PreparedModel:
        graph = graph_builder()
        outputs = draw(graph, graph.input("x", ("N", 4, 6, 6)))
        path = graph.save(tmp_path / "net.onnx", outputs)
        result = prepare(path)
        expected, found = (run_model(model, {"x": X}) for model in (path, result.proto))
        for name in outputs:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
        return result

    return made


def operators(model: PreparedModel) -> Counter[str]:
    return Counter(node.op_type for node in model.proto.graph.node)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_sum_becomes_a_chain_of_adds(prepared: Any, count: int) -> None:
    """Operands broadcast as before, and the sum keeps its name."""

    def draw(g: Any, x: str) -> list[str]:
        others = [g.node("Relu", [x]), g.normal((4, 1, 1)), g.node("Exp", [x])]
        return [g.node("Sigmoid", [g.node("Sum", [x, *others[: count - 1]], "total")])]

    model = prepared(draw)

    assert operators(model)["Sum"] == 0
    assert operators(model)["Add"] == count - 1
    assert "total" in {name for node in model.proto.graph.node for name in node.output}


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_spatial_mean_before_a_classifier_becomes_a_global_pool(prepared: Any, axes: list[int], keep: int) -> None:
    """Without keepdims a Flatten gives the shape; the mean keeps its name."""

    def draw(g: Any, x: str) -> list[str]:
        mean = g.node("ReduceMean", [x, g.constant(np.int64(axes))], "mean", keepdims=keep)
        flat = g.node("Flatten", [mean]) if keep else mean
        return [g.node("MatMul", [flat, g.normal((4, 5))], "logits")]

    model = prepared(draw)
    made = operators(model)

    assert (made["GlobalAveragePool"], made["ReduceMean"], made["Flatten"]) == (1, 0, 1)
    assert "mean" in {name for node in model.proto.graph.node for name in node.output}


def _centred(g: Any, x: str) -> list[str]:
    mean = g.node("ReduceMean", [x, g.constant(np.int64([2, 3]))])
    return [g.conv(g.node("Sub", [x, mean]), (4, 4), kernel=1)]


def _over_channels(g: Any, x: str) -> list[str]:
    return [g.conv(g.node("ReduceMean", [x, g.constant(np.int64([1, 2, 3]))]), (1, 4), kernel=1)]


def _given_out(g: Any, x: str) -> list[str]:
    mean = g.node("ReduceMean", [x, g.constant(np.int64([2, 3]))], "mean")
    return [mean, g.conv(mean, (4, 4), kernel=1)]


@pytest.mark.parametrize("draw", [_centred, _over_channels, _given_out])
def test_other_means_stay(prepared: Any, draw: Any) -> None:
    """A part of a normalization, a mean over channels too, and one that is an output."""
    made = operators(prepared(draw))

    assert (made["ReduceMean"], made["GlobalAveragePool"]) == (1, 0)
