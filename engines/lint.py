"""Check an ONNX model, of whatever origin, against what TensorRT or ONNX Runtime's integer kernels want.

The file is looked at as it is. `engines.lint_fixes` mends what can be mended safely.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from engines.errors import ModelError
from engines.lint_graph import LintGraph
from engines.lint_reading import read_graph
from engines.lint_rules import RELEASES, Hit, Release, Rule, Severity
from engines.lint_rules_cpu import CPU_RULES
from engines.lint_rules_operators import OPERATOR_RULES
from engines.lint_rules_placement import PLACEMENT_RULES
from engines.lint_rules_residual import RESIDUAL_RULES
from engines.lint_rules_types import TYPE_RULES
from engines.lint_rules_values import VALUE_RULES
from engines.lint_rules_weights import WEIGHT_RULES
from engines.onnxrt import TARGET_KEY
from engines.placement import Target

RULES = (
    *VALUE_RULES,
    *TYPE_RULES,
    *WEIGHT_RULES,
    *PLACEMENT_RULES,
    *RESIDUAL_RULES,
    *OPERATOR_RULES,
    *CPU_RULES,
)
"""All rules, of both targets."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One place in a model, and the rule that found it.

    Attributes:
        rule: name of the rule.
        severity: "error": TensorRT refuses it, or computes something else; "warning": it costs time or exactness;
            "note".
        node: name of the node, made from its first output where it has none; None for the model as a whole.
        op_type: its operator.
        what: what is there.
        cost: what that costs.
        fix: what to do.
        mendable: whether `engines.lint_fixes.mend` knows a way.
        releases: the releases of TensorRT that it concerns.
        source: where the fact comes from.
        verified: False where it is inferred, and no run on a GPU has confirmed it.
    """

    rule: str
    severity: Severity
    node: str | None
    op_type: str | None
    what: str
    cost: str
    fix: str
    mendable: bool
    releases: tuple[Release, ...]
    source: str
    verified: bool


@dataclass(frozen=True, slots=True)
class LintReport:
    """What was found in a model.

    Attributes:
        model: the file's name; None for a model in memory.
        target: what it was checked for.
        releases: the releases of TensorRT that it was checked for.
        opset: the model's opset.
        weighted: number of Conv, ConvTranspose, Gemm and MatMul nodes, and of their forms on integers (QLinearConv,
            MatMulInteger, DynamicQuantizeLSTM, ...).
        quantized: how many of them have integers behind both operands, or are such a form.
        integer: how many are such a form, which ONNX Runtime runs and TensorRT does not.
        pairs: number of Q/DQ pairs on activations.
        findings: errors first, then warnings, then notes; in each by rule, in the order of the nodes.
    """

    model: str | None
    target: Target
    releases: tuple[Release, ...]
    opset: int
    weighted: int
    quantized: int
    integer: int
    pairs: int
    findings: tuple[Finding, ...]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        counts: Mapping[str, int] = Counter(finding.severity for finding in self.findings)
        return {
            "model": self.model,
            "target": self.target,
            "tensorrt": list(self.releases),
            "opset": self.opset,
            "weighted": self.weighted,
            "quantized": self.quantized,
            "integer": self.integer,
            "pairs": self.pairs,
            "counts": {severity: counts.get(severity, 0) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.findings],
        }


def lint(
    model: onnx.ModelProto | str | os.PathLike[str],
    *,
    tensorrt: Release | None = None,
    target: Target | None = None,
) -> LintReport:
    """Check a model for what keeps it from running in INT8, or makes it slow or wrong there.

    The model is not prepared, raised or simplified, and its weights are not read. It is not changed.

    Args:
        model: the file, or the model in memory.
        tensorrt: the release of TensorRT to check for; None checks for both.
        target: "tensorrt" or "cpu"; None takes the target that our models carry in their metadata, and "tensorrt" for
            others.

    Raises:
        FileAccessError: the file, or its external data, is missing or unreadable.
        ModelError: not an ONNX model, or `tensorrt` or `target` is none of those.
    """
    if tensorrt not in (None, *RELEASES):
        raise ModelError(f"Cannot lint for TensorRT {tensorrt!r}: expected 10 or 11.")
    if target not in (None, "tensorrt", "cpu"):
        raise ModelError(f"Cannot lint for the target {target!r}: expected 'tensorrt' or 'cpu'.")
    graph = read_graph(model)
    name = None if isinstance(model, onnx.ModelProto) else Path(model).name
    return lint_graph(graph, name, releases=RELEASES if tensorrt is None else (tensorrt,), target=target)


def lint_graph(
    graph: LintGraph, name: str | None, *, releases: tuple[Release, ...] = RELEASES, target: Target | None = None
) -> LintReport:
    """Check a model that has been read; see `lint`."""
    aim = target or target_of(graph)
    findings = [
        finding
        for rule in RULES
        if aim in rule.targets
        for hit in rule.check(graph)
        if (finding := _finding(rule, hit, releases, aim)) is not None
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return LintReport(
        model=name,
        target=aim,
        releases=releases if aim == "tensorrt" else (),
        opset=graph.opset,
        weighted=len(graph.weighted) + len(graph.integer_products),
        quantized=sum(found.quantized for found in graph.weighted) + len(graph.integer_products),
        integer=len(graph.integer_products),
        pairs=len(graph.activation_pairs),
        findings=tuple(findings),
    )


def target_of(graph: LintGraph) -> Target:
    """Return the target that a model was quantized for: what our metadata say, else TensorRT."""
    return "cpu" if graph.metadata.get(TARGET_KEY) == "cpu" else "tensorrt"


def _finding(rule: Rule, hit: Hit, releases: tuple[Release, ...], target: Target) -> Finding | None:
    """Put a rule and a place together; None where it concerns no release that is asked for."""
    concerned = tuple(release for release in hit.releases or rule.releases if release in releases)
    if not concerned:
        return None
    return Finding(
        rule=rule.name,
        severity=hit.severity or rule.severity,
        node=None if hit.node is None else hit.node.name,
        op_type=None if hit.node is None else hit.node.op_type,
        what=hit.what,
        cost=rule.cost,
        fix=rule.fix,
        mendable=rule.mendable and target == "tensorrt",
        releases=concerned if target == "tensorrt" else (),
        source=rule.source,
        verified=rule.verified,
    )
