"""Networks whose answer is a picture or a list of boxes: segmentation, detection, restoration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from zoo.architecture import Promise, drawn
from zoo.builder import Builder, Value
from zoo.inputs import Input


# 2 + 2 on the way down, 2 below, 2 transposed and 2 + 2 on the way up, the last 1x1: 13.
@drawn(Promise((13, 13), (12, 13), half=True), opset=11)
def unet(b: Builder) -> Sequence[Value]:
    """Ronneberger et al., 2015: skips by Concat, up by ConvTranspose."""
    x = b.image()
    skips = []
    for channels in (16, 32):
        x = b.block(b.block(x, channels), channels)
        skips.append(x)
        x = b.pool(x)
    x = b.block(b.block(x, 64), 64)
    for skip in reversed(skips):
        x = b.concat(b.deconv(x, skip.channels), skip)
        x = b.block(b.block(x, skip.channels), skip.channels)
    return [b.conv(x, 8, 1)]


# Stem, 2 of the backbone, 3 branches of the pyramid, 1 of its image pool, projection, 2 of the decoder, last:
# 1 + 2 + 3 + 1 + 1 + 2 + 1 = 11.
@drawn(Promise((11, 11), (20, 19)), opset=13)
def deeplab(b: Builder) -> Sequence[Value]:
    """Chen et al., 2018: dilated branches and an image-wide average, resized bilinearly to the input's size."""
    x = b.block(b.image(), 16, stride=2)
    low = b.block(x, 32)
    x = b.block(low, 48, stride=2)
    branches = [b.block(x, 24, 1), *(b.block(x, 24, dilation=rate) for rate in (2, 3))]
    linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    pooled = b.enlarge(b.block(b.op("GlobalAveragePool", x), 24, 1), 8, **linear)
    x = b.enlarge(b.block(b.concat(*branches, pooled), 32, 1), **linear)
    x = b.block(b.concat(x, b.block(low, 16, 1)), 32)
    return [b.enlarge(b.conv(x, 8, 1), **linear)]


# 3 down, 3 up, the last convolution: 7. Of the transposed ones two have groups, the second as many as channels:
# TensorRT has no INT8 kernel for those.
@drawn(Promise((5, 7), (22, 18)))
def grouped_autoencoder(b: Builder) -> Sequence[Value]:
    """An hourglass whose transposed convolutions have groups, LeakyRelu between them, Tanh at the end."""
    x = b.image(channels=3)
    for channels in (16, 32, 64):
        x = b.op("LeakyRelu", b.batch_norm(b.conv(x, channels, stride=2, bias=False)), alpha=0.1)
    x = b.op("LeakyRelu", b.deconv(x, 32, 4), alpha=0.1)
    x = b.op("LeakyRelu", b.deconv(x, 32, 4, group=4), alpha=0.1)
    x = b.op("Relu", b.deconv(x, 32, 4, group=32))
    return [b.op("Tanh", b.conv(x, 8))]


def _csp(b: Builder, x: Value, channels: int, *, shortcut: bool) -> Value:
    """Split, a bottleneck on one half, all joined: 4 convolutions."""
    half = channels // 2
    both = b.block(x, channels, 1, act="Silu")
    first, second = b.ops("Split", both, channels=[half, half], axis=1)
    y = b.block(b.block(second, half, act="Silu"), half, act="Silu")
    y = b.add(second, y) if shortcut else y
    return b.block(b.concat(first, second, y), channels, 1, act="Silu")


# Stem 2, csp 4, down 1, csp 4, pyramid pool 2, csp up 4 = 17; heads at 2 levels: 2 + 2 hidden each = 8: 25. The last
# 1x1 of each head (2 x 2) and the convolution that turns distributions into distances stay float: detection heads.
@drawn(Promise((25, 25), (15, 14), half=True), opset=11)
def yolo(b: Builder) -> Sequence[Value]:
    """A detector of the YOLO kind: CSP blocks with SiLU, pooled pyramid, top-down path, decoupled heads, DFL, decode.

    Li et al., "Generalized Focal Loss", 2020, for the distributions over 16 distances.
    """
    classes, bins = 8, 16
    x = b.block(b.block(b.image(size=64), 16, stride=2, act="Silu"), 32, stride=2, act="Silu")
    near = _csp(b, x, 32, shortcut=True)
    far = _csp(b, b.block(near, 64, stride=2, act="Silu"), 64, shortcut=True)
    squeezed = b.block(far, 32, 1, act="Silu")
    pools = [squeezed]
    for _ in range(3):
        pools.append(b.pool(pools[-1], kernel=5, stride=1, pad=2))
    far = b.block(b.concat(*pools), 64, 1, act="Silu")
    near = _csp(b, b.concat(b.enlarge(far), near), 32, shortcut=False)
    flat = []
    for level in (near, far):
        boxes, scores = level, level
        for _ in range(2):
            boxes, scores = b.block(boxes, 32, act="Silu"), b.block(scores, 32, act="Silu")
        joined = b.concat(b.conv(boxes, 4 * bins, 1), b.conv(scores, classes, 1))
        flat.append(b.reshape(joined, 0, 4 * bins + classes, -1))
    every = b.concat(*flat, axis=2)
    sizes = [16, 8]
    anchors = sum(size * size for size in sizes)
    boxes, scores = b.ops("Split", every, channels=[4 * bins, classes], axis=1, split=[4 * bins, classes])
    split = b.transpose(b.reshape(boxes, 0, 4, bins, anchors), 0, 2, 1, 3, channels=bins)
    weights = b.op("Softmax", split, axis=1)
    expectation = np.arange(bins, dtype=np.float32).reshape(1, bins, 1, 1)
    distances = b.op("Conv", weights, expectation, channels=1, kernel_shape=[1, 1])
    distances = b.reshape(distances, 0, 4, anchors, channels=4)
    centres, strides = _anchors(sizes)
    begin, end = (b.op("Slice", distances, np.asarray([low]), np.asarray([low + 2]), np.asarray([1])) for low in (0, 2))
    low, high = b.op("Sub", _constant(b, centres), begin, channels=2), b.op("Add", end, centres, channels=2)
    middle = b.op("Div", b.add(low, high), 2.0)
    decoded = b.op("Mul", b.op("Concat", middle, b.op("Sub", high, low), axis=1, channels=4), strides)
    probable = b.op("Sigmoid", scores)
    return [b.op("Concat", decoded, probable, axis=1, channels=4 + classes), probable]


def _constant(b: Builder, values: np.ndarray) -> Value:
    return Value(b.constant(values), values.shape[1])


def _anchors(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells' centres [1, 2, A] and strides [1, 1, A] for an image of 64 x 64."""
    centres, strides = [], []
    for size in sizes:
        rows, columns = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")
        centres.append(np.stack([columns.ravel(), rows.ravel()]))
        strides.append(np.full((1, size * size), 64 / size))
    return np.concatenate(centres, 1)[None].astype(np.float32), np.concatenate(strides, 1)[None].astype(np.float32)


# Backbone 4, lateral 3, smoothing 3, heads shared by 3 levels: (1 hidden + 1 hidden) x 3 = 6: 16. The last convolution
# of both heads (6 nodes) stays float: they write the scores and box offsets that leave the model.
@drawn(Promise((16, 16), (19, 21)), opset=12)
def retinanet(b: Builder) -> Sequence[Value]:
    """Lin et al., 2017: a feature pyramid, and heads whose weights all levels share."""
    levels = []
    x = b.block(b.image(size=64), 16, stride=2)
    for channels in (24, 32, 48):
        x = b.block(x, channels, stride=2)
        levels.append(x)
    pyramid: list[Value] = []
    for level in reversed(levels):
        lateral = b.conv(level, 32, 1)
        pyramid.append(b.add(lateral, b.enlarge(pyramid[-1])) if pyramid else lateral)
    pyramid = [b.conv(level, 32) for level in pyramid]
    outputs = []
    for width in (4 * 6, 4):  # 6 classes, 4 offsets; 4 anchors for one, 1 for the other
        hidden = b.constant(b.weights(32, 32, 3, 3, fan_in=288, spread_axis=0))
        last = b.constant(b.weights(width, 32, 3, 3, fan_in=288, spread_axis=0))
        rows = []
        for level in pyramid:
            y = b.op("Conv", level, Value(hidden, 32), pads=[1] * 4, channels=32)
            y = b.op("Conv", b.op("Relu", y), Value(last, width), pads=[1] * 4, channels=width)
            turned = b.transpose(y, 0, 2, 3, 1, channels=width)
            rows.append(b.reshape(turned, 0, -1, width))
        joined = b.op("Concat", *rows, axis=1)
        outputs.append(b.op("Sigmoid", joined) if width == 24 else joined)
    return outputs


# Head, 3 blocks of 2, tail, 1 that makes room for the shuffle, last: 1 + 6 + 1 + 1 + 1 = 10. The last one writes 3
# channels from 16, the first reads 3 and writes 32: both are taken, one side is a multiple of 8 and at least 16.
@drawn(Promise((10, 10), (21, 20)), opset=13)
def super_resolution(b: Builder) -> Sequence[Value]:
    """Lim et al., "EDSR", 2017: residual blocks without BatchNorm, a long skip, PixelShuffle."""
    first = b.conv(b.image(size=24), 32)
    x = first
    for _ in range(3):
        x = b.add(x, b.op("Mul", b.conv(b.op("Relu", b.conv(x, 32)), 32), 0.3))
    x = b.add(b.conv(x, 32), first)
    x = b.op("DepthToSpace", b.conv(x, 64), blocksize=2, mode="CRD", channels=16)
    return [b.conv(x, 3)]


# 2 down, 2 residual blocks of 2, 1 up, last: 2 + 4 + 1 + 1 = 8. The last one writes 3 channels from 16.
@drawn(Promise((8, 8), (20, 13)), opset=11)
def style_transfer(b: Builder) -> Sequence[Value]:
    """Johnson et al., 2016: reflecting Pads before the convolutions, InstanceNormalization, Upsample."""

    def reflected(x: Value, channels: int, stride: int = 1) -> Value:
        padded = b.op("Pad", x, np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
        y = b.conv(padded, channels, pads=[0] * 4, stride=stride)
        return b.op("InstanceNormalization", y, b.gains(channels), b.offsets(channels))

    x = b.op("Relu", reflected(b.image(), 16))
    x = b.op("Relu", reflected(x, 32, 2))
    for _ in range(2):
        x = b.add(x, reflected(b.op("Relu", reflected(x, 32)), 32))
    x = b.op("Relu", reflected(b.enlarge(x), 16))
    padded = b.op("Pad", x, np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
    return [b.op("Tanh", b.conv(padded, 3, pads=[0] * 4))]


# Stem, 2 blocks of 2, last: 6. The input is NHWC and SAME padding is a Pad of its own or auto_pad.
@drawn(Promise((6, 6), (34, 34)), opset=10)
def channels_last(b: Builder) -> Sequence[Value]:
    """A graph as converters from TensorFlow write it: NHWC wrapped in Transposes, Pads and auto_pad, biases as Adds."""

    def convolved(x: Value, channels: int, group: int = 1, kernel: int = 3, **how: object) -> Value:
        nchw = b.transpose(x, 0, 3, 1, 2, channels=x.channels)
        y = b.conv(nchw, channels, kernel, group=group, bias=False, **how)
        y = b.op("Add", y, b.offsets(channels).reshape(1, -1, 1, 1))
        return b.transpose(b.op("Relu", y), 0, 2, 3, 1, channels=channels)

    image = Value(b.input(Input("image", (32, 32, 3))).name, 3)
    padded = Value(b.op("Transpose", image, perm=[0, 3, 1, 2]).name, 3)
    padded = b.op("Pad", padded, pads=[0, 0, 0, 0, 0, 0, 1, 1], mode="constant", value=0.0)
    x = b.op("Relu", b.batch_norm(b.conv(padded, 16, stride=2, pads=[0] * 4, bias=False)))
    x = b.transpose(x, 0, 2, 3, 1, channels=16)
    for channels in (32, 48):
        x = convolved(x, x.channels, group=x.channels, auto_pad="SAME_UPPER")
        x = convolved(x, channels, kernel=1, auto_pad="VALID")
    mean = b.op("ReduceMean", x, axes=[1, 2], keepdims=0, channels=48)
    return [b.op("Add", b.op("MatMul", mean, b.weights(48, 16, fan_in=48, spread_axis=1), channels=16), b.offsets(16))]


PREDICTORS = (
    unet, deeplab, grouped_autoencoder, yolo, retinanet, super_resolution, style_transfer, channels_last,
)  # fmt: skip
