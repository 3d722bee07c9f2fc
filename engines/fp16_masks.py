"""Attention masks in FP16: constants that stand for minus infinity, and need not be as large as FP32 allows.

Exporters hide keys by adding -3.4e38, or by selecting it, before a Softmax. FP16 has no such number, but it needs none:
e ** -16384 is 0 in any type, and a score can still be added to it without leaving the range. So such constants become
-16384 where all that reads them ends in a Softmax, instead of holding the attention around them in FP32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.graph import constant_array
from engines.placement import commutes

HIDDEN = -16384.0
"""What hides a key: exact in FP16, a quarter of its range."""


def reaching_softmax(graph: ir.Graph) -> set[ir.Value]:
    """Find the values that end in Softmaxes alone, across sums, products, selections, casts and moves."""
    found: set[ir.Value] = set()
    for value in [*(output for node in reversed(graph) for output in node.outputs), *graph.inputs]:
        uses = list(value.uses())
        if uses and not value.is_graph_output() and all(_leads(use.node, use.idx, found) for use in uses):
            found.add(value)
    return found


def mask_inputs(model: ir.Model) -> set[str]:
    """Name the model's inputs of whole numbers that take part in what is added before a Softmax.

    They are masks, 1 for what counts and 0 for padding, as in (1 - mask) * -10000: token ids go through a table first.
    """
    found = reaching_softmax(model.graph)
    masks: set[str] = set()
    for value in model.graph.inputs:
        whole = value.dtype is not None and not value.dtype.is_floating_point() and value.name is not None
        if whole and any(_leads(use.node, use.idx, found) for use in value.uses()):
            masks.add(str(value.name))
    return masks


def make_masks_shallow(model: ir.Model, *, infinite: bool) -> None:
    """Raise constants below -16384 to it where they only hide keys; in place.

    Args:
        model: a prepared model.
        infinite: minus infinity too. FP16 has it, so that it needs no other number; its bound does.
    """
    graph = model.graph
    found = reaching_softmax(graph)
    written: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is None or not node.outputs or node.outputs[0] not in found or not _passes(node, index):
                continue
            if value not in written:
                constant = constant_array(value)
                raised = None if constant is None else _raised(constant, infinite)
                if raised is None:
                    continue
                name = f"{value.name}_shallow"
                written[value] = ir.Value(name=name, const_value=ir.tensor(raised, name=name))
                graph.register_initializer(written[value])
            node.replace_input_with(index, written[value])


def _leads(node: ir.Node, index: int, found: set[ir.Value]) -> bool:
    if node.op_type == "Softmax" and node.domain == "":
        return True
    return _passes(node, index) and node.outputs[0] in found


def _passes(node: ir.Node, index: int) -> bool:
    """Tell whether a node hands what is hidden on as hidden."""
    if node.domain != "":
        return False
    if node.op_type == "Where":
        return index > 0
    return node.op_type in ("Add", "Sub", "Mul", "Cast") or (commutes(node) and index == 0)


def _raised(constant: ir.TensorProtocol, infinite: bool) -> np.ndarray | None:
    """Return the constant with a floor; None where it hides nothing, or holds large positive numbers too."""
    if constant.dtype != ir.DataType.FLOAT or not constant.size:
        return None
    values = constant.numpy()
    low = (values < HIDDEN) if infinite else (values < HIDDEN) & np.isfinite(values)
    if not low.any() or not float(values.max()) <= -HIDDEN:
        return None
    return np.where(low, np.float32(HIDDEN), values).astype(np.float32)
