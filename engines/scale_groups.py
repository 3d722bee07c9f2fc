"""Tensors that share one scale: what meets in a Concat that is read as INT8.

There is one pair, behind the Concat; TensorRT moves its Q back to the branches. A branch that is quantized for another
reader too has its own Q there, and with another scale the codes of the two differ: each such branch would be quantized
again by a kernel of its own before the Concat. So the scale behind a Concat and those of its branches become the
largest of them. That costs the other branches resolution, never range; a branch that would lose more than three of its
bits keeps its own scale, since a kernel more is the lesser harm.

Source: NVIDIA TensorRT documentation, explicit quantization; nvidia-modelopt 0.47, the pass concat_elimination of
modelopt.onnx.quantization.graph_utils. ONNX Runtime's Concat on the CPU takes a scale for each input and looks the new
codes up in a table of 256, so the CPU target keeps the finer scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from engines.graph import is_activation, name_of
from engines.pair_plan import PairPlan, titled
from engines.placement import ActivationPoint, Placement

MOST_COARSENING = 8
"""By how much a shared scale may be coarser than a tensor's own."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Tensors that share one scale.

    Attributes:
        tensors: their names, in the order of their pairs.
        concats: the nodes that they meet in.
    """

    tensors: tuple[str, ...]
    concats: tuple[ir.Node, ...]


def concat_groups(plan: PairPlan, points: Iterable[ActivationPoint]) -> list[ScaleGroup]:
    """Group the calibrated tensors that meet in Concats whose output is read as INT8 alone.

    Groups are closed: across operators that move values, across Concats of Concats, and over tensors that go into
    several. Tensors without a pair have no scale to share, and a group of one is none.

    Args:
        plan: the finished plan.
        points: its pairs.
    """
    places = {point.scale_of: place for place, point in enumerate(points) if point.amax is None}
    leader: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while (above := leader.setdefault(value, value)) is not value:
            leader[value] = value = leader[above]  # halving the way keeps all of them short
        return value

    concats: list[ir.Node] = []
    for node, output_is_int8, _ in plan.backwards():
        if node.op_type == "Concat" and node.domain == "" and output_is_int8 and is_activation(node.outputs[0]):
            concats.append(node)
            for value in node.inputs:
                if is_activation(value) and value is not None:
                    leader[find(plan.origins.root(value))] = find(node.outputs[0])
    members: dict[ir.Value, list[str]] = {}
    for value in leader:
        if name_of(value) in places:
            members.setdefault(find(value), []).append(name_of(value))
    meeting: dict[ir.Value, list[ir.Node]] = {}
    for node in reversed(concats):
        meeting.setdefault(find(node.outputs[0]), []).append(node)
    groups = [
        ScaleGroup(tuple(sorted(names, key=places.__getitem__)), tuple(meeting[top]))
        for top, names in members.items()
        if len(names) > 1
    ]
    return sorted(groups, key=lambda group: places[group.tensors[0]])


def told(points: Sequence[ActivationPoint], groups: Iterable[ScaleGroup]) -> tuple[ActivationPoint, ...]:
    """Return the pairs with what they share in their reasons."""
    group_of = {name: group for group in groups for name in group.tensors}
    return tuple(
        replace(point, reason=f"{point.reason}; {_sharing(group)}")
        if point.amax is None and (group := group_of.get(point.scale_of)) is not None
        else point
        for point in points
    )


def shared_scales(placement: Placement, scales: Mapping[str, float]) -> dict[str, float]:
    """Return the scales with the largest one of each group for all of it.

    A tensor whose own scale is more than `MOST_COARSENING` times as fine keeps that.

    Args:
        placement: names the groups.
        scales: by tensor name; those that a group names and `scales` lacks are left out.
    """
    shared = dict(scales)
    for group in placement.groups:
        known = [name for name in group if name in scales]
        largest = max((scales[name] for name in known), default=0.0)
        shared.update((name, largest) for name in known if scales[name] * MOST_COARSENING >= largest)
    return shared


def without_silent(placement: Placement, scales: Mapping[str, float], silent: Iterable[str]) -> dict[str, float]:
    """Return the scales with those of silent tensors replaced by the largest one of the rest of their group.

    A tensor that was always 0 has scale 1, which says nothing of the values that it meets in a Concat.

    Args:
        placement: names the groups.
        scales: by tensor name.
        silent: tensors that were 0 throughout the calibration.
    """
    heard, quiet = dict(scales), set(silent)
    for group in placement.groups:
        loud = [scales[name] for name in group if name in scales and name not in quiet]
        if loud:
            heard.update((name, max(loud)) for name in group if name in scales and name in quiet)
    return heard


def chosen_together(placement: Placement) -> list[tuple[str, ...]]:
    """Return the calibrated tensors of a placement, those that share a scale as one, in the order of their pairs."""
    group_of = {name: group for group in placement.groups for name in group}
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in placement.tensors))


def _sharing(group: ScaleGroup) -> str:
    more = f" and {len(group.concats) - 1} more" if len(group.concats) > 1 else ""
    return (
        f"one scale, the largest, for the {len(group.tensors)} tensors that meet in {titled(group.concats[0])}{more}, "
        f"where that is at most {MOST_COARSENING} times as coarse as its own"
    )
