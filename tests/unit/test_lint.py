"""Linting whole models: the file as it is, whatever wrote it, and our own models, which are clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trt_int8
from engines.errors import ModelError
from engines.lint import LintReport, lint
from engines.lint_fixes import mend
from trt_int8 import calibrate, quantize
from trt_int8.errors import FileAccessError


def pair(graph: Any, x: str, name: str, zero: Any, scale: float = 0.05) -> str:
    inputs = [graph.constant(np.float32(scale)), graph.constant(zero)]
    return str(graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [x, *inputs], f"{name}_q"), *inputs], name))


def rules(report: LintReport) -> list[str]:
    return [finding.rule for finding in report.findings if finding.severity != "note"]


@pytest.fixture
def network(graph_builder: Any, tmp_path: Path) -> Path:
    """A small residual network with a pool, a Concat, a Pad and a Gemm."""
    graph = graph_builder()
    x = graph.node("Relu", [graph.conv(graph.input("x", ("N", 8, 8, 8)), (8, 16), "stem")], "trunk")
    y = graph.conv(graph.node("Relu", [graph.conv(x, (16, 16), "b1")]), (16, 16), "b2")
    x = graph.node("Relu", [graph.node("Add", [y, x], "sum")])
    x = graph.node("Concat", [x, graph.node("MaxPool", [x], kernel_shape=[3, 3], pads=[1] * 4)], axis=1)
    x = graph.node("Pad", [x, graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))], mode="reflect")
    x = graph.node("GlobalAveragePool", [graph.node("Relu", [graph.conv(x, (32, 16), pads=[0] * 4)])])
    graph.gemm(graph.node("Flatten", [x]), (16, 16), "y")
    return Path(graph.save(tmp_path / "network.onnx", ["y"]))


@pytest.mark.parametrize(
    "options",
    [
        {"target": "tensorrt"},
        {"target": "tensorrt", "residual": "float"},
        {"target": "tensorrt", "precision": "int8+fp16"},
        {"target": "cpu"},
        {"target": "cpu", "reduce_range": True},
    ],
    ids=str,
)
def test_our_models_are_clean(options: Any, network: Path, tmp_path: Path) -> None:
    """No errors and no warnings in what this project writes, for the target that the file names."""
    data = np.random.default_rng(3).normal(size=(8, 8, 8, 8)).astype(np.float32)
    file = tmp_path / "int8.onnx"
    quantize(network, calibrate(network, [{"x": data}]), output=file, **options)
    report = lint(file)

    assert report.target == options["target"]
    assert report.quantized >= 3
    assert rules(report) == []


def test_the_model_for_the_cpu_is_none_for_tensorrt(network: Path, tmp_path: Path) -> None:
    """Asked for the other target, its unsigned codes are errors."""
    data = np.random.default_rng(3).normal(size=(8, 8, 8, 8)).astype(np.float32)
    file = tmp_path / "int8.onnx"
    quantize(network, calibrate(network, [{"x": data}]), output=file, target="cpu")

    assert {"uint8-codes", "int32-dq"} <= set(rules(lint(file, target="tensorrt")))


def test_a_model_of_onnx_runtimes_quantizer(network: Path, tmp_path: Path) -> None:
    """Its S8S8 form holds INT32 biases and pairs on both sides of the Add; mended, it is clean and closer to FP32."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = [np.random.default_rng(seed).normal(size=(2, 8, 8, 8)).astype(np.float32) for seed in range(4)]

        def get_next(self) -> Any:
            return {"x": self.rest.pop()} if self.rest else None

    file = tmp_path / "static.onnx"
    quantize_static(
        network, file, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )  # fmt: skip
    result = mend(file, tmp_path / "mended.onnx")
    feeds = {"x": np.random.default_rng(9).normal(size=(2, 8, 8, 8)).astype(np.float32)}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact, before, after = (
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for path in (network, file, result.path)
    )

    assert {"int32-dq", "residual-branch"} <= set(rules(result.before))
    assert rules(result.after) == []
    assert np.square(after - exact).mean() < np.square(before - exact).mean()


def test_weights_outside_of_the_file_are_not_read(graph_builder: Any, tmp_path: Path) -> None:
    """Scales in external data are, weights are not: a hole in their place does not show; a missing file does."""
    graph = graph_builder()
    graph.constant(np.zeros((512, 512), np.float32), "w")
    scale = graph.constant(np.float32(0.0), "scale")
    code = graph.node("QuantizeLinear", [graph.input("x", (1, 512)), scale, graph.constant(np.int8(0), "zero")], "q")
    graph.node("MatMul", [graph.node("DequantizeLinear", [code, scale, "zero"], "a"), "w"], "y")
    file = tmp_path / "m.onnx"
    onnx.save(graph.model(["y"]), file, save_as_external_data=True, location="m.data", size_threshold=0)
    header = onnx.load(file, load_external_data=False)
    (weight,) = (tensor for tensor in header.graph.initializer if tensor.name == "w")
    next(entry for entry in weight.external_data if entry.key == "offset").value = str(10**12)
    onnx.save(header, file)

    assert rules(lint(file)) == ["scale-not-positive", "float-weight"]
    (tmp_path / "m.data").unlink()
    with pytest.raises(FileAccessError, match=r"its external data 'm\.data' is missing"):
        lint(file)


def test_a_model_in_memory_is_not_changed(graph_builder: Any) -> None:
    """A ModelProto is read like a file, and stays as it was; nodes without names are told by their output."""
    graph = graph_builder()
    graph.node("Conv", [pair(graph, graph.input(), "a", np.uint8(7)), graph.normal((4, 3, 1, 1))], "y")
    for node in graph.nodes:
        node.ClearField("name")
    model = graph.model(["y"])
    content = model.SerializeToString(deterministic=True)
    report = lint(model)

    assert [(finding.node, finding.rule) for finding in report.findings[:2]] == [
        ("QuantizeLinear:a_q", "uint8-codes"), ("Conv:y", "float-weight")
    ]  # fmt: skip
    assert report.model is None
    assert model.SerializeToString(deterministic=True) == content


def test_initializers_that_are_inputs_too(graph_builder: Any) -> None:
    """Before IR version 4 every initializer is declared as an input; they are constants all the same."""
    graph = graph_builder()
    codes = graph.constant(np.ones((4, 3, 1, 1), np.int8))
    w = graph.node("DequantizeLinear", [codes, graph.constant(np.float32(0.1)), graph.constant(np.int8(0))], "w")
    graph.node("Conv", [pair(graph, graph.input(), "a", np.int8(0)), w], "y")
    for tensor in graph.initializers:
        graph.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    report = lint(graph.model(["y"], opset=10, ir_version=3))

    assert rules(report) == []
    assert (report.quantized, report.pairs) == (1, 1)


def test_constant_nodes(graph_builder: Any) -> None:
    """Scales and weights given by Constant nodes are constants."""

    def constant(array: Any) -> str:
        return str(graph.node("Constant", [], value=numpy_helper.from_array(np.asarray(array))))

    graph = graph_builder()
    code = graph.node("QuantizeLinear", [graph.input(), scale := constant(np.float32(0.1)), constant(np.int8(0))])
    x = graph.node("DequantizeLinear", [code, scale, constant(np.int8(0))])
    weight = [constant(np.ones((4, 3, 1, 1), np.int8)), constant(np.full(4, 0.1, np.float32))]
    w = graph.node("DequantizeLinear", [*weight, constant(np.zeros(4, np.int8))], axis=0)
    graph.node("Conv", [x, w], "y")
    report = lint(graph.model(["y"]))

    assert rules(report) == []
    assert report.quantized == 1


def test_branches_and_functions_are_looked_into() -> None:
    """Q and DQ inside of an If, and inside of a model-local function, are found."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (bool c, float[2,2] x) => (float[2,2] y)
        <float s = {0.1}, uint8 z = {128}> {
          a = local.Fake (x)
          y = If (c) <then_branch = t () => (float[2,2] p) { [n] q = QuantizeLinear (a, s, z)
                                                              p = DequantizeLinear (q, s, z) },
                      else_branch = e () => (float[2,2] r) { r = Exp (a) }>
        }
        <opset_import: ["" : 20], domain: "local"> Fake (u) => (v) {
          scale = Constant <value = float {0.0}> ()
          zero = Constant <value = int8 {0}> ()
          code = QuantizeLinear (u, scale, zero)
          v = DequantizeLinear (code, scale, zero)
        }"""
    )
    found = {finding.rule: finding.node for finding in lint(model).findings}

    assert found["uint8-codes"] == "n"
    assert "scale-not-positive" in found


def test_a_graph_that_contradicts_itself(graph_builder: Any) -> None:
    """Where types cannot be inferred, what can be seen without them is still found."""
    graph = graph_builder()
    x = graph.input("x", (1, 3), TensorProto.INT64)
    graph.node("MatMul", [pair(graph, x, "a", np.uint8(0)), graph.normal((4, 4))], "y")

    assert "uint8-codes" in rules(lint(graph.model(["y"])))


def test_json(graph_builder: Any) -> None:
    """The report as data: counts, and every finding with node, rule, cost and fix."""
    graph = graph_builder()
    pair(graph, graph.input(), "y", np.uint8(7))
    data = json.loads(json.dumps(lint(graph.model(["y"]), tensorrt=11).to_json()))

    assert data["counts"] == {"error": 1, "warning": 1, "note": 0}
    assert (data["tensorrt"], data["target"], data["pairs"]) == ([11], "tensorrt", 1)
    assert {key: data["findings"][0][key] for key in ("rule", "severity", "node", "releases", "mendable")} == {
        "rule": "uint8-codes", "severity": "error", "node": "n_y_q", "releases": [11], "mendable": True
    }  # fmt: skip
    assert all(finding["cost"] and finding["fix"] and finding["source"] for finding in data["findings"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"tensorrt": 12}, "TensorRT 12: expected 10 or 11"), ({"target": "gpu"}, "'gpu': expected 'tensorrt' or 'cpu'")],
)
def test_unknown_words(options: Any, expected: str) -> None:
    """A release or a target that is none is refused before the file is read."""
    with pytest.raises(ModelError, match=expected):
        lint("absent.onnx", **options)


def test_what_is_no_model(tmp_path: Path) -> None:
    """A missing file, a file of something else, and an empty model have their own messages."""
    (tmp_path / "text.onnx").write_text("no model, just words")

    with pytest.raises(FileAccessError, match="there is no file"):
        lint(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="is not an ONNX model"):
        lint(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="it holds no graph with outputs and opsets"):
        lint(onnx.ModelProto())


def test_public_name() -> None:
    """`from trt_int8 import lint` is this function."""
    assert trt_int8.lint is lint


def test_operators_on_integers_count_as_quantized(network: Path, tmp_path: Path) -> None:
    """A dynamically quantized Gemm is a MatMulInteger behind a DynamicQuantizeLinear; four convolutions stay float."""
    file = tmp_path / "dynamic.onnx"
    quantize(network, output=file, mode="dynamic", target="cpu")
    report = lint(file)

    assert {node.op_type for node in onnx.load(file).graph.node} >= {"MatMulInteger", "DynamicQuantizeLinear", "Conv"}
    assert (report.weighted, report.quantized, report.integer, report.pairs) == (5, 1, 1, 0)
    assert [finding.rule for finding in report.findings if finding.rule == "not-quantized"] == []


@pytest.mark.parametrize(
    ("op_type", "domain", "counts"),
    [
        ("QLinearConv", "", True),
        ("QLinearMatMul", "", True),
        ("ConvInteger", "", True),
        ("MatMulIntegerToFloat", "com.microsoft", True),
        ("QGemm", "com.microsoft", True),
        ("DynamicQuantizeLSTM", "com.microsoft", True),
        ("QLinearAdd", "com.microsoft", False),
        ("DynamicQuantizeLinear", "", False),
        ("QLinearConv", "elsewhere", False),
    ],
)
def test_which_operators_on_integers_are_products(op_type: str, domain: str, counts: bool) -> None:
    """Convolutions and matrix products are; sums and the quantization of an input are not."""
    float32 = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node(op_type, ["x"], ["y"], domain=domain)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [float32], [result]))

    assert lint(model).integer == counts
