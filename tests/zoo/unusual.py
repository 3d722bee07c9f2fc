"""Networks over signals, volumes and tables, and graphs of unusual form: several inputs, outputs, control flow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper
from zoo.architecture import Promise, drawn
from zoo.builder import Builder, Value
from zoo.inputs import Input


# First 1x1, 3 blocks of 2, last 1x1: 8, all 1-D.
@drawn(Promise((8, 8), (21, 26)), opset=13, dimensions=1)
def temporal_convolutions(b: Builder) -> Sequence[Value]:
    """Bai et al., "TCN", 2018: dilated 1-D convolutions that see only the past: padded on the left."""
    x = b.conv(b.image(8, 64, "signal"), 32, 1)
    for dilation in (1, 2, 4):
        y = x
        for _ in range(2):
            padded = b.op("Pad", y, np.asarray([0, 0, 2 * dilation, 0, 0, 0]))
            y = b.op("Relu", b.conv(padded, 32, 3, dilation=dilation, pads=[0, 0]))
        x = b.op("Relu", b.add(y, x))
    return [b.conv(x, 10, 1)]


# Stem, 2 blocks of a spatial and a temporal convolution, 1 projection, a 3x3x3, Gemm: 1 + 4 + 1 + 1 + 1 = 8. Kernels of
# 1x3x3 and 3x1x1 are fine from 16 channels on.
@drawn(Promise((8, 8), (24, 33)), opset=13, dimensions=3)
def video(b: Builder) -> Sequence[Value]:
    """Tran et al., "R(2+1)D", 2018, and C3D: 3-D convolutions, whole or split into space and time."""
    x = b.block(b.image(3, 12, "clip"), 16)
    x = b.pool(x)
    for channels in (16, 32):
        y = b.block(b.block(x, 32, (1, 3, 3)), channels, (3, 1, 1), act="")
        skip = x if x.channels == channels else b.block(x, channels, 1, act="")
        x = b.op("Relu", b.add(y, skip))
    return [b.classifier(b.pool(b.block(x, 48)))]


# 3 layers shared by the points, 2 that make the alignment (Gemm), 2 of the classifier: 7. The product with the
# alignment has no constant operand and stays float.
@drawn(Promise((7, 7), (20, 24)), opset=11, dimensions=1)
def point_cloud(b: Builder) -> Sequence[Value]:
    """Qi et al., "PointNet", 2017: each point by itself, the maximum over all, an alignment that is computed."""
    points = b.image(8, 64, "points")
    x = b.block(b.block(points, 32, 1), 32, 1)
    pooled = b.op("ReduceMax", x, axes=[2], keepdims=0)
    alignment = b.gemm(b.op("Relu", b.gemm(pooled, 64)), 32 * 32)
    alignment = b.reshape(alignment, 0, 32, 32)
    x = b.transpose(b.op("MatMul", b.transpose(x, 0, 2, 1), alignment, channels=32), 0, 2, 1, channels=32)
    x = b.op("ReduceMax", b.block(x, 128, 1), axes=[2], keepdims=0)
    return [b.gemm(b.op("Relu", b.gemm(x, 64)), 16)]


# Bottom 2, top 2 = 4. The last layer has one output feature: a matrix times a vector, which TensorRT does not compute
# on tensor cores; it stays float there.
@drawn(Promise((4, 5), (30, 33)), opset=17)
def recommender(b: Builder) -> Sequence[Value]:
    """Naumov et al., "DLRM", 2019: embeddings, dot products of all pairs, one score."""
    dense = b.input(Input("dense", (16,), "normal"))
    vectors = [b.op("Unsqueeze", b.op("Relu", b.gemm(b.op("Relu", b.gemm(dense, 64)), 32)), np.asarray([1]))]
    for index in range(3):
        ids = b.input(Input(f"ids_{index}", (1,), "ids", limit=50))
        table = Value(b.constant((0.2 * b.random.normal(size=(50, 32))).astype(np.float32)), 32)
        vectors.append(b.op("Gather", table, ids, axis=0))
    stacked = b.op("Concat", *vectors, axis=1)
    products = b.op("MatMul", stacked, b.transpose(stacked, 0, 2, 1))
    flat = b.reshape(products, 0, 16, channels=16)
    joined = b.op("Concat", flat, dense, axis=1, channels=32)
    x = b.op("Relu", b.gemm(b.op("Relu", b.gemm(joined, 64)), 32))
    score = b.op("MatMul", x, b.weights(32, 1, fan_in=32), channels=1)
    return [b.op("Sigmoid", score)]


# Image 3, table 2, last 2: 7.
@drawn(Promise((7, 7), (26, 25)), opset=13)
def two_inputs(b: Builder) -> Sequence[Value]:
    """An image and a vector of facts about it, whose features scale the image's channels and join them."""
    x = b.block(b.block(b.image(), 16, stride=2), 32, stride=2)
    facts = b.op("Relu", b.gemm(b.input(Input("facts", (16,), "normal")), 32))
    gate = b.op("Unsqueeze", b.op("Sigmoid", b.gemm(facts, 32)), np.asarray([2, 3]))
    x = b.block(b.op("Mul", x, gate), 32)
    flat = b.op("Flatten", b.op("GlobalAveragePool", x))
    joined = b.op("Concat", flat, facts, axis=1, channels=64)
    return [b.gemm(b.op("Relu", b.gemm(joined, 48)), 16)]


# Trunk 3, classes 1, mask 2, embedding 1: 7. The trunk's features and the classes' arg-max leave the model as well.
@drawn(Promise((7, 7), (25, 23)), opset=13)
def several_outputs(b: Builder) -> Sequence[Value]:
    """A shared trunk with three heads; an inner tensor is an output too."""
    x = b.block(b.block(b.block(b.image(), 16), 32, stride=2), 32)
    mask = b.op("Sigmoid", b.conv(b.deconv(x, 16), 1 * 8, 1))
    flat = b.op("Flatten", b.op("GlobalAveragePool", x))
    embedding = b.gemm(flat, 32)
    length = b.op("ReduceL2", embedding, axes=[1], keepdims=1)
    return [b.gemm(flat, 16), mask, b.op("Div", embedding, length), x]


def _subgraph(
    name: str, nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto], *outputs: str
) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    return helper.make_graph(list(nodes), name, list(inputs), values)


# Stem, then, after the branch, 1 and Gemm: 3. The convolutions in the branches are not calibrated.
@drawn(Promise((3, 3), (26, 28)), opset=16)
def branching(b: Builder) -> Sequence[Value]:
    """If: one of two convolutions, by a flag that is an input; they read a tensor and weights from outside."""
    flag = b.input(Input("wide", (), "flag"))
    x = b.block(b.image(), 16, stride=2)
    branches = {}
    for branch, kernel in (("then", 3), ("else", 1)):
        weight = b.constant(b.weights(16, 16, kernel, kernel, fan_in=16 * kernel * kernel, spread_axis=0))
        inner, output = f"{branch}_convolved", f"{branch}_output"
        nodes = [
            helper.make_node("Conv", [x.name, weight], [inner], name=f"{branch}_conv", pads=[kernel // 2] * 4),
            helper.make_node("Relu", [inner], [output], name=f"{branch}_relu"),
        ]
        branches[f"{branch}_branch"] = _subgraph(branch, nodes, [], output)
    y = b.op("If", flag, channels=16, **branches)
    y = b.op("Reshape", y, np.asarray([-1, 16, 16, 16]), channels=16)
    return [b.classifier(b.block(y, 32, stride=2))]


# Stem, after the loop 1 and Gemm: 3. The MatMul of the body is not calibrated.
@drawn(Promise((3, 3), (34, 34)), opset=16)
def looping(b: Builder) -> Sequence[Value]:
    """Loop: a state that is refined three times by the same layer."""
    x = b.block(b.image(), 32, stride=2)
    state = b.op("Flatten", b.op("GlobalAveragePool", x))
    weight = b.constant(b.weights(32, 32, fan_in=32, spread_axis=1))
    body = _subgraph(
        "refine",
        [
            helper.make_node("Identity", ["going"], ["still_going"], name="body_going"),
            helper.make_node("MatMul", ["state", weight], ["product"], name="body_matmul"),
            helper.make_node("Tanh", ["product"], ["bounded"], name="body_tanh"),
            helper.make_node("Add", ["state", "bounded"], ["refined"], name="body_add"),
        ],
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        "refined",
    )
    body.output.insert(0, helper.make_tensor_value_info("still_going", TensorProto.BOOL, []))
    refined = b.op("Loop", Value(b.constant(np.asarray(3)), 0), None, state, body=body, channels=32)
    refined = b.op("Reshape", refined, np.asarray([-1, 32]), channels=32)
    return [b.gemm(b.op("Relu", b.gemm(refined, 64)), 16)]


# Both convolutions have 4 channels on both sides: too narrow for TensorRT's INT8 kernels.
@drawn(Promise((0, 2), (100, 37)), opset=13)
def too_narrow(b: Builder) -> Sequence[Value]:
    """A model that quantizes to nothing for TensorRT: no layer is wide enough."""
    x = b.op("Relu", b.conv(b.image(4), 4))
    return [b.op("GlobalAveragePool", b.conv(x, 4))]


@drawn(Promise((0, 0), (0, 0)), opset=13)
def without_weights(b: Builder) -> Sequence[Value]:
    """A model without weighted operators: edges by differences, and how likely each is."""
    image = b.image()
    smooth = b.op("AveragePool", image, kernel_shape=[3, 3], pads=[1] * 4)
    return [b.op("Softmax", b.op("Abs", b.op("Sub", image, smooth)), axis=1)]


UNUSUAL = (
    temporal_convolutions, video, point_cloud, recommender, two_inputs, several_outputs, branching, looping,
    too_narrow,
)  # fmt: skip
