"""Reading a model for the linter: what it has to know of the weights is their types and shapes alone."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.external_data_helper
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir

from calibrators.errors import FileAccessError
from engines.errors import ModelError
from engines.lint_graph import LintGraph
from engines.onnxrt import load_header
from engines.size import external_files

LARGEST_READ = 1 << 17
"""Initializers of more elements are weights: no scale and no zero point is that large."""

_LEFT_OUT = "left out, as it is a weight"
"""Location of the external data of an initializer that was not read: no file has this name."""


def read_graph(model: onnx.ModelProto | str | os.PathLike[str]) -> LintGraph:
    """Read a model for looking at: without its large weights, with the types and shapes that can be inferred.

    Raises:
        FileAccessError: missing or unreadable, or its external data are missing.
        ModelError: not an ONNX model.
    """
    header, folder = load(model)
    seen = ir.from_proto(_inferred(header, folder))
    _name_all(seen)
    return LintGraph(seen)


def read_for_editing(model: onnx.ModelProto | str | os.PathLike[str]) -> tuple[LintGraph, set[ir.Value]]:
    """Read a model with its weights, those in external data where they lie.

    Returns:
        The model, and the values whose inferred types and shapes are not part of the file.

    Raises:
        FileAccessError: missing or unreadable, or its external data are missing.
        ModelError: not an ONNX model.
    """
    header, folder = load(model)
    inferred = ir.from_proto(_inferred(header, folder))
    known = {value.name: value for value in _values(inferred)}
    full = ir.from_proto(_without_functions(header))
    _name_all(full)
    if folder is not None:
        ir.external_data.set_base_dir(full.graph, folder)
    borrowed: set[ir.Value] = set()
    for value in _values(full):
        if value.name in known and not value.is_initializer() and (value.type is None or value.shape is None):
            borrowed.add(value)
            value.type, value.shape = known[value.name].type, known[value.name].shape
    return LintGraph(full), borrowed


def load(model: onnx.ModelProto | str | os.PathLike[str]) -> tuple[onnx.ModelProto, Path | None]:
    """Return a model without its external data, and the folder that they lie in; None for one in memory.

    Raises:
        FileAccessError: missing or unreadable, or its external data are missing.
        ModelError: not an ONNX model.
    """
    if isinstance(model, onnx.ModelProto):
        if not model.graph.output or not model.opset_import:
            raise ModelError("Cannot lint the model: it holds no graph with outputs and opsets. Export it again.")
        return model, None
    file = Path(model)
    header = load_header(file)
    for name in external_files(header):
        if not (file.parent / name).exists():
            raise FileAccessError(
                f"Cannot read the model {str(file)!r}: its external data {name!r} is missing. "
                "Put that file beside the model; the two belong together."
            )
    return header, file.parent


def _inferred(header: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    light = _without_functions(_without_weights(header, folder))
    # A graph that contradicts itself, or holds operators that onnx does not know, is linted with the types it states.
    with contextlib.suppress(Exception):  # the inference raises its own errors, protobuf's, and RuntimeError
        light = onnx.shape_inference.infer_shapes(light, data_prop=True)
    return light


def _without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _without_weights(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """Copy a model but for the contents of large initializers; small ones in external data are read."""
    light = onnx.ModelProto()
    _copy_fields(model, light, "graph")
    _copy_fields(model.graph, light.graph, "initializer")
    for tensor in model.graph.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if math.prod(tensor.dims) > LARGEST_READ or (external and folder is None):
            described = light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            described.data_location = onnx.TensorProto.EXTERNAL
            described.external_data.add(key="location", value=_LEFT_OUT)
            continue
        copy = light.graph.initializer.add()
        copy.CopyFrom(tensor)
        if external and folder is not None:
            try:
                onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
            except Exception as error:  # onnx raises ValidationError, OSError and ValueError for broken data
                line = " ".join(str(error).split()).rstrip(".")
                raise ModelError(
                    f"Cannot read the model: its external data are damaged: {line}. Export it again."
                ) from error
            copy.data_location = onnx.TensorProto.DEFAULT
            del copy.external_data[:]
    return light


def _copy_fields(source: Any, target: Any, leave: str) -> None:
    for field, value in source.ListFields():
        if field.name == leave:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _name_all(model: ir.Model) -> None:
    """Give every node a name of its own, as `engines.graph.prepare` does: from its first output where it has none."""
    taken: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not node.name or node.name in taken:
            first = next((output.name for output in node.outputs if output.name), "")
            node.name = (
                f"{node.op_type}:{first}" if first or node.op_type not in taken else f"{node.op_type}:{len(taken)}"
            )
        taken.add(node.name)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in [model.graph, *model.graph.subgraphs()]:
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from (value for value in node.outputs if value.name)
