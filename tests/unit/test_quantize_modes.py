"""Facts about quantization without a calibration: dynamic, and of the weights alone."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from calibrators.tensorrt_cache import TensorRTCache
from engines.errors import ModelError
from engines.onnxrt import PRECISION_KEY, TARGET_KEY, OnnxRuntimeRunner
from engines.placement_options import PlacementOptions
from trt_int8.api import calibrate, quantize
from trt_int8.cache_import import import_cache
from trt_int8.cli import app
from trt_int8.errors import UsageError
from trt_int8.placement_options import placement_entry
from trt_int8.quantize_result import METHOD_KEY, MODE_KEY

FEEDS = {"input": np.random.default_rng(5).normal(size=(4, 3, 8, 8)).astype(np.float32)}


@pytest.fixture
def sequence_model(graph_builder: Any, tmp_path: Path) -> Path:
    """LSTM, MatMul, Relu, Gemm over (6, 2, 8): 6 steps, 2 sequences, 8 features."""
    graph = graph_builder(3)
    x = graph.input("x", (6, 2, 8))
    weights = [graph.normal((1, 64, 8), 0.3), graph.normal((1, 64, 16), 0.2), graph.normal((1, 128), 0.1)]
    states = graph.nodes_of("LSTM", [x, *weights], ["sequence", "hidden"], hidden_size=16)
    last = graph.node("Reshape", [states[1], graph.constant(np.array([2, 16]))], "last")
    last = graph.node("MatMul", [last, graph.normal((16, 24), 0.25)], "product")
    graph.gemm(graph.node("Relu", [last], "active"), (24, 5), "y")
    return Path(graph.save(tmp_path / "sequence.onnx", ["y"]))


def answers(model: Path, feeds: Any) -> Any:
    with OnnxRuntimeRunner(model) as runner:
        return next(iter(runner.infer(feeds).values()))


def test_matrix_products_and_lstms_are_quantized_dynamically(sequence_model: Path, tmp_path: Path) -> None:
    """Each gets its integer form; the answers stay within two per cent; nothing is said through the root logger."""
    feeds = {"x": np.random.default_rng(1).normal(size=(6, 2, 8)).astype(np.float32)}
    result = quantize(sequence_model, output=tmp_path / "d.onnx", mode="dynamic", target="cpu")
    model = onnx.load(tmp_path / "d.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    expected = answers(sequence_model, feeds)

    assert (kinds["DynamicQuantizeLSTM"], kinds["MatMulInteger"], kinds["LSTM"], kinds["MatMul"]) == (1, 2, 0, 0)
    assert {decision.op_type: decision.quantized for decision in result.placement.decisions} == {
        "LSTM": True,
        "MatMul": True,
        "Gemm": True,
    }
    assert metadata == {
        TARGET_KEY: "cpu",
        PRECISION_KEY: "int8",
        METHOD_KEY: "dynamic",
        MODE_KEY: "dynamic",
        **placement_entry(PlacementOptions()),
    }
    assert np.linalg.norm(answers(tmp_path / "d.onnx", feeds) - expected) < 0.02 * np.linalg.norm(expected)


def test_the_quantizer_advises_nobody(
    sequence_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It warns through the root logger and prints; neither reaches the user, and the level is as before."""
    level = logging.getLogger().level
    quantize(sequence_model, output=tmp_path / "d.onnx", mode="dynamic", target="cpu")

    assert [record for record in caplog.records if record.name == "root"] == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().level == level


def test_convolutions_stay_float_dynamically(tiny_model: Path, tmp_path: Path) -> None:
    """Conv -> Relu -> Flatten -> Gemm: the Gemm alone is quantized, and the reason stands beside the Conv."""
    result = quantize(tiny_model, output=tmp_path / "d.onnx", mode="dynamic", target="cpu")

    assert [(decision.node, decision.quantized) for decision in result.placement.decisions] == [
        ("conv", False),
        ("fc", True),
    ]
    assert result.held_back[0].reason == (
        "dynamic quantization serves MatMul, Gemm, LSTM; Conv needs fixed scales"
    )  # fmt: skip


def test_excluded_nodes_stay_float_dynamically(sequence_model: Path, tmp_path: Path) -> None:
    """Also a Gemm, which the quantizer renames on its way."""
    quantize(sequence_model, output=tmp_path / "d.onnx", mode="dynamic", target="cpu", exclude=["n_y"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "d.onnx").graph.node)

    assert (kinds["MatMulInteger"], kinds["MatMul"]) == (1, 1)


@pytest.mark.parametrize(("weights", "shape"), [("per-channel", (24,)), ("per-tensor", ())])
def test_granularity_of_dynamic_weights(weights: Any, shape: Any, sequence_model: Path, tmp_path: Path) -> None:
    """A scale for each of the 24 columns, or one."""
    quantize(sequence_model, output=tmp_path / "d.onnx", mode="dynamic", target="cpu", weights=weights)
    scales = [t for t in onnx.load(tmp_path / "d.onnx").graph.initializer if t.name.endswith("_scale")]

    assert shape in [numpy_helper.to_array(scale).shape for scale in scales]


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_weights_alone(target: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Each weight is INT8 with a DequantizeLinear, biases and activations stay float."""
    result = quantize(tiny_model, output=tmp_path / "w.onnx", mode="weight-only", target=target)
    graph = onnx.load(tmp_path / "w.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    expected = answers(tiny_model, FEEDS)

    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (0, 2)
    assert types["conv.weight_quantized"] == types["fc.weight_quantized"] == TensorProto.INT8
    assert types["conv.bias"] == types["fc.bias"] == TensorProto.FLOAT
    assert (result.scales, result.mode, result.method, result.target) == ({}, "weight-only", "weight-only", target)
    assert np.linalg.norm(answers(tmp_path / "w.onnx", FEEDS) - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("options", "calibrated", "message"),
    [
        ({}, False, r"in the mode static without a calibration: .* Make one with `trt-int8 calibrate`"),
        ({"mode": "dynamic"}, False, r"dynamically for the target tensorrt: .* Take the target cpu"),
        ({"mode": "dynamic", "target": "cpu"}, True, r"^The mode dynamic does not take a calibration: "),
        (
            {"mode": "weight-only", "precision": "int8+fp16"},
            False,
            r"^The mode weight-only does not take the precision",
        ),
        ({"mode": "weight-only", "attention": "int8"}, False, r"^The mode weight-only does not take attention int8"),
        (
            {"mode": "weight-only", "target": "cpu", "activations": "affine"},
            False,
            r"^The mode weight-only does not take affine activations",
        ),
    ],
)
def test_what_contradicts_the_mode_is_refused(
    options: Any, calibrated: bool, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Nothing that the mode has no use for is silently ignored."""
    calibration = calibrate(tiny_model, [FEEDS]) if calibrated else None
    with pytest.raises(UsageError, match=message):
        quantize(tiny_model, calibration, output=tmp_path / "q.onnx", **options)
    assert not (tmp_path / "q.onnx").exists()


def test_a_model_of_convolutions_cannot_be_quantized_dynamically(graph_builder: Any, tmp_path: Path) -> None:
    """The error names what the model holds."""
    graph = graph_builder()
    graph.conv(graph.input("x"), (3, 4), "y")
    with pytest.raises(ModelError, match=r"dynamically: .* the model holds Conv\. Take the mode static"):
        quantize(graph.save(tmp_path / "c.onnx", ["y"]), output=tmp_path / "q.onnx", mode="dynamic", target="cpu")


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only"])
def test_a_model_that_is_quantized_already(mode: Any, tiny_model: Path, tmp_path: Path) -> None:
    """No mode takes it, not even by force, nor do a calibration and a cache: the FP32 model is wanted."""
    by = {"calibration": calibrate(tiny_model, [FEEDS]), "force": True} if mode == "static" else {}
    TensorRTCache(101601, "EntropyCalibration2", {"x": 0.1}).save(tmp_path / "c.cache")
    quantize(tiny_model, output=tmp_path / "q.onnx", mode="weight-only")
    text = r"q\.onnx': it is quantized already \(mode weight-only, target tensorrt\)\. Give the FP32 model"
    with pytest.raises(ModelError, match=text):
        quantize(tmp_path / "q.onnx", output=tmp_path / "again.onnx", mode=mode, target="cpu", **by)
    with pytest.raises(ModelError, match=text):
        calibrate(tmp_path / "q.onnx", [FEEDS])
    with pytest.raises(ModelError, match=text):
        import_cache(tmp_path / "c.cache", tmp_path / "q.onnx", output=tmp_path / "again.onnx")


def test_a_model_without_weights(graph_builder: Any, tmp_path: Path) -> None:
    """There is nothing to store as INT8."""
    graph = graph_builder()
    graph.node("Relu", [graph.input("x")], "y")
    with pytest.raises(ModelError, match=r"none of its 0 weighted nodes can be quantized"):
        quantize(graph.save(tmp_path / "r.onnx", ["y"]), output=tmp_path / "q.onnx", mode="weight-only")


def test_the_command_says_the_mode(sequence_model: Path, tmp_path: Path) -> None:
    """One line with the counts and the mode, then what it means."""
    arguments = ["quantize", str(sequence_model), "--mode", "dynamic", "--target", "cpu"]
    shown = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "d.onnx")])

    assert shown.exit_code == 0
    first, *rest = shown.stdout.splitlines()
    assert first.endswith(
        "3 of 3 weighted nodes in INT8, 0 Q/DQ pairs on activations, target cpu, precision int8, mode dynamic"
    )
    assert rest[-1].startswith("Each run finds the ranges of the inputs anew")
