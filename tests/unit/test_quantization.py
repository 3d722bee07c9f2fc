"""Facts about `trt_int8.quantization`: what a quantized model and its result say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from calibrators.calibration import Calibration
from engines.onnxrt import PRECISION_KEY, TARGET_KEY, OnnxRuntimeRunner
from trt_int8.api import calibrate, quantize
from trt_int8.cli import app
from trt_int8.input_alarm import INPUTS_KEY, summary_text
from trt_int8.quantization import CALIBRATION_KEY, METHOD_KEY

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
    x = graph.node("Conv", [graph.input("input"), graph.normal((3, 3, 1, 1), 1e4)], "large")
    x = graph.node("Mul", [x, graph.constant(np.float32(1e-6))], "scaled")
    graph.conv(x, (3, 2), "y")
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


def test_with_int8_nothing_is_held(large_model: Path, tmp_path: Path) -> None:
    """FP32 has room for everything."""
    result = quantize(large_model, calibrate(large_model, BATCHES), output=tmp_path / "q.onnx")

    assert result.held == ()
    assert result.to_json()["held"] == []
