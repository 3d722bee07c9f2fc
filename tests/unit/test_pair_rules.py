"""Facts about `engines.pair_rules`: which edges read quantized values on TensorRT, on graphs drawn by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import prepare
from engines.pair_rules import RULES
from engines.pair_rules_carriers import gated_map
from engines.placement import ActivationPoint, Placement
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt

MAP = ("N", 16, 8, 8)
"""Shape of a feature map that the kernels take."""


def placed(graph: Any, folder: Path, outputs: list[str], **options: Any) -> Placement:
    return place_for_tensorrt(prepare(graph.save(folder / "m.onnx", outputs)).ir(), PlacementOptions(**options))


def edges(placement: Placement) -> dict[str, set[tuple[str, int]]]:
    return {point.tensor: set(point.uses or ()) for point in placement.activations}


def point_of(placement: Placement, tensor: str) -> ActivationPoint:
    return next(point for point in placement.activations if point.tensor == tensor)


def test_every_rule_says_what_it_is_why_and_whence() -> None:
    """Names differ, and each rule has a sentence and a source."""
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.why and rule.source for rule in RULES)


def test_a_reason_names_every_node_that_reads_the_pair(graph_builder: Any, tmp_path: Path) -> None:
    """A trunk that a convolution and a residual Add read: the first rule names the pair, both stand in its reason."""
    graph = graph_builder()
    x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")], "trunk")
    graph.node("Add", [graph.conv(x, (16, 16), "branch"), x], "y")
    point = point_of(placed(graph, tmp_path, ["y"]), "trunk")

    assert point.rule == "weighted-inputs"
    assert point.reason == (
        "all inputs of weighted operators are quantized: Conv 'n_branch'; convolution and residual Add fuse into one "
        "kernel that reads the skip as INT8: Conv 'n_branch' with Add 'n_y'"
    )


def silu(graph: Any, x: str, output: str) -> str:
    return str(graph.node("Mul", [x, graph.node("Sigmoid", [x])], output))


def hard_swish_by_hand(graph: Any, x: str, output: str) -> str:
    gate = graph.clip(graph.node("Add", [x, graph.constant(np.float32(3))]), 0, 6)
    return str(graph.node("Div", [graph.node("Mul", [x, gate]), graph.constant(np.float32(6))], output))


def leaky_relu(graph: Any, x: str, output: str) -> str:
    return str(graph.node("LeakyRelu", [x], output, alpha=0.1))


def clip(graph: Any, x: str, output: str) -> str:
    return str(graph.node("Identity", [graph.clip(x, 0, 6)], output))


def hard_swish(graph: Any, x: str, output: str) -> str:
    return str(graph.node("HardSwish", [x], output))


def gated_by_hard_sigmoid(graph: Any, x: str, output: str) -> str:
    return str(graph.node("Mul", [graph.node("HardSigmoid", [x], alpha=1 / 6), x], output))


def layer_scale(graph: Any, x: str, output: str) -> str:
    return str(graph.node("Mul", [graph.node("Softplus", [x]), graph.normal((16, 1, 1))], output))


ACTIVATIONS = (silu, hard_swish_by_hand, leaky_relu, clip, hard_swish, gated_by_hard_sigmoid)


class TestFusedActivations:
    """The Q stands behind the whole of convolution and activation."""

    @pytest.mark.parametrize("activate", ACTIVATIONS)
    def test_nothing_stands_between_a_convolution_and_its_activation(
        self, activate: Callable[..., str], graph_builder: Any, tmp_path: Path
    ) -> None:
        """Conv, activation, Conv: one pair between the two, on the activation's output."""
        graph = graph_builder()
        graph.conv(activate(graph, graph.conv(graph.input(), (3, 16), "a"), "active"), (16, 16), "y")
        found = edges(placed(graph, tmp_path, ["y"]))

        between = set(found) - {"x"}
        assert len(between) == 1
        assert not between & {"a"}
        assert list(found.values()) == [{("n_a", 0)}, {("n_y", 0)}]

    def test_a_convolution_beside_the_activation_does_not_split_it(self, graph_builder: Any, tmp_path: Path) -> None:
        """What Conv gives is INT8 for another Conv; the SiLU between still reads float, on both of its edges."""
        graph = graph_builder()
        a = graph.conv(graph.input(), (3, 16), "a")
        graph.conv(silu(graph, a, "active"), (16, 16), "y")
        graph.conv(a, (16, 16), "z")
        found = edges(placed(graph, tmp_path, ["y", "z"]))

        assert found["a"] == {("n_z", 0)}
        assert found["active"] == {("n_y", 0)}

    def test_a_batch_norm_that_could_not_be_folded_belongs_to_the_convolution(
        self, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Its convolution has a second reader, so it stays in the graph: the pair stands behind it."""
        graph = graph_builder()
        a = graph.conv(graph.input(), (3, 16), "a")
        constants = [graph.constant(np.full(16, value, np.float32)) for value in (1.5, 0.1, 0.2, 0.9)]
        graph.conv(graph.node("Relu", [graph.node("BatchNormalization", [a, *constants], "bn")], "r"), (16, 16), "y")
        graph.node("Tanh", [a], "z")

        assert set(edges(placed(graph, tmp_path, ["y", "z"]))) == {"x", "r"}


class TestResiduals:
    """Branches end in all that fuses with a convolution, and in nothing else."""

    @pytest.mark.parametrize("finish", [*ACTIVATIONS, layer_scale])
    def test_a_branch_goes_through_what_fuses_with_its_convolution(
        self, finish: Callable[..., str], graph_builder: Any, tmp_path: Path
    ) -> None:
        """Conv, then an activation or a scale for each channel, then Add: the skip is INT8, the branch float."""
        graph = graph_builder()
        x = graph.input("x", MAP)
        graph.node("Add", [x, finish(graph, graph.conv(x, (16, 16), "branch"), "finished")], "sum")
        found = edges(placed(graph, tmp_path, ["sum"]))

        assert found == {"x": {("n_branch", 0), ("n_sum", 0)}}

    def test_of_two_branches_the_one_that_is_ready_last_takes_the_other_in(
        self, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Equally long ways: the later node fuses, in whatever order the Add names them."""
        for first, second in itertools.permutations(("early", "late")):
            graph = graph_builder()
            x = graph.input("x", MAP)
            for name in ("early", "late"):
                graph.conv(x, (16, 16), name)
            graph.node("Add", [first, second], "sum")
            found = edges(placed(graph, tmp_path, ["sum"]))

            assert found["early"] == {("n_sum", (first, second).index("early"))}
            assert "late" not in found

    def test_a_convolution_that_both_sides_depend_on_is_no_branch(self, graph_builder: Any, tmp_path: Path) -> None:
        """The first block of a ConvNeXt adds the stem's output to what is made of it: nothing fuses there."""
        graph = graph_builder()
        stem = graph.conv(graph.input(), (3, 16), "stem")
        hidden = graph.node("Transpose", [graph.conv(stem, (16, 16), "depthwise", group=16)], perm=[0, 2, 3, 1])
        hidden = graph.node("LayerNormalization", [hidden, graph.normal((16,))], "normal", axis=-1)
        hidden = graph.node("MatMul", [hidden, graph.normal((16, 16))], "point")
        graph.node("Add", [graph.node("Transpose", [hidden], "back", perm=[0, 3, 1, 2]), stem], "sum")
        found = edges(placed(graph, tmp_path, ["sum"]))

        assert not any(reader == "n_sum" for readers in found.values() for reader, _ in readers)

    def test_sums_behind_matrix_products_stay_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """A transformer's residual stream: MatMul, bias, Add, LayerNormalization has pairs for its products only."""
        graph = graph_builder()
        x = graph.input("x", ("N", 32, 16))
        hidden = graph.node("MatMul", [x, graph.normal((16, 16))], "first")
        hidden = graph.node("Add", [graph.node("MatMul", [hidden, graph.normal((16, 16))], "second"), x], "sum")
        graph.node("LayerNormalization", [hidden, graph.normal((16,))], "y", axis=-1)
        found = edges(placed(graph, tmp_path, ["y"]))

        assert found == {"x": {("n_first", 0)}, "first": {("n_second", 0)}}

    def test_a_size_of_1_beside_an_open_one_is_a_broadcast(self, graph_builder: Any, tmp_path: Path) -> None:
        """A per-channel input added to a map of unknown size is no skip."""
        graph = graph_builder()
        x, bias = graph.input("x", ("N", 16, "H", "W")), graph.input("bias", ("N", 16, 1, 1))
        graph.node("Add", [graph.conv(x, (16, 16), "a"), bias], "y")

        assert edges(placed(graph, tmp_path, ["y"])) == {"x": {("n_a", 0)}}


class TestAveragePools:
    """An average reads INT8 where it also gives INT8, and where that saves something."""

    @pytest.mark.parametrize("pool", ["GlobalAveragePool", "ReduceMean"])
    def test_between_a_convolution_and_a_classifier(self, pool: str, graph_builder: Any, tmp_path: Path) -> None:
        """Conv, Relu, average, Gemm: the convolution writes INT8 for the average, which gives INT8 to the Gemm."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("x", (2, 16, 8, 8)), (16, 32), "a")], "active")
        axes = [graph.constant(np.int64([2, 3]))] if pool == "ReduceMean" else []
        graph.gemm(graph.node("Flatten", [graph.node(pool, [x, *axes], "mean")]), (32, 32), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement)["active"] == {("n_mean", 0)}
        assert point_of(placement, "active").rule == "average-pool"
        assert "Pool 'n_mean' behind Conv 'n_a'" in point_of(placement, "active").reason.replace("ReduceMean", "Pool")

    def test_beside_other_readers_of_the_pair(self, graph_builder: Any, tmp_path: Path) -> None:
        """Inception's pooling branch joins the pair that the other branches read."""
        graph = graph_builder()
        x = graph.node("Tanh", [graph.input("x", MAP)], "trunk")
        graph.conv(x, (16, 16), "a")
        graph.conv(graph.node("AveragePool", [x], "mean", kernel_shape=[3, 3], pads=[1] * 4), (16, 16), "b")

        assert edges(placed(graph, tmp_path, ["a", "b"]))["trunk"] == {("n_a", 0), ("n_mean", 0)}

    def test_several_pools_of_one_convolution(self, graph_builder: Any, tmp_path: Path) -> None:
        """A pyramid of averages: all that reads the map can read it as INT8, so it is written so."""
        graph = graph_builder()
        x = graph.conv(graph.input(), (3, 16), "a")
        for size in (2, 4):
            mean = graph.node("AveragePool", [x], f"mean{size}", kernel_shape=[size] * 2, strides=[size] * 2)
            graph.conv(mean, (16, 16), f"y{size}")

        assert edges(placed(graph, tmp_path, ["y2", "y4"]))["a"] == {("n_mean2", 0), ("n_mean4", 0)}

    @pytest.mark.parametrize("concat_first", [True, False])
    def test_beside_a_concat_that_is_int8(self, concat_first: bool, graph_builder: Any, tmp_path: Path) -> None:
        """A U-Net with average pools: the skip goes into a Concat whose Q moves back to it, so all readers agree."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("x", MAP), (16, 16), "a")], "skip")
        joined, mean = "", ""
        for concat in (concat_first, not concat_first):
            if concat:
                joined = graph.node("Concat", [x, graph.input("other", MAP)], "joined", axis=1)
            else:
                mean = graph.node("AveragePool", [x], "mean", kernel_shape=[2, 2], strides=[2, 2])
        placement = placed(graph, tmp_path, [graph.conv(joined, (32, 16), "y"), graph.conv(mean, (16, 16), "z")])

        assert edges(placement)["skip"] == {("n_mean", 0)}
        assert placement.groups == (("skip", "joined"),)

    @pytest.mark.parametrize("case", ["float reader", "no convolution", "float behind", "model output", "excluded"])
    def test_left_alone_where_one_side_is_float(self, case: str, graph_builder: Any, tmp_path: Path) -> None:
        """A pair would then save nothing: somebody reads or writes the same tensor in float anyway."""
        graph = graph_builder()
        x = graph.input("x", MAP)
        if case == "no convolution":
            x = graph.node("Tanh", [x], "active")
        else:
            x = graph.node("Relu", [graph.conv(x, (16, 16), "a")], "active")
        mean = graph.node("AveragePool", [x], "mean", kernel_shape=[2, 2], strides=[2, 2])
        graph.conv(graph.node("Tanh", [mean]) if case == "float behind" else mean, (16, 16), "y")
        outputs = ["y"]
        if case == "float reader":
            outputs.append(graph.node("Tanh", [x], "z"))
        elif case == "model output":
            outputs.append(mean)
        placement = placed(graph, tmp_path, outputs, exclude=["n_a"] if case == "excluded" else [])

        assert "active" not in edges(placement)

    def test_the_mean_of_a_normalization_is_no_pool(self, graph_builder: Any, tmp_path: Path) -> None:
        """A LayerNorm written out begins with the mean over its last axis; no edge of it is quantized."""
        graph = graph_builder()
        x = graph.node("MatMul", [graph.input("x", ("N", 32, 16)), graph.normal((16, 16))], "first")
        axes = graph.constant(np.int64([-1]))
        centred = graph.node("Sub", [x, graph.node("ReduceMean", [x, axes], "mean")], "centred")
        square = graph.node("Pow", [centred, graph.constant(np.float32(2))])
        variance = graph.node("ReduceMean", [square, axes], "variance")
        deviation = graph.node("Sqrt", [graph.node("Add", [variance, graph.constant(np.float32(1e-5))])])
        normal = graph.node("Div", [centred, deviation], "normal")
        normal = graph.node("Add", [graph.node("Mul", [normal, graph.normal((16,))]), graph.normal((16,))], "shifted")
        graph.node("MatMul", [normal, graph.normal((16, 16))], "y")
        found = edges(placed(graph, tmp_path, ["y"]))

        assert [reader for readers in found.values() for reader, _ in readers] == ["n_first", "n_y"]


class TestResize:
    """The input, where all that reads the output is INT8."""

    @pytest.mark.parametrize("mode", ["nearest", "linear"])
    def test_a_resize_between_convolutions(self, mode: str, graph_builder: Any, tmp_path: Path) -> None:
        """It reads INT8; repeating values keeps their scale, interpolation has one of its own behind it."""
        graph = graph_builder()
        a = graph.node("Relu", [graph.conv(graph.input("x", (1, 16, 8, 8)), (16, 16), "a")], "small")
        scales = [graph.constant(np.float32([])), graph.constant(np.float32([1, 1, 2, 2]))]
        graph.conv(graph.node("Resize", [a, *scales], "large", mode=mode), (16, 16), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement)["small"] == {("n_large", 0)}
        assert edges(placement)["large"] == {("n_y", 0)}
        assert point_of(placement, "large").scale_of == {"nearest": "small", "linear": "large"}[mode]

    def test_through_a_concat(self, graph_builder: Any, tmp_path: Path) -> None:
        """U-Net: the upsampled half of a Concat is INT8 before it grows, and meets the scale of the other half."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("x", (1, 16, 8, 8)), (16, 16), "a")], "skip")
        deep = graph.node("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
        deep = graph.node("Relu", [graph.conv(deep, (16, 16), "b")], "deep")
        scales = [graph.constant(np.float32([])), graph.constant(np.float32([1, 1, 2, 2]))]
        up = graph.node("Resize", [deep, *scales], "up", mode="nearest")
        graph.conv(graph.node("Concat", [up, x], "joined", axis=1), (32, 16), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement)["deep"] == {("n_up", 0)}
        assert placement.groups == (("skip", "deep", "joined"),)

    def test_left_alone_where_the_output_is_read_as_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """The model's own output must not be rounded before it is enlarged."""
        graph = graph_builder()
        a = graph.conv(graph.input("x", (1, 16, 8, 8)), (16, 16), "a")
        scales = [graph.constant(np.float32([])), graph.constant(np.float32([1, 1, 2, 2]))]
        graph.node("Resize", [a, *scales], "y", mode="nearest")

        assert set(edges(placed(graph, tmp_path, ["y"]))) == {"x"}


class TestElementWise:
    """Add and Mul join pairs that are there; they never ask for one."""

    @pytest.mark.parametrize("operator", ["Add", "Mul"])
    def test_operands_that_are_int8_for_others(self, operator: str, graph_builder: Any, tmp_path: Path) -> None:
        """Two tensors that convolutions read, and a result that a convolution reads: INT8 on both sides."""
        graph = graph_builder()
        left, right = (graph.node("Tanh", [graph.input(name, MAP)], f"{name}t") for name in "ab")
        for name, value in (("c", left), ("d", right), ("e", graph.node(operator, [left, right], "both"))):
            graph.conv(value, (16, 16), name)
        found = edges(placed(graph, tmp_path, ["c", "d", "e"]))

        assert found == {
            "at": {("n_c", 0), ("n_both", 0)}, "bt": {("n_d", 0), ("n_both", 1)}, "both": {("n_e", 0)}
        }  # fmt: skip

    def test_one_float_operand_keeps_it_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """Nothing else reads the second operand as INT8, and so the Add reads neither so."""
        graph = graph_builder()
        left, right = (graph.node("Tanh", [graph.input(name, MAP)], f"{name}t") for name in "ab")
        graph.conv(left, (16, 16), "c")
        graph.conv(graph.node("Add", [left, right], "both"), (16, 16), "e")

        assert edges(placed(graph, tmp_path, ["c", "e"])) == {"at": {("n_c", 0)}, "both": {("n_e", 0)}}


def sigmoid(graph: Any, x: str) -> str:
    return str(graph.node("Sigmoid", [x], "gate"))


def clipped(graph: Any, x: str) -> str:
    shifted = graph.clip(graph.node("Add", [x, graph.constant(np.float32(3))]), 0, 6)
    return str(graph.node("Div", [shifted, graph.constant(np.float32(6))], "gate"))


def unbounded(graph: Any, x: str) -> str:
    return str(graph.node("Softplus", [x], "gate"))


def squeeze_and_excitation(graph: Any, gate: Callable[..., str] = sigmoid) -> str:
    """Conv, Relu, average, Conv, gate, product, Conv."""
    x = graph.node("Relu", [graph.conv(graph.input("x", (2, 16, 8, 8)), (16, 32), "a")], "map")
    squeezed = graph.conv(graph.node("GlobalAveragePool", [x], "mean"), (32, 32), "squeeze", kernel=1)
    return str(graph.conv(graph.node("Mul", [x, gate(graph, squeezed)], "gated"), (32, 16), "y"))


class TestChannelGates:
    """Squeeze-and-excitation: map, average and gate are INT8 together, or none of them."""

    @pytest.mark.parametrize("gate", [sigmoid, clipped])
    def test_all_three_are_int8(self, gate: Callable[..., str], graph_builder: Any, tmp_path: Path) -> None:
        """The map has one pair for both of its readers; the gate's scale is 1/127, since it is at most 1."""
        graph = graph_builder()
        placement = placed(graph, tmp_path, [squeeze_and_excitation(graph, gate)])

        assert edges(placement)["map"] == {("n_mean", 0), ("n_gated", 0)}
        assert edges(placement)["gate"] == {("n_gated", 1)}
        assert {point_of(placement, tensor).rule for tensor in ("map", "gate")} == {"channel-gate"}
        assert point_of(placement, "gate").amax == 1.0
        assert point_of(placement, "gate").reason.endswith("the gate of Mul 'n_gated', which is at most 1")
        assert "gate" not in placement.tensors

    @pytest.mark.parametrize("case", ["unbounded", "squeeze", "float reader", "float behind", "excluded"])
    def test_left_alone_where_one_part_is_float(self, case: str, graph_builder: Any, tmp_path: Path) -> None:
        """A gate of any size, a squeeze or a convolution in float, another reader of the map, or of the product."""
        graph = graph_builder()
        outputs = [squeeze_and_excitation(graph, unbounded if case == "unbounded" else sigmoid)]
        if case.startswith("float"):
            outputs.append(graph.node("Tanh", ["map" if case == "float reader" else "gated"], "z"))
        excluded = {"squeeze": ["n_squeeze"], "excluded": ["n_a"]}.get(case, [])
        found = edges(placed(graph, tmp_path, outputs, exclude=excluded))

        assert not {"map", "gate"} & set(found)

    def test_a_map_that_is_int8_for_another_reader(self, graph_builder: Any, tmp_path: Path) -> None:
        """Product and average join the pair that is there."""
        graph = graph_builder()
        outputs = [squeeze_and_excitation(graph)]
        outputs.append(graph.conv("map", (32, 16), "z"))
        found = edges(placed(graph, tmp_path, outputs))

        assert found["map"] == {("n_z", 0), ("n_mean", 0), ("n_gated", 0)}
        assert found["gate"] == {("n_gated", 1)}

    @pytest.mark.parametrize(
        ("left", "right", "index"),
        [
            ((2, 16, 8, 8), (2, 16, 1, 1), 0), ((2, 1, 8, 8), (2, 16, 8, 8), 1),
            (("N", 16, "H", "W"), ("N", 16, 1, 1), 0),
            ((2, 16, 8, 8), (2, 16, 8, 8), None), ((2, 16, 8, 8), (1,), None), ((2, 16, 8, 8), (2, 1, 1, 1), None),
            ((2, 16, 1, 1), (2, 1, 8, 8), None), ((16, 8), (16, 1), None),
        ],
    )  # fmt: skip
    def test_what_is_a_gate(self, left: Any, right: Any, index: int | None, graph_builder: Any, tmp_path: Path) -> None:
        """Broadcast over space or channels; not over the whole of a sample, and not one over the other."""
        graph = graph_builder()
        graph.node("Mul", [graph.input("a", left), graph.input("b", right)], "y")
        model = prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir()

        assert gated_map(model.graph[0]) == index


class TestNormalizations:
    """Float inside; INT8 before one only behind a convolution, and behind one only for a product."""

    @pytest.mark.parametrize("alone", [True, False])
    def test_a_convolution_before_a_layer_normalization(self, alone: bool, graph_builder: Any, tmp_path: Path) -> None:
        """ConvNeXt's depthwise convolution writes INT8 where nothing but the normalization reads it."""
        graph = graph_builder()
        a = graph.conv(graph.input("x", MAP), (16, 16), "a")
        last = graph.node("Transpose", [a], "last", perm=[0, 2, 3, 1])
        graph.node("LayerNormalization", [last, graph.normal((16,))], "y", axis=-1)
        outputs = ["y"] if alone else ["y", graph.node("Tanh", [a], "z")]
        placement = placed(graph, tmp_path, outputs)

        assert edges(placement) == {"x": {("n_a", 0)}} | ({"last": {("n_y", 0)}} if alone else {})
        if alone:
            assert point_of(placement, "last").scale_of == "a"
            assert point_of(placement, "last").reason.endswith("Conv 'n_a' before LayerNormalization 'n_y'")

    @pytest.mark.parametrize(
        "chain", ["LayerNormalization", "InstanceNormalization", "GroupNormalization", "Softmax", "Gelu", "erf", "tanh"]
    )
    def test_float_chains_before_a_product(self, chain: str, graph_builder: Any, tmp_path: Path) -> None:
        """Product, chain, product: one pair right behind the chain, none on its own edges."""
        graph = graph_builder()
        x = graph.node("MatMul", [graph.input("x", (2, 32, 16)), graph.normal((16, 16))], "first")
        if chain in ("InstanceNormalization", "GroupNormalization"):
            groups = {"num_groups": 4} if chain == "GroupNormalization" else {}
            y = graph.node(chain, [x, graph.normal((32,)), graph.normal((32,))], "normal", **groups)
        elif chain == "LayerNormalization":
            y = graph.node(chain, [x, graph.normal((16,))], "normal", axis=-1)
        elif chain in ("Softmax", "Gelu"):
            y = graph.node(chain, [x], "normal")
        else:
            inner = graph.node("Div", [x, graph.constant(np.float32(1.414))])
            if chain == "tanh":
                cube = graph.node("Pow", [x, graph.constant(np.float32(3))])
                inner = graph.node("Add", [x, graph.node("Mul", [cube, graph.constant(np.float32(0.04))])])
            gate = graph.node("Erf" if chain == "erf" else "Tanh", [inner])
            gate = graph.node("Add", [gate, graph.constant(np.float32(1))])
            y = graph.node("Mul", [graph.node("Mul", [x, gate]), graph.constant(np.float32(0.5))], "normal")
        graph.node("MatMul", [y, graph.normal((16, 16))], "y")
        found = edges(placed(graph, tmp_path, ["y"]))

        assert [reader for readers in found.values() for reader, _ in readers] == ["n_first", "n_y"]


def attend(graph: Any, *, mask: bool = True, keys: int = 32) -> str:
    """Attention of one head over x [N, keys, 16], scores divided before the mask."""
    x = graph.input("x", ("N", keys, 16))
    query, key, value = (graph.node("MatMul", [x, graph.normal((16, 16))], name) for name in ("q", "k", "v"))
    turned = graph.node("Transpose", [key], "kt", perm=[0, 2, 1])
    scores = graph.node("Div", [graph.node("MatMul", [query, turned], "qk"), graph.constant(np.float32(4))], "scaled")
    if mask:
        scores = graph.node("Add", [scores, graph.input("mask", ("N", 1, keys))], "masked")
    return str(graph.node("MatMul", [graph.node("Softmax", [scores], "p"), value], "y"))


class TestAttention:
    """Products of two activations are float unless asked for."""

    def test_float_by_default(self, graph_builder: Any, tmp_path: Path) -> None:
        """Queries, keys and values read INT8; nothing behind them does."""
        graph = graph_builder()
        placement = placed(graph, tmp_path, [attend(graph)])

        assert edges(placement) == {"x": {("n_q", 0), ("n_k", 0), ("n_v", 0)}}

    def test_both_operands_of_both_products(self, graph_builder: Any, tmp_path: Path) -> None:
        """With attention="int8": queries, keys, probabilities and values; scores, mask and Softmax stay float."""
        graph = graph_builder()
        path = graph.save(tmp_path / "m.onnx", [attend(graph)])
        prepared = prepare(path)
        placement = place_for_tensorrt(prepared.ir(), PlacementOptions(attention="int8"))
        found = edges(placement)

        assert {tensor: found[tensor] for tensor in ("q", "kt", "p", "v")} == {
            "q": {("n_qk", 0)}, "kt": {("n_qk", 1)}, "p": {("n_y", 0)}, "v": {("n_y", 1)}
        }  # fmt: skip
        assert not {"qk", "scaled", "masked", "mask"} & set(found)
        assert point_of(placement, "kt").scale_of == "k"
        assert {point.node for point in placement.weights} == {"n_q", "n_k", "n_v"}
        assert set(placement.tensors) <= set(tensors_to_calibrate(prepared))

    def test_probabilities_need_no_calibration(self, graph_builder: Any, tmp_path: Path) -> None:
        """A Softmax gives at most 1: its scale is 1/127, and no tensor is calibrated for it."""
        graph = graph_builder()
        placement = placed(graph, tmp_path, [attend(graph)], attention="int8")

        assert point_of(placement, "p").amax == 1.0
        assert "p" not in placement.tensors


class TestOtherReaders:
    """What computes in float reads float."""

    def test_a_tensor_of_a_branch_keeps_its_float_form_there(self, tmp_path: Path) -> None:
        """A tensor that is INT8 for a MatMul outside is read from inside an If as it was."""
        weight = ", ".join(["0.5"] * 256)
        model = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 20]>
            g (bool c, float[32,16] x) => (float[32,16] y, float[32,16] z)
            <float[16,16] w = {{{weight}}}> {{
              a = Tanh (x)
              z = MatMul (a, w)
              y = If (c) <then_branch = t () => (float[32,16] p) {{ p = Neg (a) }},
                          else_branch = e () => (float[32,16] q) {{ q = Exp (a) }}>
            }}"""
        )
        onnx.save(model, tmp_path / "m.onnx")
        placement = place_for_tensorrt(prepare(tmp_path / "m.onnx").ir())

        assert edges(placement) == {"a": {("MatMul:z", 0)}}

    @pytest.mark.parametrize("operator", ["LSTM", "GRU"])
    def test_recurrent_layers_read_float(self, operator: str, graph_builder: Any, tmp_path: Path) -> None:
        """The product before one is quantized, the layer's own input is not."""
        graph = graph_builder()
        x = graph.node("MatMul", [graph.input("x", (5, 32, 16)), graph.normal((16, 16))], "first")
        gates = {"LSTM": 4, "GRU": 3}[operator] * 16
        weights = [graph.normal((1, gates, 16)), graph.normal((1, gates, 16))]
        graph.nodes_of(operator, [x, *weights], ["y"], hidden_size=16)

        assert edges(placed(graph, tmp_path, ["y"])) == {"x": {("n_first", 0)}}

    def test_model_outputs_stay_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """A tensor that is both an output and the input of a convolution: only the convolution reads INT8."""
        graph = graph_builder()
        a = graph.conv(graph.input(), (3, 16), "a")
        graph.conv(a, (16, 16), "y")

        assert edges(placed(graph, tmp_path, ["a", "y"]))["a"] == {("n_y", 0)}


def two_ways(graph: Any) -> list[str]:
    x = graph.node("Sigmoid", [graph.input("x", (2, 16, 8, 8))], "source")
    first = graph.node("MaxPool", [x], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    second = graph.node("Transpose", [x], "turned", perm=[0, 1, 3, 2])
    return [graph.conv(first, (16, 16), "a"), graph.conv(second, (16, 16), "b")]


def projection(graph: Any) -> list[str]:
    x = graph.input("x", MAP)
    ends = [leaky_relu(graph, graph.conv(x, (16, 16), name), f"{name}r") for name in ("left", "right")]
    return [str(graph.conv(graph.node("Add", ends, "sum"), (16, 16), "y"))]


def padded(graph: Any) -> list[str]:
    pads = graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    x = graph.node("Pad", [graph.node("Sigmoid", [graph.input("x", MAP)], "source"), pads], "padded", mode="reflect")
    return [graph.conv(x, (16, 16), name, pads=[0] * 4) for name in ("a", "b")]


def pooled(graph: Any) -> list[str]:
    x = graph.conv(graph.input("x", (2, 16, 8, 8)), (16, 32), "a")
    mean = graph.node("GlobalAveragePool", [x], "mean")
    joined = graph.node("Concat", [graph.conv(mean, (32, 16), "b", kernel=1), mean], "joined", axis=1)
    return [graph.conv(joined, (48, 16), "y", kernel=1)]


def attention(graph: Any) -> list[str]:
    return [attend(graph)]


def test_two_ways_of_one_tensor_meet_the_same_scale(graph_builder: Any, tmp_path: Path) -> None:
    """One reads it pooled, the other transposed: a Q that TensorRT moves back finds the other one's scale."""
    graph = graph_builder()
    placement = placed(graph, tmp_path, two_ways(graph))

    assert {point.tensor: point.scale_of for point in placement.activations} == {"pooled": "source", "turned": "source"}


@pytest.mark.parametrize(
    ("indices", "expected"), [([3, 1, 0, 2], "source"), ([-1, -2, -3, -4, 0], "source"), ([0, 1], "taken")]
)
def test_a_gather_that_reorders_commutes_and_one_that_selects_does_not(
    indices: list[int], expected: str, graph_builder: Any, tmp_path: Path
) -> None:
    """A permutation of all elements has the range of the whole; a part may have a smaller one."""
    graph = graph_builder()
    x = graph.node("Tanh", [graph.input("x", (2, 4, 32, 16))], "source")
    taken = graph.node("Gather", [x, graph.constant(np.int64(indices))], "taken", axis=1)
    graph.node("MatMul", [taken, graph.normal((16, 16))], "y")

    assert placed(graph, tmp_path, ["y"]).tensors == [expected]


def gated(graph: Any) -> list[str]:
    return [squeeze_and_excitation(graph)]


@pytest.mark.parametrize("draw", [two_ways, projection, padded, pooled, attention, gated])
def test_whatever_is_left_float_its_scales_are_calibrated(
    draw: Callable[[Any], list[str]], graph_builder: Any, tmp_path: Path
) -> None:
    """Every set of exclusions, with every option: one calibration serves them all."""
    graph = graph_builder()
    prepared = prepare(graph.save(tmp_path / "m.onnx", draw(graph)))
    known = set(tensors_to_calibrate(prepared))
    names = [
        decision.node for decision in place_for_tensorrt(prepared.ir(), PlacementOptions(include=[".*"])).decisions
    ]
    for count in range(len(names) + 1):
        for excluded in itertools.combinations(names, count):
            for how in ("float", "int8"):
                placement = place_for_tensorrt(
                    prepared.ir(), PlacementOptions(exclude=excluded, include=[".*"], residual=how, attention=how)
                )
                assert set(placement.tensors) <= known, excluded


class Deep:
    """A graph of thousands of nodes, put together without protobuf."""

    def __init__(self) -> None:
        self.inputs = [self.value("x"), self.value("other")]
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def value(self, name: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("N", 16, "H", "W")))

    def constant(self, array: Any) -> ir.Value:
        name = f"constant{len(self.initializers)}"
        self.initializers.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.initializers[-1]

    def node(self, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        output = self.value(f"t{len(self.nodes)}")
        if op_type == "Concat":
            output.shape = ir.Shape(("N", None, "H", "W"))
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=f"n{len(self.nodes)}"))
        return output

    def model(self, output: ir.Value) -> ir.Model:
        graph = ir.Graph(
            self.inputs, [output], nodes=self.nodes, initializers=self.initializers, opset_imports={"": 20}
        )
        return ir.Model(graph, ir_version=10)


LENGTH = 5000


@pytest.mark.parametrize("operator", ["Add", "Concat", "Pad"])
def test_chains_of_thousands_of_nodes(operator: str) -> None:
    """Far beyond Python's limit of recursion: one pair before the last node, of a tensor that is never negative."""
    deep = Deep()
    x, other = (deep.node("Relu", [value]) for value in deep.inputs)
    pads = deep.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    for _ in range(LENGTH):
        second = pads if operator == "Pad" else other
        x = deep.node(operator, [x, second], **({"axis": 1} if operator == "Concat" else {}))
    model = deep.model(deep.node("Conv", [x, deep.constant(np.ones((16, 16, 3, 3), np.float32))]))

    (point,) = place_for_tensorrt(model).activations
    assert point.tensor == ("t0" if operator == "Pad" else x.name)
    assert point_of(place_for_cpu(model), str(x.name)).nonnegative


def test_thousands_of_residual_and_dense_connections() -> None:
    """Every block has its skip and all that meets in the Concats has one scale."""
    deep = Deep()
    weight = deep.constant(np.ones((16, 16, 3, 3), np.float32))
    x = deep.inputs[0]
    for _ in range(LENGTH // 4):
        branch = deep.node("Conv", [deep.node("Relu", [deep.node("Conv", [x, weight])]), weight])
        x = deep.node("Add", [branch, x])
    joined = x
    for _ in range(LENGTH // 4):
        joined = deep.node("Concat", [joined, deep.node("Conv", [joined, weight])], axis=1)
    placement = place_for_tensorrt(deep.model(deep.node("Conv", [joined, weight])))

    adds = [node.name for node in deep.nodes if node.op_type == "Add"]
    quantized = {(node, index) for point in placement.activations for node, index in point.uses or ()}
    assert all((name, 1) in quantized and (name, 0) not in quantized for name in adds)
    assert [len(group) for group in placement.groups] == [LENGTH // 4 + 1]
