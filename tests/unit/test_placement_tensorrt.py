"""Facts about `engines.placement` and `engines.placement_tensorrt`, on graphs drawn by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from engines.errors import ModelError
from engines.graph import prepare
from engines.placement import Placement
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt


def placed(graph: Any, folder: Path, outputs: list[str], **options: Any) -> Placement:
    prepared = prepare(graph.save(folder / "m.onnx", outputs))
    return place_for_tensorrt(prepared.ir(), PlacementOptions(**options))


def edges(placement: Placement) -> dict[str, set[tuple[str, int]]]:
    """Quantized tensor to the (node, input) edges that read the dequantized one."""
    found: dict[str, set[tuple[str, int]]] = {}
    for point in placement.activations:
        assert point.uses is not None
        found[point.tensor] = set(point.uses)
    return found


def scales(placement: Placement) -> dict[str, str]:
    return {point.tensor: point.scale_of for point in placement.activations}


class TestWeightedOperators:
    """All their inputs, nothing else."""

    def test_a_chain_of_convolutions(self, graph_builder: Any, tmp_path: Path) -> None:
        """Each convolution's input is quantized behind the Relu; no output is."""
        graph = graph_builder()
        a = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "a")], "ra")
        graph.conv(graph.node("Relu", [graph.conv(a, (16, 16), "b")], "rb"), (16, 8), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement) == {"x": {("n_a", 0)}, "ra": {("n_b", 0)}, "rb": {("n_y", 0)}}
        assert placement.tensors == ["x", "ra", "rb"]
        assert [(point.node, point.index, point.axis) for point in placement.weights] == [
            ("n_a", 1, 0), ("n_b", 1, 0), ("n_y", 1, 0)
        ]  # fmt: skip
        assert all(decision.quantized and decision.rule == "weighted-inputs" for decision in placement.decisions)

    def test_points_are_signed_with_zero_point_zero(self, graph_builder: Any, tmp_path: Path) -> None:
        """TensorRT has no other kind, also behind a Relu, and biases stay float."""
        graph = graph_builder()
        graph.conv(graph.node("Relu", [graph.conv(graph.input(), (3, 16))]), (16, 8), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert [(p.unsigned, p.zero_point, p.divisor) for p in placement.activations] == [(False, 0, 127)] * 2
        assert [p.integer_bias for p in placement.weights] == [False, False]

    def test_axes_of_per_channel_weights(self, graph_builder: Any, tmp_path: Path) -> None:
        """Conv 0, ConvTranspose 1, grouped ConvTranspose none, Gemm by transB, MatMul 1, batched MatMul none."""
        graph = graph_builder()
        x = graph.input("x", (2, 32, 16, 16))
        graph.conv(x, (32, 16), "conv")
        graph.node("ConvTranspose", [x, graph.normal((32, 16, 2, 2))], "up")
        graph.node("ConvTranspose", [x, graph.normal((32, 16, 2, 2))], "grouped", group=2)
        rows = graph.node("Reshape", [x, graph.constant(np.int64([2, 8192]))], "rows")
        graph.node("Gemm", [rows, graph.normal((16, 8192))], "gemm_t", transB=1)
        graph.node("Gemm", [rows, graph.normal((8192, 16))], "gemm")
        graph.node("MatMul", [rows, graph.normal((8192, 16))], "matmul")
        graph.node("MatMul", [x, graph.normal((32, 16, 24))], "batched")
        graph.node("MatMul", [graph.normal((20, 16)), x], "left")
        outputs = ["conv", "up", "grouped", "gemm_t", "gemm", "matmul", "batched", "left"]
        placement = placed(graph, tmp_path, outputs)

        found = {point.node: (point.index, point.axis) for point in placement.weights}
        assert found == {
            "n_conv": (1, 0), "n_up": (1, 1), "n_grouped": (1, None), "n_gemm_t": (1, 0), "n_gemm": (1, 1),
            "n_matmul": (1, 1), "n_batched": (1, None), "n_left": (0, None),
        }  # fmt: skip
        assert ("n_left", 1) in edges(placement)["x"]

    def test_a_product_of_two_activations_stays_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """Attention's products have no weight; the decision says so."""
        graph = graph_builder()
        x = graph.input("x", ("N", 16, 16))
        query = graph.node("MatMul", [x, graph.normal((16, 16))], "query")
        graph.node("MatMul", [query, x], "scores")
        placement = placed(graph, tmp_path, ["scores"])

        assert edges(placement) == {"x": {("n_query", 0)}}
        kept = placement.decisions[1]
        assert (kept.node, kept.quantized, kept.rule) == ("n_scores", False, "attention")
        assert "both operands are activations" in kept.reason

    def test_a_weight_that_is_computed_stays_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """A convolution whose kernel is an input of the model cannot hold an INT8 initializer."""
        graph = graph_builder()
        x, kernel = graph.input("x", (1, 3, 8, 8)), graph.input("kernel", (16, 3, 3, 3))
        graph.node("Conv", [x, kernel], "a")
        graph.conv("a", (16, 8), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert [(d.node, d.quantized) for d in placement.decisions] == [("n_a", False), ("n_y", True)]
        assert placement.decisions[0].reason == "its weight is computed at run time"
        assert edges(placement) == {"a": {("n_y", 0)}}

    def test_convolutions_of_constants_and_of_other_types_stay_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """FP16 weights are not ours to quantize, and the reason names the type."""
        graph = graph_builder()
        x = graph.node("Cast", [graph.input()], "half", to=onnx.TensorProto.FLOAT16)
        weight = graph.constant(np.ones((16, 3, 3, 3), np.float16))
        graph.node("Cast", [graph.node("Conv", [x, weight], "conv")], "y", to=onnx.TensorProto.FLOAT)
        placement = placed(graph, tmp_path, ["y"])

        assert placement.activations == ()
        assert placement.decisions[0].reason == "its weight is FLOAT16, not FLOAT"

    def test_weighted_nodes_inside_a_branch_are_reported(self, tmp_path: Path) -> None:
        """Only the main graph is calibrated; what is skipped is told."""
        model = onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]>
            g (bool c, float[2,2] x) => (float[2,2] y)
            <float[2,2] w = {1., 2., 3., 4.}> {
              a = MatMul (x, w)
              y = If (c) <then_branch = t () => (float[2,2] p) { [inner] p = MatMul (a, w) },
                          else_branch = e () => (float[2,2] q) { q = Exp (a) }>
            }"""
        )
        onnx.save(model, tmp_path / "m.onnx")
        placement = place_for_tensorrt(prepare(tmp_path / "m.onnx").ir(), PlacementOptions(include=["MatMul:a"]))

        assert [(d.node, d.quantized, d.rule) for d in placement.decisions] == [
            ("MatMul:a", True, "included"), ("inner", False, "subgraph")
        ]  # fmt: skip

    def test_a_graph_without_weighted_operators(self, graph_builder: Any, tmp_path: Path) -> None:
        """There is nothing to place, which is no error here."""
        graph = graph_builder()
        graph.node("Relu", [graph.input()], "y")
        placement = placed(graph, tmp_path, ["y"])

        assert (placement.activations, placement.weights, placement.decisions) == ((), (), ())

    def test_several_readers_share_one_pair(self, graph_builder: Any, tmp_path: Path) -> None:
        """Two convolutions of one tensor read one DequantizeLinear; the Sigmoid beside them reads the float tensor."""
        graph = graph_builder()
        x = graph.input()
        for name in "ab":
            graph.conv(x, (3, 16), name)
        graph.node("Sigmoid", [x], "c")
        placement = placed(graph, tmp_path, ["a", "b", "c"])

        assert edges(placement) == {"x": {("n_a", 0), ("n_b", 0)}}


class TestExclusions:
    """Regular expressions over whole node names."""

    def test_matching_nodes_stay_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """An expression has to match the whole name; the decision quotes it."""
        graph = graph_builder()
        a = graph.conv(graph.input(), (3, 16), "head.0")
        graph.conv(graph.conv(a, (16, 16), "head.10"), (16, 8), "y")
        placement = placed(graph, tmp_path, ["y"], exclude=[r"n_head\.\d"])

        decision = {d.node: d for d in placement.decisions}
        assert [d.quantized for d in placement.decisions] == [False, True, True]
        assert decision["n_head.0"].rule == "excluded"
        assert r"'n_head\\.\\d'" in decision["n_head.0"].reason
        assert "x" not in placement.tensors

    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("[", r"Cannot exclude '\[': not a regular expression"),
            ("head", r"Cannot exclude 'head': it matches .* none of the 1 weighted nodes \(n_head\)"),
        ],
    )
    def test_expressions_that_cannot_be_meant(
        self, expression: str, expected: str, graph_builder: Any, tmp_path: Path
    ) -> None:
        """A misspelt expression must not pass silently; the names that exist are shown."""
        graph = graph_builder()
        graph.conv(graph.input(), (3, 16), "head")

        with pytest.raises(ModelError, match=expected):
            placed(graph, tmp_path, ["head"], exclude=[expression])


class TestCommutingOperators:
    """MaxPool and the operators that move values get no pair of their own."""

    def test_max_pool_and_flatten_share_the_scale_of_their_source(self, graph_builder: Any, tmp_path: Path) -> None:
        """Conv -> Relu -> MaxPool -> Flatten -> Gemm has one pair between, before the Gemm, with the Relu's scale."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("x", (2, 3, 8, 8)), (3, 16))], "relu")
        x = graph.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
        graph.gemm(graph.node("Flatten", [x], "flat"), (256, 32), "y")
        placement = placed(graph, tmp_path, ["y"])

        assert scales(placement) == {"x": "x", "flat": "relu"}
        assert "pool" not in placement.tensors

    @pytest.mark.parametrize(
        ("operator", "inputs", "attributes"),
        [
            ("Transpose", [], {"perm": [0, 1, 3, 2]}),
            ("Slice", [np.int64([0]), np.int64([4]), np.int64([2])], {}),
            ("DepthToSpace", [], {"blocksize": 2}),
            ("Resize", [np.float32([]), np.float32([1, 1, 2, 2])], {"mode": "nearest"}),
            ("Pad", [np.int64([0, 0, 1, 1, 0, 0, 1, 1])], {"mode": "edge"}),
        ],
    )
    def test_operators_that_move_values(
        self, operator: str, inputs: list[Any], attributes: Any, graph_builder: Any, tmp_path: Path
    ) -> None:
        """The tensor behind them takes the scale of the tensor before them."""
        graph = graph_builder()
        graph.node("Sigmoid", [graph.input("x", (1, 16, 8, 8))], "source")
        moved = graph.node(operator, ["source", *map(graph.constant, inputs)], "moved", **attributes)
        graph.conv(moved, (4 if operator == "DepthToSpace" else 16, 16), "y")

        assert placed(graph, tmp_path, ["y", "moved"]).tensors == ["source"]

    @pytest.mark.parametrize(
        ("operator", "inputs", "attributes"),
        [
            ("Resize", [np.float32([]), np.float32([1, 1, 2, 2])], {"mode": "linear"}),
            ("Pad", [np.int64([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(7)], {}),
            ("AveragePool", [], {"kernel_shape": [2, 2]}),
            ("Tanh", [], {}),
        ],
    )
    def test_operators_that_make_new_values(
        self, operator: str, inputs: list[Any], attributes: Any, graph_builder: Any, tmp_path: Path
    ) -> None:
        """Interpolation, averages and padding with other than zero have a scale of their own."""
        graph = graph_builder()
        graph.node("Sigmoid", [graph.input("x", (1, 16, 8, 8))], "source")
        made = graph.node(operator, ["source", *map(graph.constant, inputs)], "made", **attributes)
        graph.conv(made, (16, 8), "y")

        assert placed(graph, tmp_path, ["y"]).tensors == ["made"]


class TestPads:
    """Nothing stands between a Pad and its convolution."""

    @pytest.mark.parametrize("mode", ["reflect", "constant"])
    def test_the_pair_goes_before_the_pad(self, mode: str, graph_builder: Any, tmp_path: Path) -> None:
        """A reflecting Pad, and a Pad of zeros before a transposed convolution, whose pads are something else."""
        graph = graph_builder()
        graph.node("Sigmoid", [graph.input()], "source")
        x = graph.node("Pad", ["source", graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], "padded", mode=mode)
        if mode == "constant":
            graph.node("ConvTranspose", [x, graph.normal((3, 16, 3, 3))], "y")
        else:
            graph.node("Conv", [x, graph.normal((16, 3, 3, 3))], "y", auto_pad="SAME_UPPER")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement) == {"source": {("n_padded", 0)}}
        assert placement.activations[0].rule == "before-pad"
        assert "Pad 'n_padded' of Conv" in placement.activations[0].reason

    def test_a_pad_with_other_readers_keeps_float_values_for_them(self, graph_builder: Any, tmp_path: Path) -> None:
        """What is no quantized convolution, here a model output, must not see quantized values."""
        graph = graph_builder()
        graph.node("Sigmoid", [graph.input()], "source")
        graph.node("Pad", ["source", graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], "padded", mode="reflect")
        graph.conv("padded", (3, 16), "y", pads=[0] * 4)
        placement = placed(graph, tmp_path, ["y", "padded"])

        assert edges(placement) == {"padded": {("n_y", 0)}}
        assert scales(placement) == {"padded": "source"}

    def test_a_pad_of_two_convolutions_gets_one_pair(self, graph_builder: Any, tmp_path: Path) -> None:
        """Where both readers are quantized, the pair still goes before the Pad."""
        graph = graph_builder()
        graph.node("Sigmoid", [graph.input()], "source")
        graph.node("Pad", ["source", graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], "padded", mode="reflect")
        for name in "ab":
            graph.conv("padded", (3, 16), name, pads=[0] * 4)

        assert edges(placed(graph, tmp_path, ["a", "b"])) == {"source": {("n_padded", 0)}}
        one_excluded = placed(graph, tmp_path, ["a", "b"], exclude=["n_a"])
        assert edges(one_excluded) == {"padded": {("n_b", 0)}}


def block(graph: Any, x: str, channels: tuple[int, int], name: str) -> str:
    """Conv -> Relu -> Conv."""
    y = graph.node("Relu", [graph.conv(x, channels, f"{name}1")], f"{name}1r")
    return str(graph.conv(y, (channels[1], channels[1]), f"{name}2"))


class TestResidualRule:
    """The skip input of a residual Add is quantized, the convolution's is not."""

    @pytest.mark.parametrize("branch_first", [True, False])
    def test_identity_skip(self, branch_first: bool, graph_builder: Any, tmp_path: Path) -> None:
        """The skip shares the pair of the block's first convolution, on whichever side of the Add it stands."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")], "trunk")
        operands = [block(graph, x, (16, 16), "branch"), x]
        graph.node("Relu", [graph.node("Add", operands if branch_first else operands[::-1], "sum")], "y")
        found = edges(placed(graph, tmp_path, ["y"]))

        assert found["trunk"] == {("n_branch1", 0), ("n_sum", 1 if branch_first else 0)}
        assert "branch2" not in found
        assert "sum" not in found

    @pytest.mark.parametrize("branch_first", [True, False])
    def test_projection_shortcut(self, branch_first: bool, graph_builder: Any, tmp_path: Path) -> None:
        """Of two convolutions the one with the shorter way to the common ancestor is the skip."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")], "trunk")
        operands = [block(graph, x, (16, 32), "branch"), graph.conv(x, (16, 32), "shortcut", kernel=1)]
        graph.node("Add", operands if branch_first else operands[::-1], "y")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement)["shortcut"] == {("n_y", 1 if branch_first else 0)}
        assert "branch2" not in placement.tensors
        assert [p.rule for p in placement.activations if p.tensor == "shortcut"] == ["residual-skip"]

    def test_padded_shortcut_without_weights(self, graph_builder: Any, tmp_path: Path) -> None:
        """The strided, zero-padded skip of CIFAR ResNets takes the trunk's scale: slicing and padding commute."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("x", (1, 3, 8, 8)), (3, 16), "stem")], "trunk")
        branch = graph.conv(x, (16, 32), "branch", strides=[2, 2])
        steps = [graph.constant(np.int64(values)) for values in ([0, 0], [8, 8], [2, 3], [2, 2])]
        skip = graph.node("Slice", [x, *steps], "sliced")
        skip = graph.node("Pad", [skip, graph.constant(np.int64([0, 8, 0, 0, 0, 8, 0, 0]))], "skip")
        graph.node("Add", [branch, skip], "y")
        placement = placed(graph, tmp_path, ["y"])

        assert edges(placement)["skip"] == {("n_y", 1)}
        assert scales(placement)["skip"] == "trunk"

    def test_residual_float_leaves_the_skip_alone(self, graph_builder: Any, tmp_path: Path) -> None:
        """`residual="float"` quantizes the inputs of weighted operators only."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")], "trunk")
        graph.node("Add", [block(graph, x, (16, 16), "branch"), x], "y")
        found = edges(placed(graph, tmp_path, ["y"], residual="float"))

        assert found["trunk"] == {("n_branch1", 0)}

    def test_no_rule_for_other_additions(self, graph_builder: Any, tmp_path: Path) -> None:
        """A constant, two operands that are no convolutions, and an operand doubled are no residuals."""
        graph = graph_builder()
        x = graph.input()
        graph.node("Add", [graph.conv(x, (3, 16), "a"), graph.normal((1, 16, 1, 1))], "constant")
        b, c = graph.node("Tanh", [x], "b"), graph.node("Sigmoid", [x], "c")
        graph.node("Add", [b, c], "plain")
        d = graph.conv(x, (3, 16), "d")
        graph.node("Add", [d, d], "doubled")

        assert list(edges(placed(graph, tmp_path, ["constant", "plain", "doubled"]))) == ["x"]

    def test_no_rule_where_the_convolution_has_a_second_reader(self, graph_builder: Any, tmp_path: Path) -> None:
        """A convolution whose output is needed elsewhere cannot be fused with the Add."""
        graph = graph_builder()
        x = graph.input("x", ("N", 16, 8, 8))
        a = graph.conv(x, (16, 16), "a")
        graph.node("Add", [a, x], "sum")
        graph.node("Sigmoid", [a], "gate")

        assert edges(placed(graph, tmp_path, ["sum", "gate"])) == {"x": {("n_a", 0)}}
        assert edges(placed(graph, tmp_path, ["sum", "gate", "a"])) == {"x": {("n_a", 0)}}

    def test_no_rule_for_an_addition_that_broadcasts(self, graph_builder: Any, tmp_path: Path) -> None:
        """A per-channel embedding is no skip: Conv + Add fuse only for equal shapes."""
        graph = graph_builder()
        embedding = graph.input("embedding", ("N", 16, 1, 1))
        graph.node("Add", [graph.conv(graph.input(), (3, 16), "a"), embedding], "y")

        assert edges(placed(graph, tmp_path, ["y"])) == {"x": {("n_a", 0)}}

    def test_an_excluded_convolution_is_no_branch(self, graph_builder: Any, tmp_path: Path) -> None:
        """The Add of a float convolution stays as it is."""
        graph = graph_builder()
        x = graph.input("x", ("N", 16, 8, 8))
        graph.node("Add", [graph.conv(x, (16, 16), "a"), x], "y")
        graph.conv(x, (16, 16), "b")

        assert edges(placed(graph, tmp_path, ["y", "b"], exclude=["n_a"])) == {"x": {("n_b", 0)}}
