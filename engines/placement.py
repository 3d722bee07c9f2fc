"""Where Q/DQ pairs go: the vocabulary of a placement, and the questions about a graph that both targets ask.

A placement is a plan, made from the graph alone: it says which tensors need a scale before anything is calibrated, and
every decision in it carries its rule and its reason. `engines.qdq` carries it out. The two targets have a module each:
`engines.placement_tensorrt` and `engines.placement_cpu`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from engines.graph import constant_array, is_activation

Target = Literal["tensorrt", "cpu"]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose inputs are quantized: the ones that INT8 tensor cores and VNNI carry out."""

COMMUTING = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "MaxPool", "Pad", "Split", "Expand",
    "DepthToSpace", "SpaceToDepth", "Dropout", "Resize", "Gather",
)  # fmt: skip
"""Operators that move or select values without computing new ones: quantizing before or after them is the same.

Pad, Resize and Gather do so in some of their modes only: `commutes` decides.
"""


@dataclass(frozen=True, slots=True)
class ActivationPoint:
    """One Q/DQ pair on an activation.

    Attributes:
        tensor: the tensor that QuantizeLinear reads.
        scale_of: the calibrated tensor whose scale it takes; another one only across `COMMUTING` operators, so that a Q
            that TensorRT moves across them meets the same scale on both sides.
        uses: (node, input index) of the edges that read the dequantized value; None for every edge and graph output.
        rule: short name of the rule that asks for it.
        reason: why, in one sentence.
        unsigned: stored as uint8, with zero point 0 where the tensor is never negative and 128 elsewhere; else int8.
        nonnegative: the graph itself guarantees values >= 0.
        divisor: scale = amax / divisor: 127, or 255 where an upper clip has to coincide with the largest code.
        ceiling: that clip; amax counts up to there.
        span: for affine codes, the lowest and the highest real value that they reach, 0 among them: scale =
            (highest - lowest) / 255 and the zero point is the code of 0; else None.
        amax: the largest magnitude where the graph itself guarantees one, as a Softmax does: scale = amax / divisor
            without any calibration; else None.
    """

    tensor: str
    scale_of: str
    uses: tuple[tuple[str, int], ...] | None
    rule: str
    reason: str
    unsigned: bool = False
    nonnegative: bool = False
    divisor: int = 127
    ceiling: float | None = None
    span: tuple[float, float] | None = None
    amax: float | None = None

    @property
    def zero_point(self) -> int:
        """The code of real 0."""
        if self.span is not None:
            lowest, highest = self.span
            return round(-lowest * 255 / (highest - lowest))
        return 128 if self.unsigned and not self.nonnegative else 0


@dataclass(frozen=True, slots=True)
class WeightPoint:
    """One weight stored as INT8 initializer and DequantizeLinear.

    Attributes:
        node: the weighted node.
        index: which of its inputs the weight is.
        axis: the output-channel axis of the per-channel scales, or None for one scale.
        data_scale_of: the tensor whose scale the node's data input takes.
        integer_bias: on the CPU target, store the bias as INT32 with scale s_x * s_w.
    """

    node: str
    index: int
    axis: int | None
    data_scale_of: str
    integer_bias: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a weighted node, and why.

    Attributes:
        node: its name.
        op_type: its operator.
        quantized: whether it will compute on INT8 values.
        rule: short name of the rule.
        reason: why, in one sentence.
    """

    node: str
    op_type: str
    quantized: bool
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """A whole plan for one graph and one target.

    Attributes:
        target: whose kernels it is for.
        activations: the pairs on activations.
        weights: the weights stored as INT8.
        decisions: what happens to each weighted node.
        groups: names of the calibrated tensors that share one scale, see `engines.scale_groups`.
    """

    target: Target
    activations: tuple[ActivationPoint, ...]
    weights: tuple[WeightPoint, ...]
    decisions: tuple[Decision, ...]
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def tensors(self) -> list[str]:
        """Names of the calibrated tensors that it takes scales from, each once, in order."""
        return list(dict.fromkeys(point.scale_of for point in self.activations if point.amax is None))


def operands(node: ir.Node) -> tuple[int, int]:
    """Return the input indices of a weighted node's activation and of its weight."""
    if node.op_type == "MatMul" and constant_array(node.inputs[1]) is None:
        return 1, 0
    return 0, 1


def weight_axis(node: ir.Node) -> int | None:
    """Return the output-channel axis of a weighted node's weight.

    Conv [K, C, ...]: 0. ConvTranspose [C, K, ...]: 1; with groups, axis 1 holds K / groups channels that several groups
    share, so there is one scale for the whole. Gemm: 0 with transB, else 1. MatMul [K, N]: 1; other ranks, and a weight
    on the left-hand side: one scale.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if _int_attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if _int_attribute(node, "transB", 0) else 1
    _, weight = operands(node)
    tensor = constant_array(node.inputs[weight])
    return 1 if weight == 1 and tensor is not None and len(tensor.shape) == 2 else None


class Origins:
    """Where the values of one graph come from: `root` and `never_negative`, each found once.

    What was found for one value serves all that depend on it, so that asking for every value of a graph takes time
    linear in its size, however deep it is. The graph must not change meanwhile.
    """

    def __init__(self) -> None:
        self._roots: dict[ir.Value, ir.Value] = {}
        self._nonnegative: dict[ir.Value, bool] = {}

    def root(self, value: ir.Value) -> ir.Value:
        """Follow a value back across `COMMUTING` operators to the tensor that its values come from."""
        passed: list[ir.Value] = []
        while value not in self._roots:
            passed.append(value)
            source = _moved_from(value)
            if source is None:
                break
            value = source
        found = self._roots.get(value, value)
        self._roots.update(dict.fromkeys(passed, found))
        return found

    def never_negative(self, value: ir.Value) -> bool:
        """Tell whether the graph itself guarantees that a tensor holds no negative value."""
        waiting = [self.root(value)]
        while waiting:
            current = waiting[-1]
            if current in self._nonnegative:
                waiting.pop()
                continue
            answer = _nonnegative(current.producer())
            if isinstance(answer, bool):
                self._nonnegative[current] = answer
                continue
            operands = [self.root(operand) for operand in answer]
            unknown = [operand for operand in operands if operand not in self._nonnegative]
            waiting.extend(unknown)
            if not unknown:
                self._nonnegative[current] = all(self._nonnegative[operand] for operand in operands)
        return self._nonnegative[self.root(value)]


def root(value: ir.Value) -> ir.Value:
    """Follow one value back to the tensor that its values come from; see `Origins`, which serves many values."""
    return Origins().root(value)


def never_negative(value: ir.Value) -> bool:
    """Tell whether the graph guarantees that one tensor is never negative; see `Origins`, which serves many values."""
    return Origins().never_negative(value)


def commutes(node: ir.Node) -> bool:
    """Tell whether a node only moves or selects the values of its first input.

    A Pad does where it adds zeros or repeats values: zero is a code of every scale. A Gather does where it reorders:
    its indices are constants that leave nothing out. One that picks a few rows has a range of its own.
    """
    if node.op_type not in COMMUTING or node.domain != "":
        return False
    if node.op_type == "Resize":
        return _attribute(node, "mode", "nearest") == "nearest" and (
            _attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        )
    if node.op_type == "Gather":
        return _reorders(node)
    if node.op_type != "Pad":
        return True
    if _attribute(node, "mode", "constant") != "constant":
        return True
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if fill is None:
        return True
    constant = constant_array(fill)
    return constant is not None and float(constant.numpy().reshape(-1)[0]) == 0.0


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Return the constant lower and upper bound of a Clip; None where one is absent or computed at run time."""

    def bound(index: int) -> float | None:
        value = node.inputs[index] if len(node.inputs) > index else None
        constant = constant_array(value)
        return None if constant is None else float(constant.numpy().reshape(-1)[0])

    return bound(1), bound(2)


def main_graph_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the (node, input index) pairs that read a value in its own graph; readers in subgraphs are left out."""
    return [(use.node, use.idx) for use in value.uses() if use.node.graph is value.graph or value.graph is None]


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value, where it is the only reader and the value is not a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _moved_from(value: ir.Value) -> ir.Value | None:
    """Return the activation whose values the producer of `value` moves; None where it computes new ones."""
    producer = value.producer()
    if producer is None or not commutes(producer):
        return None
    source = producer.inputs[0]
    return source if is_activation(source) else None


def _nonnegative(producer: ir.Node | None) -> bool | list[ir.Value]:
    """Tell whether an operator gives no negative value, or which activations decide that."""
    if producer is None or producer.domain != "":
        return False
    if producer.op_type in ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Exp"):
        return True
    if producer.op_type == "Clip":
        low = clip_bounds(producer)[0]
        return low is not None and low >= 0
    operands = producer.inputs
    if producer.op_type in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"):
        operands = operands[:1]  # the other one holds axes
    elif producer.op_type not in ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Add"):
        return False
    activations: list[ir.Value] = []
    for operand in operands:
        constant = constant_array(operand)
        if operand is None or (constant is not None and bool((constant.numpy() < 0).any())):
            return False
        if constant is None:
            activations.append(operand)
    return activations


def _reorders(gather: ir.Node) -> bool:
    """Tell whether the constant indices of a Gather name every element of its axis."""
    data, indices = gather.inputs[0], constant_array(gather.inputs[1])
    if data is None or data.shape is None or indices is None:
        return False
    attribute = gather.attributes.get("axis")
    length = data.shape[0 if attribute is None else attribute.as_int()]
    if not isinstance(length, int) or indices.size < length:
        return False
    return len({int(index) % length for index in indices.numpy().reshape(-1)}) == length


def _attribute(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _int_attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())
