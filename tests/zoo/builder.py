"""A small vocabulary to draw networks in, as ONNX graphs with random but sensible weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from zoo.inputs import Input, calibration_batches
from zoo.settling import EPSILON, settle

SPREAD = 0.5
"""Standard deviation of the logarithm of the channels' gains: scales per channel differ by factors, as trained ones."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph: its name, and how many channels (axis 1, or the last one of token sequences) it has."""

    name: str
    channels: int


Operand = Value | NDArray[Any] | float | None


class Builder:
    """Appends nodes to a graph. Weights are He-initialised, gains differ from channel to channel.

    He et al., "Delving Deep into Rectifiers", 2015: weights of deviation sqrt(2 / fan-in) keep the size of activations.
    Constants are handed in as numpy arrays or numbers. Nodes and tensors are named after their operator.

    Args:
        seed: of the weights.
        opset: of the graph.
        dimensions: of space: 1 for signals, 2 for images, 3 for volumes.
    """

    def __init__(self, *, seed: int = 0, opset: int = 17, dimensions: int = 2) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.dimensions = dimensions
        self.inputs: list[Input] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def input(self, entry: Input) -> Value:
        """Add an input of the model."""
        self.inputs.append(entry)
        first = entry.shape[0] if entry.shape else 0
        return Value(entry.name, first if isinstance(first, int) else 0)

    def image(self, channels: int = 3, size: int = 32, name: str = "image") -> Value:
        """Add a square (cubic, or one-dimensional) input."""
        return self.input(Input(name, (channels, *[size] * self.dimensions)))

    def constant(self, values: NDArray[Any] | float) -> str:
        """Add an initializer; plain numbers are float32."""
        name = f"constant_{len(self.initializers)}"
        array = values if isinstance(values, np.ndarray) else np.asarray(values, np.float32)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def ops(self, kind: str, *operands: Operand, channels: Sequence[int], **attributes: Any) -> list[Value]:
        """Add a node of several outputs, with their channels."""
        names = [
            "" if operand is None else operand.name if isinstance(operand, Value) else self.constant(operand)
            for operand in operands
        ]
        number = len(self.nodes)
        outputs = [f"{kind.lower()}_{number}" + (f"_{index}" if index else "") for index in range(len(channels))]
        self.nodes.append(helper.make_node(kind, names, outputs, name=f"node_{kind}_{number}", **attributes))
        return [Value(name, width) for name, width in zip(outputs, channels, strict=True)]

    def op(self, kind: str, *operands: Operand, channels: int | None = None, **attributes: Any) -> Value:
        """Add a node of one output, with the channels of its first input unless told otherwise."""
        if channels is None:
            channels = next(operand.channels for operand in operands if isinstance(operand, Value))
        return self.ops(kind, *operands, channels=[channels], **attributes)[0]

    def weights(self, *shape: int, fan_in: int, spread_axis: int | None = None) -> NDArray[np.float32]:
        """Draw weights; with `spread_axis` each channel has a gain of its own."""
        values = self.random.normal(0.0, math.sqrt(2.0 / fan_in), shape)
        if spread_axis is not None:
            values *= self.gains(shape[spread_axis]).reshape(-1, *[1] * (len(shape) - 1 - spread_axis))
        return values.astype(np.float32)

    def gains(self, count: int) -> NDArray[np.float32]:
        """Draw the channels' gains: log-normal, mean square 1."""
        return np.exp(self.random.normal(-(SPREAD**2), SPREAD, count)).astype(np.float32)

    def offsets(self, count: int) -> NDArray[np.float32]:
        """Draw biases."""
        return self.random.normal(0.0, 0.1, count).astype(np.float32)

    def conv(
        self,
        x: Value,
        channels: int,
        kernel: int | Sequence[int] = 3,
        *,
        stride: int = 1,
        group: int = 1,
        dilation: int = 1,
        pads: Sequence[int] | None = None,
        bias: bool = True,
        **attributes: Any,
    ) -> Value:
        """Add a convolution that keeps the size (up to the stride), unless `pads` are given."""
        sides = [kernel] * self.dimensions if isinstance(kernel, int) else list(kernel)
        inside = x.channels // group
        weight = self.weights(channels, inside, *sides, fan_in=inside * math.prod(sides), spread_axis=0)
        if pads is None:
            pads = [dilation * (side // 2) for side in sides] * 2
        if "auto_pad" not in attributes:
            attributes["pads"] = list(pads)
        return self.op(
            "Conv", x, weight, *([self.offsets(channels)] if bias else []), channels=channels, kernel_shape=sides,
            strides=[stride] * len(sides), dilations=[dilation] * len(sides), group=group, **attributes,
        )  # fmt: skip

    def deconv(self, x: Value, channels: int, kernel: int = 2, *, stride: int = 2, group: int = 1) -> Value:
        """Add a transposed convolution that multiplies the size by its stride."""
        sides = [kernel] * self.dimensions
        fan_in = x.channels // group * kernel**self.dimensions // stride**self.dimensions
        weight = self.weights(x.channels, channels // group, *sides, fan_in=fan_in, spread_axis=1)
        pads = [(kernel - stride) // 2] * (2 * self.dimensions)
        return self.op(
            "ConvTranspose", x, weight, self.offsets(channels), channels=channels, kernel_shape=sides,
            strides=[stride] * self.dimensions, pads=pads, group=group,
        )  # fmt: skip

    def batch_norm(self, x: Value) -> Value:
        """Add a BatchNormalization, whose statistics `model` settles."""
        scale, bias = self.gains(x.channels), self.offsets(x.channels)
        zeros, ones = np.zeros(x.channels, np.float32), np.ones(x.channels, np.float32)
        return self.op("BatchNormalization", x, scale, bias, zeros, ones, epsilon=EPSILON)

    def block(self, x: Value, channels: int, kernel: int | Sequence[int] = 3, act: str = "Relu", **how: Any) -> Value:
        """Add a convolution without bias, BatchNormalization and an activation: see `activation`."""
        return self.activation(self.batch_norm(self.conv(x, channels, kernel, bias=False, **how)), act)

    def activation(self, x: Value, kind: str) -> Value:
        """Add an activation: an operator's name, "Relu6", "Silu", "HardSwish" written out, or "" for none."""
        if not kind:
            return x
        if kind == "Relu6":
            return self.op("Clip", x, 0.0, 6.0)
        if kind == "Silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if kind == "HardSwish":  # as exporters write it below opset 14: x * clip(x + 3, 0, 6) / 6
            return self.op("Div", self.op("Mul", x, self.op("Clip", self.op("Add", x, 3.0), 0.0, 6.0)), 6.0)
        return self.op(kind, x)

    def add(self, x: Value, y: Value) -> Value:
        """Add a sum."""
        return self.op("Add", x, y)

    def concat(self, *values: Value, axis: int = 1) -> Value:
        """Join along an axis; the channels add up."""
        return self.op("Concat", *values, axis=axis, channels=sum(value.channels for value in values))

    def pool(self, x: Value, kind: str = "MaxPool", kernel: int = 2, *, stride: int = 2, pad: int = 0) -> Value:
        """Add a pool."""
        many = self.dimensions
        return self.op(kind, x, kernel_shape=[kernel] * many, strides=[stride] * many, pads=[pad] * 2 * many)

    def enlarge(self, x: Value, factor: int = 2, **attributes: Any) -> Value:
        """Enlarge, by repeating values where no other mode is given."""
        scales = np.asarray([1, 1, *[factor] * self.dimensions], np.float32)
        mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        roi = None if self.opset >= 13 else np.empty(0, np.float32)  # below, the input has to be there
        return self.op("Resize", x, roi, scales, **(mode | attributes))

    def reshape(self, x: Value, *shape: int, channels: int | None = None) -> Value:
        """Give another shape; 0 keeps an axis."""
        return self.op("Reshape", x, np.asarray(shape, np.int64), channels=channels)

    def transpose(self, x: Value, *order: int, channels: int | None = None) -> Value:
        """Give the axes another order."""
        return self.op("Transpose", x, perm=list(order), channels=channels)

    def gemm(self, x: Value, features: int) -> Value:
        """Add a fully connected layer on (samples, features), as torch writes it."""
        weight = self.weights(features, x.channels, fan_in=x.channels, spread_axis=0)
        return self.op("Gemm", x, weight, self.offsets(features), transB=1, channels=features)

    def dense(self, x: Value, features: int) -> Value:
        """Add a fully connected layer on (samples, tokens, features): MatMul and Add."""
        weight = self.weights(x.channels, features, fan_in=x.channels, spread_axis=1)
        return self.op("Add", self.op("MatMul", x, weight, channels=features), self.offsets(features))

    def classifier(self, x: Value, classes: int = 16) -> Value:
        """Add the average over space and the last layer."""
        pooled = self.op("GlobalAveragePool", x)
        return self.gemm(self.op("Flatten", pooled), classes)

    def model(self, outputs: Sequence[Value], *, output_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """Return the model, its BatchNorm statistics settled on the data that it is calibrated on."""
        values = [helper.make_tensor_value_info(value.name, output_type, None) for value in outputs]
        inputs = [entry.value_info() for entry in self.inputs]
        graph = helper.make_graph(self.nodes, "zoo", inputs, values, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        settle(model, calibration_batches(self.inputs)[0])
        return model

    def save(self, path: Path, outputs: Sequence[Value]) -> None:
        """Write the model."""
        path.write_bytes(self.model(outputs).SerializeToString())
