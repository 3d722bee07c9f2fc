"""FP16 models whose range is guarded by what calibration saw.

FP16 ends at 65504. ONNX Runtime's converter turns a whole FP32 graph into FP16 and keeps the nodes of a block list in
FP32; this module decides that list: a node stays FP32 when one of its weights, or a value that it reads or writes,
would leave the range. Values are taken from the calibration where it saw them. For tensors in between (the output of a
convolution before its Relu, say), a bound follows from interval arithmetic: |W x + b| <= sum |W| * amax(x) + |b|. A
value whose bound stays inside the range is safe; one that may leave it is held in FP32. No pass over the data is
needed beside the calibration's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from engines.graph import PreparedModel, constant_array, is_activation, quiet
from engines.onnxrt import PRECISION_KEY
from engines.placement import clip_bounds, operands, weight_axis

FP16_MAX = 65504.0
"""Largest finite FP16 number."""

MARGIN = 2.0
"""Values seen in calibration may be this much larger in use before they overflow."""


@dataclass(frozen=True, slots=True)
class HeldNode:
    """A node that stays FP32.

    Attributes:
        node: its name.
        op_type: its operator.
        reason: which value is too large, and how large.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fp16Model:
    """An FP16 model with FP32 inputs and outputs.

    Attributes:
        model: the model.
        held: the nodes kept in FP32, and why.
        nodes: number of nodes of the FP32 graph.
    """

    model: onnx.ModelProto
    held: tuple[HeldNode, ...]
    nodes: int


def convert_to_fp16(prepared: PreparedModel, amax: Mapping[str, float]) -> Fp16Model:
    """Convert a prepared FP32 model to FP16.

    Args:
        prepared: the model.
        amax: largest magnitude that calibration saw, by tensor name; tensors that are missing are bounded from the
            others.

    Returns:
        The model; inputs and outputs keep FP32, so that it is a drop-in replacement.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    held = held_in_fp32(prepared, amax)
    proto = onnx.ModelProto()
    proto.CopyFrom(prepared.proto)
    with quiet():
        converted: onnx.ModelProto = convert_float_to_float16(
            proto, keep_io_types=True, node_block_list=[node.node for node in held], disable_shape_infer=False
        )
    for key, value in {PRECISION_KEY: "fp16"}.items():
        entry = converted.metadata_props.add()
        entry.key, entry.value = key, value
    return Fp16Model(converted, held, len(prepared.proto.graph.node))


def held_in_fp32(prepared: PreparedModel, amax: Mapping[str, float]) -> tuple[HeldNode, ...]:
    """Decide which nodes stay FP32: those with a weight or value that leaves, or may leave, the FP16 range."""
    model = prepared.ir()
    bounds = magnitude_bounds(model, amax)
    held: list[HeldNode] = []
    for node in model.graph:
        reason = _too_large(node, bounds, amax)
        if reason is not None:
            held.append(HeldNode(node.name or "", node.op_type, reason))
    return tuple(held)


def magnitude_bounds(model: ir.Model, amax: Mapping[str, float]) -> dict[str, float]:
    """Return an upper bound of |x| for every float activation: what calibration saw, or what interval arithmetic says.

    Operators without a rule give infinity, except that a measured value downstream of one that passes magnitudes on
    unchanged bounds nothing upstream: the bound is one-way, from inputs to outputs.
    """
    bounds: dict[str, float] = {}
    for value in model.graph.inputs:
        bounds[str(value.name)] = amax.get(str(value.name), math.inf)
    for node in model.graph:
        for output in node.outputs:
            if not output.name:
                continue
            seen = amax.get(output.name)
            bounds[output.name] = seen if seen is not None else _bound(node, bounds)
    return bounds


def _too_large(node: ir.Node, bounds: Mapping[str, float], amax: Mapping[str, float]) -> str | None:
    for value in node.inputs:
        constant = constant_array(value)
        if value is not None and constant is not None and constant.dtype == ir.DataType.FLOAT and constant.size:
            largest = float(np.abs(constant.numpy()).max())
            if largest > FP16_MAX:
                return f"its constant {value.name!r} reaches {largest:.4g}; FP16 ends at {FP16_MAX:.0f}"
    for value in [*node.inputs, *node.outputs]:
        if value is None or not value.name or not is_activation(value):
            continue
        bound = bounds.get(value.name, math.inf)
        if value.name in amax and bound * MARGIN > FP16_MAX:
            return f"calibration saw {bound:.4g} in {value.name!r}; FP16 ends at {FP16_MAX:.0f} (margin {MARGIN:g}x)"
        if value.name not in amax and bound > FP16_MAX:
            size = "no bound" if math.isinf(bound) else f"a bound of {bound:.4g}"
            return f"{value.name!r} was not calibrated and has {size}; FP16 ends at {FP16_MAX:.0f}"
    return None


def _bound(node: ir.Node, bounds: Mapping[str, float]) -> float:
    """Bound the magnitude of a node's outputs from those of its inputs."""
    sources = [_operand(value, bounds) for value in node.inputs]
    kind = node.op_type
    if kind in _PRESERVING or (kind == "Pad" and len(sources) < 3):
        return sources[0]
    if kind in _LIMITED:
        return _LIMITED[kind]
    if kind == "Clip":
        low, high = clip_bounds(node)
        limit = max(abs(low), abs(high)) if low is not None and high is not None else math.inf
        return min(sources[0], limit)
    if kind in ("Add", "Sub", "Sum"):
        return sum(sources)
    if kind == "Mul":
        return math.prod(sources)
    if kind in ("Concat", "Max", "Min", "Where", "Pad"):
        return max(sources[1:] if kind == "Where" else sources[::2] if kind == "Pad" else sources)
    if kind in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return _weighted_bound(node, sources)
    return math.inf


_PRESERVING = frozenset(
    {
        "Abs", "AveragePool", "Cast", "DepthToSpace", "Dropout", "Elu", "Expand", "Flatten", "Gather", "Gelu",
        "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Neg", "ReduceMax",
        "ReduceMean", "ReduceMin", "Relu", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that do not make the largest magnitude larger (Elu by at most alpha, which is 1 by default)."""

_LIMITED = {"Sigmoid": 1.0, "HardSigmoid": 1.0, "Tanh": 1.0, "Softmax": 1.0, "Erf": 1.0, "Softsign": 1.0, "Sin": 1.0}


def _weighted_bound(node: ir.Node, sources: list[float]) -> float:
    data, weight = operands(node)
    constant = constant_array(node.inputs[weight])
    if constant is None:
        return math.inf
    array = np.abs(constant.numpy().astype(np.float64))
    axis = weight_axis(node)
    if axis is None or node.op_type == "ConvTranspose":
        total = float(array.sum())
    else:
        total = float(array.sum(axis=tuple(other for other in range(array.ndim) if other != axis)).max())
    bias = sources[2] if len(sources) > 2 else 0.0
    alpha = node.attributes.get("alpha")
    beta = node.attributes.get("beta")
    if node.op_type == "Gemm":
        total *= abs(alpha.as_float()) if alpha is not None else 1.0
        bias *= abs(beta.as_float()) if beta is not None else 1.0
    return total * sources[data] + bias if total else bias


def _operand(value: ir.Value | None, bounds: Mapping[str, float]) -> float:
    if value is None:
        return 0.0
    constant = constant_array(value)
    if constant is not None:
        if constant.size == 0 or constant.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return 0.0
        return float(np.abs(constant.numpy()).max())
    return bounds.get(str(value.name), math.inf)
