"""Facts about `engines.scale_groups`: what meets in a Concat has one scale, and what that does to the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.graph import PreparedModel, prepare
from engines.onnxrt import OnnxRuntimeRunner
from engines.placement import ActivationPoint, Placement
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq
from engines.runner import TensorSpec
from engines.scale_groups import MOST_COARSENING, chosen_together, shared_scales, without_silent
from trt_int8.auto import choose_scales
from trt_int8.calibration import calibrate
from trt_int8.data import open_data

SHAPE = (2, 16, 8, 8)


def prepared(graph: Any, folder: Path, outputs: list[str]) -> PreparedModel:
    return prepare(graph.save(folder / "m.onnx", outputs))


def branches(graph: Any, names: str) -> list[str]:
    """Tensors that a convolution each reads, so that they are quantized."""
    found = [graph.node("Tanh", [graph.input(f"{name}in", SHAPE)], name) for name in names]
    for name in names:
        graph.conv(name, (16, 16), f"{name}out")
    return found


def groups(graph: Any, folder: Path, outputs: list[str], **options: Any) -> tuple[tuple[str, ...], ...]:
    return place_for_tensorrt(prepared(graph, folder, outputs).ir(), PlacementOptions(**options)).groups


class TestGroups:
    """Which tensors share."""

    def test_inputs_and_output_of_a_quantized_concat(self, graph_builder: Any, tmp_path: Path) -> None:
        """Branches with pairs of their own and what is read behind the Concat; a branch without a pair is no member."""
        graph = graph_builder()
        joined = graph.node("Concat", [*branches(graph, "ab"), graph.input("c", SHAPE)], "joined", axis=1)
        graph.conv(joined, (48, 16), "y")
        placement = place_for_tensorrt(prepared(graph, tmp_path, ["aout", "bout", "y"]).ir())

        assert placement.groups == (("a", "b", "joined"),)
        assert {point.tensor for point in placement.activations} == {"a", "b", "joined"}
        reason = placement.activations[-1].reason
        assert "one scale, the largest, for the 3 tensors that meet in Concat 'n_joined'" in reason

    def test_across_operators_that_move_values(self, graph_builder: Any, tmp_path: Path) -> None:
        """A branch is pooled and reshaped before the Concat, and the Concat transposed behind it."""
        graph = graph_builder()
        (a,) = branches(graph, "a")
        pooled = graph.node("MaxPool", [a], kernel_shape=[2, 2], strides=[2, 2])
        flat = graph.node("Reshape", [pooled, graph.constant(np.int64([2, 16, 16]))])
        joined = graph.node("Concat", [flat, graph.input("b", (2, 16, 16))], "joined", axis=1)
        turned = graph.node("Transpose", [joined], "turned", perm=[0, 2, 1])
        graph.node("MatMul", [turned, graph.normal((32, 16))], "y")

        assert groups(graph, tmp_path, ["aout", "y"]) == (("a", "joined"),)

    def test_concats_of_concats_and_tensors_of_several(self, graph_builder: Any, tmp_path: Path) -> None:
        """a and b meet in one Concat that goes on with c into another; d meets c in a third: all five share."""
        graph = graph_builder()
        a, b, c, d = branches(graph, "abcd")
        inner = graph.node("Concat", [a, b], "inner", axis=1)
        graph.conv(graph.node("Concat", [inner, c], "outer", axis=1), (48, 16), "y")
        graph.conv(graph.node("Concat", [c, d], "other", axis=1), (32, 16), "z")

        (group,) = groups(graph, tmp_path, [*(f"{name}out" for name in "abcd"), "y", "z"])
        assert set(group) == {"a", "b", "c", "d", "outer", "other"}  # inner has no pair of its own

    def test_separate_concats_are_separate_groups(self, graph_builder: Any, tmp_path: Path) -> None:
        """They have nothing in common, so neither coarsens the other."""
        graph = graph_builder()
        a, b = branches(graph, "ab")
        for name, value in (("first", a), ("second", b)):
            joined = graph.node("Concat", [value, graph.input(f"{name}in", SHAPE)], name, axis=1)
            graph.conv(joined, (32, 16), f"{name}out")

        found = groups(graph, tmp_path, ["aout", "bout", "firstout", "secondout"])
        assert found == (("a", "first"), ("b", "second"))

    @pytest.mark.parametrize("reader", ["Tanh", "output", "excluded"])
    def test_a_concat_that_something_reads_as_float_is_none(
        self, reader: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Its Q cannot move back across it, so a shared scale would cost exactness for nothing."""
        graph = graph_builder()
        joined = graph.node("Concat", branches(graph, "ab"), "joined", axis=1)
        graph.conv(joined, (32, 16), "y")
        outputs = ["aout", "bout", "y"]
        if reader == "Tanh":
            outputs.append(graph.node("Tanh", [joined], "z"))
        elif reader == "output":
            outputs.append(joined)
        exclude = ["n_y"] if reader == "excluded" else []

        assert groups(graph, tmp_path, outputs, exclude=exclude) == ()

    def test_the_cpu_target_keeps_finer_scales(self, graph_builder: Any, tmp_path: Path) -> None:
        """ONNX Runtime's Concat takes a scale for each input."""
        graph = graph_builder()
        graph.conv(graph.node("Concat", branches(graph, "ab"), "joined", axis=1), (32, 16), "y")

        assert place_for_cpu(prepared(graph, tmp_path, ["aout", "bout", "y"]).ir()).groups == ()


def placement_of(*groups: tuple[str, ...], alone: tuple[str, ...] = ()) -> Placement:
    names = [*(name for group in groups for name in group), *alone]
    points = tuple(ActivationPoint(name, name, (), "rule", "reason") for name in names)
    return Placement("tensorrt", points, (), (), groups)


class TestSharedScales:
    """The largest scale of a group, unless it would ruin a member."""

    def test_the_largest_one_counts(self) -> None:
        """By hand: {1, 2, 3} becomes 3, another group and a tensor without one keep theirs."""
        placement = placement_of(("a", "b", "c"), ("d", "e"), alone=("f",))
        scales = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.25, "e": 0.5, "f": 9.0, "unknown": 7.0}

        assert shared_scales(placement, scales) == {
            "a": 3.0, "b": 3.0, "c": 3.0, "d": 0.5, "e": 0.5, "f": 9.0, "unknown": 7.0
        }  # fmt: skip

    def test_a_scale_that_is_far_finer_is_kept(self) -> None:
        """Eight times as coarse is the most: 3 of 7 bits; beyond that a tensor keeps its own."""
        placement = placement_of(("a", "b", "c"))

        assert shared_scales(placement, {"a": 8.0, "b": 1.0, "c": 0.9}) == {"a": 8.0, "b": 8.0, "c": 0.9}

    def test_a_branch_that_is_always_0_coarsens_nothing(self) -> None:
        """Its scale of 1 is no magnitude; it takes that of the others. A group of zeros alone keeps its scales."""
        placement = placement_of(("a", "b", "c"), ("d", "e"))
        scales = {"a": 1.0, "b": 0.2, "c": 0.1, "d": 1.0, "e": 1.0}
        heard = without_silent(placement, scales, ["a", "d", "e"])

        assert heard == {"a": 0.2, "b": 0.2, "c": 0.1, "d": 1.0, "e": 1.0}
        assert shared_scales(placement, heard) == {"a": 0.2, "b": 0.2, "c": 0.2, "d": 1.0, "e": 1.0}

    def test_members_without_a_scale_are_passed_over(self) -> None:
        """A cache may lack some; a group that lacks all is nothing."""
        assert shared_scales(placement_of(("a", "b"), ("c", "d")), {"a": 1.0}) == {"a": 1.0}

    @given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=6))
    def test_no_range_is_lost_and_none_more_than_eightfold_coarser(self, values: list[float]) -> None:
        """Whatever the scales: each stays or becomes the largest, and doing it twice is doing it once."""
        names = [f"t{index}" for index in range(len(values))]
        placement, scales = placement_of(tuple(names)), dict(zip(names, values, strict=True))
        shared = shared_scales(placement, scales)

        for name in names:
            assert scales[name] <= shared[name] <= MOST_COARSENING * scales[name]
            assert shared[name] in (scales[name], max(values))
        assert shared_scales(placement, shared) == shared

    def test_groups_are_chosen_together(self) -> None:
        """`auto` tries a method for a whole group at once, in the order of the pairs."""
        assert chosen_together(placement_of(("a", "b"), alone=("c",))) == [("a", "b"), ("c",)]


class TestFiles:
    """What is written."""

    def test_every_pair_of_a_group_is_written_with_one_scale(self, graph_builder: Any, tmp_path: Path) -> None:
        """The scale of the second branch is the largest and stands in all three pairs."""
        graph = graph_builder()
        graph.conv(graph.node("Concat", branches(graph, "ab"), "joined", axis=1), (32, 16), "y")
        model = prepared(graph, tmp_path, ["aout", "bout", "y"])
        placement = place_for_tensorrt(model.ir())
        written = insert_qdq(model, placement, {"a": 0.25, "b": 0.5, "joined": 0.375})
        nodes = [node for node in written.model.graph if node.op_type == "QuantizeLinear"]
        scales = [node.inputs[1].const_value.numpy() for node in nodes]  # type: ignore[union-attr]

        assert written.scales == {"a": 0.5, "b": 0.5, "joined": 0.5}
        assert scales == [np.float32(0.5)] * 3

    def test_quantizing_again_behind_the_concat_changes_nothing(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """With one scale the Concat of quantized branches equals the quantized Concat: TensorRT may move the Q."""
        graph = graph_builder()
        graph.conv(graph.node("Concat", branches(graph, "ab"), "joined", axis=1), (32, 16), "y")
        model = prepared(graph, tmp_path, ["aout", "bout", "y"])
        placement = place_for_tensorrt(model.ir())
        written = ir.to_proto(insert_qdq(model, placement, {"a": 0.01, "b": 0.006, "joined": 0.008}).model)
        feeds = {name: graph.rng.normal(size=SHAPE).astype(np.float32) for name in ("ain", "bin")}
        fetch = ["a_dequantized", "b_dequantized", "joined_dequantized"]
        found = run_model(written, feeds, fetch=fetch)

        expected = np.concatenate([found["a_dequantized"], found["b_dequantized"]], axis=1)
        np.testing.assert_array_equal(found["joined_dequantized"], expected)

    def test_a_softmax_in_int8_attention_has_steps_of_one_127th(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """Its scale comes from the graph; every other one from the calibration, and the answer stays close."""
        graph = graph_builder()
        x = graph.input("x", ("N", 32, 16))
        query, key, value = (graph.node("MatMul", [x, graph.normal((16, 16), 0.25)], name) for name in "qkv")
        scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 2, 1])])
        scores = graph.node("Div", [scores, graph.constant(np.float32(4))])
        graph.node("MatMul", [graph.node("Softmax", [scores], "p"), value], "y")
        model = prepared(graph, tmp_path, ["y"])
        feeds = {"x": graph.rng.normal(size=(4, 32, 16)).astype(np.float32)}
        calibration = calibrate(tmp_path / "m.onnx", [feeds])
        placement = place_for_tensorrt(model.ir(), PlacementOptions(attention="int8"))
        assert "p" not in calibration.tensors

        written = insert_qdq(model, placement, calibration.scales("minmax"))
        assert written.scales["p"] == np.float32(1 / 127)
        expected, found = run_model(model.proto, feeds)["y"], run_model(written.model, feeds)["y"]
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)

        inputs = open_data(feeds, _specs(tmp_path / "m.onnx"))
        choice = choose_scales(model, placement, calibration, inputs, percentile=99.99)
        assert set(choice.scales) == set(placement.tensors)


def _specs(model: Path) -> tuple[TensorSpec, ...]:
    return tuple(OnnxRuntimeRunner(model).inputs)


def test_auto_tries_a_group_as_one(graph_builder: Any, tmp_path: Path) -> None:
    """Two tensors that share a scale get the same method, and the scales that are chosen are each tensor's own."""
    graph = graph_builder()
    graph.conv(graph.node("Concat", branches(graph, "ab"), "joined", axis=1), (32, 16), "y")
    model = prepared(graph, tmp_path, ["aout", "bout", "y"])
    feeds = {name: graph.rng.normal(size=(16, *SHAPE[1:])).astype(np.float32) for name in ("ain", "bin")}
    batches = [{name: value[start : start + 2] for name, value in feeds.items()} for start in range(0, 16, 2)]
    calibration = calibrate(tmp_path / "m.onnx", batches)
    placement = place_for_tensorrt(model.ir())
    choice = choose_scales(
        model, placement, calibration, open_data(batches, _specs(tmp_path / "m.onnx")), percentile=99.99
    )

    assert len({choice.methods[name] for name in placement.groups[0]}) == 1
    own = {name: calibration.scales(choice.methods[name])[name] for name in placement.tensors}
    assert choice.scales == own
