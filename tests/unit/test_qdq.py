"""Facts about `engines.qdq`: what stands in the file, and that it computes what the definition says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, numpy_helper

from calibrators.errors import CalibrationError
from engines.graph import PreparedModel, prepare
from engines.onnxrt import PRECISION_KEY, TARGET_KEY
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import insert_qdq


def for_tensorrt(prepared: PreparedModel, scales: Mapping[str, float], **options: Any) -> onnx.ModelProto:
    """Quantize every weighted node, however few channels it has."""
    options = {"include": [".*"]} | options
    return ir.to_proto(
        insert_qdq(prepared, place_for_tensorrt(prepared.ir(), PlacementOptions(**options)), scales).model
    )


def every_scale(prepared: PreparedModel, scale: float = 0.1) -> dict[str, float]:
    model = prepared.ir()
    return dict.fromkeys(
        [*place_for_tensorrt(model, PlacementOptions(include=[".*"])).tensors, *place_for_cpu(model).tensors], scale
    )


def constants(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


@pytest.fixture
def every_operator(graph_builder: Any, tmp_path: Path) -> PreparedModel:
    """One of each weighted operator, a residual Add, a pool and a Pad."""
    graph = graph_builder()
    trunk = graph.node("Relu", [graph.conv(graph.input("x", (1, 3, 8, 8)), (3, 4), "stem")], "trunk")
    branch = graph.conv(graph.node("Relu", [graph.conv(trunk, (4, 4), "b1")]), (4, 4), "b2")
    total = graph.node("Relu", [graph.node("Add", [branch, trunk])], "total")
    padded = graph.node("Pad", [total, graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], mode="reflect")
    deep = graph.conv(padded, (4, 4), "depthwise", group=4, pads=[0] * 4)
    up = graph.node("ConvTranspose", [deep, graph.normal((4, 6, 2, 2)), graph.normal((6,))], "up", strides=[2, 2])
    up = graph.node("ConvTranspose", [up, graph.normal((6, 2, 2, 2))], "grouped", group=2, strides=[2, 2])
    pooled = graph.node("MaxPool", [up], kernel_shape=[8, 8], strides=[8, 8])
    rows = graph.node("Flatten", [pooled])
    rows = graph.node("Relu", [graph.gemm(rows, (64, 9), "transposed")])
    rows = graph.node("Relu", [graph.node("Gemm", [rows, graph.normal((9, 8)), graph.normal((8,))], "plain")])
    graph.node("MatMul", [rows, graph.normal((8, 5))], "logits")
    return prepare(graph.save(tmp_path / "every.onnx", ["logits"]))


class TestTensorRTForm:
    """The rules of TensorRT's parser."""

    def test_every_input_of_a_weighted_operator_is_dequantized(self, every_operator: PreparedModel) -> None:
        """Activations and weights come from a DequantizeLinear (across a Pad), biases are float initializers."""
        model = for_tensorrt(every_operator, every_scale(every_operator))
        made, values = producers(model), constants(model)
        weighted = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]

        assert len(weighted) == 9
        for node in weighted:
            for name in node.input[:2]:
                source = made[name]
                while source.op_type == "Pad":
                    source = made[source.input[0]]
                assert source.op_type == "DequantizeLinear", (node.name, name)
            if len(node.input) > 2:
                assert values[node.input[2]].dtype == np.float32

    def test_codes_are_int8_with_zero_points_of_zero(self, every_operator: PreparedModel) -> None:
        """Every Q and DQ has an explicit INT8 zero point of the scale's shape; no UINT8 and no INT32 anywhere."""
        model = for_tensorrt(every_operator, every_scale(every_operator))
        values = constants(model)
        pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]

        assert pairs
        for node in pairs:
            assert len(node.input) == 3
            scale, zero_point = values[node.input[1]], values[node.input[2]]
            assert zero_point.dtype == np.int8
            assert zero_point.shape == scale.shape
            assert not zero_point.any()
            assert scale.dtype == np.float32
            assert (scale > 0).all()
        assert {value.dtype for value in values.values()} <= {np.dtype(np.int8), np.dtype(np.float32), np.dtype(int)}

    def test_weights_are_int8_initializers_with_an_explicit_axis(self, every_operator: PreparedModel) -> None:
        """No float weight and no QuantizeLinear on a weight is left; per-tensor weights have one scale, no axis."""
        model = for_tensorrt(every_operator, every_scale(every_operator))
        made, values = producers(model), constants(model)
        expected = {
            "n_stem": 0, "n_b1": 0, "n_b2": 0, "n_depthwise": 0, "n_up": 1, "n_grouped": None, "n_transposed": 0,
            "n_plain": 1, "n_logits": 1,
        }  # fmt: skip
        found = {}
        for name, axis in expected.items():
            node = made[named(model, name).input[1]]
            codes, scale = values[node.input[0]], values[node.input[1]]
            assert codes.dtype == np.int8
            assert np.abs(codes.astype(int)).max() == 127
            assert scale.shape == (() if axis is None else (codes.shape[axis],))
            found[name] = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        assert found == expected
        assert all(value.size < 70 for value in values.values() if value.dtype == np.float32)

    def test_inputs_and_outputs_stay_as_they_were(self, every_operator: PreparedModel) -> None:
        """The INT8 model is a drop-in replacement: same names, types and shapes, and the checker accepts it."""
        model = for_tensorrt(every_operator, every_scale(every_operator))

        onnx.checker.check_model(model, full_check=True)
        assert list(model.graph.input) == list(every_operator.proto.graph.input)
        assert list(model.graph.output) == list(every_operator.proto.graph.output)
        assert {entry.key: entry.value for entry in model.metadata_props} == {
            TARGET_KEY: "tensorrt", PRECISION_KEY: "int8"
        }  # fmt: skip

    def test_the_prepared_model_is_left_alone(self, every_operator: PreparedModel) -> None:
        """Several quantizations start from one prepared model."""
        before = every_operator.proto.SerializeToString()
        first = for_tensorrt(every_operator, every_scale(every_operator))

        assert every_operator.proto.SerializeToString() == before
        assert for_tensorrt(every_operator, every_scale(every_operator)) == first

    def test_shared_weights_are_stored_once(self, graph_builder: Any, tmp_path: Path) -> None:
        """Two convolutions with one weight share its codes."""
        graph = graph_builder()
        weight = graph.normal((3, 3, 3, 3), name="w")
        a = graph.node("Relu", [graph.node("Conv", [graph.input(), weight], "a", pads=[1] * 4)])
        graph.node("Conv", [a, weight], "y", pads=[1] * 4)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        model = for_tensorrt(prepared, every_scale(prepared))

        assert named(model, "n_a").input[1] == named(model, "n_y").input[1]
        assert [value.size for value in constants(model).values() if value.dtype == np.int8 and value.ndim == 4] == [81]

    def test_weights_with_other_readers_stay_available(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """A weight that is an output too (or is read by any other node) keeps its float values there."""
        graph = graph_builder()
        weight = graph.normal((5, 4), name="w")
        graph.node("MatMul", [graph.input("x", ("N", 5)), weight], "y")
        graph.node("Mul", ["y", graph.node("ReduceSum", [graph.node("Mul", [weight, "y2"])], keepdims=0)], "z")
        graph.node("MatMul", [graph.input("x2", (5, 5)), weight], "y2")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y", "z"]))
        model = for_tensorrt(prepared, {"x": 0.01, "x2": 0.01})

        np.testing.assert_array_equal(constants(model)["w"], constants(prepared.proto)["w"])
        feeds = {"x": np.ones((2, 5), np.float32), "x2": np.eye(5, dtype=np.float32)}
        assert run_model(model, feeds)["z"].shape == (2, 4)

    def test_names_that_the_graph_already_uses_are_avoided(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """Tensors called x_scale, x_quantized or w_zero_point in the user's model collide with nothing."""
        graph = graph_builder()
        x = graph.input("x", ("N", 4))
        scaled = graph.node("Mul", [x, graph.constant(np.float32(1.5), "x_scale")], "x_quantized")
        y = graph.node("MatMul", [x, graph.normal((4, 4), name="w")], "x_dequantized")
        z = graph.node("Add", [y, graph.constant(np.float32([1, 2, 3, 4]), "w_zero_point")], "w_scale")
        graph.node("Sub", [z, scaled], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        scales = every_scale(prepared, 0.02)
        feeds = {"x": np.random.default_rng(0).uniform(-2, 2, (3, 4)).astype(np.float32)}
        expected = run_model(prepared.proto, feeds)["y"]

        for place in (place_for_tensorrt, place_for_cpu):
            model = ir.to_proto(insert_qdq(prepared, place(prepared.ir()), scales).model)
            onnx.checker.check_model(model, full_check=True)
            names = [output for node in model.graph.node for output in node.output]
            assert len(set(names)) == len(names)
            np.testing.assert_allclose(run_model(model, feeds)["y"], expected, atol=0.2)


class TestScales:
    """What may stand in the file."""

    def test_a_missing_scale_is_named(self, tiny_model: Path) -> None:
        """A calibration of another model lacks tensors; how many, and which."""
        with pytest.raises(CalibrationError, match=r"no scale for 1 of 2 tensors \('relu'\)"):
            for_tensorrt(prepare(tiny_model), {"input": 0.1})

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_scale_must_be_positive_and_finite(self, scale: float, tiny_model: Path) -> None:
        """Engines divide by it."""
        with pytest.raises(CalibrationError, match="the scale of 'input' is"):
            for_tensorrt(prepare(tiny_model), {"input": scale, "relu": 0.1})

    def test_the_result_reports_the_scales_written(self, tiny_model: Path) -> None:
        """By the tensor that each pair quantizes, in float32's grid."""
        prepared = prepare(tiny_model)
        result = insert_qdq(prepared, place_for_tensorrt(prepared.ir()), {"input": 0.1, "relu": 0.2})

        assert result.scales == {"input": float(np.float32(0.1)), "flat": float(np.float32(0.2))}
        assert set(result.weight_ranges.values()) == {127}


def convolve(x: Any, weight: Any, bias: Any) -> Any:
    """Conv 3x3 with padding 1 in float64, from its definition."""
    windows = sliding_window_view(np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.einsum("nchwij,kcij->nkhw", windows, weight.astype(np.float64)) + bias.reshape(-1, 1, 1)


def fake_quantized(x: Any, scale: float) -> Any:
    return np.clip(np.rint(np.float32(x) / np.float32(scale)), -128, 127) * np.float64(scale)


def fake_quantized_weight(weight: Any) -> Any:
    """Per output channel (axis 0), from the definition: scale = amax / 127, round half to even."""
    scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / np.float32(127)
    return np.clip(np.rint(weight / scale), -127, 127) * scale.astype(np.float64)


class TestNumbers:
    """The exact run of the file against arithmetic by hand."""

    def test_power_of_two_scales_are_reproduced_bit_by_bit(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """With scales 2^-k all sums are exact, so ties, clamping at -128 and 127, and codes must agree exactly."""
        graph = graph_builder(5)
        weights = [np.float32(graph.rng.integers(-127, 128, shape) * 2.0**-9) for shape in ((4, 3, 3, 3), (2, 4, 3, 3))]
        for weight in weights:
            weight[:, 0, 0, 0] = 127 * 2**-9
        biases = [np.float32(graph.rng.integers(-99, 99, k) * 2**-6) for k in (4, 2)]
        x = graph.input()
        for weight, bias, name in zip(weights, biases, "ab", strict=True):
            y = graph.node("Conv", [x, graph.constant(weight), graph.constant(bias)], name, pads=[1] * 4)
            x = graph.node("Relu", [y], f"{name}r")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["br"]))
        model = for_tensorrt(prepared, {"x": 2.0**-5, "ar": 2.0**-6})
        # multiples of half a step: every second one is a tie; +-6 lies beyond the codes, which end at -4 and 3.97
        image = np.float32(graph.rng.integers(-384, 385, (2, 3, 8, 8)) * 2.0**-6)

        hidden = np.maximum(convolve(fake_quantized(image, 2**-5), weights[0], biases[0]), 0)
        expected = np.maximum(convolve(fake_quantized(hidden, 2**-6), weights[1], biases[1]), 0)
        assert (hidden > 127 * 2**-6).any()
        np.testing.assert_array_equal(run_model(model, {"x": image})["br"], expected.astype(np.float32))

    def test_a_residual_net_agrees_with_fake_quantization_by_hand(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """The stem, a residual block and a Gemm, in float64 by hand: equal to float rounding, layer by layer."""
        graph = graph_builder(8)
        trunk = graph.node("Relu", [graph.conv(graph.input(), (3, 4), "stem")], "trunk")
        hidden = graph.node("Relu", [graph.conv(trunk, (4, 4), "b1")], "hidden")
        total = graph.node("Relu", [graph.node("Add", [graph.conv(hidden, (4, 4), "b2"), trunk])], "total")
        pooled = graph.node("GlobalAveragePool", [total], "pooled")
        graph.gemm(graph.node("Flatten", [pooled], "flat"), (4, 5), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        scales = {"x": 2.5 / 127, "trunk": 1.7 / 127, "hidden": 1.1 / 127, "total": 1.9 / 127, "pooled": 0.01}
        model = for_tensorrt(prepared, scales)
        image = graph.rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
        fetch = ["trunk", "hidden", "total", "y"]
        found = run_model(model, {"x": image}, fetch=fetch)

        values = constants(prepared.proto)

        def layer(name: str, x: Any, scale: float) -> Any:
            weight, bias = (values[tensor] for tensor in named(prepared.proto, name).input[1:])
            return convolve(fake_quantized(x, scale), fake_quantized_weight(weight), bias)

        # Each layer starts from the values of the run before it, so that a tie on the border cannot spread.
        branch = layer("n_b2", found["hidden"], scales["hidden"])
        weight, bias = (values[name] for name in named(prepared.proto, "n_y").input[1:])
        averaged = fake_quantized(found["total"], scales["total"]).mean(axis=(2, 3), dtype=np.float32)
        rows = fake_quantized(averaged, scales["pooled"])
        expected = {
            "trunk": np.maximum(layer("n_stem", image, scales["x"]), 0),
            "hidden": np.maximum(layer("n_b1", found["trunk"], scales["trunk"]), 0),
            "total": np.maximum(branch + fake_quantized(found["trunk"], scales["trunk"]), 0),
            "y": rows @ fake_quantized_weight(weight).T + bias,
        }
        for name in fetch:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)

    def test_in_range_values_carry_the_same_codes_on_both_targets(self, tiny_model: Path) -> None:
        """uint8 code = int8 code + 128 for the signed input, and the same code for the Relu's output."""
        prepared = prepare(tiny_model)
        scales = every_scale(prepared, 0.05)
        found = {}
        image = np.random.default_rng(0).uniform(-6, 6, (2, 3, 8, 8)).astype(np.float32)
        for place in (place_for_tensorrt, place_for_cpu):
            model = ir.to_proto(insert_qdq(prepared, place(prepared.ir()), scales).model)
            quantize = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "input")
            values = constants(model)
            scale, zero_point = (values[name] for name in quantize.input[1:])
            limits = np.iinfo(zero_point.dtype)
            codes = np.clip(np.rint(image / scale) + zero_point.astype(int), limits.min, limits.max)
            found[place.__name__] = (zero_point, codes)

        assert found["place_for_tensorrt"][0] == np.int8(0)
        assert found["place_for_cpu"][0] == np.uint8(128)
        np.testing.assert_array_equal(found["place_for_cpu"][1], found["place_for_tensorrt"][1] + 128)


class TestIntegerBiases:
    """The CPU's kernels add an INT32 bias in units of s_x * s_w."""

    def quantized(self, prepared: PreparedModel, scale: float, **options: Any) -> onnx.ModelProto:
        placement = place_for_cpu(prepared.ir())
        return ir.to_proto(insert_qdq(prepared, placement, dict.fromkeys(placement.tensors, scale), **options).model)

    def test_reduced_range_keeps_weights_within_7_bits(self, every_operator: PreparedModel) -> None:
        """Codes in [-63, 63]: two products with uint8 fit into 16 bits, 2 * 255 * 63 < 2^15."""
        model = self.quantized(every_operator, 0.1, reduce_range=True)
        weights = [v for v in constants(model).values() if v.dtype == np.int8 and v.ndim > 1]

        assert len(weights) == 9
        assert {int(np.abs(codes.astype(int)).max()) for codes in weights} == {63}

    @pytest.mark.parametrize(("factor", "limit"), [(1.0, 127), (1.25, 101), (5.0, 63)])
    def test_reduced_range_spares_weights_whose_activations_use_fewer_codes(
        self, tiny_model: Path, factor: float, limit: int
    ) -> None:
        """127 * 127 // code: a Relu whose maximum is the threshold leaves 8 bits; a signed input leaves 7."""
        prepared = prepare(tiny_model)
        placement = place_for_cpu(prepared.ir())
        scales = dict.fromkeys(placement.tensors, 0.1)
        largest = dict.fromkeys(placement.tensors, factor * 12.7)
        result = insert_qdq(prepared, placement, scales, reduce_range=True, largest=largest)

        assert result.weight_ranges == {"conv": 63, "fc": limit}  # codes 255; 127, 159, 255
        codes = [v for v in constants(ir.to_proto(result.model)).values() if v.dtype == np.int8 and v.ndim > 1]
        assert [int(np.abs(array.astype(int)).max()) for array in codes] == [63, limit]

    def test_the_bias_is_the_float_one_to_half_a_unit(self, tiny_model: Path) -> None:
        """bias ~ code * s_x * s_w[k], and the scale in the file is that product."""
        prepared = prepare(tiny_model)
        model = self.quantized(prepared, 0.05)
        values, made = constants(model), producers(model)
        for name, expected in (("conv", "conv.bias"), ("fc", "fc.bias")):
            node = named(model, name)
            dequantize, weight = made[node.input[2]], made[node.input[1]]
            codes, scale = (values[part] for part in dequantize.input[:2])
            assert codes.dtype == np.int32
            np.testing.assert_allclose(scale, np.float32(0.05) * values[weight.input[1]], rtol=1e-6)
            assert (np.abs(codes * scale - constants(prepared.proto)[expected]) <= scale * 0.51).all()

    def test_a_large_bias_beside_tiny_weights_does_not_overflow(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """A channel that batch norm has all but switched off keeps its bias: its weights give up resolution instead."""
        graph = graph_builder()
        weight = graph.rng.normal(size=(3, 3, 1, 1)).astype(np.float32)
        weight[1] *= 1e-12
        weight[2] = 0
        bias = np.float32([0.5, 100, -70])
        graph.node("Conv", [graph.input(), graph.constant(weight), graph.constant(bias)], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        placement = place_for_cpu(prepared.ir())
        model = insert_qdq(prepared, placement, {"x": 1e-3, "y": 1.0}).model
        image = graph.rng.normal(0, 0.05, (2, 3, 8, 8)).astype(np.float32)

        for optimized in (False, True):
            found = run_model(model, {"x": image}, optimized=optimized)["y"]
            np.testing.assert_allclose(
                found[:, 1:], np.broadcast_to(bias[1:, None, None], found[:, 1:].shape), atol=0.6
            )

    @pytest.mark.parametrize(
        ("shape", "attributes", "integer"),
        [
            ((4,), {}, True),
            ((1, 4), {}, True),
            ((1,), {}, True),
            ((3, 4), {}, False),
            ((3, 1), {}, False),
            ((), {}, False),
            ((4,), {"alpha": 0.5}, True),  # preparation multiplies it into the weight
            ((4,), {"beta": 2.0}, True),
        ],
    )
    def test_biases_of_gemm_in_every_form(
        self,
        shape: tuple[int, ...],
        attributes: Any,
        integer: bool,
        graph_builder: Any,
        tmp_path: Path,
        run_model: Callable[..., Any],
    ) -> None:
        """One value per output channel becomes INT32; everything else that Gemm adds stays float, and stays right."""
        graph = graph_builder()
        weight, bias = graph.normal((5, 4)), graph.constant(graph.rng.normal(size=shape).astype(np.float32))
        graph.node("Gemm", [graph.input("x", (3, 5)), weight, bias], "y", **attributes)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        model = self.quantized(prepared, 3 / 127, reduce_range=True)
        feeds = {"x": graph.rng.uniform(-3, 3, (3, 5)).astype(np.float32)}

        kinds = {value.dtype for value in constants(model).values()}
        assert (np.dtype(np.int32) in kinds) == integer
        expected = run_model(prepared.proto, feeds)["y"]
        for optimized in (False, True):
            np.testing.assert_allclose(run_model(model, feeds, optimized=optimized)["y"], expected, atol=0.15)

    def test_a_shared_weight_may_have_two_biases(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """Each node gets codes of its own, since its bias bounds them; the numbers agree with FP32."""
        graph = graph_builder()
        weight = graph.normal((3, 3, 3, 3), 0.2, name="w")
        x = graph.input()
        a = graph.node("Relu", [graph.node("Conv", [x, weight, graph.normal((3,))], "a", pads=[1] * 4)], "ar")
        graph.node("Conv", [a, weight, graph.normal((3,))], "b", pads=[1] * 4)
        graph.node("Conv", [x, weight], "c", pads=[1] * 4)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["b", "c"]))
        model = self.quantized(prepared, 4 / 127, reduce_range=True)
        onnx.checker.check_model(model, full_check=True)
        feeds = {"x": graph.rng.normal(size=(1, 3, 8, 8)).astype(np.float32)}

        biases = [named(model, name).input[2] for name in ("n_a", "n_b")]
        assert [producers(model)[name].op_type for name in biases] == ["DequantizeLinear"] * 2
        expected = run_model(prepared.proto, feeds)
        for name, value in run_model(model, feeds).items():
            np.testing.assert_allclose(value, expected[name], atol=0.25)


def test_model_outputs_that_are_quantized_keep_name_and_type(graph_builder: Any, tmp_path: Path) -> None:
    """On the CPU target a convolution that is an output gets a pair; the output's name moves behind it."""
    graph = graph_builder()
    y = graph.conv(graph.input(), (3, 4), "y")
    graph.node("Relu", [y], "z")
    prepared = prepare(graph.save(tmp_path / "m.onnx", ["y", "z"]))
    placement = place_for_cpu(prepared.ir())
    model = ir.to_proto(insert_qdq(prepared, placement, dict.fromkeys(placement.tensors, 0.1)).model)

    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == ["y", "z"]
    assert producers(model)["y"].op_type == "DequantizeLinear"
    assert [output.type.tensor_type.elem_type for output in model.graph.output] == [TensorProto.FLOAT] * 2
