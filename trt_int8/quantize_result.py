"""What the quantization stage gives: an INT8 model, or an FP16 model, and what was decided on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engines.fp16 import HeldNode
from engines.placement import Decision, Placement, Target
from trt_int8.auto import AutoChoice

Int8Precision = Literal["int8", "int8+fp16"]
"""What an INT8 model computes in: its other layers in FP32, or in FP16."""

Mode = Literal["static", "dynamic", "weight-only"]
"""When activations are quantized: with scales from a calibration, with scales found at every run, or never."""


METHOD_KEY = "trt_int8.method"
"""Metadata key of quantized models: the calibration method."""

WEIGHT_ONLY = "weight-only"
"""Rule of the nodes whose weight alone is stored as INT8."""

MODE_KEY = "trt_int8.mode"
"""Metadata key of quantized models: the mode; absent from those of the mode static."""

CALIBRATION_KEY = "trt_int8.calibration"
"""Metadata key of quantized models: the hash of the calibration."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """An INT8 model.

    Attributes:
        path: the file.
        target: the placement it was made for.
        precision: what it computes in.
        mode: when activations are quantized.
        method: the calibration method; the mode where nothing was calibrated.
        placement: what was done where, and why.
        scales: scale of every Q/DQ pair.
        held: with "int8+fp16", the nodes kept in FP32, and why.
        auto: what `auto` chose, where it had data to choose by.
        notes: what a user should know: reduced weight range, nodes held back.
    """

    path: Path
    target: Target
    precision: Int8Precision
    mode: Mode
    method: str
    placement: Placement
    scales: Mapping[str, float]
    held: tuple[HeldNode, ...]
    auto: AutoChoice | None
    notes: tuple[str, ...]

    @property
    def held_back(self) -> tuple[Decision, ...]:
        """The weighted nodes that stay float."""
        return tuple(decision for decision in self.placement.decisions if not decision.quantized)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "file": self.path.name,
            "target": self.target,
            "precision": self.precision,
            "mode": self.mode,
            "method": self.method,
            "scales": dict(self.scales),
            "pairs": [
                {"tensor": point.tensor, "scale_of": point.scale_of, "rule": point.rule, "reason": point.reason}
                for point in self.placement.activations
            ],
            "decisions": [asdict(decision) for decision in self.placement.decisions],
            "held": [asdict(node) for node in self.held],
            "auto": None if self.auto is None else {**asdict(self.auto), "scales": None},
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Fp16Result:
    """An FP16 model.

    Attributes:
        path: the file.
        held: the nodes kept in FP32, and why.
        nodes: number of nodes of the FP32 graph.
    """

    path: Path
    held: tuple[HeldNode, ...]
    nodes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"file": self.path.name, "held": [asdict(node) for node in self.held], "nodes": self.nodes}
