"""Which tensors of a model are calibrated: those that a placement takes a scale from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import onnx_ir as ir

from calibrators.errors import CalibrationError
from engines.garbage import garbage_collection_off
from engines.graph import PreparedModel, float_activations, name_of
from engines.node_rules import RULES
from engines.pair_rules_residual import residual_skips
from engines.placement import Placement, root
from engines.placement_cpu import place_for_cpu
from engines.placement_options import PlacementOptions
from engines.placement_tensorrt import place_for_tensorrt

_Place: TypeAlias = Callable[[ir.Model, PlacementOptions], Placement]

_PLACE: Mapping[str, _Place] = {"tensorrt": place_for_tensorrt, "cpu": place_for_cpu}

_OVERRULED = frozenset(rule.name for rule in RULES if rule.can_be_overruled)
"""The rules that `include` quantizes nodes against."""


@garbage_collection_off()
def tensors_to_calibrate(prepared: PreparedModel, which: str = "quantized") -> list[str]:
    """Name the tensors whose statistics are collected, in graph order.

    "quantized": those that a placement for either target takes a scale from, whatever options are chosen later, and the
    graph's float inputs and outputs, which cost next to nothing, bound the FP16 range and tell coordinates from scores.
    What attention products read is among them except behind a Softmax: its output, which grows with the square of the
    sequence, is known to lie between 0 and 1. "tensorrt", "cpu": those of one target's placement by default options,
    which are fewer, instead. "all": every float activation, for TensorRT's implicit path, which wants them all.

    Raises:
        CalibrationError: nothing in the graph can be quantized, or it is quantized already.
    """
    model = prepared.ir()
    every = float_activations(model)
    if which == "all":
        return every
    wanted = set(_PLACE[which](model, PlacementOptions()).tensors) if which in _PLACE else _needed(model)
    if not wanted and any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph):
        raise CalibrationError(
            f"{str(prepared.path)!r} is quantized already: nothing that holds float weights is left in it. "
            "Calibrate the FP32 model that it was made from."
        )
    if not wanted:
        raise CalibrationError(
            f"{str(prepared.path)!r} holds no Conv, ConvTranspose, Gemm or MatMul with constant weights: there is "
            "nothing to quantize. Use --tensors all to calibrate its activations all the same."
        )
    wanted |= {value.name for value in [*model.graph.inputs, *model.graph.outputs] if value.name is not None}
    return [name for name in every if name in wanted]


def _needed(model: ir.Model) -> set[str]:
    """Name the tensors that some choice of options takes a scale from."""
    default, asked = PlacementOptions(), PlacementOptions(attention="int8")
    placements = _with_all_included(place_for_cpu, model, default)
    placements += (plain := _with_all_included(place_for_tensorrt, model, default))
    if "attention" in _held_by(plain[0]):
        placements += _with_all_included(place_for_tensorrt, model, asked)
    found = {name for placement in placements for name in placement.tensors}
    # Where one of two convolutions that meet in an Add is left float, the skip is on the other side.
    names = {decision.node for decision in plain[-1].decisions if decision.quantized}
    sums = [value for node in residual_skips(list(model.graph), names) for value in node.inputs if value is not None]
    return found | {name_of(root(value)) for value in sums}


def _with_all_included(place: _Place, model: ir.Model, options: PlacementOptions) -> list[Placement]:
    """Return the placement by some options, and the one that overrules every rule, where that is another one."""
    placement = place(model, options)
    if _OVERRULED.isdisjoint(_held_by(placement)):
        return [placement]
    return [placement, place(model, replace(options, include=[".*"]))]


def _held_by(placement: Placement) -> set[str]:
    """Name the rules that keep weighted nodes in float."""
    return {decision.rule for decision in placement.decisions if not decision.quantized}
