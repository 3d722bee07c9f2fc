"""Which weighted nodes are quantized: one rule per reason not to, asked in order; what no rule keeps is quantized.

A rule has a name, a sentence that says why, a source, and a function that gives the reason for one node with the
numbers that decided. The first rule that answers decides, and every decision names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from engines.errors import ModelError
from engines.graph import constant_array, is_activation
from engines.node_facts import RECURRENT, holds_weights, is_embedding, is_expectation, weight_shape
from engines.node_rules_attention import attention_product
from engines.node_rules_context import NodeContext
from engines.node_rules_kernels import few_channels, few_channels_per_group, matrix_vector, small_product
from engines.placement import WEIGHTED, Decision, Target, operands
from engines.placement_options import PlacementOptions

BOTH: tuple[Target, ...] = ("tensorrt", "cpu")
TENSORRT: tuple[Target, ...] = ("tensorrt",)

GUIDE = "NVIDIA TensorRT documentation, explicit quantization"
MODELOPT = "nvidia-modelopt 0.47, modelopt.onnx.quantization"


@dataclass(frozen=True, slots=True)
class NodeRule:
    """A reason to leave weighted nodes in float.

    Attributes:
        name: short name; stands in the decisions.
        why: why the rule exists, in one sentence.
        source: where it comes from.
        targets: whom it concerns: both where it is about what can be written down or about accuracy, TensorRT alone
            where it is about its kernels.
        can_be_overruled: whether `include` may quantize such a node all the same.
        applies: gives the reason for one node, or None.
    """

    name: str
    why: str
    source: str
    targets: tuple[Target, ...]
    can_be_overruled: bool
    applies: Callable[[ir.Node, NodeContext], str | None]


def _in_body(node: ir.Node, context: NodeContext) -> str | None:
    if node.graph is context.model.graph:
        return None
    return "it stands in a branch or loop body; only the main graph is calibrated and quantized"


def _recurrent(node: ir.Node, context: NodeContext) -> str | None:
    if node.op_type not in RECURRENT or node.domain != "":
        return None
    return (
        f"{node.op_type} carries a state from step to step: TensorRT has no INT8 recurrent layer, and ONNX Runtime "
        "quantizes recurrent layers at run time only"
    )


def _embedding(node: ir.Node, context: NodeContext) -> str | None:
    if not is_embedding(node):
        return None
    table = constant_array(node.inputs[0])
    if table is None:
        raise AssertionError(f"{node.name} has no table")
    size = " x ".join(str(length) for length in table.shape.numpy())
    return (
        f"a look-up in a table of {size} computes nothing that INT8 could speed up; the table stays {table.dtype.name}"
    )


def _unsupported(node: ir.Node, context: NodeContext) -> str | None:
    if node.domain != "":
        return f"{node.op_type} belongs to the domain {node.domain!r}; only operators of ONNX are quantized"
    if node.op_type in WEIGHTED:
        return None
    return f"{node.op_type} is no operator that computes on INT8 between Q and DQ; those are {', '.join(WEIGHTED)}"


def _not_quantizable(node: ir.Node, context: NodeContext) -> str | None:
    data, index = operands(node)
    weight = constant_array(node.inputs[index])
    if weight is None and node.op_type != "MatMul":
        return "its weight is computed at run time"
    if weight is not None and weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype.name}, not FLOAT"
    if constant_array(node.inputs[data]) is not None:
        return "its data input is a constant"
    if not is_activation(node.inputs[data]) or (weight is None and not is_activation(node.inputs[index])):
        return "the type of its data input is unknown: shape inference stops at an operator before it"
    return None


def _expectation(node: ir.Node, context: NodeContext) -> str | None:
    if not is_expectation(node):
        return None
    bins = max(weight_shape(node) or (0,))
    return (
        f"{node.op_type} averages the {bins} equally spaced bins of a Softmax: probabilities in steps of 1/127 would "
        "shift the average, and it costs next to nothing"
    )


def _detection_head(node: ir.Node, context: NodeContext) -> str | None:
    return context.detection_heads.get(node.name or "")


RULES: tuple[NodeRule, ...] = (
    NodeRule(
        "subgraph",
        "Tensors of branches and loop bodies are no tensors of the main graph, so calibration cannot see them.",
        "ONNX specification, control-flow operators",
        BOTH,
        False,
        _in_body,
    ),
    NodeRule(
        "recurrent",
        "Neither target has a recurrent operator that reads statically quantized values.",
        "onnx-tensorrt, docs/operators.md: LSTM, GRU and RNN in FP32, FP16 and BF16",
        BOTH,
        False,
        _recurrent,
    ),
    NodeRule(
        "embedding",
        "A look-up reads a few rows of its table and multiplies nothing, so that quantizing it costs accuracy only.",
        f"{MODELOPT}.ort_utils: Gather is taken off the list of operators",
        BOTH,
        False,
        _embedding,
    ),
    NodeRule(
        "unsupported-operator",
        "Q and DQ around an operator without an INT8 kernel are work for nothing.",
        f"{GUIDE}: quantizable layers",
        BOTH,
        False,
        _unsupported,
    ),
    NodeRule(
        "not-quantizable",
        "An INT8 weight is a constant made from FP32 values, and its input is a tensor that calibration has seen.",
        f"{MODELOPT}.graph_utils.find_nodes_from_convs_to_exclude: weights that are no constants",
        BOTH,
        False,
        _not_quantizable,
    ),
    NodeRule(
        "attention",
        "TensorRT fuses attention as a whole in FP16, and scores and probabilities lose most by rounding.",
        f"{MODELOPT}.partitioning.find_mha_partitions and graph_utils.find_nodes_from_mha_to_exclude",
        BOTH,
        False,
        attention_product,
    ),
    NodeRule(
        "expectation",
        "A fixed average over the bins of a distribution decides coordinates and is too small to be worth INT8.",
        "X. Li et al., Generalized Focal Loss, 2020 (arXiv:2006.04388); ultralytics pull request 26171",
        BOTH,
        True,
        _expectation,
    ),
    NodeRule(
        "detection-head",
        "The last convolutions of a detector write coordinates that nothing after them corrects; they are little work.",
        "ultralytics pull request 26171: output convolutions of heads in float",
        BOTH,
        True,
        _detection_head,
    ),
    NodeRule(
        "few-channels",
        "INT8 tensor cores take 16 channels at a time; with fewer, padding and Q/DQ cost more than INT8 saves.",
        f"{MODELOPT}.graph_utils.find_nodes_from_convs_to_exclude",
        TENSORRT,
        True,
        few_channels,
    ),
    NodeRule(
        "few-channels-per-group",
        "Each group is a convolution of its own with few channels, and only depthwise-like ones have INT8 kernels.",
        f"{MODELOPT}.graph_utils.find_nodes_from_convs_to_exclude; TensorRT issue 1934 for transposed ones",
        TENSORRT,
        True,
        few_channels_per_group,
    ),
    NodeRule(
        "matrix-vector",
        "A product with a vector is bound by memory and does not use tensor cores; Q/DQ only add to it.",
        f"{MODELOPT}.graph_utils.find_nodes_from_matmul_to_exclude",
        TENSORRT,
        True,
        matrix_vector,
    ),
    NodeRule(
        "small-product",
        "A product that does not fill an INT8 tensor core gains nothing, and Q/DQ around it cost time.",
        f"{MODELOPT}.graph_utils.find_nodes_from_matmul_to_exclude",
        TENSORRT,
        True,
        small_product,
    ),
)
"""The rules in the order in which they are asked: what cannot be quantized, what should not be, what does not pay."""


def weighted_nodes(
    model: ir.Model,
    options: PlacementOptions | None = None,
    *,
    target: Target = "tensorrt",
    amax: Mapping[str, float] | None = None,
) -> tuple[list[ir.Node], list[Decision]]:
    """Sort the nodes that hold weights into those that are quantized and those that are not.

    Args:
        model: a prepared model; it is not changed.
        options: what the user wants; `residual` does not matter here.
        target: whose rules.
        amax: largest magnitude that calibration saw, by tensor name; the rule for detection heads sees more with it.

    Returns:
        The nodes to quantize, in graph order, attention products among them; and a decision for every node that holds
        weights: those of the main graph in its order, then those of branches and loop bodies.

    Raises:
        ModelError: an expression is not valid, or matches no node that holds weights.
    """
    options = options or PlacementOptions()
    context = NodeContext(model, target, options.attention, amax or {})
    nodes = [node for node in context.nodes if holds_weights(node)]
    excluded, included = _matched(nodes, options.exclude, "exclude"), _matched(nodes, options.include, "include")
    rules = [rule for rule in RULES if target in rule.targets]
    chosen: list[ir.Node] = []
    decisions: list[Decision] = []
    for node in nodes:
        decision = _decide(node, context, rules, excluded, included)
        decisions.append(decision)
        if decision.quantized:
            chosen.append(node)
    decisions.extend(
        _decide(node, context, rules, {}, {})
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.graph is not model.graph and holds_weights(node)
    )
    return chosen, decisions


def _decide(
    node: ir.Node,
    context: NodeContext,
    rules: Sequence[NodeRule],
    excluded: Mapping[str, str],
    included: Mapping[str, str],
) -> Decision:
    name = node.name or ""
    if name in excluded:
        return Decision(name, node.op_type, False, "excluded", f"excluded by the expression {excluded[name]!r}")
    for rule in rules:
        reason = rule.applies(node, context)
        if reason is None:
            continue
        if not rule.can_be_overruled or name not in included:
            return Decision(name, node.op_type, False, rule.name, reason)
        reason = f"included by the expression {included[name]!r} against the rule {rule.name}: {reason}"
        return Decision(name, node.op_type, True, "included", reason)
    _, index = operands(node)
    weight = node.inputs[index]
    if constant_array(weight) is None:
        reason = "attention product: both operands are activations, and both are quantized"
        return Decision(name, node.op_type, True, "attention", reason)
    reason = "all inputs of weighted operators are quantized"
    table = context.tables.get(weight.name or "") if weight is not None else None
    if table is not None:
        reason += f"; {table!r} looks up in the same weight, and goes on reading it in float"
    return Decision(name, node.op_type, True, "weighted-inputs", reason)


def _matched(nodes: Sequence[ir.Node], expressions: Sequence[str], verb: str) -> dict[str, str]:
    """Return the expression that matches a node's whole name, by name; the last one where several do."""
    found: dict[str, str] = {}
    names = [node.name or "" for node in nodes]
    for expression in expressions:
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise ModelError(f"Cannot {verb} {expression!r}: not a regular expression: {error}.") from error
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ModelError(
                f"Cannot {verb} {expression!r}: it matches the whole name of none of the {len(names)} weighted nodes "
                f"({shown}). Use '.*' for the parts that vary."
            )
        found.update(dict.fromkeys(matched, expression))
    return found
