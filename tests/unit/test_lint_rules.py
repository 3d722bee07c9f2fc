"""Every lint rule finds its fault in a hand-drawn graph, by the node's name, and nothing in the sound twin of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.lint import RULES, Finding, lint

HALF = TensorProto.FLOAT16

SCALE, ZERO = np.float32(0.05), np.int8(0)

both = pytest.mark.parametrize("faulty", [True, False])


def pair(graph: Any, x: str, name: str, scale: Any = SCALE, zero: Any = ZERO, dq_scale: Any = None) -> str:
    """Q and DQ named n_NAME_q and n_NAME; `zero` None leaves the zero point out."""
    zeros = [] if zero is None else [graph.constant(zero)]
    read = graph.constant(scale)
    code = graph.node("QuantizeLinear", [x, read, *zeros], f"{name}_q")
    given = read if dq_scale is None else graph.constant(dq_scale)
    return str(graph.node("DequantizeLinear", [code, given, *zeros], name))


def weight(graph: Any, shape: tuple[int, ...], name: str, axis: int | None = 0, scale: Any = None) -> str:
    """INT8 initializer and DQ, per channel along `axis`."""
    codes = graph.constant(graph.rng.integers(-127, 128, shape, np.int8))
    values = np.full(shape[axis] if axis is not None else (), 0.01, np.float32) if scale is None else scale
    attributes = {} if axis is None else {"axis": axis}
    zero = graph.constant(np.zeros(np.shape(values), np.int8))
    return str(graph.node("DequantizeLinear", [codes, graph.constant(values), zero], name, **attributes))


def conv(graph: Any, x: str, name: str, channels: tuple[int, int] = (4, 4), **attributes: Any) -> str:
    """A 1x1 convolution with an INT8 weight."""
    return str(graph.node("Conv", [x, weight(graph, (*channels[::-1], 1, 1), f"{name}_w")], name, **attributes))


def image(graph: Any, name: str = "x", dtype: int = TensorProto.FLOAT) -> str:
    return str(graph.input(name, (1, 4, 8, 8), dtype))


def of(model: onnx.ModelProto, rule: str, **options: Any) -> list[Finding]:
    return [finding for finding in lint(model, **options).findings if finding.rule == rule]


def nodes(
    graph: Any, rule: str, outputs: list[str] | None = None, *, opset: int = 20, **options: Any
) -> list[str | None]:
    """The nodes that a rule names, in the graph drawn so far."""
    last = graph.nodes[-1].output[0]
    return [finding.node for finding in of(graph.model(outputs or [last], opset=opset), rule, **options)]


@both
@pytest.mark.parametrize("zero", [0, 128, 7])
def test_uint8_codes(faulty: bool, zero: int, graph_builder: Any) -> None:
    """Unsigned codes are an error whatever their zero point; a UINT8 image that is cast is none."""
    graph = graph_builder()
    x = image(graph) if faulty else graph.node("Cast", [image(graph, dtype=TensorProto.UINT8)], to=TensorProto.FLOAT)
    conv(graph, pair(graph, x, "a", zero=np.uint8(zero) if faulty else np.int8(0)), "y")

    assert nodes(graph, "uint8-codes") == (["n_a_q"] if faulty else [])


@both
def test_zero_point(faulty: bool, graph_builder: Any) -> None:
    """Signed codes with a zero point other than 0, on an activation and on a weight."""
    graph = graph_builder()
    zero = np.int8(3 if faulty else 0)
    codes = graph.constant(np.ones((4, 4, 1, 1), np.int8))
    w = graph.node("DequantizeLinear", [codes, graph.constant(np.float32(0.1)), graph.constant(zero)], "w")
    graph.node("Conv", [pair(graph, image(graph), "a", zero=zero), w], "y")

    assert nodes(graph, "zero-point") == (["n_w", "n_a_q"] if faulty else [])


def test_missing_zero_point(graph_builder: Any) -> None:
    """A Q without zero point is an error, a DQ of INT8 without one a note, and explicit ones are neither."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a", zero=None), "b")
    codes = graph.constant(np.ones((4, 4, 1, 1), np.int8))
    w = graph.node("DequantizeLinear", [codes, graph.constant(np.float32(0.1))], "w")
    graph.node("Conv", [pair(graph, "b", "c"), w], "y")
    found = of(graph.model(["y"]), "missing-zero-point")

    assert [(finding.node, finding.severity) for finding in found] == [("n_a_q", "error"), ("n_w", "note")]


@both
def test_missing_axis(faulty: bool, graph_builder: Any) -> None:
    """Scales per channel without an axis; one scale needs none."""
    graph = graph_builder()
    w = weight(graph, (4, 4, 1, 1), "w", axis=None, scale=np.full(4 if faulty else 1, 0.1, np.float32))
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")

    assert nodes(graph, "missing-axis") == (["n_w"] if faulty else [])


@both
def test_per_channel_before_opset_13(faulty: bool, graph_builder: Any) -> None:
    """Opset 12 knows one scale per tensor."""
    graph = graph_builder()
    w = weight(graph, (4, 4, 1, 1), "w", axis=None, scale=np.full(4 if faulty else 1, 0.1, np.float32))
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")

    assert nodes(graph, "per-channel-opset", opset=12) == (["n_w"] if faulty else [])
    assert nodes(graph, "per-channel-opset") == []


@both
def test_per_channel_activation(faulty: bool, graph_builder: Any) -> None:
    """Weights may have several scales, activations one."""
    graph = graph_builder()
    x = image(graph) if faulty else graph.normal((4, 4, 1, 1))
    inputs = [x, graph.constant(np.full(4, 0.1, np.float32)), graph.constant(np.zeros(4, np.int8))]
    code = graph.node("QuantizeLinear", inputs, "a_q", axis=1)
    real = graph.node("DequantizeLinear", [code, *inputs[1:]], "a", axis=1)
    graph.node("Conv", [real, weight(graph, (4, 4, 1, 1), "w")] if faulty else [image(graph), real], "y")

    assert nodes(graph, "per-channel-activation") == (["n_a_q"] if faulty else [])


@pytest.mark.parametrize(
    ("scale", "what"),
    [(0.0, "the scale is 0"), (-1.0, "the scale is -1"), (np.nan, "the scale is nan"), (np.inf, "the scale is inf"),
     (1e-3, None)],
)  # fmt: skip
def test_scale_not_positive(scale: float, what: str | None, graph_builder: Any) -> None:
    """Zero, negative, NaN and infinite scales; said once for a pair that shares the constant."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a", np.float32(scale)), "y")
    found = [(finding.node, finding.what) for finding in of(graph.model(["y"]), "scale-not-positive")]

    assert found == ([] if what is None else [("n_a_q", what)])


def test_scale_not_positive_in_some_channels(graph_builder: Any) -> None:
    """Of per-channel scales the bad ones are counted."""
    graph = graph_builder()
    w = weight(graph, (4, 4, 1, 1), "w", scale=np.float32([0.1, 0, 0.1, -2]))
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")
    (found,) = of(graph.model(["y"]), "scale-not-positive")

    assert found.what == "2 of 4 scales are not usable: 0"


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (np.float32(1e-39), ("warning", "the scale is subnormal in FP32")),
        (np.float32(1e-9), ("note", "the scale is 0 in FP16, if the model is converted to it")),
        (np.float16(3e-5), ("note", "the scale is subnormal in FP16")),
        (np.float32(1e-4), None),
        (np.float16(1e-4), None),
    ],
)
def test_scale_subnormal(scale: Any, expected: tuple[str, str] | None, graph_builder: Any) -> None:
    """FP16 is normal from 6.1e-5 on and has nothing between 0 and 6e-8."""
    graph = graph_builder()
    half = scale.dtype == np.float16
    x = pair(graph, image(graph, dtype=HALF if half else TensorProto.FLOAT), "a", scale)
    w = graph.normal((4, 4, 1, 1))
    if half:
        w = graph.node("Cast", [w], to=HALF)
    graph.node("Conv", [x, w], "y")
    found = of(graph.model([helper.make_tensor_value_info("y", HALF if half else 1, None)]), "scale-subnormal")

    assert [(finding.severity, finding.what) for finding in found] == ([expected] if expected else [])


@both
def test_scale_at_run_time(faulty: bool, graph_builder: Any) -> None:
    """A scale that is computed from the data is dynamic quantization; a Constant node or a cast constant is none."""
    graph = graph_builder()
    x = image(graph)
    if faulty:
        scale = graph.node("ReduceMax", [x], "peak", keepdims=0)
    else:
        value = onnx.numpy_helper.from_array(np.float64(0.1))
        scale = graph.node("Cast", [graph.node("Constant", [], "constant", value=value)], to=TensorProto.FLOAT)
    zero = graph.constant(np.int8(0))
    code = graph.node("QuantizeLinear", [x, scale, zero], "a_q")
    conv(graph, graph.node("DequantizeLinear", [code, scale, zero], "a"), "y")

    assert nodes(graph, "scale-at-run-time") == (["n_a_q", "n_a"] if faulty else [])
    assert nodes(graph, "scale-behind-nodes") == []


@both
def test_scale_behind_nodes(faulty: bool, graph_builder: Any) -> None:
    """A constant, or one behind a Cast, is a scale that every reader of the file sees; behind a Reshape it is none."""
    graph = graph_builder()
    scale = graph.constant(np.float32([0.1]))
    if faulty:
        scale = graph.node("Reshape", [scale, graph.constant(np.int64([]))], "flat")
    code = graph.node("QuantizeLinear", [image(graph), scale, graph.constant(np.int8(0))], "a_q")
    conv(
        graph, graph.node("DequantizeLinear", [code, graph.constant(np.float32(0.1)), graph.constant(np.int8(0))]), "y"
    )

    assert nodes(graph, "scale-behind-nodes") == (["n_a_q"] if faulty else [])


@both
def test_zero_point_size(faulty: bool, graph_builder: Any) -> None:
    """One zero point for four scales."""
    graph = graph_builder()
    scale, zero = np.full(4, 0.1, np.float32), np.zeros(1 if faulty else 4, np.int8)
    codes = graph.constant(np.ones((4, 4, 1, 1), np.int8))
    w = graph.node("DequantizeLinear", [codes, graph.constant(scale), graph.constant(zero)], "w", axis=0)
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")

    assert nodes(graph, "zero-point-size") == (["n_w"] if faulty else [])


@both
def test_scalar_data(faulty: bool, graph_builder: Any) -> None:
    """A single number without axes behind Q and DQ; a vector of one element is none."""
    graph = graph_builder()
    s = pair(graph, graph.input("s", () if faulty else (1,)), "s_real")
    graph.node("Mul", [image(graph), s], "y")

    assert nodes(graph, "scalar-data") == (["n_s_real_q"] if faulty else [])


@both
def test_unequal_pair(faulty: bool, graph_builder: Any) -> None:
    """A DQ with another scale than its Q multiplies the values."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a", np.float32(0.1), dq_scale=np.float32(0.2 if faulty else 0.1)), "y")

    assert nodes(graph, "unequal-pair") == (["n_a"] if faulty else [])


@pytest.mark.parametrize(
    ("dtype", "severity"),
    [(TensorProto.INT16, "error"), (TensorProto.UINT4, "error"), (TensorProto.INT4, "error"),
     (TensorProto.FLOAT8E4M3FN, "note"), (TensorProto.INT8, None)],
)  # fmt: skip
def test_code_type(dtype: int, severity: str | None, graph_builder: Any) -> None:
    """16-bit and 4-bit activations are errors, FP8 is noted, INT8 is what is wanted."""
    graph = graph_builder()
    graph.initializers.append(helper.make_tensor("zero", dtype, [], [0]))
    scale = graph.constant(np.float32(0.1))
    code = graph.node("QuantizeLinear", [image(graph), scale, "zero"], "a_q")
    conv(graph, graph.node("DequantizeLinear", [code, scale, "zero"], "a"), "y")
    found = of(graph.model(["y"], opset=21), "code-type")

    assert [(finding.node, finding.severity) for finding in found] == ([("n_a_q", severity)] if severity else [])


@pytest.mark.parametrize(("opset", "expected"), [(18, ["n_a_q", "n_a"]), (19, [])])
def test_half_scale_opset(opset: int, expected: list[str], graph_builder: Any) -> None:
    """FP16 scales come with opset 19."""
    graph = graph_builder()
    pair(graph, image(graph, dtype=HALF), "a", np.float16(0.1))

    assert nodes(graph, "fp16-scale-opset", opset=opset) == expected


@both
def test_scale_type(faulty: bool, graph_builder: Any) -> None:
    """A Q reads FP16 with an FP32 scale."""
    graph = graph_builder()
    pair(graph, image(graph, dtype=HALF), "a", np.float32(0.1) if faulty else np.float16(0.1))

    assert nodes(graph, "scale-type", opset=23) == (["n_a_q"] if faulty else [])


@both
def test_wide_scales_between_casts(faulty: bool, graph_builder: Any) -> None:
    """FP16 -> FP32 -> Q -> DQ -> FP16 in an FP16 graph; with FP16 scales there is nothing to find."""
    graph = graph_builder()
    x = graph.node("Relu", [image(graph, dtype=HALF)], "r")
    if faulty:
        x = graph.node("Cast", [x], to=TensorProto.FLOAT)
    x = pair(graph, x, "a", np.float32(0.1) if faulty else np.float16(0.1))
    if faulty:
        x = graph.node("Cast", [x], to=HALF)
    graph.node("Conv", [x, graph.constant(np.ones((4, 4, 1, 1), np.float16))], "y")

    assert nodes(graph, "fp32-scales") == (["n_a_q", "n_a"] if faulty else [])


@pytest.mark.parametrize(("ours", "severity"), [(False, "warning"), (True, "note")])
def test_wide_scales_hold_a_layer_in_fp32(ours: bool, severity: str, graph_builder: Any) -> None:
    """A quantized layer in FP32 in a graph of FP16; in our own models the range guard meant it."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a"), "c")
    graph.node("Relu", [graph.node("Cast", ["c"], to=HALF)], "y")
    model = graph.model([helper.make_tensor_value_info("y", HALF, None)])
    if ours:
        helper.set_model_props(model, {"trt_int8.precision": "int8+fp16"})
    (found,) = of(model, "fp32-scales")

    assert (found.node, found.severity) == ("n_c", severity)


@both
def test_int8_beside_fp32(faulty: bool, graph_builder: Any) -> None:
    """A quantized model of FP32 is told about INT8 + FP16; a float one is not."""
    graph = graph_builder()
    x = image(graph)
    conv(graph, pair(graph, x, "a") if faulty else x, "y")

    assert nodes(graph, "int8-beside-fp32") == ([None] if faulty else [])


@pytest.mark.parametrize(
    ("op_type", "shape", "attributes", "right"),
    [
        ("Conv", (4, 4, 1, 1), {}, 0),
        ("ConvTranspose", (4, 4, 1, 1), {}, 1),
        ("Gemm", (4, 4), {"transB": 1}, 0),
        ("Gemm", (4, 4), {}, 1),
        ("MatMul", (4, 4), {}, 1),
        ("MatMul", (2, 4, 4), {}, 2),
    ],
)
def test_weight_axis(op_type: str, shape: tuple[int, ...], attributes: Any, right: int, graph_builder: Any) -> None:
    """Scales lie along the output channels: any other axis is named."""
    for axis in range(len(shape) if len(shape) < 4 else 2):
        graph = graph_builder()
        x = pair(graph, graph.input("x", (1, 4, 8, 8) if len(shape) == 4 else (2, 4)), "a")
        graph.node(op_type, [x, weight(graph, shape, "w", axis)], "y", **attributes)

        assert nodes(graph, "weight-axis") == ([] if axis == right else ["n_y"])


@both
def test_weight_axis_behind_a_transpose(faulty: bool, graph_builder: Any) -> None:
    """[out, in] quantized along 0 and transposed for a MatMul is right; along 1 it is not."""
    graph = graph_builder()
    w = weight(graph, (5, 4), "w", axis=1 if faulty else 0)
    w = graph.node("Transpose", [w], perm=[1, 0])
    graph.node("MatMul", [pair(graph, graph.input("x", (2, 4)), "a"), w], "y")

    assert nodes(graph, "weight-axis") == (["n_y"] if faulty else [])


@both
def test_grouped_transpose(faulty: bool, graph_builder: Any) -> None:
    """Axis 1 of a grouped ConvTranspose is shared by its groups; what is only inferred is a note that says so."""
    graph = graph_builder()
    w = weight(graph, (4, 2, 1, 1), "w", axis=1 if faulty else None)
    graph.node("ConvTranspose", [pair(graph, image(graph), "a"), w], "y", group=2)
    found = of(graph.model(["y"]), "grouped-transpose-weight")

    assert [(f.node, f.severity, f.verified) for f in found] == ([("n_y", "note", False)] if faulty else [])


@both
def test_foldable_weight(faulty: bool, graph_builder: Any) -> None:
    """A float weight behind Q and DQ can be folded back; an INT8 initializer stays."""
    graph = graph_builder()
    w = pair(graph, graph.normal((4, 4, 1, 1)), "w") if faulty else weight(graph, (4, 4, 1, 1), "w")
    graph.node("Conv", [pair(graph, image(graph), "a"), w], "y")

    assert nodes(graph, "foldable-weight") == (["n_w_q"] if faulty else [])


@both
@pytest.mark.parametrize("between", [None, "Flatten", "Relu"])
def test_float_weight(faulty: bool, between: str | None, graph_builder: Any) -> None:
    """A float weight under a quantized activation, also across what moves values; a Relu between computes."""
    graph = graph_builder()
    x = pair(graph, graph.input("x", (2, 4)), "a")
    x = graph.node(between, [x]) if between else x
    graph.node("MatMul", [x, graph.normal((4, 4)) if faulty else weight(graph, (4, 4), "w", 1)], "y")

    assert nodes(graph, "float-weight") == (["n_y"] if faulty and between != "Relu" else [])


def test_float_weight_of_a_product_of_activations(graph_builder: Any) -> None:
    """Of two activations one is quantized."""
    graph = graph_builder()
    graph.node("MatMul", [pair(graph, graph.input("x", (2, 4)), "a"), graph.input("z", (4, 4))], "y")
    (found,) = of(graph.model(["y"]), "float-weight")

    assert found.what == "its other operand, computed at run time, is float, its activation is quantized"


def test_float_activation(graph_builder: Any) -> None:
    """An INT8 weight under a float activation; where no activation has a pair it is weight-only, and a note."""
    graph = graph_builder()
    conv(graph, image(graph), "a")
    (weight_only,) = of(graph.model(["a"]), "float-activation")
    conv(graph, pair(graph, "a", "b"), "y")
    (found,) = of(graph.model(["y"]), "float-activation")

    assert (weight_only.node, weight_only.severity) == ("n_a", "note")
    assert (found.node, found.severity) == ("n_a", "warning")


@both
def test_int32_dq(faulty: bool, graph_builder: Any) -> None:
    """An INT32 bias behind a DQ; a float bias is as it should be."""
    graph = graph_builder()
    bias = graph.normal((4,))
    if faulty:
        codes, scale = graph.constant(np.int32([1, 2, 3, 4])), graph.constant(np.full(4, 1e-3, np.float32))
        bias = graph.node("DequantizeLinear", [codes, scale, graph.constant(np.zeros(4, np.int32))], "bias", axis=0)
    graph.node("Conv", [pair(graph, image(graph), "a"), weight(graph, (4, 4, 1, 1), "w"), bias], "y")

    assert nodes(graph, "int32-dq") == (["n_bias"] if faulty else [])
    assert nodes(graph, "quantized-bias") == []


@both
def test_quantized_bias(faulty: bool, graph_builder: Any) -> None:
    """A bias in 8 bits."""
    graph = graph_builder()
    bias = weight(graph, (4,), "bias", axis=None) if faulty else graph.normal((4,))
    graph.node("Conv", [pair(graph, image(graph), "a"), weight(graph, (4, 4, 1, 1), "w"), bias], "y")

    assert nodes(graph, "quantized-bias") == (["n_y"] if faulty else [])


@pytest.mark.parametrize(
    ("reader", "lonely"), [("Softmax", True), ("Flatten", True), ("Conv", False), ("AveragePool", True), (None, True)]
)
def test_lonely_pair(reader: str | None, lonely: bool, graph_builder: Any) -> None:
    """A pair that a float operator, the model's output, or a pool without a Q behind it reads."""
    graph = graph_builder()
    x = pair(graph, image(graph), "a")
    if reader == "Conv":
        conv(graph, x, "y")
    elif reader is not None:
        graph.node(reader, [x], "y", **({"kernel_shape": [2, 2]} if reader == "AveragePool" else {}))

    assert nodes(graph, "lonely-pair") == (["n_a_q"] if lonely else [])


@both
def test_a_normalization_of_what_a_convolution_gives(faulty: bool, graph_builder: Any) -> None:
    """Conv, Relu, Transpose, pair, LayerNormalization: the convolution writes INT8. Behind a lone Tanh none does."""
    graph = graph_builder()
    x = graph.input("x", (1, 4, 8, 8))
    made = graph.node("Tanh", [x]) if faulty else graph.node("Relu", [graph.conv(x, (4, 4), "c")])
    turned = graph.node("Transpose", [made], perm=[0, 2, 3, 1])
    graph.node("LayerNormalization", [pair(graph, turned, "a"), graph.normal((4,))], "y", axis=-1)

    assert nodes(graph, "lonely-pair", ["y"]) == (["n_a_q"] if faulty else [])


def test_a_pool_between_two_pairs_is_no_island(graph_builder: Any) -> None:
    """An average pool computes on INT8 where its output is quantized too."""
    graph = graph_builder()
    x = graph.node("AveragePool", [pair(graph, image(graph), "a")], kernel_shape=[2, 2])
    conv(graph, pair(graph, graph.node("Relu", [x]), "b"), "y")

    assert nodes(graph, "lonely-pair") == []


@both
def test_split_activation(faulty: bool, graph_builder: Any) -> None:
    """A pair between Conv and Relu splits them; signed codes behind the Relu are fine for TensorRT."""
    graph = graph_builder()
    x = conv(graph, pair(graph, image(graph), "a"), "c")
    x = graph.node("Relu", [pair(graph, x, "b") if faulty else x], "r")
    conv(graph, pair(graph, x, "d"), "y")

    assert nodes(graph, "split-activation") == (["n_b_q"] if faulty else [])
    assert all(finding.severity == "note" for finding in lint(graph.model(["y"])).findings) != faulty


def test_requantized(graph_builder: Any) -> None:
    """Q -> DQ -> Q: a warning for two scales, also across a MaxPool; a note for one scale twice."""
    for second, severity in ((0.05, "note"), (0.1, "warning")):
        graph = graph_builder()
        conv(graph, pair(graph, pair(graph, image(graph), "a"), "b", np.float32(second)), "y")
        (found,) = of(graph.model(["y"]), "requantized")
        assert (found.node, found.severity) == ("n_a_q" if severity == "note" else "n_b_q", severity)
    for second, expected in ((0.05, []), (0.1, ["n_b_q"])):
        graph = graph_builder()
        x = graph.node("MaxPool", [pair(graph, image(graph), "a")], kernel_shape=[2, 2])
        conv(graph, pair(graph, x, "b", np.float32(second)), "y")
        assert nodes(graph, "requantized") == expected


@pytest.mark.parametrize(
    ("scales", "what"),
    [
        ((0.1, 0.1, 0.1), None),
        ((0.1, 0.2, 0.2), "its inputs have different scales"),
        ((0.1, 0.1, 0.3), "its output has another scale than its inputs"),
        ((0.1, None, 0.1), "1 of its 2 inputs are quantized"),
        ((None, None, 0.1), None),
    ],
)
def test_concat_scales(scales: tuple[float | None, ...], what: str | None, graph_builder: Any) -> None:
    """A Concat in INT8 has one scale on all sides; a float Concat with a Q behind it is left alone."""
    graph = graph_builder()
    x, z = (
        name if scale is None else pair(graph, name, f"{name}_real", np.float32(scale))
        for name, scale in zip((image(graph), image(graph, "z")), scales[:2], strict=True)
    )
    x = graph.node("Concat", [x, graph.node("MaxPool", [z], kernel_shape=[1, 1])], "cat", axis=1)
    conv(graph, pair(graph, x, "b", np.float32(scales[2])), "y", (8, 4))
    found = [(f.node, f.what, f.severity) for f in of(graph.model(["y"]), "concat-scales")]
    severity = "note" if None in scales else "warning"  # a Concat in float is slower, but no kernel quantizes again

    assert found == ([] if what is None else [("n_cat", what, severity)])


@pytest.mark.parametrize(("fill", "expected"), [(0, ["n_a_q"]), (7, [])])
def test_split_pad(fill: float, expected: list[str], graph_builder: Any) -> None:
    """A pair between a Pad of zeros and its Conv; a Pad of sevens does not commute, and must stay in front."""
    graph = graph_builder()
    pads = graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    x = graph.node("Pad", [image(graph), pads, graph.constant(np.float32(fill))], "padded")
    conv(graph, pair(graph, x, "a"), "y")

    assert nodes(graph, "split-pad") == expected


def test_a_pair_before_the_pad_or_beside_another_reader(graph_builder: Any) -> None:
    """Before the Pad is right; where the Add of a skip reads the padded value too, the pair cannot move."""
    graph = graph_builder()
    pads = graph.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))
    conv(graph, graph.node("Pad", [pair(graph, image(graph), "a"), pads], "right"), "b")
    shared = pair(graph, graph.node("Pad", ["b", pads], "padded"), "c")
    graph.node("Add", [conv(graph, shared, "d"), shared], "y")

    assert nodes(graph, "split-pad") == []


@pytest.mark.parametrize(
    ("branch", "skip", "expected"),
    [
        (True, True, {"residual-branch": "both of its inputs are quantized"}),
        (False, True, {}),
        (False, False, {"residual-skip": "its skip input is float"}),
        (True, False, {"residual-branch": "its convolution's input is quantized",
                       "residual-skip": "its skip input is float"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("branch_first", [True, False])
def test_residual_add(
    branch: bool, skip: bool, expected: dict[str, str], branch_first: bool, graph_builder: Any
) -> None:
    """The skip is quantized, the convolution's side is not, whichever comes first."""
    graph = graph_builder()
    x = graph.node("Relu", [image(graph)], "trunk")
    real = pair(graph, x, "a")
    y = conv(graph, real, "c")
    operands = [pair(graph, y, "b") if branch else y, real if skip else x]
    graph.node("Relu", [graph.node("Add", operands if branch_first else operands[::-1], "sum")], "y")
    conv(graph, pair(graph, "y", "d"), "z")
    found = {f.rule: f.what for f in lint(graph.model(["z"])).findings if f.rule.startswith("residual")}

    assert found == expected


def test_a_float_skip_of_our_own_model_was_asked_for(graph_builder: Any) -> None:
    """--residual float leaves skips alone on purpose: a note."""
    graph = graph_builder()
    x = image(graph)
    graph.node("Add", [conv(graph, pair(graph, x, "a"), "c"), x], "y")
    model = graph.model(["y"])
    helper.set_model_props(model, {"trt_int8.target": "tensorrt"})

    assert [finding.severity for finding in of(model, "residual-skip")] == ["note"]


@both
@pytest.mark.parametrize(
    ("op_type", "domain"),
    [("MatMulInteger", ""), ("QLinearConv", ""), ("DynamicQuantizeLinear", ""), ("QGemm", "com.microsoft"),
     ("QLinearAdd", "com.microsoft"), ("DynamicQuantizeMatMul", "com.microsoft"), ("MatMulNBits", "com.microsoft"),
     ("QuantizeLinear", "com.microsoft")],
)  # fmt: skip
def test_integer_operator(faulty: bool, op_type: str, domain: str, graph_builder: Any) -> None:
    """Operators on integers are refused; Q/DQ around float ones are the way."""
    graph = graph_builder()
    if faulty:
        graph.node(op_type, [image(graph)], "y", domain=domain)
    else:
        conv(graph, pair(graph, image(graph), "a"), "y")

    assert nodes(graph, "integer-operator") == (["n_y"] if faulty else [])
    assert nodes(graph, "foreign-operator") == []


@pytest.mark.parametrize(
    ("op_type", "domain", "found"),
    [
        ("FakeQuantize", "", True),
        ("FakeQuantWithMinMaxVars", "tf", True),
        ("Quant", "qonnx.custom_op.general", True),
        ("FixedPerTensorAffine", "", True),
        ("fake_quantize_per_tensor_affine", "org.pytorch.aten", True),
        ("QuickGelu", "com.microsoft", False),
    ],
)
def test_fake_quant_operator(op_type: str, domain: str, found: bool, graph_builder: Any) -> None:
    """Other frameworks' fake quantization is named as such; any other foreign operator needs a plugin."""
    graph = graph_builder()
    graph.node(op_type, [image(graph)], "y", domain=domain)

    assert nodes(graph, "fake-quant-operator") == (["n_y"] if found else [])
    assert nodes(graph, "foreign-operator") == ([] if found else ["n_y"])


@both
def test_fake_quantization_taken_apart(faulty: bool, graph_builder: Any) -> None:
    """Div -> Round -> Clip -> Mul is a warning; rounding and clipping pixels for an image is none."""
    graph = graph_builder()
    x = graph.node("Div", [image(graph), graph.constant(np.float32(0.1))])
    x = graph.clip(graph.node("Round", [x], "round"), -128 if faulty else 0, 127 if faulty else 255)
    graph.node(*(("Mul", [x, graph.constant(np.float32(0.1))]) if faulty else ("Relu", [x])), "y")
    found = of(graph.model(["y"]), "fake-quant-operator")

    assert [(f.node, f.severity) for f in found] == ([("n_round", "warning")] if faulty else [])


@both
def test_unsupported_operator(faulty: bool, graph_builder: Any) -> None:
    """An operator that the parser does not take."""
    graph = graph_builder()
    graph.node("Det" if faulty else "Relu", [image(graph)], "y")

    assert nodes(graph, "unsupported-operator") == (["n_y"] if faulty else [])


@pytest.mark.parametrize(
    ("opset", "tensorrt", "found"),
    [(8, None, ("old-opset", "warning", (10, 11))), (9, None, None), (24, None, None), (25, 11, None),
     (25, None, ("new-opset", "note", (10,))), (25, 10, ("new-opset", "note", (10,))),
     (26, None, ("new-opset", "note", (10, 11)))],
)  # fmt: skip
def test_opset(opset: int, tensorrt: Any, found: Any, graph_builder: Any) -> None:
    """Opsets 9 to 24 are documented for TensorRT 10, to 25 for 11; that newer ones fail is not verified."""
    graph = graph_builder()
    graph.node("Relu", [image(graph)], "y")
    findings = lint(graph.model(["y"], opset=opset), tensorrt=tensorrt).findings

    assert [(f.rule, f.severity, f.releases) for f in findings if f.rule.endswith("-opset")] == (
        [found] if found else []
    )


@both
def test_not_quantized(faulty: bool, graph_builder: Any) -> None:
    """A float model is told that nothing of it will run in INT8."""
    graph = graph_builder()
    conv(graph, pair(graph, image(graph), "a"), "b")
    if faulty:
        graph = graph_builder()
        graph.node("Relu", [image(graph)], "y")

    assert nodes(graph, "not-quantized") == ([None] if faulty else [])


def unsigned_conv(graph: Any, *, signed: bool = False, weight_type: Any = np.int8, output: bool = True) -> None:
    """Conv and Relu as ONNX Runtime's QLinearConv wants them, with exceptions."""
    zero = np.int8(0) if signed else np.uint8(128)
    codes = graph.constant(np.ones((4, 4, 1, 1), weight_type))
    w = graph.node("DequantizeLinear", [codes, graph.constant(np.float32(0.1)), graph.constant(weight_type(0))], "w")
    scale = graph.constant(np.full(4, 0.005, np.float32))
    bias = graph.node("DequantizeLinear", [graph.constant(np.int32([1, 2, 3, 4])), scale], "bias", axis=0)
    graph.node("Relu", [graph.node("Conv", [pair(graph, image(graph), "a", zero=zero), w, bias], "c")], "y")
    if output:
        pair(graph, "y", "z", zero=zero if signed else np.uint8(0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"signed": True}, [("signed-activation", "n_a_q"), ("signed-activation", "n_z_q")]),
        ({"weight_type": np.uint8}, [("unsigned-weight", "n_c")]),
        ({"output": False}, [("conv-float-output", "n_c")]),
    ],
)
def test_cpu_target(options: Any, expected: list[tuple[str, str]], graph_builder: Any) -> None:
    """Unsigned activations, signed weights, and a Q behind every convolution: what the target cpu has rules for."""
    graph = graph_builder()
    unsigned_conv(graph, **options)
    report = lint(graph.model([graph.nodes[-1].output[0]]), target="cpu")

    assert [(finding.rule, finding.node) for finding in report.findings] == expected
    assert report.releases == ()


@both
def test_cpu_target_wants_integer_biases(faulty: bool, graph_builder: Any) -> None:
    """A float bias keeps a convolution float in ONNX Runtime."""
    graph = graph_builder()
    unsigned_conv(graph)
    if faulty:
        next(node for node in graph.nodes if node.op_type == "Conv").input[2] = graph.normal((4,))

    assert nodes(graph, "conv-float-bias", ["z"], target="cpu") == (["n_c"] if faulty else [])


def test_a_convolution_with_a_computed_kernel_is_no_integer_kernel(graph_builder: Any) -> None:
    """A tracker's correlation of two maps reads INT8 on both sides and computes in float: nothing is missing there."""
    graph = graph_builder()
    maps = [pair(graph, graph.input(name, shape), f"{name}p", zero=np.uint8(128)) for name, shape in (
        ("search", (1, 4, 8, 8)), ("template", (4, 4, 3, 3)),
    )]  # fmt: skip
    graph.node("Conv", [*maps, graph.normal((4,))], "y")

    assert lint(graph.model(["y"]), target="cpu").findings == ()


def test_rules_are_told_apart() -> None:
    """Names are unique; what is only inferred is never more than a note."""
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert {rule.severity for rule in RULES if not rule.verified} == {"note"}
