"""engines.trt_inspector: the inspector's JSON as TensorRT 10 and 11 write it, drawn after their documentation."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import EngineError
from engines.trt_inspector import (
    EngineLayer,
    compare_tables,
    data_type,
    intended_precisions,
    layer_table,
    parse_layers,
)

WIDE_INT8 = "Thirty-two wide channel vectorized row major Int8 format"


def tensor(version: int, name: str, layout: str, dtype: str) -> dict[str, Any]:
    """A tensor in the inspector's JSON: 10 writes layout and type as one text, 11 apart."""
    common = {"Name": name, "Location": "Device", "Dimensions": [1, 8, 8, 8]}
    if version == 10:
        return common | {"Format/Datatype": f"{layout} {dtype}"}
    return common | {"Format": layout, "DataType": dtype}


def information(version: int) -> str:
    linear = "Row major linear"
    layers = [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
            "LayerType": "Reformat",
            "Inputs": [tensor(version, "x", linear, "FP32")],
            "Outputs": [tensor(version, "x copy", "Channel major", "Int8")],
            "Metadata": "[ONNX Layer: conv1]",
            "TacticName": "",
        },
        {
            "Name": "conv1.weight + q1 + conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor(version, "x copy", "Thirty-two wide channel vectorized row major", "Int8")],
            "Outputs": [tensor(version, "r", "Thirty-two wide channel vectorized row major", "Int8")],
            "Metadata": "[ONNX Layer: q1]\x1e[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
            "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32",
        },
        {
            "Name": "conv2",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor(version, "r half", linear, "Half" if version == 10 else "FP16")],
            "Outputs": [tensor(version, "y", linear, "FP16")],
            "Metadata": "",
        },
    ]
    names = ["x", "y"]
    bindings: dict[str, Any] = {"Bindings": names}
    if version == 11:
        bindings = {"I/O Tensors": [{"Name": name, "IOMode": "Input", "DataType": "FP32"} for name in names]}
    return json.dumps({"Layers": layers, **bindings})


@pytest.mark.parametrize("version", [10, 11])
def test_reads_both_versions_alike(version: int) -> None:
    """Precision, nodes and reformats come out the same, whichever way they are written."""
    reformat, first, second = parse_layers(information(version), {"conv2": 0.25})

    assert [layer.precision for layer in (reformat, first, second)] == ["fp32", "int8", "fp16"]
    assert [layer.is_reformat for layer in (reformat, first, second)] == [True, False, False]
    assert first.nodes == ("q1", "conv1", "relu1")
    assert second.nodes == ("conv2",)  # no metadata: the name is taken
    assert "Int8" in first.inputs[0]
    assert "Thirty-two wide" in first.outputs[0]
    assert first.tactic.endswith("i8i32_f32")
    assert [layer.time_ms for layer in (first, second)] == [None, 0.25]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WIDE_INT8, "int8"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Row major linear BF16", "bf16"),
        ("kHALF", "fp16"),
        ("kINT8", "int8"),
        ("UInt8", "uint8"),
        ("Two wide channel vectorized row major FP8 format", "fp8"),
        ("N/A due to dynamic shapes", None),
        ("", None),
    ],
)
def test_finds_the_type_in_tensorrts_words(text: str, expected: str | None) -> None:
    """The wording differs by layout and release."""
    assert data_type(text) == expected


@pytest.mark.parametrize("text", ["", "null", "{}", "[1]", "Layers"])
def test_other_text_is_refused(text: str) -> None:
    """It is not taken for an engine without layers."""
    with pytest.raises(EngineError, match="inspector"):
        parse_layers(text)


def test_names_alone_are_refused() -> None:
    """An engine built without detailed verbosity says nothing about precision."""
    with pytest.raises(EngineError, match="only the names"):
        parse_layers(json.dumps({"Layers": ["conv1", "conv2"], "Bindings": ["x"]}))


def quantized_model() -> onnx.ModelProto:
    """conv1 with both inputs dequantized, relu1, conv2 with float weights."""
    weights = {name: numpy_helper.from_array(np.ones((8, 8, 1, 1), np.int8), name) for name in ("w1",)}
    constants = [
        *weights.values(),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "w2"),
    ]
    pair = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["xq"], "q1"),
        helper.make_node("DequantizeLinear", ["xq", *pair], ["xd"], "d1"),
        helper.make_node("DequantizeLinear", ["w1", *pair], ["wd"], "dw1"),
        helper.make_node("Conv", ["xd", "wd"], ["c1"], "conv1"),
        helper.make_node("Relu", ["c1"], ["r"], "relu1"),
        helper.make_node("Conv", ["r", "w2"], ["c2"], "conv2"),
        helper.make_node("Identity", ["c2"], ["y"], "last"),
    ]
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8, 8]) for name in ("x", "y")}
    graph = helper.make_graph(nodes, "quantized", [value["x"]], [value["y"]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_the_intended_precision_is_read_off_the_model() -> None:
    """INT8 where data and weights are dequantized; the type of the output elsewhere; Q/DQ nodes are no rows."""
    assert intended_precisions(quantized_model()) == {
        "conv1": ("Conv", "int8"),
        "relu1": ("Relu", "fp32"),
        "conv2": ("Conv", "fp32"),
        "last": ("Identity", "fp32"),
    }


@pytest.mark.parametrize("version", [10, 11])
def test_the_table_says_what_became_of_each_node(version: int) -> None:
    """A node is shown in the layer that computes it, not in the copy before; a removed one has no layer."""
    layers = parse_layers(information(version), {"conv1.weight + q1 + conv1 + relu1": 0.5})
    table = layer_table("m.engine", quantized_model(), layers)
    rows = {row.node: row for row in table.rows}

    assert (rows["conv1"].precision, rows["conv1"].layer_ms) == ("int8", 0.5)
    assert rows["conv1"].as_intended
    assert rows["relu1"].layer == rows["conv1"].layer
    assert not rows["conv2"].as_intended  # fp32 was intended, the kernel takes fp16
    assert rows["last"].layer is None
    assert [layer.kind for layer in table.reformats] == ["Reformat"]
    assert table.summary == "1 of 1 intended layers run INT8; 1 reformat layer"
    assert table.to_json()["layers"][0]["reformat"] is True


def test_two_engines_are_compared_by_node() -> None:
    """The node with the largest change in time comes first; one that only one model has is kept."""

    def table(times: dict[str, float]) -> Any:
        layers = [EngineLayer(name, "", "int8", (name,), (), (), "", time) for name, time in times.items()]
        return layer_table("e", quantized_model(), layers)

    differences = compare_tables(table({"conv1": 1.0, "conv2": 1.0}), table({"conv1": 0.75, "conv2": 3.0}))

    assert [(item.node, item.difference_ms) for item in differences[:2]] == [("conv2", 2.0), ("conv1", -0.25)]
    assert all(item.difference_ms is None for item in differences[2:])
