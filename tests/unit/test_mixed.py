"""Facts about `engines.mixed` and the Q/DQ nodes in its graphs: which type stands where, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, numpy_helper

from calibrators.numerics import fp16_scale
from engines.errors import EngineBuildError
from engines.graph import PreparedModel, float_activations, prepare
from engines.mixed import mixed_graph
from engines.onnxrt import PRECISION_KEY, TARGET_KEY
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt
from engines.qdq import QuantizedModel, insert_qdq
from engines.trt_types import check_types

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def calm(prepared: PreparedModel, **larger: float) -> dict[str, float]:
    """Magnitudes of 4 for every tensor, except those named."""
    return dict.fromkeys(float_activations(prepared.ir()), 4.0) | larger


def quantized(prepared: PreparedModel, amax: Mapping[str, float], scales: Mapping[str, float]) -> QuantizedModel:
    placement = place_for_tensorrt(prepared.ir(), PlacementOptions(include=[".*"]))
    return insert_qdq(prepared, placement, scales, typed=mixed_graph(prepared, placement, amax).model)


def mixed(prepared: PreparedModel, amax: Mapping[str, float], scales: Mapping[str, float] | None = None) -> ir.Model:
    """The INT8+FP16 model with types inferred anew; checked to keep the rules that every such model keeps."""
    scales = {name: value / 127 for name, value in amax.items()} if scales is None else scales
    proto = ir.to_proto(quantized(prepared, amax, scales).model)
    onnx.checker.check_model(proto, full_check=True)
    before = prepared.proto.graph
    assert (list(proto.graph.input), list(proto.graph.output)) == (list(before.input), list(before.output))
    del proto.graph.value_info[:]
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    for node in model.graph:
        assert None not in {value.dtype for value in node.outputs}
        kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value and value.dtype in (FLOAT, FLOAT16)}
        assert len(kinds) == 1 or node.op_type == "Cast", (node.name, kinds)
        if node.op_type == "QuantizeLinear":
            assert {use.node.op_type for use in node.outputs[0].uses()} == {"DequantizeLinear"}
        if node.op_type in WEIGHTED:
            for value in node.inputs[:2]:
                producer = value and value.producer()
                while producer is not None and producer.op_type == "Pad":
                    producer = producer.inputs[0] and producer.inputs[0].producer()
                assert producer is not None
                assert producer.op_type == "DequantizeLinear", node.name
    return model


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def before(node: ir.Node, index: int = 0) -> ir.Node:
    """The node that writes an input."""
    value = node.inputs[index]
    producer = value and value.producer()
    assert producer is not None
    return producer


def constant(node: ir.Node, index: int) -> Any:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def kinds(model: ir.Model, *names: str) -> list[ir.DataType | None]:
    """What nodes write."""
    return [named(model, name).outputs[0].dtype for name in names]


def counts(model: ir.Model) -> dict[str, int]:
    found = [node.op_type for node in model.graph]
    return {kind: found.count(kind) for kind in ("Cast", "QuantizeLinear", "DequantizeLinear")}


@pytest.fixture(scope="module")
def residual(graph_builder: Any, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """A stem, a residual block, a pool that is an output too, and a Gemm."""
    graph = graph_builder(4)
    trunk = graph.node("Relu", [graph.conv(graph.input(), (3, 4), "stem")], "trunk")
    hidden = graph.node("Relu", [graph.conv(trunk, (4, 4), "b1")], "hidden")
    total = graph.node("Relu", [graph.node("Add", [graph.conv(hidden, (4, 4), "b2"), trunk], "sum")], "total")
    graph.gemm(graph.node("Flatten", [graph.node("GlobalAveragePool", [total], "pooled")]), (4, 5), "y")
    return prepare(graph.save(tmp_path_factory.mktemp("residual") / "m.onnx", ["y", "pooled"]))


class TestTypes:
    """Everything between the input and the outputs is FP16, and no cast stands where TensorRT fuses."""

    def test_a_residual_net(self, residual: PreparedModel) -> None:
        """The skip shares the pair of the convolution beside it, and the only casts stand before the outputs."""
        model = mixed(residual, calm(residual))

        assert set(kinds(model, "n_stem", "n_trunk", "n_b1", "n_hidden", "n_b2", "n_sum", "n_total")) == {FLOAT16}
        assert counts(model) == {"Cast": 2, "QuantizeLinear": 4, "DequantizeLinear": 8}
        assert {node.outputs[0].is_graph_output() for node in model.graph if node.op_type == "Cast"} == {True}
        assert before(named(model, "n_sum"), 1) is before(named(model, "n_b1"))

    def test_scales_and_biases_are_fp16(self, residual: PreparedModel) -> None:
        """A pair shares one scale; only Q on the FP32 input has an FP32 one, of the same value."""
        model = mixed(residual, calm(residual))
        first = before(named(model, "n_stem"))

        for node in model.graph:
            if node.op_type == "DequantizeLinear":
                assert constant(node, 1).dtype == np.float16
                source = node.inputs[0] and node.inputs[0].producer()
                assert source is None or source is before(first) or source.inputs[1] is node.inputs[1]
            if node.op_type in WEIGHTED:
                assert constant(node, 2).dtype == np.float16
        assert constant(before(first), 1).dtype == np.float32
        assert constant(before(first), 1) == constant(first, 1)

    def test_the_input_is_quantized_without_a_cast(self, residual: PreparedModel) -> None:
        """Q reads FP32 as it is fed; FP16 begins behind it."""
        model = mixed(residual, calm(residual))
        quantize = before(before(named(model, "n_stem")))

        assert quantize.inputs[0] is model.graph.inputs[0]
        assert [use.node for use in model.graph.inputs[0].uses()] == [quantize]

    def test_an_input_with_other_readers_is_cast_for_them(self, graph_builder: Any, tmp_path: Path) -> None:
        """The convolution's Q still reads the input itself."""
        graph = graph_builder()
        x = graph.input()
        graph.node("Add", [graph.conv(x, (3, 3), "conv"), graph.node("Sigmoid", [x], "s")], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        model = mixed(prepared, calm(prepared))

        assert before(before(named(model, "n_conv"))).inputs[0] is model.graph.inputs[0]
        assert before(named(model, "n_s")).op_type == "Cast"
        assert kinds(model, "n_conv", "n_s", "n_y") == [FLOAT16] * 3

    def test_an_output_that_is_quantized_inside(self, graph_builder: Any, tmp_path: Path) -> None:
        """Q reads the FP16 tensor beneath the output's cast."""
        graph = graph_builder()
        middle = graph.node("Relu", [graph.conv(graph.input(), (3, 4), "first")], "middle")
        graph.conv(middle, (4, 2), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["middle", "y"]))
        model = mixed(prepared, calm(prepared))

        assert before(before(before(named(model, "n_y")))).name == "n_middle"
        assert counts(model)["Cast"] == 2

    def test_casts_of_the_model_itself_stay(self, graph_builder: Any, tmp_path: Path) -> None:
        """They are part of what it computes: Q reads what they give."""
        graph = graph_builder()
        whole = graph.node("Cast", [graph.input("n", ("N", 3, 8, 8), TensorProto.INT32)], "x", to=TensorProto.FLOAT)
        graph.conv(whole, (3, 4), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        model = mixed(prepared, calm(prepared))

        assert before(before(before(named(model, "n_y")))).name == "n_x"
        assert kinds(model, "n_x", "n_y") == [FLOAT16] * 2

    def test_the_metadata_and_the_build_agree(self, residual: PreparedModel) -> None:
        """The model says what it is, and goes for int8+fp16 and for nothing else."""
        model = ir.to_proto(quantized(residual, calm(residual), calm(residual)).model)

        assert {entry.key: entry.value for entry in model.metadata_props} == {
            TARGET_KEY: "tensorrt", PRECISION_KEY: "int8+fp16"
        }  # fmt: skip
        check_types(Path("m.onnx"), model, "int8+fp16", implicit=False)
        others: Any = ("int8", "fp16")
        for precision in others:
            with pytest.raises(EngineBuildError, match="it holds Q/DQ nodes and FP16 tensors"):
                check_types(Path("m.onnx"), model, precision, implicit=False)

    def test_the_prepared_model_is_left_alone(self, residual: PreparedModel) -> None:
        """It serves other quantizations, which give the same again."""
        content = residual.proto.SerializeToString()
        first = ir.to_proto(mixed(residual, calm(residual)))

        assert ir.to_proto(mixed(residual, calm(residual))) == first
        assert residual.proto.SerializeToString() == content


class TestScales:
    """FP16's grid."""

    def test_activations_and_weights_are_rounded_up(self, tiny_model: Path) -> None:
        """0.1 is 1638.4 units of 2^-14 and becomes 1639; the result reports what the file holds."""
        prepared = prepare(tiny_model)
        scales = {"input": 0.1, "relu": 1e-12}
        model = mixed(prepared, calm(prepared), scales)
        data, weight = before(named(model, "conv")), before(named(model, "conv"), 1)

        assert constant(data, 1) == constant(before(data), 1) == 1639 * 2**-14
        assert constant(before(named(model, "fc")), 1) == 2**-24
        assert quantized(prepared, calm(prepared), scales).scales == {"input": 1639 * 2**-14, "flat": 2**-24}
        exact = numpy_helper.to_array(prepared.proto.graph.initializer[0])
        expected = fp16_scale(np.abs(exact).max(axis=(1, 2, 3)) / np.float32(127))
        np.testing.assert_array_equal(constant(weight, 1), expected)
        np.testing.assert_array_equal(constant(weight, 0), np.rint(exact / expected[:, None, None, None]))

    def test_scales_that_meet_no_fp16_stay_exact(self, tiny_model: Path) -> None:
        """Where all is held in FP32, a scale may be any number, beyond 65504 too."""
        prepared = prepare(tiny_model)
        model = mixed(prepared, dict.fromkeys(calm(prepared), 1e9), {"input": 0.1, "relu": 1e6})

        assert constant(before(named(model, "conv")), 1) == np.float32(0.1)
        assert constant(before(named(model, "fc")), 1) == 1e6
        assert counts(model)["Cast"] == 0


class TestHeldNodes:
    """What stays FP32 is fused as before."""

    def test_a_held_convolution_has_fp32_on_all_of_its_inputs(self, residual: PreparedModel) -> None:
        """Its tensor is read by an FP16 Add as well: one Q, and a DQ for each of the two types."""
        amax = calm(residual, b1=1e6, hidden=3.0)
        model = mixed(residual, amax)
        held = named(model, "n_b1")

        assert kinds(model, "n_b1", "n_hidden", "n_b2", "n_sum") == [FLOAT, FLOAT, FLOAT16, FLOAT16]
        data, weight = before(held), before(held, 1)
        assert [constant(data, 1).dtype, constant(weight, 1).dtype, constant(held, 2).dtype] == [np.float32] * 3
        skip = before(named(model, "n_sum"), 1)
        assert skip is not data
        assert before(skip) is before(data)
        assert constant(skip, 1) == constant(data, 1)
        assert constant(skip, 1).dtype == np.float16

    def test_a_held_producer_is_quantized_in_fp32(self, residual: PreparedModel) -> None:
        """Q takes what the Relu computes, and its DQ goes on in FP16: no cast is left but those of the outputs."""
        model = mixed(residual, calm(residual, b1=1e6, hidden=3.0))
        data = before(named(model, "n_b2"))

        assert before(before(data)).name == "n_hidden"
        assert constant(before(data), 1).dtype == np.float32
        assert constant(data, 1).dtype == np.float16
        assert counts(model)["Cast"] == 2

    def test_a_chain_of_held_nodes(self, residual: PreparedModel) -> None:
        """Tensors between held nodes exist in FP32 alone."""
        model = mixed(residual, calm(residual, b1=1e6, hidden=1e6, b2=1e6))

        assert kinds(model, "n_stem", "n_trunk", "n_b1", "n_hidden", "n_b2") == [FLOAT16, FLOAT16, FLOAT, FLOAT, FLOAT]
        assert before(before(before(named(model, "n_b2")))).name == "n_hidden"

    def test_weights_shared_by_both_types_are_stored_for_both(self, graph_builder: Any, tmp_path: Path) -> None:
        """FP32 codes and scales for the held one; the other's were made from FP32 values too."""
        graph = graph_builder()
        weight = graph.normal((3, 3, 3, 3), name="w")
        x = graph.input()
        for name in ("large", "small"):
            graph.node("Conv", [x, weight], name, pads=[1] * 4)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["large", "small"]))
        model = mixed(prepared, calm(prepared, large=1e6))
        exact, rounded = (before(named(model, name), 1) for name in ("n_large", "n_small"))

        value = numpy_helper.to_array(next(t for t in prepared.proto.graph.initializer if t.name == "w"))
        scale = np.abs(value).max(axis=(1, 2, 3)) / np.float32(127)
        for node, expected in ((exact, scale), (rounded, fp16_scale(scale))):
            np.testing.assert_array_equal(constant(node, 1), expected)
            np.testing.assert_array_equal(constant(node, 0), np.rint(value / expected[:, None, None, None]))
        assert "w" not in model.graph.initializers

    @pytest.mark.parametrize("large", ["x", "a", "b"])
    def test_a_pad_and_its_convolutions_are_held_together(self, large: str, graph_builder: Any, tmp_path: Path) -> None:
        """A cast on either side of the Pad would split what fuses: all three stay FP32, and say why."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.input("in")], "x")
        padded = graph.node("Pad", [x, graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], "p", mode="reflect")
        for name in ("a", "b"):
            graph.conv(padded, (3, 4), name, pads=[0] * 4)
        graph.node("Relu", ["a"], "ra")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["ra", "b"]))
        amax = {"in": 4.0, "x": 4.0, "a": 4.0, "b": 4.0} | {large: 40000.0}
        model = mixed(prepared, amax)
        held = mixed_graph(prepared, place_for_tensorrt(prepared.ir(), PlacementOptions(include=[".*"])), amax).held

        assert kinds(model, "n_p", "n_a", "n_b") == [FLOAT] * 3
        together = [node.node for node in held if node.node in ("n_p", "n_a", "n_b")]
        assert together == ["n_p", "n_a", "n_b"]
        first = {"x": "n_p", "a": "n_a", "b": "n_b"}[large]
        reasons = {node.node: node.reason for node in held}
        assert reasons[first].startswith(f"calibration saw 4e+04 in {large!r}")
        for name in {"n_p", "n_a", "n_b"} - {first}:
            assert reasons[name] == f"it fuses with {first!r}, which stays FP32; a cast between them would split them"

    @settings(max_examples=40)
    @given(st.sets(st.sampled_from(["x", "stem", "trunk", "b1", "hidden", "b2", "sum", "total", "pooled", "y"])))
    def test_any_nodes_may_be_held(
        self, residual: PreparedModel, run_model: Callable[..., Any], large: set[str]
    ) -> None:
        """Whatever is too large, the model keeps all rules, and answers as the INT8 model does."""
        scales = dict.fromkeys(calm(residual), 0.02)
        image = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)
        model = mixed(residual, calm(residual, **dict.fromkeys(large, 1e6)), scales)
        plain = insert_qdq(residual, place_for_tensorrt(residual.ir(), PlacementOptions(include=[".*"])), scales).model

        expected, found = (run_model(each, {"x": image}) for each in (plain, model))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=0.05)

    def test_values_from_branches(self, tmp_path: Path) -> None:
        """An If is held; what it gives is quantized from FP32, and a branch may read a quantized tensor."""
        model = onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]>
            g (bool c, float[2,2] x) => (float[2,2] y)
            <float[2,2] w = {1., 2., 3., 4.}> {
              a = MatMul (x, w)
              b = Relu (a)
              d = If (c) <then_branch = t () => (float[2,2] p) { p = Neg (b) },
                          else_branch = e () => (float[2,2] q) { q = Add (b, x) }>
              e = Add (d, b)
              y = MatMul (e, w)
            }"""
        )
        onnx.save(model, tmp_path / "m.onnx")
        prepared = prepare(tmp_path / "m.onnx")
        found = mixed(prepared, {"x": 4.0, "a": 40.0, "b": 40.0, "d": 44.0, "e": 84.0, "y": 400.0})

        assert kinds(found, "MatMul:a", "Relu:b", "If:d", "Add:e", "MatMul:y") == [
            FLOAT16, FLOAT16, FLOAT, FLOAT16, FLOAT16
        ]  # fmt: skip


def fake_quantized(x: Any, scale: float) -> Any:
    return np.clip(np.rint(np.float32(x) / np.float32(scale)), -128, 127) * np.float64(scale)


def convolve(x: Any, weight: Any) -> Any:
    """Conv 3x3 with padding 1 in float64, from its definition."""
    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.einsum("nchwij,kcij->nkhw", windows, weight)


def sqnr_db(reference: Any, found: Any) -> float:
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / ((reference - found) ** 2).sum()))


class TestNumbers:
    """What ONNX Runtime computes."""

    def test_a_convolution_in_float64(self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]) -> None:
        """Codes and steps by hand; what differs is FP16's rounding of both factors and of the result, 2^-11 each."""
        graph = graph_builder(2)
        graph.conv(graph.input(), (3, 4), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        weight, bias = (numpy_helper.to_array(tensor) for tensor in prepared.proto.graph.initializer)
        image = graph.rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
        found = run_model(mixed(prepared, calm(prepared), {"x": 0.0211}), {"x": image})["y"]

        scale = 1383 * 2**-16  # 0.0211 is 1382.8 units
        steps = [fp16_scale(float(np.abs(channel).max()) / 127) for channel in weight]
        weight = np.stack([fake_quantized(channel, step) for channel, step in zip(weight, steps, strict=True)])
        codes = fake_quantized(image, scale)
        expected = convolve(codes, weight) + np.float16(bias).astype(np.float64)[:, None, None]
        allowed = (2 * convolve(np.abs(codes), np.abs(weight)) + np.abs(expected)) * 2**-11
        assert (np.abs(found - expected) <= allowed).all()

    @pytest.mark.parametrize("larger", [{}, {"b1": 1e6, "hidden": 1e6}, {"trunk": 1e6}])
    def test_answers_are_those_of_the_int8_model(
        self, residual: PreparedModel, larger: dict[str, float], run_model: Callable[..., Any]
    ) -> None:
        """FP16 adds less noise than INT8 made, whatever is held: 35 dB and more between the two models."""
        placement = place_for_tensorrt(residual.ir(), PlacementOptions(include=[".*"]))
        image = np.random.default_rng(6).normal(size=(8, 3, 8, 8)).astype(np.float32)
        computed = run_model(residual.proto, {"x": image}, fetch=float_activations(residual.ir())[1:])
        amax = {name: float(np.abs(value).max()) for name, value in {"x": image, **computed}.items()}
        scales = {name: value / 127 for name, value in amax.items()}
        plain = run_model(insert_qdq(residual, placement, scales).model, {"x": image})
        found = run_model(mixed(residual, amax | larger, scales), {"x": image})

        for name, value in plain.items():
            assert found[name].dtype == np.float32
            assert sqnr_db(value, found[name]) > 35
            assert sqnr_db(computed[name], found[name]) > 35

    def test_what_a_held_node_computes_does_not_overflow(
        self, graph_builder: Any, tmp_path: Path, run_model: Callable[..., Any]
    ) -> None:
        """Values near 1e6 go through two convolutions and come back: finite, and as in INT8 with FP32."""
        graph = graph_builder(1)
        x = graph.node("Mul", [graph.conv(graph.input(), (3, 4), "first"), graph.constant(np.float32(1e6))], "large")
        x = graph.node("Mul", [graph.conv(x, (4, 4), "second"), graph.constant(np.float32(1e-6))], "small")
        graph.conv(x, (4, 2), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        image = graph.rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
        computed = run_model(prepared.proto, {"x": image}, fetch=["first", "large", "second", "small", "y"])
        amax = {name: float(np.abs(value).max()) for name, value in {"x": image, **computed}.items()}
        scales = {name: value / 127 for name, value in amax.items()}
        model = mixed(prepared, amax, scales)

        assert kinds(model, "n_first", "n_large", "n_second", "n_small", "n_y") == [
            FLOAT16, FLOAT, FLOAT, FLOAT, FLOAT16
        ]  # fmt: skip
        found = run_model(model, {"x": image})["y"]
        assert np.isfinite(found).all()
        placement = place_for_tensorrt(prepared.ir(), PlacementOptions(include=[".*"]))
        plain = run_model(insert_qdq(prepared, placement, scales).model, {"x": image})["y"]
        assert sqnr_db(plain, found) > 35


def test_a_model_whose_placement_found_nothing_is_told_from_one_that_was_never_quantized(tiny_model: Path) -> None:
    """Both hold FP32 alone; the first one's user has to learn why."""
    model = onnx.load(tiny_model)
    with pytest.raises(EngineBuildError, match="it holds float32 alone; expected Q/DQ nodes"):
        check_types(tiny_model, model, "int8", implicit=False)
    onnx.helper.set_model_props(model, {PRECISION_KEY: "int8", TARGET_KEY: "tensorrt"})
    with pytest.raises(EngineBuildError, match=r"none of its nodes gains from INT8 .* --explain"):
        check_types(tiny_model, model, "int8", implicit=False)
