"""The residual rule: of an Add that a convolution feeds, the skip is quantized and the convolution's input is not.

Which side is the skip is decided by `engines.pair_rules_residual.residual_skips`, on the graph as it would be without
its pairs, so that the linter and the placement never disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from engines.lint_graph import LintGraph, Quantizer, once_per_graph
from engines.lint_rules import GUIDE, MODELOPT, Hit, Rule
from engines.onnxrt import TARGET_KEY
from engines.pair_rules_residual import residual_skips


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """An Add that fuses with the convolution that feeds it.

    Attributes:
        node: the Add.
        branch: the DQ between the convolution and the Add; None where there is none, as it should be.
        skip: the DQ behind the other input; None where it is float.
    """

    node: ir.Node
    branch: Quantizer | None
    skip: Quantizer | None


def quantized_branch(graph: LintGraph) -> Iterator[Hit]:
    """Find residual Adds whose convolution's output is quantized."""
    for found in residual_adds(graph):
        if found.branch is not None:
            skip = "both of its inputs are" if found.skip is not None else "its convolution's input is"
            yield Hit(found.node, f"{skip} quantized")


def float_skip(graph: LintGraph) -> Iterator[Hit]:
    """Find residual Adds whose skip is float. In our models that was asked for by --residual float."""
    ours = TARGET_KEY in graph.metadata
    for found in residual_adds(graph):
        if found.skip is None:
            yield Hit(found.node, "its skip input is float", "note" if ours else None)


@once_per_graph
def residual_adds(graph: LintGraph) -> tuple[ResidualAdd, ...]:
    """Return the residual Adds of the main graph, with the pairs on both sides."""
    quantized: set[str | None] = {found.node.name for found in graph.weighted if found.quantized}
    adds = {node.name: node for node in graph.model.graph if node.op_type == "Add"}
    if not quantized or not adds:
        return ()
    found: list[ResidualAdd] = []
    for twin, skip in residual_skips(list(_without_pairs(graph)), quantized).items():
        node = adds.get(twin.name)
        if node is None:
            continue
        branch, other = node.inputs[1 - skip], node.inputs[skip]
        if branch is not None and other is not None:
            record = graph.by_output.get(branch)
            found.append(ResidualAdd(node, record, graph.origin(other)[0]))
    return tuple(found)


def _without_pairs(graph: LintGraph) -> ir.Graph:
    """Copy the graph without the pairs on its activations."""
    model = graph.model.clone()
    records = {node.name: node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    pairs = [(records.get(first.node.name), records.get(last.node.name)) for first, last in graph.activation_pairs]
    for first, last in pairs:
        if first is None or last is None or first.inputs[0] is None or last.outputs[0].is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(last.outputs[0], first.inputs[0])
        model.graph.remove(last, safe=True)
    for first, _ in pairs:
        if first is not None and first.graph is not None and not list(first.outputs[0].uses()):
            model.graph.remove(first, safe=True)
    return model.graph


RESIDUAL_RULES = (
    Rule(
        "residual-branch",
        "warning",
        "TensorRT fuses Conv + Add into one kernel; a Q between the two splits it, and the sum loses exactness.",
        "take the pair between convolution and Add away; the skip keeps its own.",
        f"{GUIDE}; {MODELOPT}",
        quantized_branch,
        mendable=True,
    ),
    Rule(
        "residual-skip",
        "warning",
        "Conv + Add fuse into one INT8 kernel only where the skip is INT8 too; here the sum goes through memory in "
        "float.",
        "quantize the skip (`trt-int8 quantize --residual int8`).",
        f"{GUIDE}; {MODELOPT}",
        float_skip,
    ),
)
