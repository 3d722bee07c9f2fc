"""Facts about `trt_int8.quantization`: what a quantized model and its result say of themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from calibrators.calibration import Calibration
from engines.onnxrt import PRECISION_KEY, TARGET_KEY, OnnxRuntimeRunner
from trt_int8 import __version__
from trt_int8.api import calibrate, quantize
from trt_int8.cli import app
from trt_int8.errors import CalibrationError, UsageError
from trt_int8.input_alarm import INPUTS_KEY, summary_text
from trt_int8.placement_options import PLACEMENT_KEY
from trt_int8.quantize_result import CALIBRATION_KEY, METHOD_KEY

RNG = np.random.default_rng(5)
BATCHES = [{"input": RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)} for _ in range(3)]


@pytest.fixture
def calibration(tiny_model: Path) -> Calibration:
    """A calibration of the tiny model."""
    return calibrate(tiny_model, BATCHES)


@pytest.fixture
def large_model(graph_builder: Any, tmp_path: Path) -> Path:
    """Conv, Relu, Conv; the first convolution's values are beyond FP16's range."""
    graph = graph_builder()
    x = graph.node("Conv", [graph.input("input"), graph.normal((8, 3, 1, 1), 1e4)], "large")
    x = graph.node("Mul", [x, graph.constant(np.float32(1e-6))], "scaled")
    graph.conv(x, (8, 16), "y")
    return Path(graph.save(tmp_path / "large.onnx", ["y"]))


@pytest.mark.parametrize(
    ("options", "precision", "target"),
    [
        ({}, "int8", "tensorrt"),
        ({"precision": "int8+fp16"}, "int8+fp16", "tensorrt"),
        ({"target": "cpu"}, "int8", "cpu"),
    ],
)
def test_a_model_tells_its_origin(
    options: Any, precision: str, target: str, tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Precision, target, method, hash and inputs of the calibration stand in its metadata, and in the result."""
    result = quantize(tiny_model, calibration, output=tmp_path / "q.onnx", method="mse", **options)
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "q.onnx").metadata_props}

    assert metadata == {
        PRECISION_KEY: precision,
        TARGET_KEY: target,
        METHOD_KEY: "mse",
        CALIBRATION_KEY: calibration.sha256,
        INPUTS_KEY: summary_text(calibration.input_statistics),
        PLACEMENT_KEY: '{"residual": "int8", "attention": "float", "exclude": [], "include": []}',
    }
    assert (result.precision, result.target, result.held) == (precision, target, ())


def test_int8_beside_fp16_answers_as_int8_does(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The same file names and types outside, FP16 inside, answers closer to each other than one per cent."""
    answers = []
    precisions: Any = ("int8", "int8+fp16")
    for precision in precisions:
        quantize(tiny_model, calibration, output=tmp_path / f"{precision}.onnx", precision=precision)
        with OnnxRuntimeRunner(tmp_path / f"{precision}.onnx") as runner:
            answers.append(runner.infer(BATCHES[0])["logits"])
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "int8+fp16.onnx").graph.initializer}

    assert types == {TensorProto.FLOAT16, TensorProto.INT8, TensorProto.FLOAT}  # FP32: the scale of Q on the input
    assert answers[0].dtype == answers[1].dtype == np.float32
    assert np.linalg.norm(answers[0] - answers[1]) < 0.01 * np.linalg.norm(answers[0])


def test_nodes_held_in_fp32_are_reported(large_model: Path, tmp_path: Path) -> None:
    """Which they are and why stands in the result, in its JSON, and on the command line beside the float ones."""
    calibration = calibrate(large_model, BATCHES, tensors="all")
    calibration.save(tmp_path / "c.npz")
    result = quantize(large_model, calibration, output=tmp_path / "q.onnx", precision="int8+fp16")
    written = json.loads(json.dumps(result.to_json()))

    assert [node.node for node in result.held] == ["n_large", "n_scaled"]
    assert [node["node"] for node in written["held"]] == ["n_large", "n_scaled"]
    assert written["precision"] == "int8+fp16"
    arguments = ["quantize", str(large_model), "--calibration", str(tmp_path / "c.npz"), "--precision", "int8+fp16"]
    shown = CliRunner().invoke(app, [*arguments, "--exclude", "n_y", "--output", str(tmp_path / "cli.onnx")])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].endswith("target tensorrt, precision int8+fp16, method entropy")
    assert lines[1] == "float: n_y (Conv): excluded by the expression 'n_y'"
    assert lines[2].startswith("fp32: n_large (Conv): calibration saw ")
    assert lines[3].startswith("fp32: n_scaled (Mul): calibration saw ")
    assert len(lines) == 4


def test_a_calibration_of_another_release(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """It is refused unless forced; what is corrected within a release changes nothing that is counted."""

    def made_by(tool: str) -> Calibration:
        histograms = {name: calibration.histogram(name) for name in calibration.tensors}
        return Calibration(histograms, replace(calibration.fingerprint, tool=tool))

    release = __version__.rsplit(".", 1)[0]
    output = tmp_path / "q.onnx"
    for tool in ("0.0.9", f"{release}.0, 0.0.9"):
        with pytest.raises(CalibrationError, match=rf"made by trt-int8 {tool}, and this is .*--force"):
            quantize(tiny_model, made_by(tool), output=output)
        assert not output.exists()
    quantize(tiny_model, made_by("0.0.9"), output=output, force=True)
    quantize(tiny_model, made_by(f"{release}.0, {release}.77"), output=output)


def test_a_calibration_may_be_named_by_its_file(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The bytes are the same."""
    calibration.save(tmp_path / "c.npz")
    quantize(tiny_model, calibration, output=tmp_path / "object.onnx")
    quantize(tiny_model, tmp_path / "c.npz", output=tmp_path / "file.onnx")

    assert (tmp_path / "object.onnx").read_bytes() == (tmp_path / "file.onnx").read_bytes()


def test_with_int8_nothing_is_held(large_model: Path, tmp_path: Path) -> None:
    """FP32 has room for everything."""
    result = quantize(large_model, calibrate(large_model, BATCHES), output=tmp_path / "q.onnx")

    assert result.held == ()
    assert result.to_json()["held"] == []


def test_a_rule_can_be_overruled(graph_builder: Any, tmp_path: Path) -> None:
    """`--include` quantizes a node against a rule about speed, on the command line as in Python."""
    graph = graph_builder()
    graph.conv(graph.conv(graph.input("input"), (3, 16), "stem"), (16, 5), "y")
    graph.conv("y", (5, 3), "z")
    model = Path(graph.save(tmp_path / "few.onnx", ["z"]))
    calibration = calibrate(model, BATCHES)
    calibration.save(tmp_path / "c.npz")
    plain = quantize(model, calibration, output=tmp_path / "q.onnx")
    result = quantize(model, calibration, output=tmp_path / "q.onnx", include=["n_z"])

    assert [decision.rule for decision in plain.held_back] == ["few-channels"]
    assert result.held_back == ()
    arguments = [
        "quantize",
        str(model),
        "--calibration",
        str(tmp_path / "c.npz"),
        "--output",
        str(tmp_path / "cli.onnx"),
    ]
    shown = CliRunner().invoke(app, [*arguments, "--include", "n_z"])
    assert "3 of 3 weighted nodes in INT8" in shown.stdout
    refused = CliRunner().invoke(app, [*arguments, "--include", "z"])
    assert str(refused.exception).startswith("Cannot include 'z': it matches the whole name of none of the 3 weighted")


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_the_ranges_of_a_calibration_tell_a_detection_head(target: Any, graph_builder: Any, tmp_path: Path) -> None:
    """Coordinates in hundreds beside scores: the last convolutions stay float; in tenths they do not."""
    for reach, held in ((300.0, ["n_boxes", "n_scores"]), (0.1, [])):
        graph = graph_builder()
        x = graph.node("Relu", [graph.conv(graph.input("input"), (3, 16), "stem")])
        boxes = graph.node("Tanh", [graph.conv(x, (16, 8), "boxes")])
        boxes = graph.node("Mul", [boxes, graph.constant(np.float32(reach))])
        scores = graph.node("Sigmoid", [graph.conv(x, (16, 8), "scores")])
        graph.node("Concat", [boxes, scores], "table", axis=1)
        model = graph.save(tmp_path / "m.onnx", ["table"])
        result = quantize(model, calibrate(model, BATCHES), output=tmp_path / "q.onnx", target=target)

        assert [decision.node for decision in result.held_back] == held


def attention_model(graph: Any, path: Path) -> Path:
    """Attention of one head over 32 tokens of 16 numbers."""
    x = graph.input("input", ("N", 32, 16))
    query, key, value = (graph.node("MatMul", [x, graph.normal((16, 16), 0.25)], name) for name in "qkv")
    scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 2, 1])], "scores")
    graph.node("MatMul", [graph.node("Softmax", [scores], "p"), value], "y")
    return Path(graph.save(path, ["y"]))


def test_attention_in_int8_is_asked_for(graph_builder: Any, tmp_path: Path) -> None:
    """`--attention int8` adds a pair for each of the four operands, and the answers stay close to FP32's."""
    model = attention_model(graph_builder(), tmp_path / "m.onnx")
    batches = [{"input": RNG.normal(size=(4, 32, 16)).astype(np.float32)} for _ in range(3)]
    calibrate(model, batches).save(tmp_path / "c.npz")
    pairs = {}
    for attention in ("float", "int8"):
        output = tmp_path / f"{attention}.onnx"
        options = ["--calibration", str(tmp_path / "c.npz"), "--attention", attention, "--output", str(output)]
        answer = CliRunner().invoke(app, ["quantize", str(model), *options])
        assert answer.exit_code == 0, answer.output
        pairs[attention] = sum(node.op_type == "QuantizeLinear" for node in onnx.load(output).graph.node)

    assert (pairs["float"], pairs["int8"]) == (1, 5)
    with OnnxRuntimeRunner(model) as exact, OnnxRuntimeRunner(tmp_path / "int8.onnx") as quantized:
        expected, found = exact.infer(batches[0])["y"], quantized.infer(batches[0])["y"]
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_attention_in_int8_is_for_tensorrt(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The CPU target has no such products, and says so instead of leaving the wish out."""
    with pytest.raises(UsageError, match="Cannot quantize attention products for the target cpu"):
        quantize(tiny_model, calibration, output=tmp_path / "q.onnx", target="cpu", attention="int8")
