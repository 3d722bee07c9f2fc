"""Bounds that the graph itself sets to the values of a tensor: a Sigmoid gives no more than 1, whatever it reads."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from engines.graph import constant_array
from engines.placement import Origins, clip_bounds

UNIT = frozenset(("Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Softsign"))
"""Operators whose outputs have a magnitude of at most 1."""


def largest_magnitude(value: ir.Value, origins: Origins) -> float | None:
    """Return the largest magnitude that a tensor can have by the graph alone; None where the graph sets no bound.

    Seen are the operators of `UNIT`, a Clip to constants, and either of them times or by one constant, which is how a
    HardSigmoid is written below opset 14: Clip(x + 3, 0, 6) / 6.

    Args:
        value: the tensor.
        origins: where the values of its graph come from.
    """
    factor = 1.0
    while (producer := origins.root(value).producer()) is not None and producer.domain == "":
        if producer.op_type in UNIT:
            return factor
        if producer.op_type == "Clip":
            bounds = clip_bounds(producer)
            found = [abs(bound) for bound in bounds if bound is not None and math.isfinite(bound)]
            return factor * max(found) if len(found) == len(bounds) else None
        step = _factor(producer)
        source = producer.inputs[0]
        if step is None or source is None:
            return None
        factor *= step
        value = source
    return None


def _factor(node: ir.Node) -> float | None:
    """Return by how much a product or quotient with one constant on its right scales magnitudes."""
    if node.op_type not in ("Mul", "Div") or constant_array(node.inputs[0]) is not None:
        return None
    constant = constant_array(node.inputs[1])
    if constant is None or constant.size != 1:
        return None
    number = abs(float(np.asarray(constant.numpy()).reshape(-1)[0]))
    if node.op_type == "Mul":
        return number
    return 1.0 / number if number else None
