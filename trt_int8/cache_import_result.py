"""What `trt-int8 cache import` made, and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.fp16 import HeldNode
from engines.placement import Placement
from engines.tensorrt_names import FoundTensor, MissingTensor
from trt_int8.quantize_result import Int8Precision

_RULES = {
    "name": "name",
    "renamed": "--rename",
    "spelling": "name but for what a tool appended",
    "same values": "a tensor that holds the same values",
    "MaxPool": "the other side of a MaxPool, which has the same scale",
    "folded BatchNorm": "the convolution that a BatchNorm was folded into",
    "layer order": "kind and order of the layers",
}


@dataclass(frozen=True, slots=True)
class ImportResult:
    """A Q/DQ model made from a calibration cache.

    Attributes:
        path: the model.
        precision: what its other layers compute in.
        release: of TensorRT that wrote the cache: "8.6.1".
        algorithm: of the calibrator that wrote it.
        placement: what was done where, and why.
        scales: scale of every Q/DQ pair.
        wanted: how many tensors Q/DQ takes scales from, those of nodes that stay float for want of one included.
        found: those that the cache holds, and by which rule.
        missing: those that it lacks.
        absent: names of the cache that the graph lacks, TensorRT's own names left out.
        own: number of names that TensorRT made up itself, and that no rule needed.
        held: with "int8+fp16", the nodes kept in FP32, and why.
        notes: what a user should know.
    """

    path: Path
    precision: Int8Precision
    release: str
    algorithm: str
    placement: Placement
    scales: Mapping[str, float]
    wanted: int
    found: tuple[FoundTensor, ...]
    missing: tuple[MissingTensor, ...]
    absent: tuple[str, ...]
    own: int
    held: tuple[HeldNode, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "file": self.path.name,
            "precision": self.precision,
            "tensorrt": self.release,
            "algorithm": self.algorithm,
            "scales": dict(self.scales),
            "wanted": self.wanted,
            "found": [asdict(tensor) for tensor in self.found],
            "missing": [asdict(tensor) for tensor in self.missing],
            "absent": list(self.absent),
            "tensorrts_own": self.own,
            "decisions": [asdict(decision) for decision in self.placement.decisions],
            "held": [asdict(node) for node in self.held],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return the summary for the terminal."""
        decisions = self.placement.decisions
        rules = Counter(tensor.rule for tensor in self.found)
        how = ", ".join(f"{count} by {_RULES[rule]}" for rule, count in rules.most_common())
        nodes = f"{sum(decision.quantized for decision in decisions)} of {len(decisions)} weighted nodes in INT8"
        origin = f"scales of TensorRT {self.release} ({self.algorithm})"
        lines = [
            f"{self.path}: {nodes}, {len(self.scales)} Q/DQ pairs on activations, precision {self.precision}, {origin}",
            f"{len(self.found)} of {self.wanted} tensors that Q/DQ needs found in the cache{': ' if how else ''}{how}",
        ]
        lines += [
            f"found: {item.tensor} as {item.cached!r} (by {_RULES[item.rule]})"
            for item in self.found
            if item.rule != "name"
        ]
        lines += [f"missing: {item.tensor}: {item.reason}" for item in self.missing]
        lines += [f"not in the graph: {name}" for name in self.absent]
        if self.own:
            lines.append(f"{self.own} names in the cache are TensorRT's own, for tensors that the ONNX file has not")
        lines += [f"float: {item.node} ({item.op_type}): {item.reason}" for item in decisions if not item.quantized]
        lines += [f"fp32: {node.node} ({node.op_type}): {node.reason}" for node in self.held]
        return [*lines, *self.notes]
