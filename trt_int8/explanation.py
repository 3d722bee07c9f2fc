"""Why a model is quantized as it is, for the terminal: every weighted node and every Q/DQ pair, with its rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.table import Table

from engines.pair_rules import RULES
from engines.placement import ActivationPoint, Decision, Placement
from trt_int8.console import make_table
from trt_int8.quantize_result import WEIGHT_ONLY


def explanation_tables(placement: Placement, scales: Mapping[str, float]) -> tuple[Table, ...]:
    """Lay a placement out in tables.

    Args:
        placement: what was done where.
        scales: scale of every pair, by the tensor that it quantizes.

    Returns:
        The weighted nodes: operator, whether it computes on INT8, its weight's scales, and by which rule. The Q/DQ
        pairs on activations, where there are any: scale, rule, and who reads the dequantized value. The rules: each
        reason once, with how often it was given; of pairs that of their rule, since they name the readers above.
    """
    decisions, points = placement.decisions, placement.activations
    quantized = sum(_arithmetic(decision) == "INT8" for decision in decisions)
    axes = {weight.node: weight.axis for weight in placement.weights}
    nodes = make_table(
        f"Weighted nodes: {quantized} of {len(decisions)} compute on INT8",
        ("node", "operator", "computes on", "weight scales", "rule"),
        (
            (
                decision.node,
                decision.op_type,
                _arithmetic(decision),
                _granularity(axes[decision.node]) if decision.node in axes else "",
                decision.rule,
            )
            for decision in decisions
        ),
        left=5,
    )
    pairs = make_table(
        f"Q/DQ pairs on activations: {len(points)}",
        ("tensor", "rule", "read by", "scale"),
        ((point.tensor, point.rule, _readers(point.uses), f"{scales[point.tensor]:.6g}") for point in points),
        left=3,
    )
    reasons = [
        *((decision.rule, decision.reason) for decision in decisions),
        *((point.rule, _why(placement, point)) for point in points),
    ]
    rules = make_table(
        "Why",
        ("rule", "reason", "times"),
        ((rule, reason, str(count)) for (rule, reason), count in Counter(reasons).items()),
        left=2,
    )
    return (nodes, pairs, rules) if points else (nodes, rules)


def _why(placement: Placement, point: ActivationPoint) -> str:
    """Return why the rule of a pair exists; its own reason goes on with the names of the nodes."""
    whys = {rule.name: rule.why for rule in RULES} if placement.target == "tensorrt" else {}
    return whys.get(point.rule, point.reason)


def _arithmetic(decision: Decision) -> str:
    """Say what a node computes on; one whose weight alone is stored as INT8 computes in float."""
    return "INT8" if decision.quantized and decision.rule != WEIGHT_ONLY else "float"


def _granularity(axis: int | None) -> str:
    return "one" if axis is None else f"per channel, axis {axis}"


def _readers(uses: tuple[tuple[str, int], ...] | None) -> str:
    """Name the nodes that read a pair; None stands for every reader of the tensor."""
    return "all its readers" if uses is None else ", ".join(dict.fromkeys(node for node, _ in uses))
