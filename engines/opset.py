"""Opsets: which operators a graph may hold, and the way of an old graph to a newer opset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.defs
import onnx.version_converter

from engines.errors import UnsupportedModelError

MINIMUM_OPSET = 19
"""First opset in which the scale of Q/DQ may be FP16, which INT8 beside FP16 needs under strong typing."""

RAISED_OPSET = 20
"""The opset that older graphs are raised to."""

STANDARD_DOMAINS = ("", "ai.onnx")

RUNNABLE_DOMAINS = (*STANDARD_DOMAINS, "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
"""Operator domains that ONNX Runtime brings along; others need an extension library."""


def opset_of(model: onnx.ModelProto, file: Path) -> int:
    """Return the opset of the standard operators.

    Raises:
        UnsupportedModelError: the model uses no standard operators, or an opset that the installed onnx does not know.
    """
    versions = [int(entry.version) for entry in model.opset_import if entry.domain in STANDARD_DOMAINS]
    if not versions:
        domains = ", ".join(entry.domain for entry in model.opset_import)
        raise UnsupportedModelError(
            f"{str(file)!r} uses no standard ONNX operators (domains: {domains}); there is nothing to quantize in it."
        )
    opset, newest = versions[0], onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UnsupportedModelError(
            f"{str(file)!r} has opset {opset}; the installed onnx knows opsets up to {newest}. "
            f"Export it again with opset {RAISED_OPSET}, or install a newer onnx."
        )
    return opset


def check_operators(model: onnx.ModelProto, opset: int, file: Path) -> None:
    """Refuse operators that neither ONNX nor ONNX Runtime knows, before anything is spent on the graph.

    Raises:
        UnsupportedModelError: names the operator.
    """
    for node in (node for graph in nested_graphs(model.graph) for node in graph.node):
        if node.domain not in RUNNABLE_DOMAINS:
            raise UnsupportedModelError(
                f"{str(file)!r} holds the operator {node.op_type} of the domain {node.domain!r}, which needs an "
                "extension library to run. Cut the graph there, or export it with standard ONNX operators."
            )
        if node.domain not in STANDARD_DOMAINS:
            continue
        try:
            deprecated = onnx.defs.get_schema(node.op_type, opset).deprecated
        except onnx.defs.SchemaError as error:
            raise UnsupportedModelError(
                f"{str(file)!r} holds the operator {node.op_type}, which ONNX opset {opset} does not have. "
                f"Export it again with opset {RAISED_OPSET}."
            ) from error
        if deprecated:
            raise UnsupportedModelError(
                f"{str(file)!r} holds the operator {node.op_type}, which was removed before its opset {opset}. "
                f"Export it again with opset {RAISED_OPSET}."
            )


def raise_opset(model: onnx.ModelProto, opset: int, file: Path) -> onnx.ModelProto:
    """Raise a model of an older opset to `RAISED_OPSET`.

    Raises:
        UnsupportedModelError: an operator cannot be converted; it is named.
    """
    try:
        raised = onnx.version_converter.convert_version(model, RAISED_OPSET)
    except Exception as error:  # the converter raises RuntimeError and its own ConvertError
        found = " ".join(str(error).split()).rpartition("failed: ")[2].rstrip(".")
        raise UnsupportedModelError(
            f"{str(file)!r} has opset {opset} and cannot be raised to {RAISED_OPSET}: {_stumbling_block(model, opset)} "
            f"cannot be converted ({found}). Export it again with opset {RAISED_OPSET}."
        ) from error
    raised.ir_version = max(model.ir_version, 10)
    return raised


def nested_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Walk through a graph and the graphs inside its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for subgraph in inner:
                yield from nested_graphs(subgraph)


def _stumbling_block(model: onnx.ModelProto, opset: int) -> str:
    """Name the operators of the model that change in the first opset that it cannot be raised to."""
    for version in range(opset + 1, RAISED_OPSET + 1):
        try:
            model = onnx.version_converter.convert_version(model, version)
        except Exception:  # the failing step is what is looked for, whatever it raises
            nodes = (node for graph in nested_graphs(model.graph) for node in graph.node)
            operators = sorted({node.op_type for node in nodes if node.domain in STANDARD_DOMAINS})
            changed = [name for name in operators if onnx.defs.get_schema(name, version).since_version == version]
            return " or ".join(changed) or "an operator"
    return "an operator"
