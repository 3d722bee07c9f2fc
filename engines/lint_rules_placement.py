"""Rules about where pairs stand: islands, chains, Concat, Pad, and what splits a fused layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from engines.epilogues import pointwise_source
from engines.lint_graph import LintGraph, Quantizer, moves, once_per_graph
from engines.lint_rules import GUIDE, MODELOPT, Hit, Rule
from engines.lint_rules_values import same_scale
from engines.opset import STANDARD_DOMAINS
from engines.placement import WEIGHTED, commutes, root, sole_consumer

ACTIVATIONS = frozenset((
    "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Elu", "Selu",
    "Celu", "Softplus", "Softsign", "Mish", "ThresholdedRelu", "BatchNormalization",
))  # fmt: skip
"""Operators that TensorRT fuses behind a convolution or product, whose Q belongs behind them."""

CARRIERS = ACTIVATIONS | frozenset((
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
    "LpPool", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "Concat", "Resize", "Upsample", "Pad",
))  # fmt: skip
"""Operators that compute on INT8 where what they give is quantized again."""


@dataclass(frozen=True, slots=True)
class ConcatGroup:
    """A Concat with quantized inputs.

    Attributes:
        node: the Concat.
        inputs: the DQ behind each input, None where it is float.
        outputs: the Qs behind its output.
    """

    node: ir.Node
    inputs: tuple[Quantizer | None, ...]
    outputs: tuple[Quantizer, ...]


def lonely_pair(graph: LintGraph) -> Iterator[Hit]:
    """Find pairs whose value nothing reads that computes on INT8."""
    for first, last in lonely_pairs(graph):
        readers, leaves = graph.readers(last.output)
        names = sorted({node.op_type for node, _ in readers} | ({"the model's output"} if leaves else set()))
        yield Hit(first.node, f"read by {', '.join(names)} alone" if names else "read by nothing")


def lonely_pairs(graph: LintGraph) -> Iterator[tuple[Quantizer, Quantizer]]:
    """Give the (Q, DQ) that `lonely_pair` finds."""
    quantized_again = _quantized_again(graph)
    for first, last in graph.activation_pairs:
        readers, _ = graph.readers(last.output)
        if not any(_computes_on_int8(graph, first, reader, index, quantized_again) for reader, index in readers):
            yield first, last


def split_activation(graph: LintGraph) -> Iterator[Hit]:
    """Find pairs between a weighted operator and its activation."""
    for first, _, activation in split_pairs(graph):
        producer = first.data.producer()
        before = producer.op_type if producer is not None else ""
        yield Hit(first.node, f"between {before} and {activation.op_type}")


def split_pairs(graph: LintGraph) -> Iterator[tuple[Quantizer, Quantizer, ir.Node]]:
    """Give the (Q, DQ, activation) that `split_activation` finds."""
    quantized_again = _quantized_again(graph)
    for first, last in graph.activation_pairs:
        producer, reader = first.data.producer(), sole_consumer(last.output)
        if producer is None or reader is None or sole_consumer(first.output) is None:
            continue
        between = producer.op_type in WEIGHTED and reader.op_type in ACTIVATIONS and reader.inputs[0] is last.output
        if between and sole_consumer(first.data) is first.node and reader.outputs[0] in quantized_again:
            yield first, last, reader


def requantized(graph: LintGraph) -> Iterator[Hit]:
    """Find values that are quantized again, with nothing computed between."""
    for first, last in graph.activation_pairs:
        readers, _ = graph.readers(last.output)
        again = [graph.by_output[node.outputs[0]] for node, _ in readers if node.outputs[0] in graph.by_output]
        other = next((second for second in again if not same_scale(first, second)), None)
        if other is not None:
            yield Hit(other.node, "quantizes what comes from INT8, with another scale")
        elif any(second.data is last.output for second in again):
            yield Hit(first.node, "quantized twice with one scale", "note")


def concat_scales(graph: LintGraph) -> Iterator[Hit]:
    """Find Concats whose inputs and output have different scales."""
    for group in concat_groups(graph):
        inputs = [record for record in group.inputs if record is not None]
        if len(inputs) < len(group.inputs):
            if group.outputs:
                # An INT8 Resize before a float Concat can still be worth its pair: that is for a measurement to say.
                yield Hit(group.node, f"{len(inputs)} of its {len(group.inputs)} inputs are quantized", "note")
        elif any(not same_scale(inputs[0], record) for record in inputs[1:]):
            yield Hit(group.node, "its inputs have different scales")
        elif any(not same_scale(inputs[0], record) for record in group.outputs):
            yield Hit(group.node, "its output has another scale than its inputs")


def concat_groups(graph: LintGraph) -> Iterator[ConcatGroup]:
    """Give the Concats with a quantized input, and the pairs on both sides."""
    for node in graph.nodes:
        if node.op_type != "Concat" or node.domain not in STANDARD_DOMAINS:
            continue
        found = [graph.origin(value)[0] for value in node.inputs if value is not None and value not in graph.constants]
        if not any(found):
            continue
        readers, _ = graph.readers(node.outputs[0])
        outputs = [graph.by_output[reader.outputs[0]] for reader, _ in readers if reader.outputs[0] in graph.by_output]
        yield ConcatGroup(node, tuple(found), tuple(record for record in outputs if record.quantizes))


def split_pad(graph: LintGraph) -> Iterator[Hit]:
    """Find pairs between a Pad and the convolutions that would fuse with it."""
    for pad, first, last in split_pads(graph):
        reader = next(iter(last.output.uses())).node
        yield Hit(first.node, f"between {pad.op_type} and {reader.op_type}")


def split_pads(graph: LintGraph) -> Iterator[tuple[ir.Node, Quantizer, Quantizer]]:
    """Give the (Pad, Q, DQ) that `split_pad` finds: zeros or repeated values, for convolutions alone."""
    for first, last in graph.activation_pairs:
        pad = first.data.producer()
        if pad is None or pad.op_type != "Pad" or not commutes(pad) or sole_consumer(first.data) is not first.node:
            continue
        uses = list(last.output.uses())
        convolutions = all(use.node.op_type in ("Conv", "ConvTranspose") and use.idx == 0 for use in uses)
        if uses and convolutions and not last.output.is_graph_output() and sole_consumer(first.output) is last.node:
            yield pad, first, last


@once_per_graph
def _quantized_again(graph: LintGraph) -> set[ir.Value]:
    """Collect the values that reach a Q across operators that move values or compute on INT8."""
    reaching: set[ir.Value] = set()
    for node in reversed(graph.nodes):
        record = graph.by_output.get(node.outputs[0]) if node.outputs else None
        if record is not None:
            if record.quantizes:
                reaching.add(record.data)
        elif (node.op_type in CARRIERS or moves(node)) and any(value in reaching for value in node.outputs):
            reaching.update(value for value in node.inputs if value is not None)
    return reaching


def _computes_on_int8(
    graph: LintGraph, first: Quantizer, node: ir.Node, index: int, quantized_again: set[ir.Value]
) -> bool:
    if node.domain not in STANDARD_DOMAINS:
        return True  # a plugin may read INT8
    if node.op_type in WEIGHTED:
        return index < 2
    if node.outputs[0] in graph.by_output:
        return True
    if node.op_type == "LayerNormalization":
        return _by_convolution(first.data)
    if node.op_type == "Add" and any(
        value is not None and (producer := value.producer()) is not None and producer.op_type in WEIGHTED
        for value in node.inputs
    ):
        return True  # the skip of a residual connection
    return node.op_type in CARRIERS and any(value in quantized_again for value in node.outputs)


def _by_convolution(value: ir.Value) -> bool:
    """Tell whether the kernel of a convolution gives a value, across activations and operators that move values."""
    producer = root(value).producer()
    while producer is not None and (source := pointwise_source(producer)) is not None:
        producer = root(source).producer()
    return producer is not None and producer.op_type in ("Conv", "ConvTranspose")


PLACEMENT_RULES = (
    Rule(
        "lonely-pair",
        "warning",
        "nothing that reads this pair computes on INT8: it rounds the values, and runs as two kernels of its own.",
        "take the pair away.",
        f"{GUIDE}; {MODELOPT}",
        lonely_pair,
        mendable=True,
    ),
    Rule(
        "split-activation",
        "warning",
        "TensorRT fuses an operator with its activation only where no Q stands between them.",
        "quantize behind the activation alone.",
        GUIDE,
        split_activation,
        mendable=True,
    ),
    Rule(
        "requantized",
        "warning",
        "going from one scale to another is a kernel of its own, and rounds twice.",
        "give both pairs one scale, or take one of them away.",
        GUIDE,
        requantized,
        mendable=True,
    ),
    Rule(
        "concat-scales",
        "warning",
        "a Concat in INT8 only copies where all of its inputs and its output have one scale; else every branch is "
        "quantized again by a kernel of its own.",
        "give all of them the largest scale: values change by at most half of it.",
        f"{GUIDE}; {MODELOPT}, concat_elimination",
        concat_scales,
        mendable=True,
    ),
    Rule(
        "split-pad",
        "warning",
        "a Pad is fused with its convolution only where nothing stands between them; here it is a layer of its own.",
        "move the pair before the Pad: zeros and repeated values are the same codes on either side.",
        "reported to NVIDIA/TensorRT as issue 2592",
        split_pad,
        mendable=True,
    ),
)
