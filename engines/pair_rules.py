"""Which edges read quantized values on TensorRT: one rule per reason, applied in order.

A rule has a name, a sentence that says why, a source, and a function that gives the edges. Every pair names the first
rule that asked for it, and its reason tells of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from engines.node_facts import operands_are_activations
from engines.node_rules import GUIDE, MODELOPT
from engines.pair_plan import CONVOLUTIONS, Ask, PairPlan, titled
from engines.pair_rules_carriers import (
    average_pool,
    channel_gate,
    convolution_before_normalization,
    element_wise,
    resize,
)
from engines.placement import operands


@dataclass(frozen=True, slots=True)
class PairRule:
    """A reason to quantize what a node reads.

    Attributes:
        name: short name; stands in the pairs.
        why: why the rule exists; the reason of a pair is this with the nodes behind it.
        source: where it comes from.
        edges: gives the edges, in view of those that the rules before it gave and its own so far.
    """

    name: str
    why: str
    source: str
    edges: Callable[[PairPlan], Iterator[Ask]]


def _weighted_inputs(plan: PairPlan) -> Iterator[Ask]:
    for node in plan.chosen:
        data, _ = operands(node)
        if not operands_are_activations(node) and data_edge(plan, node)[0] is node:
            yield Ask(node, data, titled(node))


def _before_pad(plan: PairPlan) -> Iterator[Ask]:
    for node in plan.chosen:
        pad, index = data_edge(plan, node)
        if pad is not node:
            yield Ask(pad, index, f"{titled(pad)} of {titled(node)}")


def _attention(plan: PairPlan) -> Iterator[Ask]:
    for node in plan.chosen:
        if not operands_are_activations(node):
            continue
        for index in (0, 1):
            value = node.inputs[index]
            producer = plan.origins.root(value).producer() if value is not None else None
            if producer is not None and producer.op_type == "Softmax":
                yield Ask(node, index, f"{titled(node)} of probabilities, which are at most 1", amax=1.0)
            else:
                yield Ask(node, index, titled(node))


def _residual_skip(plan: PairPlan) -> Iterator[Ask]:
    for node, skip in plan.skips.items():
        branch = node.inputs[1 - skip]
        if branch is None:
            raise AssertionError(f"{node.name} has no input {1 - skip}")
        yield Ask(node, skip, f"{titled(plan.by_convolution[branch])} with {titled(node)}")


def data_edge(plan: PairPlan, node: ir.Node) -> tuple[ir.Node, int]:
    """Return the edge that the pair of a weighted node's data input stands on.

    That is the node's own, or the first of the Pads right before a convolution, where they serve quantized convolutions
    alone.
    """
    edge = node, operands(node)[0]
    if node.op_type in CONVOLUTIONS:
        while (value := edge[0].inputs[edge[1]]) is not None:
            producer = value.producer()
            if producer is None or producer not in plan.fusing_pads:
                break
            edge = producer, 0
    return edge


RESIDUAL = PairRule(
    "residual-skip",
    "convolution and residual Add fuse into one kernel that reads the skip as INT8",
    f"{GUIDE}: Q/DQ placement, skip connections; {MODELOPT}.graph_utils.build_non_residual_input_map",
    _residual_skip,
)

RULES: tuple[PairRule, ...] = (
    PairRule(
        "weighted-inputs",
        "all inputs of weighted operators are quantized",
        f"{GUIDE}: Q/DQ placement, weighted operations",
        _weighted_inputs,
    ),
    PairRule(
        "before-pad",
        "a Pad fuses with its convolution only where nothing stands between them",
        "TensorRT issue 2592",
        _before_pad,
    ),
    PairRule(
        "attention",
        "both operands of an attention product are quantized",
        f"{MODELOPT}.graph_utils.find_nodes_from_mha_to_exclude: the products that are not excluded",
        _attention,
    ),
    RESIDUAL,
    PairRule(
        "average-pool",
        "an average between INT8 neighbours reads and writes INT8 itself",
        f"{GUIDE}: a quantizable AveragePool fuses with DQ and Q; {MODELOPT}.partitioning.find_quantizable_nodes",
        average_pool,
    ),
    PairRule(
        "channel-gate",
        "a product of a convolution's map with its gate reads and writes INT8, and the convolution writes INT8 for it",
        f"{MODELOPT}.partitioning, _is_fusible_mul: faster for MobileNetV3 and RegNetY; NVIDIA/TensorRT, "
        "tools/tensorflow-quantization, EfficientNetQDQCase",
        channel_gate,
    ),
    PairRule(
        "resize",
        "a Resize whose readers are INT8 moves fewer bytes where its input is INT8 too",
        f"TensorRT issue 3542; {MODELOPT}.partitioning: Resize among those that prefer quantized input",
        resize,
    ),
    PairRule(
        "element-wise",
        "an element-wise operator with INT8 on both sides fuses with the DQ before and the Q behind it",
        f"{GUIDE}: quantizable operators; {MODELOPT}.graph_utils.filter_quantizable_kgen_heads",
        element_wise,
    ),
    PairRule(
        "convolution-before-normalization",
        "a convolution that only a LayerNormalization reads has faster kernels where it writes INT8",
        f"{MODELOPT}.graph_utils.find_conv_to_layernorm_nodes",
        convolution_before_normalization,
    ),
)
"""The rules in the order in which they are applied: each sees the pairs of those before it."""
