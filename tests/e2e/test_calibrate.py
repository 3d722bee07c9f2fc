"""Calibration of a real graph through ONNX Runtime: order, merging, memory, and inputs of every kind."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trt_int8 import calibrate, compare, quantize

METHODS = ("minmax", "entropy", "percentile", "mse")


def batches(seed: int, count: int, rows: int = 2) -> list[dict[str, np.ndarray]]:
    """Return batches for `tiny_model`; the last one is short."""
    rng = np.random.default_rng(seed)
    sizes = [rows] * (count - 1) + [1]
    return [{"input": rng.standard_normal((size, 3, 8, 8), dtype=np.float32)} for size in sizes]


def test_order_does_not_matter(tiny_model: Path):
    """The same batches in another order give identical scales for every method."""
    data = batches(0, 30)
    forward, backward = calibrate(tiny_model, data), calibrate(tiny_model, data[::-1])

    for method in METHODS:
        assert forward.scales(method) == backward.scales(method)


def test_merging_is_exact(tiny_model: Path):
    """Two merged calibrations of the halves give the scales of one calibration of the whole."""
    data = batches(1, 30)
    whole = calibrate(tiny_model, data)
    merged = calibrate(tiny_model, data[:11]).merge(calibrate(tiny_model, data[11:]))

    for method in METHODS:
        assert merged.scales(method) == whole.scales(method)
    assert merged.fingerprint.samples == whole.fingerprint.samples == 59


def test_statistics_are_those_of_the_values(tiny_model: Path):
    """Range and maximum of the input and of the Relu are those that numpy and ONNX Runtime give."""
    import onnxruntime

    data = batches(2, 10)
    calibration = calibrate(tiny_model, data)
    model = onnx.load(tiny_model)
    model.graph.output.append(onnx.ValueInfoProto(name="relu"))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    relu = np.concatenate([session.run(["relu"], batch)[0] for batch in data])
    images = np.concatenate([batch["input"] for batch in data])

    assert calibration.range("input") == (images.min(), images.max())
    assert calibration.amax("minmax")["relu"] == pytest.approx(relu.max(), rel=1e-5)
    assert calibration.histogram("relu").count == relu.size


MEMORY = """
import pathlib, re, sys
import numpy as np
from trt_int8 import calibrate

def stream(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"input": rng.standard_normal((8, 3, 8, 8), dtype=np.float32)}

calibrate(sys.argv[1], stream(int(sys.argv[2])))
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_batches(tiny_model: Path):
    """The peak memory of a process that calibrates 1000 batches is that of 50, within 2 per cent."""

    def peak(count: int) -> int:
        command = [sys.executable, "-c", MEMORY, str(tiny_model), str(count)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(1000) <= 1.02 * peak(50)


PLAIN = """
import pathlib, re, sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
for _ in range(5):
    session.run(None, {"input": np.zeros((1, 16, 128, 128), np.float32)})
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""

BOUNDED = """
import logging, pathlib, re, sys
import numpy as np
from trt_int8 import calibrate

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
rng = np.random.default_rng(0)
calibrate(sys.argv[1], ({"input": rng.standard_normal((1, 16, 128, 128), dtype=np.float32)} for _ in range(60)))
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def test_memory_stays_within_the_bound_that_is_said(graph_builder: Any, tmp_path: Path):
    """A process that calibrates takes no more than one that infers, and what the log said before the first batch.

    What later layers read is kept for a group of batches, of one layer after the other and not of all 40 at once.
    """
    graph = graph_builder()
    x = graph.input("input", ("N", 16, 128, 128))
    for layer in range(40):
        x = graph.node("Relu", [graph.conv(x, (16, 16), f"conv{layer}")], f"relu{layer}")
    model = graph.save(tmp_path / "deep.onnx", [x])

    def output(script: str) -> list[str]:
        command = [sys.executable, "-c", script, str(model)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    *_, plain = output(PLAIN)
    *log, peak = output(BOUNDED)
    (said,) = re.findall(r"^memory: at most (\d+) MiB above plain inference", "\n".join(log), re.MULTILINE)
    assert int(peak) - int(plain) <= int(said) * 1024


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    """Token ids (int64), a float vector and a scalar: logits = (mean(embedding[ids]) + vector) * scalar @ w."""
    rng = np.random.default_rng(4)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"], "embed"),
        helper.make_node("ReduceMean", ["embedded", "axes"], ["pooled"], "pool", keepdims=0),
        helper.make_node("Add", ["pooled", "vector"], ["shifted"], "shift"),
        helper.make_node("Mul", ["shifted", "gain"], ["scaled"], "scale"),
        helper.make_node("Gemm", ["scaled", "w"], ["logits"], "fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", 16]),
            helper.make_tensor_value_info("gain", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 16])],
        [
            numpy_helper.from_array(rng.normal(size=(50, 16)).astype(np.float32), "table"),
            numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )
    path = tmp_path / "text.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_several_inputs_of_every_kind(text_model: Path, tmp_path: Path, target: str):
    """Token ids of changing length, a vector and a scalar: calibrated, quantized, and close to FP32."""
    rng = np.random.default_rng(6)
    data = [
        {
            "ids": rng.integers(0, 50, (2, 3 + index % 4)),
            "vector": rng.normal(size=(2, 16)).astype(np.float32),
            "gain": np.float32(1.5),
        }
        for index in range(40)
    ]
    calibration = calibrate(text_model, data)
    quantize(text_model, calibration, output=tmp_path / "q.onnx", method="mse", target=target)
    (row,) = compare(text_model, [tmp_path / "q.onnx"], data).to_json()["candidates"]

    assert "ids" not in calibration.tensors
    assert calibration.fingerprint.samples == 80
    assert row["sqnr_db"] > 30


def test_fixed_batch_keeps_padding_out(tiny_model: Path):
    """A model with a fixed batch of 4 is fed 10 samples; the statistics are of 10, not of 12."""
    model = onnx.load(tiny_model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tiny_model)
    images = np.random.default_rng(8).standard_normal((10, 3, 8, 8), dtype=np.float32)
    calibration = calibrate(tiny_model, {"input": images})

    assert calibration.fingerprint.samples == 10
    assert calibration.histogram("input").count == 10 * 3 * 8 * 8
    assert calibration.histogram("relu").count == 10 * 8 * 8 * 8
