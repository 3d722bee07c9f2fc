"""The vocabulary of lint rules: a rule looks for one thing, and says what it costs and how it is mended.

An error is what TensorRT refuses, or computes otherwise than ONNX defines it. A warning costs time or exactness. A note
is worth knowing; what no run on a GPU has confirmed is never more than a note. The rules stand in modules of their own,
by what they look at: `engines.lint_rules_values`, `_types`, `_weights`, `_placement`, `_residual`, `_operators` and
`_cpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from engines.lint_graph import LintGraph
from engines.placement import Target

Severity = Literal["error", "warning", "note"]

Release = Literal[10, 11]
"""A major release of TensorRT."""

RELEASES: tuple[Release, ...] = (10, 11)

BOTH_TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")

IMPORTER = "onnx-tensorrt, importer of QuantizeLinear and DequantizeLinear"
GUIDE = "NVIDIA's guide to explicit quantization"
MODELOPT = "NVIDIA Model Optimizer, ONNX placement"
ONNX = "ONNX operator specification"
ONNX_RUNTIME = "ONNX Runtime, Q/DQ fusions of the CPU provider"
SYMMETRIC = "quantize again with symmetric INT8 (`trt-int8 quantize`)"


@dataclass(frozen=True, slots=True)
class Hit:
    """One place that a rule found.

    Attributes:
        node: the node; None for the model as a whole.
        what: what is there, in a few words that hold for many nodes alike where they can.
        severity: where this place is more or less serious than the rule; None takes the rule's.
        releases: the releases of TensorRT that this place concerns; None takes the rule's.
    """

    node: ir.Node | None
    what: str
    severity: Severity | None = None
    releases: tuple[Release, ...] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing to look for.

    Attributes:
        name: short name, with hyphens.
        severity: of its findings, where they do not say.
        cost: what it costs, one sentence.
        fix: what to do, one sentence.
        source: where the fact comes from.
        check: finds the places, in the order of the nodes.
        mendable: whether `engines.lint_fixes` has a way to mend it; a single place may still be beyond it.
        verified: whether the fact was read in source, documentation or a run; else it is inferred.
        targets: the targets that it concerns.
        releases: the releases of TensorRT that it concerns.
    """

    name: str
    severity: Severity
    cost: str
    fix: str
    source: str
    check: Callable[[LintGraph], Iterable[Hit]]
    mendable: bool = False
    verified: bool = True
    targets: tuple[Target, ...] = ("tensorrt",)
    releases: tuple[Release, ...] = RELEASES
