"""Facts about `engines.placement_cpu`: ONNX Runtime turns every convolution into its integer kernel.

Products of 8-bit weights saturate in pairs on processors without VNNI and AMX, so everything here that compares the
integer kernels with exact arithmetic takes 7-bit weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from engines.graph import PreparedModel, float_activations, prepare
from engines.placement import ActivationPoint
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.qdq import insert_qdq, point_scale

INPUT = np.random.default_rng(2).normal(size=(2, 4, 8, 8)).astype(np.float32)


def plain(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8))])
    return [g.conv(g.node("Relu", [g.conv(x, (8, 8), bias=False)]), (8, 4))]


def identity_residual(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8))])
    y = g.conv(g.node("Relu", [g.conv(x, (8, 8))]), (8, 8))
    return [g.conv(g.node("Relu", [g.node("Add", [y, x])]), (8, 4))]


def projection_residual(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8))])
    y = g.conv(g.node("Relu", [g.conv(x, (8, 6), strides=[2, 2])]), (6, 6))
    skip = g.conv(x, (8, 6), kernel=1, strides=[2, 2])
    return [g.conv(g.node("Relu", [g.node("Add", [y, skip])]), (6, 4))]


def pre_activation_residual(g: Any, x: str) -> list[str]:
    x = g.conv(x, (4, 8))
    y = g.conv(g.node("Relu", [x]), (8, 8))
    x = g.node("Add", [x, y])
    return [g.conv(g.node("Relu", [x]), (8, 4))]


def padded_shortcut(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 4))])
    skip = g.node("Slice", [x, *(g.constant(np.int64(v)) for v in ([0, 0], [8, 8], [2, 3], [2, 2]))])
    skip = g.node("Pad", [skip, g.constant(np.int64([0, 2, 0, 0, 0, 2, 0, 0]))])
    return [g.conv(g.node("Relu", [g.node("Add", [g.conv(x, (4, 8), strides=[2, 2]), skip])]), (8, 4))]


def inverted_residual(g: Any, x: str) -> list[str]:
    def expanded(x: str) -> str:
        x = g.clip(g.conv(x, (4, 12), kernel=1), 0, 6)
        x = g.clip(g.conv(x, (12, 12), group=12), 0, 6)
        return str(g.conv(x, (12, 4), kernel=1))

    x = expanded(x)
    return [g.clip(g.conv(g.node("Add", [x, expanded(x)]), (4, 8), kernel=1), 0, 6)]


def low_ceiling(g: Any, x: str) -> list[str]:
    return [g.conv(g.clip(g.conv(g.clip(g.conv(x, (4, 8)), 0, 0.25), (8, 8)), 0, 1000), (8, 4))]


def hard_tanh(g: Any, x: str) -> list[str]:
    return [g.conv(g.clip(g.conv(x, (4, 8)), -1, 1), (8, 4))]


def floor_only(g: Any, x: str) -> list[str]:
    return [g.conv(g.node("Clip", [g.conv(x, (4, 8)), g.constant(np.float32(0))]), (8, 4))]


def depthwise(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8), group=4)])
    x = g.node("Relu", [g.conv(x, (8, 8), group=8)])
    return [g.conv(g.node("Relu", [g.conv(x, (8, 6), kernel=1)]), (6, 6), group=2)]


def concatenated_branches(g: Any, x: str) -> list[str]:
    a, b = g.node("Relu", [g.conv(x, (4, 3))]), g.conv(x, (4, 3), kernel=1)
    c = g.node("MaxPool", [a], kernel_shape=[3, 3], pads=[1] * 4)
    return [g.conv(g.node("Concat", [a, b, c, x], axis=1), (13, 4))]


def concatenated_with_float(g: Any, x: str) -> list[str]:
    return [g.conv(g.node("Concat", [g.conv(x, (4, 3)), g.node("Sin", [x])], axis=1), (7, 4))]


def max_pooled(g: Any, x: str) -> list[str]:
    x = g.node("MaxPool", [g.node("Relu", [g.conv(x, (4, 8))])], kernel_shape=[2, 2], strides=[2, 2])
    return [g.conv(g.node("Relu", [g.node("MaxPool", [g.conv(x, (8, 8))], kernel_shape=[2, 2])]), (8, 4))]


def classifier(g: Any, x: str) -> list[str]:
    x = g.node("GlobalAveragePool", [g.node("Relu", [g.conv(x, (4, 8))])])
    return [g.node("Softmax", [g.gemm(g.node("Flatten", [x]), (8, 5))])]


def averaged_classifier(g: Any, x: str) -> list[str]:
    x = g.node("AveragePool", [g.node("Relu", [g.conv(x, (4, 8))])], kernel_shape=[4, 4], strides=[4, 4])
    x = g.node("Relu", [g.gemm(g.node("Flatten", [x]), (32, 9))])
    return [g.gemm(x, (9, 5), bias=False)]


def several_readers(g: Any, x: str) -> list[str]:
    y = g.conv(x, (4, 8), "shared")
    z = g.node("Mul", [g.node("Relu", [y]), g.node("Sigmoid", [y])])
    return [g.conv(z, (8, 4)), g.conv(y, (8, 4)), "shared"]


def relu_output(g: Any, x: str) -> list[str]:
    y = g.node("Relu", [g.conv(x, (4, 8))], "features")
    return ["features", g.conv(y, (8, 4)), g.node("Exp", [y])]


def encoder(g: Any, x: str) -> list[str]:
    def normalized(value: str, name: str) -> str:
        gain, shift = g.normal((8,)), g.normal((8,))
        return str(g.node("LayerNormalization", [value, gain, shift], name))

    x = normalized(x, "normal_1")
    wide = g.node("Gelu", [g.node("MatMul", [x, g.normal((8, 32))])], "inner")
    x = normalized(g.node("Add", [x, g.node("MatMul", [wide, g.normal((32, 8))])]), "normal_2")
    return [g.node("MatMul", [x, g.normal((8, 16))])]


def silu(g: Any, x: str) -> list[str]:
    for channels in ((4, 8), (8, 8)):
        y = g.conv(x, channels)
        x = g.node("Mul", [y, g.node("Sigmoid", [y])])
    return [g.node("Sigmoid", [g.conv(x, (8, 4))])]


def other_activations(g: Any, x: str) -> list[str]:
    x = g.node("LeakyRelu", [g.conv(x, (4, 8))], alpha=0.1)
    x = g.node("PRelu", [g.conv(x, (8, 8)), g.normal((8, 1, 1))])
    return [g.conv(g.node("HardSwish", [g.conv(x, (8, 8))]), (8, 4))]


def squeeze_and_excite(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8))])
    gate = g.node("Relu", [g.conv(g.node("GlobalAveragePool", [x]), (8, 4), kernel=1)])
    gate = g.node("Sigmoid", [g.conv(gate, (4, 8), kernel=1)])
    return [g.conv(g.node("Mul", [x, gate]), (8, 4))]


def transposed_product(g: Any, x: str) -> list[str]:
    x = g.node("Transpose", [g.conv(x, (4, 8))], perm=[0, 2, 3, 1])
    x = g.node("Reshape", [x, g.constant(np.int64([0, -1, 8]))])
    return [g.node("MatMul", [x, g.normal((8, 5))])]


def reshaped_output(g: Any, x: str) -> list[str]:
    return [g.node("Flatten", [g.conv(x, (4, 8))])]


def channel_shuffle(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8))])
    x = g.node("Reshape", [x, g.constant(np.int64([0, 2, 4, 8, 8]))])
    x = g.node("Reshape", [g.node("Transpose", [x], perm=[0, 2, 1, 3, 4]), g.constant(np.int64([0, 8, 8, 8]))])
    a, b = g.nodes_of("Split", [x], ["half_a", "half_b"], axis=1, num_outputs=2)
    return [g.conv(g.node("Concat", [a, g.conv(b, (4, 4))], axis=1), (8, 4))]


def feature_pyramid(g: Any, x: str) -> list[str]:
    a = g.node("Relu", [g.conv(x, (4, 8))])
    b = g.node("Relu", [g.conv(a, (8, 8), strides=[2, 2])])
    scales = ["", g.constant(np.float32([1, 1, 2, 2]))]
    up = g.node("Resize", [b, *scales], mode="nearest", nearest_mode="floor",
                coordinate_transformation_mode="asymmetric")  # fmt: skip
    smooth = g.node("Resize", [b, *scales], mode="linear")
    return [g.conv(g.node("Concat", [up, a, smooth], axis=1), (24, 4))]


def reflected_pads(g: Any, x: str) -> list[str]:
    widths = g.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    x = g.node("Relu", [g.conv(g.node("Pad", [x, widths], mode="reflect"), (4, 8), pads=[0] * 4)])
    return [g.conv(g.node("Pad", [x, widths], mode="edge"), (8, 4), pads=[0] * 4)]


def decoder(g: Any, x: str) -> list[str]:
    x = g.node("Relu", [g.conv(x, (4, 8))])
    x = g.node("Relu", [g.node("ConvTranspose", [x, g.normal((8, 4, 2, 2), 0.2)], strides=[2, 2])])
    return [g.conv(x, (4, 4))]


def arithmetic(g: Any, x: str) -> list[str]:
    a, b = g.conv(x, (4, 8)), g.conv(x, (4, 8))
    c = g.node("Add", [g.node("Sub", [a, b]), g.normal((8, 1, 1))])
    return [g.conv(g.node("Mul", [c, c]), (8, 4))]


def shared_weights(g: Any, x: str) -> list[str]:
    weight = g.normal((4, 4, 3, 3), 0.2)
    for _ in range(2):
        x = g.node("Relu", [g.node("Conv", [x, weight, g.normal((4,))], pads=[1] * 4)])
    return [g.node("Conv", [x, weight], pads=[1] * 4)]


NETS = [
    plain, identity_residual, projection_residual, pre_activation_residual, padded_shortcut, inverted_residual,
    low_ceiling, hard_tanh, floor_only, depthwise, concatenated_branches, concatenated_with_float, max_pooled,
    classifier, averaged_classifier, several_readers, relu_output, silu, other_activations, squeeze_and_excite,
    transposed_product, reshaped_output, channel_shuffle, feature_pyramid, reflected_pads, decoder, arithmetic,
    shared_weights,
]  # fmt: skip


@pytest.fixture
def drawn(graph_builder: Any, tmp_path: Path) -> Callable[[Any], PreparedModel]:
    """Draws one of the nets and prepares it."""

    def draw(net: Any) -> PreparedModel:
        graph = graph_builder(11)
        outputs = net(graph, graph.input("x", ("N", 4, 8, 8)))
        return prepare(graph.save(tmp_path / "net.onnx", outputs))

    return draw


@pytest.fixture
def minmax(run_model: Callable[..., Any]) -> Callable[[PreparedModel], dict[str, float]]:
    """Scales amax / 127 of every activation on INPUT."""

    def calibrate(prepared: PreparedModel) -> dict[str, float]:
        values = run_model(
            prepared.proto, {"x": INPUT}, fetch=[n for n in float_activations(prepared.ir()) if n != "x"]
        )
        return {name: float(np.abs(value).max() / 127) for name, value in {"x": INPUT, **values}.items()}

    return calibrate


def points(prepared: PreparedModel) -> dict[str, ActivationPoint]:
    return {point.tensor: point for point in place_for_cpu(prepared.ir()).activations}


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_every_convolution_runs_on_integers(
    net: Any, drawn: Any, minmax: Any, tmp_path: Path, run_model: Callable[..., Any]
) -> None:
    """ONNX Runtime executes no float Conv, Gemm or MatMul, and its outputs are the exact ones.

    Exact is the file run as written, Q/DQ as fake quantization; a few kernels round on another way, by a step or two.
    """
    prepared = drawn(net)
    scales = minmax(prepared)
    result = insert_qdq(prepared, place_for_cpu(prepared.ir()), scales, reduce_range=True)
    model = ir.to_proto(result.model)
    onnx.checker.check_model(model, full_check=True)
    exact = run_model(model, {"x": INPUT})
    native = run_model(model, {"x": INPUT}, optimized=True, optimized_model=tmp_path / "executed.onnx")

    executed = Counter(node.op_type for node in onnx.load(tmp_path / "executed.onnx").graph.node)
    convolutions = sum(node.op_type == "Conv" for node in prepared.proto.graph.node)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(executed)
    assert executed["QLinearConv"] == convolutions
    for name, value in exact.items():
        np.testing.assert_allclose(native[name], value, atol=2.5 * scales[name], err_msg=name)
        # one step is amax / 127; the difference from FP32 is some steps, not a different network
        expected = run_model(prepared.proto, {"x": INPUT})[name]
        assert np.linalg.norm(value - expected) < 0.15 * np.linalg.norm(expected)


class TestCodes:
    """Unsigned activations that carry the scales of the calibration."""

    def test_never_negative_tensors_start_at_zero_and_others_at_128(self, drawn: Any) -> None:
        """Inputs and bare convolutions can be negative; Relu, and what moves or averages or adds it, cannot."""
        found = {name: point.zero_point for name, point in points(drawn(identity_residual)).items()}

        assert found == {"x": 128, "relu_1": 0, "relu_3": 0, "conv_4": 128, "relu_6": 0, "conv_7": 128}
        assert all(point.unsigned for point in points(drawn(identity_residual)).values())

    @pytest.mark.parametrize(
        ("operator", "zero_point"), [("Sigmoid", 0), ("Softmax", 0), ("Abs", 0), ("Tanh", 128), ("Neg", 128)]
    )
    def test_operators_that_guarantee_a_sign(
        self, operator: str, zero_point: int, graph_builder: Any, tmp_path: Path
    ) -> None:
        """The graph itself decides, not what the calibration happened to see."""
        graph = graph_builder()
        graph.conv(graph.node(operator, [graph.input()], "a"), (3, 4), "y")

        assert points(prepare(graph.save(tmp_path / "m.onnx", ["y"])))["a"].zero_point == zero_point

    @pytest.mark.parametrize(("source", "zero_point"), [("Relu", 0), ("Neg", 128)])
    @pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax"])
    def test_a_reduction_has_the_sign_of_what_it_reduces(
        self, operator: str, source: str, zero_point: int, graph_builder: Any, tmp_path: Path
    ) -> None:
        """A mean over a Relu's output, as PyTorch exports global pooling, is never negative; the axes have no say."""
        graph = graph_builder()
        axes = graph.constant(np.array([-1, -2]))
        graph.conv(graph.node(operator, [graph.node(source, [graph.input()]), axes], "a"), (3, 4), "y", kernel=1)

        assert points(prepare(graph.save(tmp_path / "m.onnx", ["y"])))["a"].zero_point == zero_point

    def test_sums_of_relus_are_never_negative_and_sums_with_negative_constants_may_be(
        self, graph_builder: Any, tmp_path: Path
    ) -> None:
        """All operands have to be, constants by their values."""
        graph = graph_builder()
        x = graph.input()
        a, b = graph.node("Relu", [x]), graph.node("Sigmoid", [x])
        sums = {
            "good": graph.node("Add", [a, b], "good"),
            "lifted": graph.node("Add", [a, graph.constant(np.float32([0, 1]).repeat(4))], "lifted"),
            "lowered": graph.node("Add", [a, graph.constant(np.float32([1, -1]).repeat(4))], "lowered"),
            "mixed": graph.node("Concat", [a, x, b], "mixed", axis=1),
        }
        for name, value in sums.items():
            graph.conv(value, (9 if name == "mixed" else 3, 4), f"y_{name}")
        prepared = prepare(graph.save(tmp_path / "m.onnx", [f"y_{name}" for name in sums]))

        found = points(prepared)
        assert {name: found[name].zero_point for name in sums} == {"good": 0, "lifted": 0, "lowered": 128, "mixed": 128}

    def test_a_clip_lets_the_largest_code_be_its_upper_bound(self, drawn: Any) -> None:
        """Scale amax / 255, so that QuantizeLinear saturates where the Clip does, or below."""
        found = {name: point for name, point in points(drawn(inverted_residual)).items() if name.startswith("clip")}

        assert len(found) == 5
        for point in found.values():
            assert (point.zero_point, point.divisor, point.ceiling) == (0, 255, 6.0)
            assert point_scale(point, {point.scale_of: 3 / 127}) == np.float32(3 / 255)

    def test_a_threshold_above_the_clip_counts_up_to_the_clip(self, drawn: Any) -> None:
        """A calibration method may choose the edge of a bin above the largest value."""
        point = next(point for name, point in points(drawn(inverted_residual)).items() if name.startswith("clip"))

        assert point_scale(point, {point.scale_of: 7 / 127}) == np.float32(6 / 255)

    @pytest.mark.parametrize(("low", "high", "ceiling"), [(0, 6, 6.0), (1, 6, 6.0), (0, 0, None), (-1, 6, None)])
    def test_only_clips_between_zero_and_something_positive_count(
        self, low: float, high: float, ceiling: float | None, graph_builder: Any, tmp_path: Path
    ) -> None:
        """A Clip to nothing must not make a scale of zero, and one below zero needs both signs."""
        graph = graph_builder()
        graph.conv(graph.clip(graph.conv(graph.input(), (3, 4)), low, high), (4, 2), "y")
        point = next(p for name, p in points(prepare(graph.save(tmp_path / "m.onnx", ["y"]))).items() if "clip" in name)

        assert (point.ceiling, point.divisor) == (ceiling, 255 if ceiling else 127)
        assert point_scale(point, {point.scale_of: 0.5}) > 0

    @pytest.mark.parametrize("factor", [0.5, 1.0, 1.001, 1.2])
    def test_clips_are_dropped_at_every_threshold(
        self, factor: float, drawn: Any, minmax: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """Whatever the method chose, ONNX Runtime finds the Clip superfluous and the convolution runs on integers."""
        prepared = drawn(low_ceiling)
        scales = {name: scale * factor for name, scale in minmax(prepared).items()}
        result = insert_qdq(prepared, place_for_cpu(prepared.ir()), scales, reduce_range=True)
        run_model(result.model, {"x": INPUT}, optimized=True, optimized_model=tmp_path / "executed.onnx")
        executed = [node.op_type for node in onnx.load(tmp_path / "executed.onnx").graph.node]

        assert executed.count("QLinearConv") == 3
        assert "Clip" not in executed

    def test_commuting_operators_keep_the_scale_of_their_input(self, drawn: Any) -> None:
        """Every tensor of a channel shuffle has the code of the Relu before it: moving values changes none."""
        prepared = drawn(channel_shuffle)
        moved = {name: point for name, point in points(prepared).items() if point.rule == "commuting"}

        assert {"half_a", "half_b"} <= set(moved)
        assert {(point.scale_of, point.zero_point) for point in moved.values()} == {("relu_1", 0)}


class TestRegion:
    """How far integers are carried."""

    def test_all_readers_of_what_an_integer_kernel_gives_read_it_dequantized(self, drawn: Any) -> None:
        """There is no other value of it, also for the Exp beside the convolution: no edge is left out."""
        placed = points(drawn(relu_output))

        assert all(point.uses is None for point in placed.values() if point.tensor != "x")
        assert [index for _, index in placed["x"].uses or ()] == [0]

    def test_float_readers_of_what_was_computed_in_float_read_that(self, drawn: Any) -> None:
        """In a transformer the residual stream is not rounded for the matrix products that read it too."""
        prepared = drawn(encoder)
        readers = {node.name: node.op_type for node in prepared.proto.graph.node}
        placed = points(prepared)

        assert sorted(placed) == ["inner", "normal_1", "normal_2"]
        assert {readers[name] for point in placed.values() for name, _ in point.uses or ()} == {"MatMul"}

    def test_a_residual_sum_before_a_normalization_stays_float_and_apart(
        self, drawn: Any, minmax: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """ONNX Runtime leaves one Q for each product's input, and neither DQ nor SkipLayerNormalization."""
        prepared = drawn(encoder)
        result = insert_qdq(prepared, place_for_cpu(prepared.ir()), minmax(prepared))
        run_model(result.model, {"x": INPUT}, optimized=True, optimized_model=tmp_path / "optimized.onnx")
        operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)

        assert operators["QuantizeLinear"] == 3
        assert operators["LayerNormalization"] == 2
        assert not {"DequantizeLinear", "QLinearAdd", "SkipLayerNormalization", "MatMul"} & set(operators)

    def test_excluded_nodes_keep_float_inputs_where_nothing_else_wants_integers(self, drawn: Any) -> None:
        """Excluding the last convolution takes its output away, not its neighbour's."""
        prepared = drawn(plain)
        names = [node.name for node in prepared.proto.graph.node if node.op_type == "Conv"]
        placement = place_for_cpu(prepared.ir(), PlacementOptions(exclude=[names[-1]]))

        assert [weight.node for weight in placement.weights] == names[:-1]
        outputs = {node.name: node.output[0] for node in prepared.proto.graph.node}
        assert outputs[names[-1]] not in placement.tensors
        assert placement.tensors == ["x", "relu_1", "relu_3"]

    def test_an_addition_of_a_constant_computes_in_float(self, graph_builder: Any, tmp_path: Path) -> None:
        """ONNX Runtime adds integers only where both sides are quantized, so a pair behind it would serve nobody."""
        graph = graph_builder()
        graph.node("Add", [graph.conv(graph.input(), (3, 4), "a"), graph.normal((8, 8))], "y")
        placement = place_for_cpu(prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir())

        assert placement.tensors == ["x", "a"]

    def test_a_graph_without_weighted_operators_is_left_alone(self, graph_builder: Any, tmp_path: Path) -> None:
        """Integers pay in products; an Add by itself stays float."""
        graph = graph_builder()
        x = graph.input()
        graph.node("Add", [x, graph.node("Relu", [x])], "y")
        placement = place_for_cpu(prepare(graph.save(tmp_path / "m.onnx", ["y"])).ir())

        assert (placement.activations, placement.weights) == ((), ())

    def test_points_come_in_graph_order_each_once(self, drawn: Any) -> None:
        """The report and the calibration list tensors as the graph does."""
        prepared = drawn(projection_residual)
        order = ["x", *(node.output[0] for node in prepared.proto.graph.node)]
        tensors = [point.tensor for point in place_for_cpu(prepared.ir()).activations]

        assert tensors == sorted(set(tensors), key=order.index)
