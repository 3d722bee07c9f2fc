"""Opsets: which operators a graph may hold, and the way of an old graph to a newer opset."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.defs
import onnx.numpy_helper
import onnx.shape_inference
import onnx.version_converter

from engines.errors import UnsupportedModelError
from engines.prepare_resize import FIRST_WITH_MODES, hide_old_resizes, restore_old_resizes

MINIMUM_OPSET = 19
"""First opset in which the scale of Q/DQ may be FP16, which INT8 beside FP16 needs under strong typing."""

RAISED_OPSET = 20
"""The opset that older graphs are raised to."""

FIRST_WITH_BROADCASTING = 7
"""The opset from which on shapes are aligned at their last axis, as numpy does."""

FIRST_WITHOUT_FLATTENING = 13
"""The opset from which on Softmax and its kin work along one axis; before, along all from that axis on."""

FIRST_SCAN_WITHOUT_BATCH = 9
"""The opset in which Scan lost its batch axis."""

STANDARD_DOMAINS = ("", "ai.onnx")

REWRITTEN = ("GroupNormalization",)
"""Operators that ONNX has withdrawn in the opset of some graphs, and that preparation writes as others."""

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
        if deprecated and node.op_type not in REWRITTEN:
            raise UnsupportedModelError(
                f"{str(file)!r} holds the operator {node.op_type}, which was removed before its opset {opset}. "
                f"Export it again with opset {RAISED_OPSET}."
            )


def check_training(model: onnx.ModelProto, opset: int, file: Path) -> None:
    """Refuse a model that was exported in training mode: its outputs depend on the whole batch, or on chance.

    Raises:
        UnsupportedModelError: names the operator.
    """
    constants = {tensor.name: tensor for graph in nested_graphs(model.graph) for tensor in graph.initializer}
    for node in (node for graph in nested_graphs(model.graph) for node in graph.node):
        if node.domain not in STANDARD_DOMAINS:
            continue
        training = False
        if node.op_type == "BatchNormalization":
            flags = [attribute.i for attribute in node.attribute if attribute.name == "training_mode"]
            training = any(flags) if opset >= 14 else any(node.output[1:])
        elif node.op_type == "Dropout" and opset >= 12 and len(node.input) > 2 and node.input[2] in constants:
            training = bool(onnx.numpy_helper.to_array(constants[node.input[2]]).any())
        if training:
            raise UnsupportedModelError(
                f"{str(file)!r} holds the operator {node.op_type} ({node.name or node.output[0]}) in training mode; "
                "expected a model for inference. Call model.eval() before the export."
            )


def raise_opset(model: onnx.ModelProto, opset: int, file: Path) -> onnx.ModelProto:
    """Raise a model of an older opset to `RAISED_OPSET`.

    Args:
        model: edited where its operators need it.
        opset: of the model.
        file: the model's file, for messages.

    Raises:
        UnsupportedModelError: an operator cannot be converted; it is named.
    """
    model.ir_version = max(model.ir_version, 4)  # before, every initializer had to be an input
    if opset < FIRST_SCAN_WITHOUT_BATCH:
        _refuse_batched_scan(model, opset, file)
    if opset < FIRST_WITH_MODES:
        if not _has_bodies(model):  # see `_forget_guesses`
            with contextlib.suppress(Exception):  # shapes that the hidden operators would keep from the converter
                model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        hide_old_resizes(model)
    if opset < FIRST_WITHOUT_FLATTENING:
        _refuse_flat_hardmax(model, opset, file)
    if opset < FIRST_WITH_BROADCASTING:
        _spread_slopes(model)
    try:
        raised = onnx.version_converter.convert_version(model, RAISED_OPSET)
    except Exception as error:  # the converter raises RuntimeError and its own ConvertError
        found = " ".join(str(error).split()).rpartition("failed: ")[2].rstrip(".")
        raise UnsupportedModelError(
            f"{str(file)!r} has opset {opset} and cannot be raised to {RAISED_OPSET}: {_stumbling_block(model, opset)} "
            f"cannot be converted ({found}). Export it again with opset {RAISED_OPSET}."
        ) from error
    restore_old_resizes(raised, file)
    if _has_bodies(model):
        _forget_guesses(raised, model)
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


def _refuse_batched_scan(model: onnx.ModelProto, opset: int, file: Path) -> None:
    for node in (node for graph in nested_graphs(model.graph) for node in graph.node):
        if node.op_type == "Scan" and node.domain in STANDARD_DOMAINS:
            raise UnsupportedModelError(
                f"{str(file)!r} has opset {opset} and cannot be raised to {RAISED_OPSET}: the operator Scan "
                f"({node.name or node.output[0]}) had a batch axis up to opset 8, which newer ones do not have. "
                f"Export it again with opset {RAISED_OPSET}."
            )


def _has_bodies(model: onnx.ModelProto) -> bool:
    return any(attribute.type == onnx.AttributeProto.GRAPH for node in model.graph.node for attribute in node.attribute)


def _forget_guesses(raised: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Drop the shapes that the converter inferred: in old opsets it took that of an If from one of its branches."""
    for graph in nested_graphs(raised.graph):
        del graph.value_info[:]
    for value, stated in zip(raised.graph.output, original.graph.output, strict=True):
        value.type.CopyFrom(stated.type)


def _refuse_flat_hardmax(model: onnx.ModelProto, opset: int, file: Path) -> None:
    """The converter keeps the meaning of Softmax and LogSoftmax, and forgets Hardmax."""
    for node in (node for graph in nested_graphs(model.graph) for node in graph.node):
        if node.op_type != "Hardmax" or node.domain not in STANDARD_DOMAINS:
            continue
        if next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1) != -1:
            raise UnsupportedModelError(
                f"{str(file)!r} has opset {opset} and cannot be raised to {RAISED_OPSET}: the operator Hardmax "
                f"({node.name or node.output[0]}) works on all axes from one on, up to opset "
                f"{FIRST_WITHOUT_FLATTENING - 1}. Export it again with opset {RAISED_OPSET}."
            )


def _spread_slopes(model: onnx.ModelProto) -> None:
    """Give the slopes of PRelu, one per channel, the shape that aligns with the channels; the converter forgets it."""
    values = [*model.graph.input, *model.graph.value_info]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    slopes = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] > 1}
    for node in model.graph.node:
        rank = ranks.get(node.input[0], 0) if node.op_type == "PRelu" else 0
        if rank < 3 or node.input[1] not in slopes:
            continue
        name = f"{node.output[0]}_slope"
        values_of = onnx.numpy_helper.to_array(slopes[node.input[1]]).reshape(-1, *[1] * (rank - 2))
        model.graph.initializer.append(onnx.numpy_helper.from_array(values_of, name))
        node.input[1] = name


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
