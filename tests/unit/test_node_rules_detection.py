"""Facts about `engines.node_rules_detection`: detection heads are found, and what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.graph import prepare
from engines.node_rules import weighted_nodes
from engines.placement import Target
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt

Shape = Sequence[int | str]
STATIC: Shape = (2, 3, 64, 64)
OPEN: Shape = ("N", 3, "height", "width")


def heads(
    graph: Any,
    folder: Path,
    outputs: Sequence[str],
    *,
    amax: Mapping[str, float] | None = None,
    target: Target = "tensorrt",
    include: Sequence[str] = (),
) -> set[str]:
    """The nodes that are taken for the last convolutions of a detector."""
    model = prepare(graph.save(folder / "m.onnx", list(outputs))).ir()
    _, decisions = weighted_nodes(model, PlacementOptions(include=include), target=target, amax=amax)
    return {decision.node for decision in decisions if decision.rule == "detection-head"}


def pyramid(graph: Any, shape: Shape = STATIC) -> list[str]:
    """Feature maps of 16 channels at a quarter and at an eighth of the input's size."""
    maps = [graph.input("x", shape)]
    for index, channels in enumerate([(3, 16), (16, 16), (16, 16)]):
        name = f"level{index}"
        maps.append(graph.node("Relu", [graph.conv(maps[-1], channels, f"{name}_conv", strides=[2, 2])], name))
    return maps[2:]


def flat(graph: Any, x: str, columns: int, output: str | None = None) -> str:
    """Write a map's predictions into a list [N, positions, columns]."""
    x = graph.node("Transpose", [x], perm=[0, 2, 3, 1])
    return str(graph.node("Reshape", [x, graph.constant(np.int64([0, -1, columns]))], output))


def joined(graph: Any, parts: Sequence[str], output: str, axis: int = 1) -> str:
    return str(graph.node("Concat", list(parts), output, axis=axis))


def anchors(graph: Any, x: Sequence[str]) -> list[str]:
    """Two lists, offsets and scores, from two maps each; scores through a Softmax."""
    boxes = [flat(graph, graph.conv(level, (16, 8), f"box{index}"), 4) for index, level in enumerate(x)]
    classes = [flat(graph, graph.conv(level, (16, 6), f"class{index}"), 3) for index, level in enumerate(x)]
    return [joined(graph, boxes, "boxes"), graph.node("Softmax", [joined(graph, classes, "logits")], "scores")]


def bins(graph: Any, x: Sequence[str]) -> list[str]:
    """Distributions over 16 distances, their averages, strides and scores in one table."""
    parts = []
    for index, level in enumerate(x):
        box, name = graph.conv(level, (16, 64), f"box{index}", kernel=1), graph.conv(level, (16, 5), f"class{index}")
        both = joined(graph, [box, name], f"both{index}")
        parts.append(graph.node("Reshape", [both, graph.constant(np.int64([0, 69, -1]))]))
    sizes = graph.constant(np.int64([64, 5]))
    distances, classes = graph.nodes_of("Split", [joined(graph, parts, "all", axis=2), sizes], ["d", "c"], axis=1)
    distances = graph.node("Reshape", [distances, graph.constant(np.int64([0, 4, 16, -1]))])
    weights = graph.node("Softmax", [graph.node("Transpose", [distances], perm=[0, 2, 1, 3])], axis=1)
    average = graph.constant(np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1), "project")
    corners = graph.node("Squeeze", [graph.node("Conv", [weights, average], "dfl"), graph.constant(np.int64([1]))])
    corners = graph.node("Mul", [corners, graph.constant(np.float32(8))], "corners")
    return [joined(graph, [corners, graph.node("Sigmoid", [classes])], "table")]


def separate(graph: Any, x: Sequence[str]) -> list[str]:
    """A list for each map and each kind, none joined with another."""
    return [
        flat(graph, graph.conv(level, (16, 8), f"{kind}{index}"), 4, f"{kind}_list{index}")
        for index, level in enumerate(x)
        for kind in ("box", "class")
    ]


def grid(graph: Any, x: Sequence[str]) -> list[str]:
    """One convolution for each map: Sigmoid of everything, scaled coordinates beside bare scores, then the lists."""
    parts = []
    for index, level in enumerate(x):
        out = graph.conv(level, (16, 18), f"box{index}", kernel=1)
        shape = [2, 3, 6, *((16, 16), (8, 8))[index]]
        out = graph.node("Reshape", [out, graph.constant(np.int64(shape))])
        out = graph.node("Sigmoid", [graph.node("Transpose", [out], perm=[0, 1, 3, 4, 2])])
        names = [f"xy{index}", f"score{index}"]
        graph.nodes_of("Split", [out, graph.constant(np.int64([4, 2]))], names, axis=4)
        scaled = graph.node("Mul", [names[0], graph.constant(np.float32(32))])
        both = joined(graph, [scaled, names[1]], f"row{index}", axis=4)
        parts.append(graph.node("Reshape", [both, graph.constant(np.int64([2, -1, 6]))]))
    return [joined(graph, parts, "table")]


DETECTORS: list[tuple[Callable[[Any, Sequence[str]], list[str]], set[str]]] = [
    (anchors, {"n_box0", "n_box1", "n_class0", "n_class1"}),
    (bins, {"n_box0", "n_box1", "n_class0", "n_class1"}),
    (separate, {"n_box0", "n_box1", "n_class0", "n_class1"}),
    (grid, {"n_box0", "n_box1"}),
]


class TestDetectors:
    """Several resolutions, nothing learned behind, lists of positions."""

    @pytest.mark.parametrize("target", ["tensorrt", "cpu"])
    @pytest.mark.parametrize(("draw", "expected"), DETECTORS)
    def test_the_last_convolutions_are_found(
        self, draw: Any, expected: set[str], target: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """All of them and none of the others, on both targets, without any ranges."""
        graph = graph_builder()

        assert heads(graph, tmp_path, draw(graph, pyramid(graph)), target=target) == expected

    @pytest.mark.parametrize(("draw", "expected"), DETECTORS[:3])
    def test_sizes_may_be_open(self, draw: Any, expected: set[str], graph_builder: Any, tmp_path: Path) -> None:
        """Where height and width are known at run time alone, the strides tell the resolutions apart."""
        graph = graph_builder()

        assert heads(graph, tmp_path, draw(graph, pyramid(graph, OPEN))) == expected

    def test_features_may_be_merged_across_levels(self, graph_builder: Any, tmp_path: Path) -> None:
        """A coarse map that is enlarged and added has the resolution of the one that it is added to."""
        for shape in (STATIC, OPEN):
            graph = graph_builder()
            fine, coarse = pyramid(graph, shape)
            enlarged = graph.node("Resize", [coarse, "", graph.constant(np.float32([1, 1, 2, 2]))], "enlarged")
            fine = graph.conv(graph.node("Add", [fine, enlarged]), (16, 16), "merged")
            assert heads(graph, tmp_path, anchors(graph, [fine, coarse])) == DETECTORS[0][1]

    def test_the_reason_has_the_numbers(self, graph_builder: Any, tmp_path: Path) -> None:
        """How many convolutions, at how many resolutions."""
        graph = graph_builder()
        model = prepare(graph.save(tmp_path / "m.onnx", anchors(graph, pyramid(graph)))).ir()
        reasons = {decision.node: decision.reason for decision in weighted_nodes(model)[1]}

        assert reasons["n_box1"].startswith("one of 4 convolutions whose predictions at 2 resolutions are flattened")

    def test_include_takes_them_back(self, graph_builder: Any, tmp_path: Path) -> None:
        """The rule is about accuracy, which is the user's to weigh."""
        graph = graph_builder()

        assert heads(graph, tmp_path, anchors(graph, pyramid(graph)), include=["n_box.", "n_class0"]) == {"n_class1"}

    def test_the_average_over_bins_is_told_from_a_learned_layer(self, graph_builder: Any, tmp_path: Path) -> None:
        """It stays float by a rule of its own; a trained convolution in its place is the last one instead."""
        graph = graph_builder()
        model = prepare(graph.save(tmp_path / "m.onnx", bins(graph, pyramid(graph)))).ir()

        assert {d.node: d.rule for d in weighted_nodes(model)[1]}["n_dfl"] == "expectation"
        trained = graph.rng.normal(size=(1, 16, 1, 1)).astype(np.float32)
        next(t for t in graph.initializers if t.name == "project").CopyFrom(
            onnx.numpy_helper.from_array(trained, "project")
        )
        assert heads(graph, tmp_path, ["table"]) == set()

    def test_the_cpu_placement_leaves_their_tails_alone(self, graph_builder: Any, tmp_path: Path) -> None:
        """No pair behind the last convolutions: lists of boxes and scores stay as they were computed."""
        graph = graph_builder()
        model = prepare(graph.save(tmp_path / "m.onnx", anchors(graph, pyramid(graph)))).ir()
        for place in (place_for_tensorrt, place_for_cpu):
            assert {point.tensor for point in place(model).activations} == {"x", "level0", "level1"} | (
                {"level2"} if place is place_for_cpu else set()
            )


class TestRanges:
    """What calibration saw."""

    def one_map(self, graph: Any) -> list[str]:
        """One resolution: coordinates and scores of every position in one table."""
        level = pyramid(graph)[0]
        boxes = flat(graph, graph.conv(level, (16, 4), "box"), 4)
        scores = graph.node("Sigmoid", [flat(graph, graph.conv(level, (16, 8), "class"), 8)])
        return [joined(graph, [boxes, scores], "table", axis=2)]

    @pytest.mark.parametrize(("amax", "found"), [({}, False), ({"table": 15.9}, False), ({"table": 16.0}, True)])
    def test_one_resolution_needs_them(
        self, amax: dict[str, float], found: bool, graph_builder: Any, tmp_path: Path
    ) -> None:
        """From 16 times the range of a score on, one scale would leave scores fewer than 8 codes."""
        graph = graph_builder()

        assert heads(graph, tmp_path, self.one_map(graph), amax=amax) == ({"n_box", "n_class"} if found else set())

    def test_the_range_of_a_list_of_lists(self, graph_builder: Any, tmp_path: Path) -> None:
        """The range is known of the output alone; the table inside is moved and joined into it."""
        graph = graph_builder()
        (table,) = self.one_map(graph)
        graph.node("Transpose", [joined(graph, [table, table], "twice")], "y", perm=[0, 2, 1])

        assert heads(graph, tmp_path, ["y"], amax={"y": 640.0}) == {"n_box", "n_class"}

    def test_the_reason_has_the_numbers(self, graph_builder: Any, tmp_path: Path) -> None:
        """The table by name, and the largest value in it."""
        graph = graph_builder()
        model = prepare(graph.save(tmp_path / "m.onnx", self.one_map(graph))).ir()
        (decision,) = (d for d in weighted_nodes(model, amax={"table": 643.25})[1] if d.node == "n_box")

        assert "end in 'table', where values up to 643.2 stand beside scores of at most 1" in decision.reason

    def test_both_placements_take_them(self, graph_builder: Any, tmp_path: Path) -> None:
        """The ranges reach the rule through either target's placement."""
        graph = graph_builder()
        model = prepare(graph.save(tmp_path / "m.onnx", self.one_map(graph))).ir()
        for place in (place_for_tensorrt, place_for_cpu):
            rules = {d.node: d.rule for d in place(model, amax={"table": 100.0}).decisions}
            assert (rules["n_box"], rules["n_class"]) == ("detection-head", "detection-head")
            assert "detection-head" not in {d.rule for d in place(model).decisions}

    def test_a_table_of_scores_alone(self, graph_builder: Any, tmp_path: Path) -> None:
        """Nothing but scores has one range."""
        graph = graph_builder()
        level = pyramid(graph)[0]
        scores = [graph.node("Sigmoid", [flat(graph, graph.conv(level, (16, 8), name), 8)]) for name in "ab"]

        assert heads(graph, tmp_path, [joined(graph, scores, "table", axis=2)], amax={"table": 100.0}) == set()


def classifier(graph: Any, x: Sequence[str]) -> list[str]:
    return [graph.gemm(graph.node("Flatten", [graph.node("GlobalAveragePool", [x[1]])]), (16, 32))]


def two_exits(graph: Any, x: Sequence[str]) -> list[str]:
    """Convolutions as classifiers behind averages of two maps."""
    return [
        graph.node("Flatten", [graph.conv(graph.node("GlobalAveragePool", [level]), (16, 32), kernel=1)]) for level in x
    ]


def averaged_maps(graph: Any, x: Sequence[str]) -> list[str]:
    """Class maps of two resolutions, averaged."""
    return [graph.node("Flatten", [graph.node("GlobalAveragePool", [graph.conv(level, (16, 32))])]) for level in x]


def segmentation(graph: Any, x: Sequence[str]) -> list[str]:
    """Maps of two resolutions, brought to one size, joined, and flattened for the loss."""
    maps = [graph.conv(level, (16, 8)) for level in x]
    scales = graph.constant(np.float32([1, 1, 2, 2]))
    maps[1] = graph.node("Resize", [maps[1], "", scales], mode="linear")
    return [graph.node("Reshape", [joined(graph, maps, "maps"), graph.constant(np.int64([0, 16, -1]))])]


def feature_maps(graph: Any, x: Sequence[str]) -> list[str]:
    """A backbone's outputs."""
    return [graph.conv(level, (16, 32)) for level in x]


def depth_maps(graph: Any, x: Sequence[str]) -> list[str]:
    """One channel at two resolutions, the axis of length 1 dropped."""
    axes = graph.constant(np.int64([1]))
    squeezed = graph.node("Squeeze", [graph.conv(x[0], (16, 1)), axes])
    return [squeezed, graph.node("Reshape", [graph.conv(x[1], (16, 1)), graph.constant(np.int64([2, 8, 8]))])]


def one_resolution(graph: Any, x: Sequence[str]) -> list[str]:
    return [joined(graph, [flat(graph, graph.conv(x[0], (16, 8)), 4) for _ in range(2)], "lists")]


def tokens(graph: Any, x: Sequence[str]) -> list[str]:
    """Features of two maps as one sequence of a transformer, which has learned layers behind."""
    sequence = joined(graph, [flat(graph, graph.conv(level, (16, 16)), 16) for level in x], "tokens")
    return [graph.node("MatMul", [sequence, graph.normal((16, 32))])]


def recurrent(graph: Any, x: Sequence[str]) -> list[str]:
    """The same sequence, read by an LSTM."""
    sequence = joined(graph, [flat(graph, graph.conv(level, (16, 16)), 16) for level in x], "tokens")
    return [graph.node("LSTM", [sequence, graph.normal((1, 32, 16)), graph.normal((1, 32, 8))], hidden_size=8)]


class TestOthers:
    """What is no detector stays in INT8."""

    @pytest.mark.parametrize("shape", [STATIC, OPEN])
    @pytest.mark.parametrize(
        "draw",
        [
            classifier, two_exits, averaged_maps, segmentation, feature_maps, depth_maps, one_resolution, tokens,
            recurrent,
        ],
    )  # fmt: skip
    def test_they_have_no_detection_head(self, draw: Any, shape: Shape, graph_builder: Any, tmp_path: Path) -> None:
        """With calibration's ranges or without."""
        graph = graph_builder()
        outputs = draw(graph, pyramid(graph, shape))

        assert heads(graph, tmp_path, outputs) == set()
        assert heads(graph, tmp_path, outputs, amax=dict.fromkeys([*outputs, "lists"], 500.0)) == set()

    def test_a_body_may_hold_anything(self, tmp_path: Path) -> None:
        """A convolution that a branch reads is not taken for the last one."""
        model = onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]>
            g (bool c, float[1,3,16,16] x, float[8,3,3,3] unused) => (float[1,196,8] y, float[1,36,8] z)
            <float[8,3,3,3] w, int64[3] s = {1, -1, 8}> {
              a = Conv <strides = [1, 1]> (x, w)
              b = Conv <strides = [2, 2]> (x, w)
              y = Reshape (a, s)
              e = If (c) <then_branch = t () => (float[1,8,7,7] p) { p = Exp (b) },
                          else_branch = f () => (float[1,8,7,7] q) { q = Tanh (b) }>
              z = Reshape (e, s)
            }"""
        )
        weight = onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
        model.graph.initializer.append(weight)
        model.graph.output[1].type.tensor_type.shape.dim[1].Clear()
        onnx.save(model, tmp_path / "m.onnx")

        assert {decision.rule for decision in weighted_nodes(prepare(tmp_path / "m.onnx").ir())[1]} == {
            "weighted-inputs"
        }
