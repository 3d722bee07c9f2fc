"""Facts about `engines.fp16`: FP16 inside, FP32 at the borders and wherever FP16's range would not do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto

from engines.fp16 import Fp16Model, convert_to_fp16, held_in_fp32
from engines.graph import PreparedModel, float_activations, prepare
from engines.onnxrt import PRECISION_KEY

IMAGES = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)


def types(model: onnx.ModelProto) -> dict[str | None, ir.DataType | None]:
    """What each node writes."""
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    return {node.name: node.outputs[0].dtype for node in inferred.graph}


@pytest.fixture
def seen(run_model: Callable[..., Any]) -> Callable[..., dict[str, float]]:
    """Largest magnitudes of all tensors (or of those named) on some feeds."""

    def measure(prepared: PreparedModel, feeds: Any, only: list[str] | None = None) -> dict[str, float]:
        names = float_activations(prepared.ir()) if only is None else only
        computed = run_model(prepared.proto, feeds, fetch=[name for name in names if name not in feeds])
        return {name: float(np.abs(({**feeds, **computed})[name]).max()) for name in names}

    return measure


@pytest.fixture
def agrees(run_model: Callable[..., Any]) -> Callable[..., None]:
    """Checks a conversion: valid, sorted, FP32 borders, finite outputs near those of FP32, optimized or not."""

    def check(prepared: PreparedModel, converted: Fp16Model, feeds: Any, tolerance: float = 0.01) -> None:
        onnx.checker.check_model(converted.model, full_check=True)
        for side in ("input", "output"):
            before, after = (getattr(model.graph, side) for model in (prepared.proto, converted.model))
            assert [(v.name, v.type) for v in after] == [(v.name, v.type) for v in before]
        expected = run_model(prepared.proto, feeds)
        for optimized in (False, True):
            for name, value in run_model(converted.model, feeds, optimized=optimized).items():
                assert value.dtype == expected[name].dtype
                assert np.isfinite(value).all(), name
                largest = np.abs(expected[name]).max()
                np.testing.assert_allclose(value, expected[name], atol=tolerance * largest, err_msg=name)

    return check


class TestHarmlessModels:
    """Everything fits."""

    def test_all_nodes_compute_in_fp16(self, tiny_model: Path, seen: Any, agrees: Any) -> None:
        """Weights and tensors between the borders are FP16, nothing is held back, and the outputs agree with FP32."""
        prepared = prepare(tiny_model)
        converted = convert_to_fp16(prepared, seen(prepared, {"input": IMAGES}))

        assert converted.held == ()
        assert converted.nodes == 4
        assert {tensor.data_type for tensor in converted.model.graph.initializer} == {TensorProto.FLOAT16}
        found = types(converted.model)
        assert [found[name] for name in ("conv", "relu", "flatten")] == [ir.DataType.FLOAT16] * 3
        agrees(prepared, converted, {"input": IMAGES})

    def test_the_file_is_half_as_large(self, graph_builder: Any, tmp_path: Path) -> None:
        """Weights make up nearly all of it."""
        graph = graph_builder()
        graph.gemm(graph.input("x", (1, 300)), (300, 200), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))

        ratio = prepared.proto.ByteSize() / convert_to_fp16(prepared, {"x": 1.0, "y": 9.0}).model.ByteSize()
        assert ratio == pytest.approx(2, rel=0.01)

    def test_the_precision_is_recorded_beside_other_metadata(self, tiny_model: Path, tmp_path: Path) -> None:
        """The user's own entries stay."""
        model = onnx.load(tiny_model)
        model.metadata_props.add(key="author", value="me")
        onnx.save(model, tmp_path / "m.onnx")
        converted = convert_to_fp16(prepare(tmp_path / "m.onnx"), {"input": 1.0})

        found = {entry.key: entry.value for entry in converted.model.metadata_props}
        assert found == {"author": "me", PRECISION_KEY: "fp16"}

    def test_the_prepared_model_is_left_alone(self, tiny_model: Path) -> None:
        """It still serves the other conversions."""
        prepared = prepare(tiny_model)
        before = prepared.proto.SerializeToString()
        convert_to_fp16(prepared, {"input": 1.0})

        assert prepared.proto.SerializeToString() == before

    def test_integer_inputs_stay_integers(self, graph_builder: Any, tmp_path: Path, agrees: Any) -> None:
        """Token ids are looked up as they are; the table becomes FP16."""
        graph = graph_builder()
        rows = graph.node("Gather", [graph.normal((9, 4)), graph.input("ids", ("N", 3), TensorProto.INT64)], "rows")
        graph.node("MatMul", [rows, graph.normal((4, 2))], "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        converted = convert_to_fp16(prepared, {})

        assert converted.held == ()
        agrees(prepared, converted, {"ids": np.int64([[0, 8, 3]])})


class TestHeldNodes:
    """What stays FP32, and the reason that the report shows."""

    def test_a_weight_beyond_the_range(self, graph_builder: Any, tmp_path: Path, seen: Any, agrees: Any) -> None:
        """The constant and its size are named, and the next node goes on in FP16."""
        graph = graph_builder()
        large = graph.node("Mul", [graph.input(), graph.constant(np.float32(1e5), "large")], "a")
        small = graph.node("Mul", [large, graph.constant(np.float32(1e-5))], "b")
        graph.conv(small, (3, 4), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        feeds = {"x": IMAGES * np.float32(0.05)}
        converted = convert_to_fp16(prepared, seen(prepared, feeds))

        assert [(held.node, held.op_type) for held in converted.held] == [("n_a", "Mul")]
        assert converted.held[0].reason == "its constant 'large' reaches 1e+05; FP16 ends at 65504"
        agrees(prepared, converted, feeds)

    def test_values_near_the_range_are_held_with_a_margin(self, tiny_model: Path) -> None:
        """What calibration saw may be twice as large in use: 32752 is the last magnitude that passes."""
        prepared = prepare(tiny_model)
        passing = {"input": 1.0, "conv": 32752.0, "relu": 1.0, "flat": 1.0, "logits": 1.0}

        assert held_in_fp32(prepared, passing) == ()
        held = held_in_fp32(prepared, passing | {"conv": 32753.0})
        assert [node.node for node in held] == ["conv", "relu"]  # the node that writes it, and the one that reads it
        assert held[0].reason == "calibration saw 3.275e+04 in 'conv'; FP16 ends at 65504 (margin 2x)"

    def test_a_tensor_that_was_not_calibrated_is_judged_by_its_bound(self, tiny_model: Path) -> None:
        """The convolution's output follows from its input: bounded below 65504 it passes, above it is held."""
        prepared = prepare(tiny_model)
        calibrated = {"relu": 1.0, "flat": 1.0, "logits": 1.0}

        assert held_in_fp32(prepared, {"input": 3.0, **calibrated}) == ()
        held = held_in_fp32(prepared, {"input": 30000.0, **calibrated})
        assert [node.node for node in held] == ["conv", "relu"]
        assert re.fullmatch(
            r"'conv' was not calibrated and has a bound of \d\.\d+e\+05; FP16 ends at 65504", held[0].reason
        )

    def test_an_operator_without_a_bound_is_held(
        self, graph_builder: Any, tmp_path: Path, seen: Any, agrees: Any
    ) -> None:
        """Exp of an uncalibrated tensor may reach anything; once calibrated it passes."""
        graph = graph_builder()
        graph.conv(graph.node("Exp", [graph.input()], "e"), (3, 4), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        everything = seen(prepared, {"x": IMAGES})
        partly = {name: value for name, value in everything.items() if name != "e"}

        assert held_in_fp32(prepared, everything) == ()
        held = held_in_fp32(prepared, partly)
        assert [node.node for node in held] == ["n_e", "n_y"]
        assert held[0].reason == "'e' was not calibrated and has no bound; FP16 ends at 65504"
        agrees(prepared, convert_to_fp16(prepared, partly), {"x": IMAGES})

    def test_operators_that_the_converter_leaves_alone_are_reported(
        self, graph_builder: Any, tmp_path: Path, agrees: Any
    ) -> None:
        """They stay FP32 whatever their range; on whole numbers they are no concern of precision."""
        graph = graph_builder()
        x = graph.node("CumSum", [graph.input(), graph.constant(np.int64(3))], "sums")
        graph.conv(x, (3, 4), "y")
        count = graph.input("n", (2,), TensorProto.INT64)
        graph.node("CumSum", [count, graph.constant(np.int64(0))], "counts")
        counts = onnx.helper.make_tensor_value_info("counts", TensorProto.INT64, [2])
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y", counts]))
        converted = convert_to_fp16(prepared, {"x": 3.0, "sums": 9.0, "y": 5.0})

        assert [(held.node, held.reason) for held in converted.held] == [
            ("n_sums", "ONNX Runtime's converter has no FP16 form of CumSum")
        ]
        agrees(prepared, converted, {"x": IMAGES, "n": np.int64([3, 4])})


class TestOverflow:
    """Values beyond 65504 pass between FP32 nodes without a detour through FP16."""

    def test_a_chain_of_large_values_stays_finite(
        self, graph_builder: Any, tmp_path: Path, seen: Any, agrees: Any
    ) -> None:
        """Three nodes hand on values near 1e6; the converter alone would cast each of them to FP16 and back."""
        graph = graph_builder()
        x = graph.conv(graph.input(), (3, 4), "first")
        x = graph.node("Mul", [x, graph.constant(np.float32(1e3))], "thousand")
        x = graph.node("Relu", [graph.node("Mul", [x, graph.constant(np.float32(1e3))], "million")], "large")
        both = graph.node("Add", [x, graph.node("Abs", [x], "again")], "sum")
        graph.conv(graph.node("Mul", [both, graph.constant(np.float32(1e-6))], "small"), (4, 2), "y")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        amax = seen(prepared, {"x": IMAGES})
        assert amax["large"] > 65504
        converted = convert_to_fp16(prepared, amax)

        assert [held.node for held in converted.held] == ["n_million", "n_large", "n_again", "n_sum", "n_small"]
        found = types(converted.model)
        assert found["n_million"] == found["n_large"] == found["n_sum"] == ir.DataType.FLOAT
        assert found["n_thousand"] == found["n_y"] == ir.DataType.FLOAT16
        agrees(prepared, converted, {"x": IMAGES})

    def test_large_inputs_and_outputs_stay_finite(
        self, graph_builder: Any, tmp_path: Path, seen: Any, agrees: Any
    ) -> None:
        """An FP32 input that only FP32 nodes read, and an FP32 output that one writes, are not cast on the way."""
        graph = graph_builder()
        scaled = graph.node("Mul", [graph.input(), graph.constant(np.float32(1e-5))], "scaled")
        y = graph.conv(scaled, (3, 4), "conv")
        graph.node("Mul", [y, graph.constant(np.float32(1e6))], "large_output")
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["large_output"]))
        feeds = {"x": IMAGES * np.float32(1e5)}
        converted = convert_to_fp16(prepared, seen(prepared, feeds))

        assert [held.node for held in converted.held] == ["n_scaled", "n_large_output"]
        assert types(converted.model)["n_conv"] == ir.DataType.FLOAT16
        assert [node.op_type for node in converted.model.graph.node if "large_output" in node.output] == ["Mul"]
        agrees(prepared, converted, feeds)

    def test_several_fp32_readers_share_one_cast(self, graph_builder: Any, tmp_path: Path, agrees: Any) -> None:
        """The converter writes one Cast per reader under one name, which no runtime accepts."""
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input(), (3, 4))], "shared")
        for name in ("a", "b", "c"):
            graph.node("Mul", [x, graph.constant(np.float32(1e5))], name)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["a", "b", "c"]))
        converted = convert_to_fp16(prepared, {"x": 4.0, "shared": 4.0, "a": 4e5, "b": 4e5, "c": 4e5})

        outputs = [output for node in converted.model.graph.node for output in node.output]
        assert len(set(outputs)) == len(outputs)
        agrees(prepared, converted, {"x": IMAGES})


def test_branches_stay_fp32_and_read_what_they_need(tmp_path: Path, agrees: Any) -> None:
    """An If is held as a whole; FP16 tensors and weights that its branches read from outside are widened."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (bool c, float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {1., 2., 3., 4.}> {
          a = MatMul (x, w)
          b = Relu (a)
          d = If (c) <then_branch = t () => (float[2,2] p) { n = Mul (b, w)  p = Neg (n) },
                      else_branch = e () => (float[2,2] q) { q = Add (b, x) }>
          y = MatMul (d, w)
        }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    prepared = prepare(tmp_path / "m.onnx")
    converted = convert_to_fp16(prepared, {"x": 2.0, "a": 9.0, "b": 9.0, "d": 9.0, "y": 30.0})

    assert [(held.op_type, held.reason) for held in converted.held] == [
        ("If", "the values inside its branches or loop body are not calibrated")
    ]
    assert types(converted.model)["Relu:b"] == ir.DataType.FLOAT16
    for choice in (True, False):
        agrees(prepared, converted, {"c": np.array(choice), "x": np.float32([[1, -2], [0.5, 1]])})


def attend(graph: Any, hide: Callable[[Any, str], str]) -> None:
    """Attention of one head over x [2, 5, 8], its scores hidden by `hide`."""
    x = graph.input("x", (2, 5, 8))
    query, key, value = (graph.node("MatMul", [x, graph.normal((8, 8))], name) for name in ("q", "k", "v"))
    scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 2, 1])], "scores")
    graph.node("MatMul", [graph.node("Softmax", [hide(graph, scores)], "p"), value], "y")


def added(graph: Any, scores: str) -> str:
    """As BERT is exported: (1 - mask) * the least number there is."""
    mask = graph.node("Cast", [graph.input("mask", (2, 1, 5), onnx.TensorProto.INT64)], to=onnx.TensorProto.FLOAT)
    hidden = graph.node("Sub", [graph.constant(np.float32(1)), mask])
    least = graph.constant(np.float32(np.finfo(np.float32).min))
    return str(graph.node("Add", [scores, graph.node("Mul", [hidden, least])]))


def selected(graph: Any, scores: str) -> str:
    """As masked_fill is exported."""
    kept = graph.node("Cast", [graph.input("mask", (2, 1, 5), onnx.TensorProto.INT64)], to=onnx.TensorProto.BOOL)
    return str(graph.node("Where", [kept, scores, graph.constant(np.float32(np.finfo(np.float32).min))]))


def infinite(graph: Any, scores: str) -> str:
    """A causal mask."""
    return str(graph.node("Add", [scores, graph.constant(np.triu(np.full((5, 5), -np.inf, np.float32), 1))]))


class TestMasks:
    """What hides keys from attention holds nothing in FP32."""

    @pytest.mark.parametrize("hide", [added, selected, infinite])
    def test_attention_computes_in_fp16(
        self, hide: Callable[[Any, str], str], graph_builder: Any, tmp_path: Path, agrees: Any, run_model: Any
    ) -> None:
        """Nothing is held, and masked keys count for nothing."""
        graph = graph_builder()
        attend(graph, hide)
        prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))
        feeds = {"x": np.random.default_rng(4).normal(size=(2, 5, 8)).astype(np.float32)}
        if hide is not infinite:
            feeds["mask"] = np.int64([[[1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]])
        seen = dict.fromkeys(("x", "q", "k", "v", "y"), 30.0)
        converted = convert_to_fp16(prepared, seen)

        assert converted.held == ()
        agrees(prepared, converted, feeds)

    def test_a_number_that_does_not_end_in_a_softmax_alone_is_held(self, graph_builder: Any, tmp_path: Path) -> None:
        """The same sum as an output of the model: its values are wanted."""
        graph = graph_builder()
        attend(graph, selected)
        graph.nodes[-3].output[0], graph.nodes[-2].input[0] = "masked", "masked"
        held = held_in_fp32(prepare(graph.save(tmp_path / "m.onnx", ["y", "masked"])), dict.fromkeys("xqkvy", 1.0))

        assert "Where" in [node.op_type for node in held]
