"""Products of two activations: the two matrix products of attention, and whatever else multiplies computed values."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.graph import is_activation
from engines.node_facts import operands_are_activations
from engines.node_rules_context import NodeContext
from engines.placement import commutes, main_graph_uses

LONGEST_SEQUENCE = 512
"""Keys per query up to which TensorRT's INT8 attention is the faster one."""

REACH = 8
"""Nodes between a product and its Softmax: scaling, mask, casts, reshapes; more is no attention that anyone draws."""


def attention_product(node: ir.Node, context: NodeContext) -> str | None:
    """Products of two activations stay float unless the option asks for INT8 and the form of the attention allows it.

    INT8 wants a Softmax beside the product, at most 512 keys, and no mask added to the bare scores: the pattern MatMul,
    Add of a computed mask, Softmax, MatMul is fused in FP16 alone.
    """
    if node.op_type != "MatMul" or not operands_are_activations(node):
        return None
    if context.attention == "float" or context.target != "tensorrt":
        return "both operands are activations: attention products stay float"
    softmax = next(_softmax_after(node), None) or next(_softmax_before(node), None)
    if softmax is None:
        return "both operands are activations, and there is no Softmax beside it: only attention is quantized so"
    scores = softmax.inputs[0]
    if scores is None:
        raise AssertionError(f"{softmax.name} has no input")
    keys = scores.shape[-1] if scores.shape is not None and len(scores.shape) else None
    if isinstance(keys, int) and keys > LONGEST_SEQUENCE:
        return f"attention over {keys} keys: TensorRT's INT8 attention pays up to {LONGEST_SEQUENCE}"
    mask = scores.producer()
    if mask is not None and mask.op_type == "Add" and all(is_activation(value) for value in mask.inputs):
        for value in mask.inputs:
            product = value.producer() if value is not None else None
            if product is not None and product.op_type == "MatMul" and operands_are_activations(product):
                return (
                    f"{mask.name!r} adds a computed mask to the bare scores: this form of attention is fused in float"
                )
    return None


def _softmax_after(node: ir.Node) -> Iterator[ir.Node]:
    """Find the Softmax that the scores reach across scaling, masks and reshapes."""
    for _ in range(REACH):
        readers = [reader for reader, _ in main_graph_uses(node.outputs[0])]
        yield from (reader for reader in readers if reader.op_type == "Softmax")
        following = [reader for reader in readers if _keeps_scores(reader)]
        if len(following) != 1:
            return
        node = following[0]


def _softmax_before(node: ir.Node) -> Iterator[ir.Node]:
    """Find the Softmax whose probabilities an operand is."""
    for value in node.inputs:
        for _ in range(REACH):
            producer = value.producer() if value is not None else None
            if producer is None:
                break
            if producer.op_type == "Softmax":
                yield producer
            if not (commutes(producer) or producer.op_type in ("Cast", "Mul")):
                break
            value = producer.inputs[0]


def _keeps_scores(node: ir.Node) -> bool:
    return commutes(node) or node.op_type in ("Add", "Cast", "Clip", "Div", "Max", "Mul", "Sub", "Where")
