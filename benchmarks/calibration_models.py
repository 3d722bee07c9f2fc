"""The three models of the calibration benchmark, built from seeds: nothing is downloaded.

Their weights are random, but their activations are not absurd: every convolution is followed by a normalisation whose
statistics were settled on image-like batches, and which is folded into the weights, as an exported model has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

MODELS = ("resnet50", "mobilenetv2", "bert")
"""Those whose speed is measured; "small" is for the memory."""

VOCABULARY = 8192
TOKENS = 128

_SETTLING_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph under construction, and what it holds for the batch that settles the statistics."""

    name: str
    values: torch.Tensor


class Builder:
    """Appends nodes to an ONNX graph and computes them at once in torch, which settles the next layer's statistics."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, values: torch.Tensor | NDArray[np.generic]) -> str:
        """Add an initializer."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def normal(self, *shape: int, deviation: float = 1.0) -> torch.Tensor:
        """Draw normally distributed weights."""
        return torch.randn(shape, generator=self.random) * deviation

    def uniform(self, size: int, low: float, high: float) -> torch.Tensor:
        """Draw uniformly distributed weights."""
        return torch.rand(size, generator=self.random) * (high - low) + low

    def node(self, kind: str, inputs: list[str], values: torch.Tensor, **attributes: object) -> Value:
        """Add a node of one output, which holds `values` for the settling batch."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes))
        return Value(name, values)

    def conv(self, x: Value, channels: int, kernel: int = 1, stride: int = 1, group: int = 1) -> Value:
        """Add a convolution with a settled normalisation folded into it."""
        inside = x.values.shape[1] // group
        pad = kernel // 2
        weight = self.normal(channels, inside, kernel, kernel, deviation=math.sqrt(2 / (inside * kernel * kernel)))
        raw = functional.conv2d(x.values, weight, stride=stride, padding=pad, groups=group)
        deviation, mean = torch.std_mean(raw, dim=(0, 2, 3), correction=0)
        gain = self.uniform(channels, 0.3, 1.2) / (deviation + 1e-5)
        bias = self.normal(channels, deviation=0.2) - gain * mean
        folded = [self.constant(weight * gain.reshape(-1, 1, 1, 1)), self.constant(bias)]
        shift = gain.reshape(-1, 1, 1), bias.reshape(-1, 1, 1)
        return self.node(
            "Conv", [x.name, *folded], raw * shift[0] + shift[1],
            kernel_shape=[kernel] * 2, pads=[pad] * 4, strides=[stride] * 2, group=group,
        )  # fmt: skip

    def relu(self, x: Value) -> Value:
        """Add a ReLU."""
        return self.node("Relu", [x.name], x.values.relu())

    def relu6(self, x: Value) -> Value:
        """Add a ReLU6."""
        limits = [self.constant(np.float32(limit)) for limit in (0, 6)]
        return self.node("Clip", [x.name, *limits], x.values.clamp(0, 6))

    def add(self, x: Value, y: Value) -> Value:
        """Add a sum of two activations."""
        return self.node("Add", [x.name, y.name], x.values + y.values)

    def classifier(self, x: Value, classes: int) -> None:
        """Add pooling and the last layer, whose output is `logits`."""
        pooled = self.node("GlobalAveragePool", [x.name], x.values.mean(dim=(2, 3), keepdim=True))
        flat = self.node("Flatten", [pooled.name], pooled.values.flatten(1))
        features = flat.values.shape[1]
        weight = self.constant(self.normal(classes, features, deviation=features**-0.5))
        self.nodes.append(
            helper.make_node("Gemm", [flat.name, weight, self.constant(torch.zeros(classes))], ["logits"], transB=1)
        )

    def save(self, path: Path, inputs: onnx.ValueInfoProto, output: onnx.ValueInfoProto) -> None:
        """Write the model."""
        graph = helper.make_graph(self.nodes, path.stem, [inputs], [output], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString(deterministic=True))


def build(name: str, path: Path) -> None:
    """Write one of `MODELS`, or "small", of batch 1, to `path`."""
    with torch.no_grad():
        {"resnet50": _resnet50, "mobilenetv2": _mobilenetv2, "bert": _bert, "small": _small}[name](path)


def batches(name: str, count: int) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Yield batches of one sample for a model, the same ones in every call."""
    random = torch.Generator().manual_seed(7)
    for index in range(count):
        if name == "bert":
            yield {"ids": torch.randint(0, VOCABULARY, (1, TOKENS), generator=random).numpy()}
        else:
            gain = 0.8 + 0.4 * (index * 37 % 101) / 101  # the ranges of batches differ
            yield {"image": (gain * _images(1, random, 64 if name == "small" else 224)).numpy()}


def _images(count: int, random: torch.Generator, side: int = 224) -> torch.Tensor:
    """Fields of low frequencies with a little noise: image-like, where white noise would average out."""
    images = 0.1 * torch.randn(count, 3, side, side, generator=random)
    for size in (4, 8, 16, 32, 64):
        coarse = torch.randn(count, 3, size, size, generator=random) / math.sqrt(size / 4)
        images += functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    return images


def _image_input(builder: Builder, side: int = 224) -> Value:
    return Value("image", _images(_SETTLING_IMAGES, builder.random, side))


def _save_classifier(builder: Builder, path: Path, side: int = 224) -> None:
    builder.save(
        path,
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1000]),
    )


def _resnet50(path: Path) -> None:
    """He et al., "Deep Residual Learning for Image Recognition", with the stride in the 3x3 convolution."""
    builder = Builder(seed=1)
    x = builder.relu(builder.conv(_image_input(builder), 64, kernel=7, stride=2))
    pooled = functional.max_pool2d(x.values, 3, 2, 1)
    x = builder.node("MaxPool", [x.name], pooled, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            skip = builder.conv(x, 4 * width, stride=stride) if block == 0 else x
            y = builder.relu(builder.conv(x, width))
            y = builder.relu(builder.conv(y, width, kernel=3, stride=stride))
            x = builder.relu(builder.add(builder.conv(y, 4 * width), skip))
    builder.classifier(x, 1000)
    _save_classifier(builder, path)


def _mobilenetv2(path: Path) -> None:
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks"."""
    builder = Builder(seed=2)
    x = builder.relu6(builder.conv(_image_input(builder), 32, kernel=3, stride=2))
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, channels, blocks, first_stride in stages:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            before = x.values.shape[1]
            hidden = before * expansion
            y = builder.relu6(builder.conv(x, hidden)) if expansion != 1 else x
            y = builder.relu6(builder.conv(y, hidden, kernel=3, stride=stride, group=hidden))
            y = builder.conv(y, channels)
            x = builder.add(x, y) if stride == 1 and before == channels else y
    builder.classifier(builder.relu6(builder.conv(x, 1280)), 1000)
    _save_classifier(builder, path)


def _small(path: Path) -> None:
    """Four convolutions on images of 64 x 64."""
    builder = Builder(seed=4)
    x = _image_input(builder, 64)
    for channels, stride in [(16, 2), (24, 1), (32, 2), (48, 1)]:
        x = builder.relu(builder.conv(x, channels, kernel=3, stride=stride))
    builder.classifier(x, 1000)
    _save_classifier(builder, path, 64)


def _bert(path: Path, layers: int = 6, width: int = 384, heads: int = 6) -> None:
    """Devlin et al., "BERT": an encoder that takes the first token's vector for its two classes."""
    builder = Builder(seed=3)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=builder.random)
    each = width // heads

    def normalised(x: Value) -> Value:
        gain, bias = builder.uniform(width, 0.5, 1.5), builder.normal(width, deviation=0.1)
        values = functional.layer_norm(x.values, (width,), gain, bias)
        return builder.node(
            "LayerNormalization", [x.name, builder.constant(gain), builder.constant(bias)], values, axis=-1
        )

    def linear(x: Value, features: int) -> Value:
        inside = x.values.shape[-1]
        weight = builder.normal(inside, features, deviation=inside**-0.5)
        bias = builder.normal(features, deviation=0.02)
        product = builder.node("MatMul", [x.name, builder.constant(weight)], x.values @ weight)
        return builder.node("Add", [product.name, builder.constant(bias)], product.values + bias)

    def split(x: Value, permutation: list[int]) -> Value:
        shape = [1, TOKENS, heads, each]
        parts = builder.node("Reshape", [x.name, builder.constant(np.int64(shape))], x.values.reshape(shape))
        return builder.node("Transpose", [parts.name], parts.values.permute(permutation), perm=permutation)

    def attention(x: Value) -> Value:
        query, key, value = (split(linear(x, width), order) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        scores = builder.node("MatMul", [query.name, key.name], query.values @ key.values)
        root = math.sqrt(each)
        scaled = builder.node("Div", [scores.name, builder.constant(np.float32(root))], scores.values / root)
        weights = builder.node("Softmax", [scaled.name], scaled.values.softmax(-1), axis=-1)
        mixed = builder.node("MatMul", [weights.name, value.name], weights.values @ value.values)
        turned = builder.node("Transpose", [mixed.name], mixed.values.permute(0, 2, 1, 3), perm=[0, 2, 1, 3])
        shape = [1, TOKENS, width]
        joined = builder.node("Reshape", [turned.name, builder.constant(np.int64(shape))], turned.values.reshape(shape))
        return linear(joined, width)

    table = builder.normal(VOCABULARY, width)
    x = builder.node("Gather", [builder.constant(table), "ids"], table[ids])
    positions = builder.normal(1, TOKENS, width, deviation=0.05)
    x = normalised(builder.node("Add", [x.name, builder.constant(positions)], x.values + positions))
    for _ in range(layers):
        x = normalised(builder.add(x, attention(x)))
        hidden = linear(x, 4 * width)
        hidden = builder.node("Gelu", [hidden.name], functional.gelu(hidden.values))
        x = normalised(builder.add(x, linear(hidden, width)))
    first = builder.node("Gather", [x.name, builder.constant(np.int64(0))], x.values[:, 0], axis=1)
    weight = builder.constant(builder.normal(width, 2, deviation=width**-0.5))
    builder.nodes.append(helper.make_node("MatMul", [first.name, weight], ["logits"]))
    builder.save(
        path,
        helper.make_tensor_value_info("ids", TensorProto.INT64, [1, TOKENS]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2]),
    )
