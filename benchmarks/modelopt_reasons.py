"""Why our placement leaves in float what ModelOpt's puts between Q and DQ: a reason for each kind of difference.

A difference is an edge: a node that reads an INT8 value in ModelOpt's graph and a float one in ours, or the other way
round. `kind_of` says which kind it is, from the graph alone; a kind without a reason is a difference that no one has
thought about yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from engines.epilogues import pointwise_source, self_gated
from engines.graph import constant_array, is_activation
from engines.pair_rules_residual import residual_skips
from engines.placement import Decision, root

REASONS = {
    "attention": (
        "Products of two activations. ModelOpt quantizes them unless a mask is added to the bare scores; here "
        "`--attention int8` asks for it, under the same condition. Scores and probabilities lose most by rounding, "
        "and TensorRT's fused FP16 attention is what INT8 has to beat."
    ),
    "detection-head": (
        "The last convolutions of a detection head. ModelOpt knows no such rule and leaves it to `nodes_to_exclude`; "
        "the authors of detectors exclude them by name (ultralytics pull request 26171). Here they are recognised, "
        "and `--include` overrules it."
    ),
    "expectation": (
        "The average over the bins of a Softmax (DFL): its weight is 0, 1, 2, ..., and probabilities in steps of "
        "1/127 would shift every box. Excluded by name where detectors are exported with ModelOpt."
    ),
    "few-channels-per-group": (
        "ConvTranspose with fewer than 16 channels in each group. ModelOpt's rule on channels looks at Conv alone; "
        "for transposed ones with groups TensorRT has no INT8 kernel (TensorRT issue 1934)."
    ),
    "float-operator": (
        "The operator computes in float in both: its weight has no Q/DQ. ModelOpt's pair stands before a Pool, "
        "Reshape or Split whose output it reads, or serves another reader of the same tensor. A value that is only "
        "dequantized again is rounded for nothing."
    ),
    "shared-pair": (
        "The pair is there in both graphs for another reader. ModelOpt hands the dequantized tensor to every reader "
        "(ONNX Runtime's `DedicatedQDQPair=False`), here the readers that no rule names take the unrounded one: the "
        "residual stream of a post-norm encoder is the usual case."
    ),
    "concat": (
        "A branch of a Concat. The pair stands behind the Concat here, with one scale for all that meets in it; "
        "TensorRT moves its Q back onto the branches, where it meets the one that is there for other readers. A "
        "Concat that is read in float (before the BatchNormalization of a dense block) gets none."
    ),
    "residual-branch": (
        "The convolution's side of a residual Add. Only the skip may be INT8: a Q on the branch would stand inside "
        "the fused kernel of convolution and sum. ModelOpt has the same rule but does not see it behind a SiLU."
    ),
    "sum": (
        "A sum that no convolution writes: the residual stream of a transformer or of a net with instance norms. It "
        "goes into a normalization in float, no kernel reads or writes it as INT8, and everything later reads what "
        "was rounded here."
    ),
    "normalization": (
        "The input of a normalization (BatchNormalization before its convolution, LayerNormalization, LRN, or what "
        "one is written with). Normalizations compute in float; rounding their input costs accuracy in all that "
        "follows, and the Q behind them already makes them write INT8."
    ),
    "average": (
        "An average over space. It reads INT8 here only where what it writes is read as INT8 and a kernel of INT8 can "
        "write its input so: not before a classifier in float, and not where a gate of the same map is float."
    ),
    "activation": (
        "The inside of an activation that is written with several operators (HardSwish as x Clip(x + 3) / 6, SwiGLU's "
        "SiLU). It fuses with the operator before it as a whole; a Q between them would split the kernel."
    ),
    "gating": (
        "A product of an activation and a gate of the same shape (GLU, SwiGLU), or one that goes into a sum in float "
        "(squeeze-and-excitation before a residual Add, experts). ModelOpt rounds both factors, so that the tensor "
        "before it is written as INT8; here the product alone is rounded, once, by the Q of the operator behind it."
    ),
    "selection": (
        "A Gather that picks rows, or a Shape. The pair stands behind the Gather here, where it has the range of the "
        "rows that are picked."
    ),
    "softmax": "A Softmax: it computes in float, and its inputs are scores whose differences matter.",
    "subgraph": "A branch or loop body reads the tensor from outside; what happens there is not calibrated.",
}
"""The reason for each kind; see `kind_of`."""

POOLS = ("AveragePool", "GlobalAveragePool")
NORMALIZATIONS = ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "LRN")
PARTS_OF_NORMALIZATIONS = ("ReduceMean", "Pow", "Sub")
ACTIVATIONS = ("HardSwish", "Sigmoid", "Gelu", "Relu", "LeakyRelu", "Clip")


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge that reads a dequantized value.

    Attributes:
        node: name of the reader.
        index: which of its inputs.
    """

    node: str
    index: int


class Kinds:
    """Sorts the differences of one graph.

    Args:
        model: the prepared graph, without Q/DQ.
        decisions: ours on its weighted nodes.
        pairs: names of the tensors that stand before a pair of ours.
    """

    def __init__(self, model: ir.Model, decisions: dict[str, Decision], pairs: set[str]) -> None:
        self._nodes = {node.name or "": node for node in model.graph}
        self._decisions = decisions
        nodes = list(model.graph)
        self._gated = self_gated(nodes)
        quantized = {name for name, decision in decisions.items() if decision.quantized}
        self._skips = residual_skips(nodes, quantized, self._gated)
        self._pairs = {root(value).name for node in nodes for value in node.inputs if value and value.name in pairs}

    def operator(self, name: str) -> str:
        """Return the operator of a node."""
        return self._nodes[name].op_type

    def of_node(self, name: str) -> str:
        """Name the kind of a weighted node that ModelOpt quantizes and ours does not: our rule's name."""
        decision = self._decisions.get(name)
        return "undecided" if decision is None or decision.quantized else decision.rule

    def of_edge(self, edge: Edge) -> str:
        """Name the kind of an edge that reads INT8 in ModelOpt's graph alone."""
        node = self._nodes[edge.node]
        value = node.inputs[edge.index]
        if value is None:
            return "unknown"
        if edge.node in self._decisions:
            return "float-operator"
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node)):
            return "subgraph"
        if node.op_type == "Concat":
            return "concat"
        if node in self._skips:
            return "residual-branch"
        if root(value).name in self._pairs:
            return "shared-pair"
        return self._by_operator(node, value)

    def _by_operator(self, node: ir.Node, value: ir.Value) -> str:
        if node.op_type in POOLS:
            return "average"
        if node.op_type in ("Gather", "Shape"):
            return "selection"
        if node.op_type == "Softmax":
            return "softmax"
        if node.op_type in (*NORMALIZATIONS, *PARTS_OF_NORMALIZATIONS) or _is_normalized(node, value):
            return "normalization"
        if node in self._gated or node.op_type in ACTIVATIONS or pointwise_source(node) is not None:
            return "activation"
        if node.op_type in ("Add", "Sum") and all(is_activation(operand) for operand in node.inputs):
            return "sum"
        return "gating" if node.op_type == "Mul" else "unknown"


def _is_normalized(node: ir.Node, value: ir.Value) -> bool:
    """Tell whether a Mul scales a value by what was computed from its own square: a root-mean-square norm."""
    squared = any(use.node.op_type == "Pow" for use in value.uses())
    return node.op_type == "Mul" and squared and all(constant_array(operand) is None for operand in node.inputs)


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return [attribute for attribute in node.attributes.values() if isinstance(attribute, ir.Attr)]
