"""A model in pieces: the same values, and the first of several wrong batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.collector import collect
from calibrators.errors import NonFiniteActivationError
from calibrators.protocols import Activations, GroupedSource
from engines import activations, pieces
from engines.activations import OnnxRuntimeActivations
from engines.calibrated_tensors import tensors_to_calibrate
from engines.errors import InferenceError
from engines.graph import PreparedModel, prepare

RNG = np.random.default_rng(3)


@dataclass
class Batch:
    feeds: Mapping[str, Any]
    samples: int = 1
    extras: Mapping[str, Any] = field(default_factory=dict)


def images(count: int) -> list[Batch]:
    return [Batch({"x": RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)}) for _ in range(count)]


@pytest.fixture
def deep(graph_builder: Any, tmp_path: Path) -> PreparedModel:
    """Eight convolutions with skip connections, one of them from the first to the last."""
    graph = graph_builder()
    first = x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")], "trunk")
    for k in range(6):
        y = graph.node("Relu", [graph.conv(x, (16, 16), f"c{k}")], f"r{k}")
        x = graph.node("Add", [x, y], f"a{k}")
    x = graph.conv(graph.node("Add", [x, first], "long"), (16, 8), "head")
    graph.gemm(graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pooled")], "flat"), (8, 5), "logits")
    return prepare(graph.save(tmp_path / "deep.onnx", ["logits"]))


def cut(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", size)


@pytest.mark.parametrize("size", [1, 4096, 20_000])
def test_pieces_have_the_bits_of_the_whole(deep: PreparedModel, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; every tensor comes from one of them."""
    names = tensors_to_calibrate(deep, "all")
    (batch,) = images(1)
    whole = OnnxRuntimeActivations(deep, names, [batch])
    assert len(whole._pieces) == 1
    cut(monkeypatch, size)
    parts = OnnxRuntimeActivations(deep, names, [batch])
    assert len(parts._pieces) > 2

    expected, found = whole.run(0, batch).values, parts.run(0, batch).values

    assert list(found) == list(expected) == names
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]).ravel(), np.asarray(values).ravel(), err_msg=name)


def test_weights_make_a_piece(graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four weights of 4 kB behind outputs of 128 bytes: pieces that take half of 4 kB at least are those four."""
    graph = graph_builder()
    x = graph.input(shape=(1, 32))
    for k in range(4):
        x = graph.gemm(x, (32, 32), f"g{k}")
    prepared = prepare(graph.save(tmp_path / "chain.onnx", [x]))
    names = tensors_to_calibrate(prepared, "all")
    cut(monkeypatch, 4096)

    source = OnnxRuntimeActivations(prepared, names, [])

    assert [[name for name in piece.outputs if name in names] for piece in source._pieces] == [
        ["g0"],
        ["g1"],
        ["g2"],
        ["g3"],
    ]


def test_batches_of_a_group_take_turns(deep: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece runs on all of them, and each tensor of each batch comes once, with the values of a single run.

    What is fed comes by itself, before the first piece.
    """
    cut(monkeypatch, 4096)
    names, batches = tensors_to_calibrate(deep), images(3)
    source = OnnxRuntimeActivations(deep, names, batches, first=10)
    assert isinstance(source, GroupedSource)
    taken: list[tuple[int, dict[str, Any]]] = []

    def take(part: Activations) -> None:
        taken.append((part.batch, {name: np.array(values) for name, values in part.values.items()}))

    source.run_group(0, batches, take)

    assert [batch for batch, values in taken if "x" not in values] == [10, 11, 12] * len(source._pieces)
    for k, batch in enumerate(batches):
        parts = [part for index, part in taken if index == 10 + k]
        assert sorted(name for part in parts for name in part) == sorted(names)
        joined = {name: values for part in parts for name, values in part.items()}
        for name, values in source.run(k, batch).values.items():
            np.testing.assert_array_equal(joined[name], values)


def test_statistics_do_not_depend_on_the_grouping(deep: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of up to eight, of one, threads or none, histograms or ranges."""
    batches = images(11)
    names = tensors_to_calibrate(deep)

    def counted(threads: int, total: int | None) -> Any:
        return collect(OnnxRuntimeActivations(deep, names, batches, threads=threads), total=total)

    expected = counted(1, None)
    cut(monkeypatch, 4096)
    grouped = counted(2, 11)
    monkeypatch.setattr(activations, "_LARGEST_GROUP", 1)
    single = counted(2, None)
    for found in (grouped, single):
        assert (found.batches, found.samples) == (11, 11)
        for name, histogram in expected.histograms.items():
            assert found.histograms[name].counts.tolist() == histogram.counts.tolist()
            assert found.histograms[name].bins.tolist() == histogram.bins.tolist()
    source = OnnxRuntimeActivations(deep, names, batches, threads=2)
    assert collect(source, statistics="minmax").ranges == expected.reduced().ranges


def test_of_wrong_batches_the_first_is_reported(deep: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a later one fails in an earlier piece: infinity appears only behind the trunk."""
    cut(monkeypatch, 4096)
    batches = images(6)
    batches[2].feeds["x"][:] = 3e38  # type: ignore[index]
    batches[3] = Batch({"x": np.zeros((1, 2, 8, 8), np.float32)})

    with pytest.raises(NonFiniteActivationError) as caught:
        collect(OnnxRuntimeActivations(deep, tensors_to_calibrate(deep), batches, threads=1))
    assert caught.value.batch == 2
    batches[1] = Batch({"image": batches[0].feeds["x"]})
    with pytest.raises(InferenceError, match="batch 1 has no input 'image'"):
        collect(OnnxRuntimeActivations(deep, tensors_to_calibrate(deep), batches, threads=1))


def test_much_that_is_carried_makes_groups_small(deep: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What batches feed and carry between pieces bounds their number."""
    cut(monkeypatch, 4096)
    source = OnnxRuntimeActivations(deep, tensors_to_calibrate(deep), [])
    assert source.group_size == activations._LARGEST_GROUP
    monkeypatch.setattr(activations, "_GROUP_BYTES", 30_000)

    source.run(0, images(1)[0])

    assert source.group_size == 3  # the image, 768 bytes, and two tensors of 4096


def test_a_graph_within_a_node_is_not_cut(graph_builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the inner graph reads of the outer one is not among the node's inputs."""
    import onnx
    from onnx import TensorProto, helper

    graph = graph_builder()
    x = graph.node("Relu", [graph.conv(graph.input(), (3, 4), "c")], "r")
    model = onnx.load(graph.save(tmp_path / "m.onnx", [x]))
    inner = helper.make_graph(
        [helper.make_node("Neg", ["r"], ["n"])],
        "then",
        [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["r"], ["p"])],
        "else",
        [],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, None)],
    )
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=other))
    cut(monkeypatch, 1)

    assert len(pieces._cut(model.graph, {"r", "y"}, {}, pieces._types(model.graph))) == 1


def test_what_is_left_out_connects_nothing() -> None:
    """An output and an input without a name, two nodes apart: the graph is cut all the same."""
    from onnx import TensorProto, helper

    names = ["x", "a", "b", "c"]
    nodes = [
        helper.make_node("Dropout", ["x"], ["a", ""]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Clip", ["b", "", "high"], ["c"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in names]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    sizes = dict.fromkeys(names, 8 * pieces.PIECE_BYTES)

    assert len(pieces._cut(graph, {"a", "b", "c"}, sizes, pieces._types(graph))) > 1
