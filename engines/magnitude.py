"""How large the values of a graph can get: interval arithmetic from what calibration saw.

|W x + b| <= sum |W| * amax(x) + |b|, and so on for every operator that has a rule. The bounds serve the tensors that
calibration did not see, such as the output of a convolution before its Relu; no pass over the data is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from engines.graph import constant_array
from engines.placement import clip_bounds, operands, weight_axis

_PRESERVING = frozenset(
    {
        "Abs", "AveragePool", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
        "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "Identity", "MaxPool", "Mish", "Neg", "ReduceMax",
        "ReduceMean", "ReduceMin", "Relu", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
        "Trilu", "Unsqueeze",
    }
)  # fmt: skip
"""Operators whose results are no larger than the largest magnitude of their first input."""

_LIMITED = {
    "Cos": 1.0, "Erf": 1.0, "HardSigmoid": 1.0, "Sigmoid": 1.0, "Sin": 1.0, "Softmax": 1.0, "Softsign": 1.0, "Tanh": 1.0
}  # fmt: skip
"""Operators whose results have a limit of their own."""


def magnitude_bounds(model: ir.Model, amax: Mapping[str, float]) -> dict[str, float]:
    """Return an upper bound of |x| for every activation of the main graph, integers included.

    The bound of a tensor that calibration saw is what it saw. The others follow from the inputs of their node;
    operators without a rule give infinity. Nothing is concluded from outputs to inputs. Rounding in float32 may exceed
    a bound by a few parts in a million.

    Args:
        model: a prepared model.
        amax: largest magnitude seen, by tensor name; where it is given it must hold.
    """
    bounds = {str(value.name): amax.get(str(value.name), math.inf) for value in model.graph.inputs}
    for node in model.graph:
        for output in node.outputs:
            if output.name:
                seen = amax.get(output.name)
                bounds[output.name] = _bound(node, output, bounds) if seen is None else seen
    return bounds


def _bound(node: ir.Node, output: ir.Value, bounds: Mapping[str, float]) -> float:
    """Bound the magnitude of a node's output from those of its inputs."""
    kind = node.op_type
    if node.domain != "" or not node.inputs or (output is not node.outputs[0] and kind != "Split"):
        return math.inf  # the other outputs of MaxPool and Dropout are indices and masks
    sources = [_operand(value, bounds) for value in node.inputs]
    data = sources[0]
    if kind in _PRESERVING:
        return data
    if kind in _LIMITED:
        return _LIMITED[kind]
    if kind in ("Add", "Sub", "Sum"):
        return sum(sources)
    if kind == "Mul":
        return _times(data, sources[1])
    if kind in ("Concat", "Max", "Mean", "Min"):
        return max(sources)
    if kind == "Where":
        return max(sources[1:])
    if kind == "Pad":
        return max(sources[::2])  # inputs 1 and 3 are widths and axes
    if kind in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return _weighted(node, sources)
    if kind in ("Elu", "LeakyRelu", "PRelu"):
        return _times(data, max(1.0, sources[1] if kind == "PRelu" else abs(_alpha(node))))
    if kind in ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"):
        return _normalized(node, sources)
    if kind == "BatchNormalization":
        return _batch_normalized(node, data)
    return _special(node, output, data)


def _product(node: ir.Node, sources: list[float]) -> float:
    """Bound the product of two activations: |sum of K terms| <= K times the largest one.

    What a Softmax gives along its last axis sums up to 1, so that its product is an average, however long it is.
    """
    left, right = node.inputs[:2]
    softmax = left.producer() if left is not None else None
    if left is None or right is None:
        return math.inf
    if softmax is not None and softmax.op_type == "Softmax" and softmax.domain == "":
        axis = softmax.attributes.get("axis")
        if axis is None or axis.as_int() in (-1, None if left.shape is None else len(left.shape) - 1):
            return sources[1]
    inner = _size(left, -1) or _size(right, -2)
    return math.inf if inner is None else _times(_times(float(inner), sources[0]), sources[1])


def _size(value: ir.Value, axis: int) -> int | None:
    """Return the size of an axis; where shape inference left it open, from what a Reshape before it splits.

    An open first axis on both sides of a Reshape is the batch, which it leaves alone.
    """
    shape = value.shape
    if shape is None or len(shape) < -axis:
        return None
    axis %= len(shape)
    size = shape[axis]
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.inputs else None
    if isinstance(size, int) or producer is None or source is None or source.shape is None:
        return size if isinstance(size, int) else None
    if producer.op_type == "Transpose" and "perm" in producer.attributes:
        return _size(source, producer.attributes["perm"].as_ints()[axis] - len(shape))
    if producer.op_type != "Reshape" or axis == 0 or isinstance(shape[0], int) or isinstance(source.shape[0], int):
        return None
    given = [size for size in source.shape[1:] if isinstance(size, int)]
    other = [size for place, size in enumerate(shape) if place not in (0, axis) and isinstance(size, int)]
    if len(given) < len(source.shape) - 1 or len(other) < len(shape) - 2 or 0 in other:
        return None
    return int(math.prod(given) // math.prod(other))


def _normalized(node: ir.Node, sources: list[float]) -> float:
    """Bound a normalization over n values: no one of them is more than sqrt(n) deviations from their mean."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return math.inf
    if node.op_type == "GroupNormalization":
        channels = shape[1]
        sizes = [*shape[2:], channels]
        if isinstance(channels, int):
            sizes[-1] = channels // node.attributes["num_groups"].as_int()
    elif node.op_type == "InstanceNormalization":
        sizes = list(shape[2:])
    else:
        axis = node.attributes.get("axis")
        sizes = list(shape[-1 if axis is None else axis.as_int() :])
    if not all(isinstance(size, int) for size in sizes):
        return math.inf
    count = math.prod(size for size in sizes if isinstance(size, int))
    return _times(math.sqrt(count), sources[1]) + (sources[2] if len(sources) > 2 else 0.0)


def _special(node: ir.Node, output: ir.Value, data: float) -> float:
    if node.op_type == "Clip":
        low, high = clip_bounds(node)
        given = [value for value in node.inputs[1:] if value is not None]
        if len(given) > (low is not None) + (high is not None):
            return math.inf  # a limit computed at run time
        ends = np.clip([-data, data], -math.inf if low is None else low, math.inf if high is None else high)
        return float(np.abs(ends).max())
    if node.op_type == "Div":
        divisor = constant_array(node.inputs[1])
        smallest = 0.0 if divisor is None else float(np.abs(divisor.numpy().astype(np.float64)).min(initial=math.inf))
        return data / smallest if smallest else math.inf
    if node.op_type == "Resize":
        # Cubic interpolation overshoots, and a crop outside the image puts its own value there.
        mode, transformation = (node.attributes.get(name) for name in ("mode", "coordinate_transformation_mode"))
        simple = mode is None or mode.as_string() in ("nearest", "linear")
        cropped = transformation is not None and transformation.as_string() == "tf_crop_and_resize"
        return data if simple and not cropped else math.inf
    if node.op_type == "Cast":
        return _cast(output.dtype, data)
    return math.inf


def _cast(dtype: ir.DataType | None, data: float) -> float:
    """Bound a cast: to bool everything but 0 becomes 1; to an integer type that is too small values wrap around."""
    if dtype is None:
        return math.inf
    if dtype == ir.DataType.BOOL:
        return 1.0
    if dtype.is_floating_point():
        return data
    if not dtype.is_signed():
        return math.inf
    return data if data < 2.0 ** (dtype.bitwidth - 1) else math.inf


def _weighted(node: ir.Node, sources: list[float]) -> float:
    data, weight = operands(node)
    constant = constant_array(node.inputs[weight])
    if constant is None:
        return _product(node, sources) if node.op_type == "MatMul" else math.inf
    array = np.abs(constant.numpy().astype(np.float64))
    axis = weight_axis(node)
    if axis is None or node.op_type == "ConvTranspose":
        total = float(array.sum())
    else:
        total = float(array.sum(axis=tuple(other for other in range(array.ndim) if other != axis)).max(initial=0.0))
    bias = sources[2] if len(sources) > 2 else 0.0
    if node.op_type == "Gemm":
        total *= abs(_alpha(node))
        beta = node.attributes.get("beta")
        bias = _times(bias, 1.0 if beta is None else abs(beta.as_float()))
    return _times(total, sources[data]) + bias


def _batch_normalized(node: ir.Node, data: float) -> float:
    constants = [constant_array(value) for value in node.inputs[1:5]]
    scale, shift, mean, variance = (None if c is None else c.numpy().astype(np.float64) for c in constants)
    if scale is None or shift is None or mean is None or variance is None or math.isinf(data):
        return math.inf
    epsilon = node.attributes.get("epsilon")
    deviation = np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
    return float((np.abs(scale / deviation) * (data + np.abs(mean)) + np.abs(shift)).max(initial=0.0))


def _alpha(node: ir.Node) -> float:
    """Return the attribute alpha, by the operator's own default."""
    attribute = node.attributes.get("alpha")
    return (0.01 if node.op_type == "LeakyRelu" else 1.0) if attribute is None else float(attribute.as_float())


def _times(left: float, right: float) -> float:
    """Multiply bounds; 0 times anything finite is 0, also where its bound is infinite."""
    return left * right if left and right else 0.0


def _operand(value: ir.Value | None, bounds: Mapping[str, float]) -> float:
    if value is None:
        return 0.0
    constant = constant_array(value)
    if constant is None:
        return bounds.get(str(value.name), math.inf)
    if constant.dtype == ir.DataType.STRING:
        return math.inf
    largest = float(np.abs(constant.numpy().astype(np.float64)).max(initial=0.0))
    return math.inf if math.isnan(largest) else largest
