"""engines.trt_layers: the inspector's JSON as TensorRT 8 to 11 write it, drawn after published samples of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.errors import EngineError
from engines.trt_layers import data_type, kernel_precision, nodes_in_name, parse_layers

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


def test_control_characters_may_stand_as_they_are() -> None:
    """Some releases do not escape what stands between the nodes of a layer, which JSON asks for."""
    layer = {"Name": "conv", "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: q]|[ONNX Layer: conv]"}

    (found,) = parse_layers(json.dumps({"Layers": [layer]}).replace("|", "\x1e"))

    assert found.nodes == ("q", "conv")


def test_names_alone_are_refused() -> None:
    """An engine built without detailed verbosity says nothing about precision."""
    with pytest.raises(EngineError, match="only the names"):
        parse_layers(json.dumps({"Layers": ["conv1", "conv2"], "Bindings": ["x"]}))


def test_an_engine_of_which_nothing_is_told_is_refused() -> None:
    """An engine has layers: an empty list is the inspector's silence."""
    with pytest.raises(EngineError, match="nothing about this engine's layers"):
        parse_layers(json.dumps({"Layers": []}))


def one(**layer: Any) -> Any:
    """Read a single layer."""
    return parse_layers(json.dumps({"Layers": [{"Name": "k", "LayerType": "kernel", **layer}]}))[0]


def test_before_shapes_are_set_the_kernel_and_the_weights_tell() -> None:
    """A dynamic engine without shapes, as TensorRT 8.6 shows it: no formats, but a tactic and the weights' type."""
    unknown = [{"Name": "x", "Dimensions": [-1, 128, 14, 14], "Format/Datatype": "N/A due to dynamic shapes"}]
    weights = {"Type": "Int8", "Count": 13824}
    tactic = "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw"

    assert one(Inputs=unknown, Outputs=unknown, TacticName=tactic).precision == "int8"
    assert one(Inputs=unknown, Outputs=unknown, Weights=weights).precision == "int8"
    assert one(Inputs=unknown, Outputs=unknown).precision is None


@pytest.mark.parametrize(
    ("tactic", "expected"),
    [
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs", "int8"),
        ("sm80_xmma_gemm_i8f32_i8i32_f32_by_fusion_tactic", "int8"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "fp16"),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc", "fp32"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn", "bf16"),
        ("sm89_xmma_gemm_e4m3f32_e4m3f32_f32_tn", "fp8"),
        ("__myl_MulAdd_i8_i8", None),
        ("", None),
    ],
)
def test_kernels_say_what_they_multiply(tactic: str, expected: str | None) -> None:
    """Their names hold the types of data and result, then those of the products and sums: the products' counts."""
    assert kernel_precision(tactic) == expected


def test_the_kernel_outranks_its_first_input() -> None:
    """A fused product may read a residual or a mask first; masks and indices are no precision at all."""
    half, mask = {"Format/Datatype": "Half"}, {"Format/Datatype": "Bool"}

    assert one(Inputs=[half], TacticName="sm80_xmma_gemm_i8i8_i8i32_f32_tn").precision == "int8"
    assert one(Inputs=[mask, half]).precision == "fp16"
    assert one(Inputs=[mask]).precision == "bool"


def test_type_and_layout_apart_do_not_contradict() -> None:
    """TensorRT 11: the data type counts, whatever the words for the layout; both are shown."""
    tensor = {"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Int8"}

    found = one(Inputs=[tensor], Outputs=[])

    assert found.precision == "int8"
    assert found.inputs == ("Row major linear FP32 format (kLINEAR) Int8",)


@pytest.mark.parametrize("between", ["\x1e", "\x1f", ", ", " ", ""])
def test_metadata_of_several_nodes(between: str) -> None:
    """Whatever separates them, and though names hold brackets and commas; what is no ONNX node is passed over."""
    metadata = between.join(f"[ONNX Layer: {name}]" for name in ("/a/Conv", "(Unnamed Layer* 3) [Shuffle]", "b, c"))

    assert one(Metadata=metadata).nodes == ("/a/Conv", "(Unnamed Layer* 3) [Shuffle]", "b, c")
    assert one(Metadata=f"made by a plugin{between or ' '}[ONNX Layer: a]").nodes == ("a",)


@pytest.mark.parametrize("metadata", ["", None, "nothing of ONNX"])
def test_without_metadata_the_name_tells(metadata: str | None) -> None:
    """Layers that TensorRT inserted or that older releases built have none."""
    assert one(Name="/conv1/Conv + /Relu", Metadata=metadata).nodes == ("/conv1/Conv", "/Relu")


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("/conv1/Conv + /Relu", ("/conv1/Conv", "/Relu")),
        ("/head/a/Conv || /head/b/Conv", ("/head/a/Conv", "/head/b/Conv")),
        ("PWN(PWN(/act/Sigmoid), PWN(/act/Mul))", ("/act/Sigmoid", "/act/Mul")),
        ("PWN(PWN(sigmoid), mul)", ("sigmoid", "mul")),
        ("PWN(/act/Relu) + /pool", ("/act/Relu", "/pool")),
        ("Reformatting CopyNode for Input Tensor 1 to /proj/Conv + /Add", ("/proj/Conv", "/Add")),
        ("(Unnamed Layer* 1) [Convolution]", ("(Unnamed Layer* 1) [Convolution]",)),
        ("/model_10/m/attn/MatMul_myl109_2", ("/model_10/m/attn/MatMul",)),
        ("{ForeignNode[/a/Split_16.../a/Add]}", ("/a/Split_16", "/a/Add")),
        ("{ForeignNode[(Unnamed Layer* 0) [ElementWise]]}", ("(Unnamed Layer* 0) [ElementWise]",)),
    ],
)
def test_nodes_in_names(name: str, nodes: tuple[str, ...]) -> None:
    """Names as TensorRT joins and wraps them."""
    assert nodes_in_name(name) == nodes


def test_a_region_claims_no_precision() -> None:
    """What flows into and out of it says nothing about the kernels inside; a copy beside it is no region."""
    half = [{"Format/Datatype": "Row major linear FP16 format"}]
    region = one(Name="{ForeignNode[/a/Split_16.../a/Add]}", LayerType="Myelin", Inputs=half, Outputs=half)
    copy = one(
        Name="Reformatting CopyNode for Output Tensor 0 to {ForeignNode[/a/Split_16.../a/Add]}",
        LayerType="Reformat",
        Inputs=half,
        Outputs=half,
    )

    assert (region.region, region.precision) == (("/a/Split_16", "/a/Add"), None)
    assert (copy.region, copy.precision, copy.is_reformat) == (None, "fp16", True)


def test_what_tensorrt_skips_is_no_copy() -> None:
    """A reformat that fell away is listed as NoOp; a concatenation's copy is a reformat by its kind."""
    assert not one(Name="Reformatting CopyNode for Input Tensor 0 to /Conv", LayerType="NoOp").is_reformat
    assert one(Name="/Split_output_0 copy", LayerType="Reformat", Metadata="[ONNX Layer: /Concat]").is_reformat


def test_layers_that_share_a_name_share_its_time() -> None:
    """The profiler adds them up; each gets its part, so that sums stay what they were. Unknown names are left out."""
    text = json.dumps({"Layers": [{"Name": "copy"}, {"Name": "copy"}, {"Name": "conv"}]})

    layers = parse_layers(text, {"copy": 1.0, "conv": 3.0, "gone": 9.0})

    assert [layer.time_ms for layer in layers] == [0.5, 0.5, 3.0]


def test_constants_and_layers_without_tensors_are_read() -> None:
    """A constant has no inputs; null stands for nothing in some releases."""
    found = one(Name="weights", LayerType="Constant", Inputs=None, Outputs=[{"Format/Datatype": "FP32"}], Metadata=None)

    assert (found.precision, found.inputs, found.tactic) == ("fp32", (), "")
