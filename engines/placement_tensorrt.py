"""Q/DQ where TensorRT's fusions read them.

`engines.node_rules` says which weighted nodes compute on INT8, `engines.pair_rules` which edges read quantized values,
`engines.scale_groups` which of their tensors share a scale. What holds for all of it:

1. Weighted operators read INT8 on all inputs: activations with one scale, weights with one per output channel. Biases
   stay float.
2. Outputs are not quantized; the Q of the next reader does it, behind the fused activation. So a model's outputs stay
   float, and so does what branches and loop bodies read from outside.
3. Operators that commute with Q/DQ (MaxPool, Reshape, ...) get no pair of their own, and a tensor meets the same scale
   on every way across them.
4. No pair stands where nothing but float operators read it: normalizations, Softmax, GELU, attention masks, recurrent
   layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from engines.graph import name_of
from engines.node_facts import operands_are_activations
from engines.node_rules import weighted_nodes
from engines.pair_plan import PairPlan
from engines.pair_rules import RESIDUAL, RULES
from engines.placement import Placement, WeightPoint, operands, weight_axis
from engines.placement_options import PlacementOptions
from engines.scale_groups import concat_groups, told


def place_for_tensorrt(
    model: ir.Model,
    options: PlacementOptions | None = None,
    *,
    amax: Mapping[str, float] | None = None,
) -> Placement:
    """Plan signed INT8 with zero point 0 for TensorRT.

    Args:
        model: a prepared model; it is not changed.
        options: what the user wants.
        amax: largest magnitude that calibration saw, by tensor name; serves the rule for detection heads.
    """
    options = options or PlacementOptions()
    chosen, decisions = weighted_nodes(model, options, amax=amax)
    plan = PairPlan(model, chosen)
    for rule in RULES:
        if rule is RESIDUAL and options.residual == "float":
            continue
        for ask in rule.edges(plan):
            plan.add(rule.name, rule.why, ask)  # before the rule goes on, which looks at its own edges too
    points = tuple(plan.points())
    groups = concat_groups(plan, points)
    weights = tuple(_weight(plan, node) for node in chosen if not operands_are_activations(node))
    shared = tuple(group.tensors for group in groups)
    return Placement("tensorrt", told(points, groups), weights, tuple(decisions), shared)


def _weight(plan: PairPlan, node: ir.Node) -> WeightPoint:
    data, weight = operands(node)
    value = node.inputs[data]
    if value is None:
        raise AssertionError(f"{node.name} has no data input")
    return WeightPoint(node.name or "", weight, weight_axis(node), name_of(plan.origins.root(value)))
