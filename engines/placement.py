"""Where Q/DQ pairs go: the vocabulary of a placement, and the questions about a graph that both targets ask.

A placement is a plan, made from the graph alone: it says which tensors need a scale before anything is calibrated, and
every decision in it carries its rule and its reason. `engines.qdq` carries it out. The two targets have a module each:
`engines.placement_tensorrt` and `engines.placement_cpu`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from engines.errors import ModelError
from engines.graph import constant_array, is_activation, name_of

Target = Literal["tensorrt", "cpu"]
Residual = Literal["int8", "float"]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose inputs are quantized: the ones that INT8 tensor cores and VNNI carry out."""

COMMUTING = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "MaxPool", "Pad", "Split", "Expand",
    "DepthToSpace", "SpaceToDepth", "Dropout", "Resize",
)  # fmt: skip
"""Operators that move or select values without computing new ones: quantizing before or after them is the same.

Pad and Resize do so in some of their modes only: `commutes` decides.
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

    @property
    def zero_point(self) -> int:
        """The code of real 0."""
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
    """A whole plan for one graph and one target."""

    target: Target
    activations: tuple[ActivationPoint, ...]
    weights: tuple[WeightPoint, ...]
    decisions: tuple[Decision, ...]

    @property
    def tensors(self) -> list[str]:
        """Names of the calibrated tensors that it takes scales from, each once, in order."""
        return list(dict.fromkeys(point.scale_of for point in self.activations))


def weighted_nodes(model: ir.Model, exclude: Sequence[str] = ()) -> tuple[list[ir.Node], list[Decision]]:
    """Sort the weighted nodes into those that are quantized and those that are not.

    Args:
        model: a prepared model.
        exclude: regular expressions; a node whose whole name one of them matches stays float.

    Returns:
        The nodes to quantize, in graph order, and a decision for every weighted node.

    Raises:
        ModelError: an expression is not valid, or matches no weighted node.
    """
    nodes = [node for node in model.graph if node.op_type in WEIGHTED and node.domain == ""]
    excluded = _excluded(nodes, exclude)
    chosen: list[ir.Node] = []
    decisions: list[Decision] = []
    for node in nodes:
        name = node.name or ""
        reason = _why_not(node)
        if name in excluded:
            rule, reason = "excluded", f"excluded by the expression {excluded[name]!r}"
        elif reason is not None:
            rule = "not-quantizable"
        else:
            rule, reason = "weighted-inputs", "all inputs of weighted operators are quantized"
            chosen.append(node)
        decisions.append(Decision(name, node.op_type, rule == "weighted-inputs", rule, reason))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.graph is not model.graph and node.op_type in WEIGHTED and node.domain == "":
            reason = "it stands in a branch or loop body; only the main graph is calibrated and quantized"
            decisions.append(Decision(node.name or "", node.op_type, False, "subgraph", reason))
    return chosen, decisions


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


def root(value: ir.Value) -> ir.Value:
    """Follow a value back across `COMMUTING` operators to the tensor that its values come from.

    A Pad counts as commuting only where it adds zeros or repeats values: zero is a code of every scale.
    """
    while True:
        producer = value.producer()
        if producer is None or not commutes(producer):
            return value
        source = producer.inputs[0]
        if source is None or not is_activation(source):
            return value
        value = source


def commutes(node: ir.Node) -> bool:
    """Tell whether a node only moves or selects the values of its first input."""
    if node.op_type not in COMMUTING or node.domain != "":
        return False
    if node.op_type == "Resize":
        return _attribute(node, "mode", "nearest") == "nearest" and (
            _attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        )
    if node.op_type != "Pad":
        return True
    if _attribute(node, "mode", "constant") != "constant":
        return True
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if fill is None:
        return True
    constant = constant_array(fill)
    return constant is not None and float(constant.numpy().reshape(-1)[0]) == 0.0


def never_negative(value: ir.Value) -> bool:
    """Tell whether the graph itself guarantees that a tensor holds no negative value."""
    producer = root(value).producer()
    if producer is None:
        return False
    if producer.op_type in ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Exp"):
        return True
    if producer.op_type == "Clip":
        low = clip_bounds(producer)[0]
        return low is not None and low >= 0
    if producer.op_type in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"):
        source = producer.inputs[0]  # the other one holds axes
        return source is not None and _nonnegative_operand(source)
    if producer.op_type in ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Add"):
        return all(source is not None and _nonnegative_operand(source) for source in producer.inputs)
    return False


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


def scale_tensor(value: ir.Value) -> str:
    """Name the calibrated tensor that gives `value` its scale."""
    return name_of(root(value))


def _excluded(nodes: Iterable[ir.Node], expressions: Sequence[str]) -> dict[str, str]:
    excluded: dict[str, str] = {}
    names = [node.name or "" for node in nodes]
    for expression in expressions:
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise ModelError(f"Cannot exclude {expression!r}: not a regular expression: {error}.") from error
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ModelError(
                f"Cannot exclude {expression!r}: it matches the whole name of none of the {len(names)} weighted nodes "
                f"({shown}). Use '.*' for the parts that vary."
            )
        excluded.update(dict.fromkeys(matched, expression))
    return excluded


def _why_not(node: ir.Node) -> str | None:
    """Say why a weighted node cannot be quantized; None where it can."""
    activation, weight = operands(node)
    constant = constant_array(node.inputs[weight])
    if constant is None:
        if node.op_type == "MatMul":
            return "both operands are activations: attention products stay float"
        return "its weight is computed at run time"
    if constant.dtype != ir.DataType.FLOAT:
        return f"its weight is {constant.dtype.name}, not FLOAT"
    data = node.inputs[activation]
    if constant_array(data) is not None:
        return "its data input is a constant"
    if not is_activation(data):
        return "the type of its data input is unknown: shape inference stops at an operator before it"
    return None


def _nonnegative_operand(value: ir.Value) -> bool:
    constant = constant_array(value)
    if constant is not None:
        return bool((constant.numpy() >= 0).all())
    return never_negative(value)


def _attribute(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _int_attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())
