"""Convolutional classifiers.

Numbers of a `Promise`: the weighted operators, less those that a rule leaves float; the comment before each adds up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from zoo.architecture import Promise, drawn
from zoo.builder import Builder, Value


def _squeeze_excite(b: Builder, x: Value, squeezed: int, inner: str = "Relu", gate: str = "Sigmoid") -> Value:
    """Hu et al., 2018: a gate for each channel, from the averages of all."""
    pooled = b.op("GlobalAveragePool", x)
    hidden = b.activation(b.conv(pooled, squeezed, 1), inner)
    return b.op("Mul", x, b.op(gate, b.conv(hidden, x.channels, 1)))


# Stem, 2 blocks of 2, 2 blocks of 2 with a projection each, Gemm: 1 + 4 + 6 + 1 = 12, none held back.
@drawn(Promise((12, 12), (25, 26), half=True), opset=13)
def resnet(b: Builder) -> Sequence[Value]:
    """He et al., 2016: basic blocks, identity and projection shortcuts, BatchNorm not folded."""
    x = b.pool(b.block(b.image(), 16, 5, stride=1), kernel=3, pad=1)
    for channels, stride in [(16, 1), (16, 1), (32, 2), (48, 2)]:
        y = b.block(b.block(x, channels, stride=stride), channels, act="")
        skip = x if x.channels == channels else b.block(x, channels, 1, act="", stride=stride)
        x = b.op("Relu", b.add(y, skip))
    return [b.classifier(x)]


# Stem, 3 blocks of 3, 1 projection, Gemm: 1 + 9 + 1 + 1 = 12.
@drawn(Promise((12, 12), (30, 22)), opset=9)
def preactivated_resnet(b: Builder) -> Sequence[Value]:
    """He et al., "Identity Mappings", 2016: BatchNorm and Relu before each convolution, where nothing folds them."""
    x = b.conv(b.image(), 32)
    for channels, stride in [(32, 1), (64, 2), (64, 1)]:
        y = b.op("Relu", b.batch_norm(x))
        skip = x if x.channels == channels else b.conv(y, channels, 1, stride=stride, bias=False)
        y = b.conv(y, 16, 1, bias=False)
        y = b.conv(b.op("Relu", b.batch_norm(y)), 16, stride=stride, bias=False)
        y = b.conv(b.op("Relu", b.batch_norm(y)), channels, 1, bias=False)
        x = b.add(y, skip)
    return [b.classifier(b.op("Relu", b.batch_norm(x)))]


# Stem, 3 blocks of 3, 2 projections, Gemm: 1 + 9 + 2 + 1 = 13; the grouped 3x3 have 4 channels a group and stay INT8,
# as grouped convolutions of 3x3 with a multiple of 8 channels do.
@drawn(Promise((13, 13), (27, 26)))
def resnext(b: Builder) -> Sequence[Value]:
    """Xie et al., 2017: bottlenecks whose 3x3 convolution has groups."""
    x = b.block(b.image(), 32, 3)
    for channels, stride in [(32, 1), (64, 2), (128, 2)]:
        y = b.block(x, channels // 2, 1)
        y = b.block(y, channels // 2, group=channels // 8, stride=stride)
        y = b.block(y, channels, 1, act="")
        skip = x if x.channels == channels else b.block(x, channels, 1, act="", stride=stride)
        x = b.op("Relu", b.add(y, skip))
    return [b.classifier(x)]


# Stem, depthwise and projection of the first block, 4 blocks of 3, head, Gemm: 1 + 2 + 12 + 1 + 1 = 17.
@drawn(Promise((17, 17), (22, 22), half=True), opset=11)
def mobilenet_v2(b: Builder) -> Sequence[Value]:
    """Sandler et al., 2018: inverted residuals, ReLU6, linear bottlenecks."""
    x = b.block(b.image(), 16, stride=2, act="Relu6")
    for expansion, channels, stride in [(1, 16, 1), (6, 24, 2), (6, 24, 1), (6, 32, 2), (6, 32, 1)]:
        hidden = expansion * x.channels
        y = b.block(x, hidden, 1, act="Relu6") if expansion > 1 else x
        y = b.block(y, hidden, group=hidden, stride=stride, act="Relu6")
        y = b.block(y, channels, 1, act="")
        x = b.add(x, y) if stride == 1 and x.channels == channels else y
    return [b.classifier(b.block(x, 96, 1, act="Relu6"))]


# Stem, 4 blocks of 3 with 2 convolutions of squeeze and excitation in two of them, head, 2 Gemms: 1 + 12 + 4 + 1 + 2
# = 20. The squeezed widths are 8 and 24: 1x1 with 8 channels on one side and at least 16 on the other are taken.
@drawn(Promise((20, 20), (17, 15), half=True), opset=14)
def mobilenet_v3(b: Builder) -> Sequence[Value]:
    """Howard et al., 2019: hard swish, squeeze and excitation with a hard sigmoid, two layers after the pool."""
    x = b.activation(b.block(b.image(), 16, stride=2, act=""), "HardSwish")
    plan = [(32, 16, 1, "Relu", 8), (64, 24, 2, "Relu", 0), (96, 24, 1, "HardSwish", 24), (96, 32, 2, "HardSwish", 0)]
    for hidden, channels, stride, act, squeezed in plan:
        y = b.block(x, hidden, 1, act=act)
        y = b.block(y, hidden, 5 if squeezed else 3, group=hidden, stride=stride, act=act)
        y = _squeeze_excite(b, y, squeezed, gate="HardSigmoid") if squeezed else y
        y = b.block(y, channels, 1, act="")
        x = b.add(x, y) if stride == 1 and x.channels == channels else y
    x = b.op("HardSwish", b.batch_norm(b.conv(x, 96, 1, bias=False)))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    return [b.gemm(b.activation(b.gemm(x, 64), "HardSwish"), 16)]


# Stem, depthwise, 2 of squeeze and excitation and projection of the first block, 3 blocks of 5, head, Gemm:
# 1 + 4 + 15 + 1 + 1 = 22. Squeezing 16 to 4 channels and back (2) is too narrow for TensorRT's INT8 kernels only where
# neither side is a multiple of 8; 16 is.
@drawn(Promise((22, 22), (16, 14)))
def efficientnet(b: Builder) -> Sequence[Value]:
    """Tan and Le, 2019: inverted residuals with SiLU and squeeze and excitation."""
    x = b.block(b.image(), 16, stride=2, act="Silu")
    for expansion, channels, stride in [(1, 16, 1), (6, 24, 2), (6, 24, 1), (6, 40, 2)]:
        hidden, squeezed = expansion * x.channels, x.channels // 4
        y = b.block(x, hidden, 1, act="Silu") if expansion > 1 else x
        y = b.block(y, hidden, group=hidden, stride=stride, act="Silu")
        y = b.block(_squeeze_excite(b, y, max(squeezed, 4), inner="Silu"), channels, 1, act="")
        x = b.add(x, y) if stride == 1 and x.channels == channels else y
    return [b.classifier(b.block(x, 96, 1, act="Silu"))]


# Stem, 3 + 3 layers of 2, a transition, Gemm: 1 + 12 + 1 + 1 = 15.
@drawn(Promise((15, 15), (28, 18)), opset=12)
def densenet(b: Builder) -> Sequence[Value]:
    """Huang et al., 2017: each layer reads all before it; BatchNorm and Relu come before the convolutions."""
    x = b.block(b.image(), 32)
    for stage in range(2):
        for _ in range(3):
            y = b.conv(b.op("Relu", b.batch_norm(x)), 32, 1, bias=False)
            y = b.conv(b.op("Relu", b.batch_norm(y)), 16, bias=False)
            x = b.concat(x, y)
        if stage == 0:
            x = b.conv(b.op("Relu", b.batch_norm(x)), x.channels // 2, 1, bias=False)
            x = b.pool(x, "AveragePool")
    return [b.classifier(b.op("Relu", b.batch_norm(x)))]


# Stem of 3, a module of 7, a reduction of 4, a factorised module of 9 (1, 3, 4, 1), Gemm: 3 + 7 + 4 + 9 + 1 = 24.
# Kernels of 1x7 and 7x1 are fine from 16 channels on.
@drawn(Promise((24, 24), (23, 22)), opset=11)
def inception(b: Builder) -> Sequence[Value]:
    """Szegedy et al., 2016: four branches joined, average pools, 7x7 as 1x7 and 7x1, reductions without padding."""
    x = b.block(b.block(b.block(b.image(), 16, stride=1), 16), 32)
    x = b.pool(x, kernel=3, pad=1)
    pooled = b.pool(x, "AveragePool", 3, stride=1, pad=1)
    x = b.concat(
        b.block(x, 16, 1),
        b.block(b.block(x, 16, 1), 24, 5),
        b.block(b.block(b.block(x, 16, 1), 24), 24),
        b.block(pooled, 16, 1),
    )
    still = [0, 0, 0, 0]
    x = b.concat(
        b.block(x, 32, stride=2, pads=still),
        b.block(b.block(b.block(x, 16, 1), 24), 24, stride=2, pads=still),
        b.pool(x, kernel=3),
    )
    pooled = b.pool(x, "AveragePool", 3, stride=1, pad=1)
    x = b.concat(
        b.block(x, 32, 1),
        b.block(b.block(b.block(x, 24, 1), 24, (1, 7)), 32, (7, 1)),
        b.block(b.block(b.block(b.block(x, 16, 1), 24, (7, 1)), 24, (1, 7)), 32, (7, 1)),
        b.block(pooled, 32, 1),
    )
    return [b.classifier(x)]


# Stem, 3 units of 3, Gemm: 1 + 9 + 1 = 11. TensorRT has no INT8 kernel for 1x1 with groups of fewer than 16 channels:
# of the 6 only the 2 that narrow 64 channels in 4 groups are taken there.
@drawn(Promise((7, 11), (33, 31)), opset=9)
def shufflenet(b: Builder) -> Sequence[Value]:
    """Zhang et al., 2018: 1x1 convolutions with groups, and channels shuffled between them."""
    x = b.pool(b.block(b.image(), 32), kernel=3, pad=1)
    for stride in (2, 1, 1):
        channels = 64
        y = b.block(x, 32, 1, group=4)
        size = {2: 16, 1: 8}[stride]
        shuffled = b.reshape(y, -1, 4, 8, size, size)
        y = b.reshape(b.transpose(shuffled, 0, 2, 1, 3, 4), -1, 32, size, size, channels=32)
        y = b.block(y, 32, group=32, stride=stride, act="")
        if stride == 2:
            y = b.block(y, channels - x.channels, 1, group=4, act="")
            x = b.op("Relu", b.concat(b.pool(x, "AveragePool", 3, pad=1), y))
        else:
            x = b.op("Relu", b.add(b.block(y, channels, 1, group=4, act=""), x))
    return [b.classifier(x)]


# Stem, a unit of 5 that halves the size, 2 units of 3, head, Gemm: 1 + 5 + 6 + 1 + 1 = 14.
@drawn(Promise((14, 14), (25, 24)), opset=13)
def shufflenet_v2(b: Builder) -> Sequence[Value]:
    """Ma et al., 2018: half of the channels pass untouched (Split), and all are shuffled after the Concat."""
    x = b.block(b.image(), 32, stride=2)

    def shuffle(value: Value, size: int) -> Value:
        split = b.reshape(value, -1, 2, value.channels // 2, size, size)
        return b.reshape(b.transpose(split, 0, 2, 1, 3, 4), -1, value.channels, size, size, channels=value.channels)

    left = b.block(b.block(x, 32, group=32, stride=2, act=""), 32, 1)
    right = b.block(b.block(b.block(x, 32, 1), 32, group=32, stride=2, act=""), 32, 1)
    x = shuffle(b.concat(left, right), 8)
    for _ in range(2):
        kept, y = b.ops("Split", x, np.asarray([32, 32]), channels=[32, 32], axis=1)
        y = b.block(b.block(b.block(y, 32, 1), 32, group=32, act=""), 32, 1)
        x = shuffle(b.concat(kept, y), 8)
    return [b.classifier(b.block(x, 96, 1))]


# Stem, 3 blocks of 2, Gemm: 1 + 6 + 1 = 8. The stem reads one channel, writes 64 (a multiple of 8) and is not square:
# TensorRT's exception for narrow inputs is for square kernels, so it stays float there.
@drawn(Promise((7, 8), (27, 33)), opset=13)
def keyword_spotter(b: Builder) -> Sequence[Value]:
    """Zhang et al., "Hello Edge", 2017: depthwise separable convolutions over a spectrogram."""
    x = b.block(b.image(1, 32, "spectrogram"), 64, (9, 5), stride=2)
    for _ in range(3):
        x = b.block(b.block(x, 64, group=64), 64, 1)
    pooled = b.op("AveragePool", x, kernel_shape=[16, 16], strides=[1, 1])
    return [b.op("Softmax", b.gemm(b.op("Flatten", pooled), 16), axis=1)]


# 6 convolutions and 3 Gemms: 9. The last Gemm has 10 columns, fewer than the 16 of a tensor core: float for TensorRT.
@drawn(Promise((8, 9), (23, 21)), opset=8)
def vgg(b: Builder) -> Sequence[Value]:
    """Simonyan and Zisserman, 2015, at an opset of 2018: plain convolutions, LRN after the first, Dropout, Gemms."""
    x = b.op("LRN", b.op("Relu", b.conv(b.image(), 16)), size=5)
    for channels in (32, 64):
        x = b.op("Relu", b.conv(x, channels))
        x = b.pool(b.op("Relu", b.conv(x, channels)))
    x = b.pool(b.op("Relu", b.conv(x, 64)))
    x = b.reshape(x, 0, -1, channels=64 * 16)
    for _ in range(2):
        x = b.op("Dropout", b.op("Relu", b.gemm(x, 128)), ratio=0.5)
    return [b.op("Softmax", b.gemm(x, 10), axis=1)]


# Patches, 2 blocks of 4 MatMuls, Gemm: 1 + 8 + 1 = 10; a MatMul whose weight stands on the left counts as well.
@drawn(Promise((10, 10), (25, 22)), opset=20)
def mlp_mixer(b: Builder) -> Sequence[Value]:
    """Tolstikhin et al., 2021: fully connected layers over tokens and over channels in turn; LayerNorm, Gelu."""
    width, tokens = 64, 16
    x = b.conv(b.image(), width, 8, stride=8, pads=[0] * 4)
    x = b.transpose(b.reshape(x, 0, width, tokens), 0, 2, 1, channels=width)
    for index in range(2):
        y = b.op("LayerNormalization", x, b.gains(width), b.offsets(width))
        if index == 0:
            y = b.transpose(y, 0, 2, 1, channels=tokens)
            y = b.transpose(b.dense(b.op("Gelu", b.dense(y, 32)), tokens), 0, 2, 1, channels=width)
        else:  # the same with the weight on the left, as einsum is exported
            for rows, columns in [(32, tokens), (tokens, 32)]:
                y = b.op("MatMul", b.weights(rows, columns, fan_in=columns, spread_axis=0), y, channels=width)
                y = b.op("Gelu", y) if rows == 32 else y
        x = b.add(x, y)
        y = b.op("LayerNormalization", x, b.gains(width), b.offsets(width))
        x = b.add(x, b.dense(b.op("Gelu", b.dense(y, 2 * width)), width))
    mean = b.op("ReduceMean", x, np.asarray([1]), keepdims=0)
    return [b.gemm(mean, 16)]


CLASSIFIERS = (
    resnet, preactivated_resnet, resnext, mobilenet_v2, mobilenet_v3, efficientnet, densenet, inception, shufflenet,
    shufflenet_v2, keyword_spotter, vgg, mlp_mixer,
)  # fmt: skip
