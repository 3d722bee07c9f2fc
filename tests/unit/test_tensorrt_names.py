"""Tensors of a graph under the names of a calibration cache."""

from typing import Any

import onnx
import onnx_ir as ir
import pytest

from engines.tensorrt_names import FoundTensor, MissingTensor, contradictions, find_tensors, is_tensorrts_own


def typed(builder: Any, *outputs: str) -> ir.Model:
    """Return a drawn graph with types."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(builder.model(outputs)))


def batch_norm(builder: Any, x: str, channels: int, output: str) -> str:
    """Draw a BatchNorm."""
    parameters = [builder.normal((channels,)) for _ in range(3)]
    variance = builder.constant(abs(builder.rng.normal(size=channels)).astype("float32"))
    return str(builder.node("BatchNormalization", [x, *parameters, variance], output))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("(Unnamed Layer* 64) [Shuffle]_output", True),
        ("(Unnamed Layer* 3) [Fully Connected]_output", True),
        ("(Unnamed Layer* 3) [PluginV2Ext]_output_1", True),
        ("ONNXTRT_Broadcast_236_output", True),
        ("input_1:0", False),
        ("my (Unnamed Layer* 64) [Shuffle]_output", False),
    ],
)
def test_tensorrts_own_names(name: str, own: bool):
    """Names that TensorRT and its parser make up are told from those of a model."""
    assert is_tensorrts_own(name) is own


@pytest.mark.parametrize(
    ("cached", "rule"),
    [
        ("relu", "name"),
        ("relu:0", "spelling"),
        ("relu_dequantized", "spelling"),
        ("relu_DequantizeLinear_Output", "spelling"),
        ("flat", "same values"),
        ("again", "same values"),
        ("pool", "MaxPool"),
    ],
)
def test_rules(cached: str, rule: str, graph_builder: Any):
    """A tensor is found under its name, under an appended one, and under that of a tensor with the same values."""
    builder = graph_builder()
    conv = builder.conv(builder.input(), (3, 4), "conv")
    relu = builder.node("Relu", [conv], "relu")
    builder.node("Relu", [relu], "again")
    builder.node("MaxPool", [relu], "pool", kernel_shape=[2, 2])
    builder.node("Flatten", [relu], "flat")
    model = typed(builder, "again", "pool", "flat")
    found, missing = find_tensors(["relu"], {cached: 0.5}, model, model)

    assert (found, missing) == ([FoundTensor("relu", cached, rule)], [])


@pytest.mark.parametrize("cached", ["conv", "sliced", "resized", "average", "x"])
def test_other_values_are_not_taken(cached: str, graph_builder: Any):
    """Not taken: what a Relu reads, a slice, an interpolation, an average, the input."""
    builder = graph_builder()
    conv = builder.conv(builder.input(), (3, 4), "conv")
    relu = builder.node("Relu", [conv], "relu")
    ends = [builder.constant([0], "zero"), builder.constant([2], "two"), builder.constant([2], "axis")]
    builder.node("Slice", [relu, *ends], "sliced")
    scales = builder.constant(onnx.numpy_helper.to_array(onnx.helper.make_tensor("s", 1, [4], [1, 1, 2, 2])), "s")
    builder.node("Resize", [relu, "", scales], "resized", mode="linear")
    builder.node("AveragePool", [relu], "average", kernel_shape=[2, 2])
    model = typed(builder, "sliced", "resized", "average")
    found, missing = find_tensors(["relu"], {cached: 0.5}, model, model)

    assert found == []
    assert missing[0].tensor == "relu"


def test_what_a_relu_reads_is_a_hint(graph_builder: Any):
    """That the cache holds only what a Relu reads is said."""
    builder = graph_builder()
    builder.node("Relu", [builder.conv(builder.input(), (3, 4), "conv")], "relu")
    model = typed(builder, "relu")
    _, missing = find_tensors(["relu"], {"conv": 0.5}, model, model)

    assert missing == [MissingTensor("relu", "the cache holds only 'conv', from which Relu computes it")]


def folding_pair(graph_builder: Any) -> tuple[ir.Model, ir.Model]:
    """Return a graph whose BatchNorm stands, and the same with it folded under its output's name."""
    original = graph_builder()
    conv = original.conv(original.input(), (3, 4), "conv", bias=False)
    batch_norm(original, conv, 4, "bn")
    prepared = graph_builder()
    prepared.conv(prepared.input(), (3, 4), "bn")
    return typed(original, "bn"), typed(prepared, "bn")


def test_folded_batch_norm(graph_builder: Any):
    """The output of a folded BatchNorm is found under the convolution's name where that alone is in the cache."""
    original, prepared = folding_pair(graph_builder)
    found, _ = find_tensors(["bn"], {"conv": 0.5}, prepared, original)

    assert found == [FoundTensor("bn", "conv", "folded BatchNorm")]


def test_standing_batch_norm(graph_builder: Any):
    """Where the cache holds both, the BatchNorm's is taken: the convolution's is of other values."""
    original, prepared = folding_pair(graph_builder)
    found, _ = find_tensors(["bn"], {"conv": 0.5, "bn": 0.25}, prepared, original)

    assert found == [FoundTensor("bn", "bn", "name")]


def test_shared_convolution_is_not_folded(graph_builder: Any):
    """A convolution that something else reads beside its BatchNorm could not have been folded into it."""
    builder = graph_builder()
    conv = builder.conv(builder.input(), (3, 4), "conv", bias=False)
    batch_norm(builder, conv, 4, "bn")
    builder.node("Relu", [conv], "relu")
    model = typed(builder, "bn", "relu")

    assert find_tensors(["bn"], {"conv": 0.5}, model, model)[0] == []


def test_both_spellings_are_not_guessed(graph_builder: Any):
    """A name that fits in two spellings fits in none."""
    builder = graph_builder()
    builder.node("Relu", [builder.input()], "relu")
    model = typed(builder, "relu")

    assert find_tensors(["relu"], {"relu:0": 0.5, "relu_dequantized": 0.25}, model, model)[0] == []


def test_the_users_name_goes_first(graph_builder: Any):
    """What the user says goes before any rule."""
    builder = graph_builder()
    builder.node("Relu", [builder.input()], "relu")
    model = typed(builder, "relu")
    found, _ = find_tensors(["relu"], {"relu": 0.5, "other": 0.25}, model, model, {"other": "relu"})

    assert found == [FoundTensor("relu", "other", "renamed")]


def test_network_without_names(graph_builder: Any):
    """A network of TensorRT's own API: the layers by kind and order, and what stands before layer 0 is the input."""
    builder = graph_builder()
    relu = builder.node("Relu", [builder.conv(builder.input(), (3, 4), "conv")], "relu")
    builder.gemm(builder.node("Flatten", [relu], "flat"), (256, 5), "logits")
    model = typed(builder, "logits")
    cached = {
        "data": 0.1,
        "(Unnamed Layer* 0) [Convolution]_output": 0.2,
        "(Unnamed Layer* 1) [Activation]_output": 0.3,
        "(Unnamed Layer* 2) [Fully Connected]_output": 0.4,
    }
    found, missing = find_tensors(["x", "relu", "logits"], cached, model, model)

    assert missing == []
    assert [(item.tensor, cached[item.cached], item.rule) for item in found] == [
        ("x", 0.1, "layer order"),
        ("relu", 0.3, "layer order"),
        ("logits", 0.4, "layer order"),
    ]


def test_batch_norm_layers_fit_the_file_before_its_preparation(graph_builder: Any):
    """Layers of kind Scale are the BatchNorms that the preparation folds: the tensor is the BatchNorm's output."""
    original, prepared = folding_pair(graph_builder)
    cached = {"(Unnamed Layer* 0) [Convolution]_output": 0.2, "(Unnamed Layer* 1) [Scale]_output": 0.3}
    found, _ = find_tensors(["bn"], cached, prepared, original)

    assert found == [FoundTensor("bn", "(Unnamed Layer* 1) [Scale]_output", "layer order")]


def test_unnamed_layers_out_of_order(graph_builder: Any):
    """Where the file is not in the order of the network, nothing is concluded from it."""
    builder = graph_builder()
    builder.node("Relu", [builder.conv(builder.input(), (3, 4), "conv")], "relu")
    model = typed(builder, "relu")
    cached = {"(Unnamed Layer* 1) [Activation]_output": 0.3, "(Unnamed Layer* 0) [Convolution]_output": 0.2}
    found, missing = find_tensors(["relu"], cached, model, model)

    assert found == []
    assert "not in the order of their numbers" in missing[0].reason


def test_contradictions(graph_builder: Any):
    """A tensor before what it is computed from, and one that differs from what it repeats, cannot be the graph's."""
    builder = graph_builder()
    conv = builder.conv(builder.input(), (3, 4), "1")
    relu = builder.node("Relu", [conv], "2")
    builder.node("Flatten", [relu], "3")
    model = typed(builder, "3")

    assert contradictions({"x": 1.0, "1": 0.5, "2": 0.25, "3": 0.25}, model) == []
    assert contradictions({"2": 0.25, "x": 1.0, "1": 0.5, "3": 0.25}, model) == ["2"]
    assert contradictions({"x": 1.0, "1": 0.5, "2": 0.25, "3": 0.5}, model) == ["3"]
