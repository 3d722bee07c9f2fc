"""Preparation of a graph: one deterministic function that every stage applies to the same file.

`calibrate`, `quantize` and the FP16 conversion all work on the graph that `prepare` returns, so that the tensor names
of a calibration always fit. Tensor names of the file are kept; only tensors that folding makes superfluous disappear.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
import onnxslim
from onnx_ir.passes.common import ShapeInferencePass

from calibrators.errors import FileAccessError
from calibrators.files import atomic_path
from engines.errors import ModelError, UnsupportedModelError
from engines.onnxrt import Execution, load_header, make_session, tensor_specs
from engines.opset import MINIMUM_OPSET, RAISED_OPSET, check_operators, nested_graphs, opset_of, raise_opset
from engines.size import external_files

if TYPE_CHECKING:
    import onnxruntime

PROTOBUF_LIMIT_BYTES = 2**31 - 2**20
"""Protobuf's limit for one message, less a margin for everything beside the weights."""

FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A graph that is ready to be calibrated and quantized.

    Attributes:
        path: the file it came from.
        proto: the prepared model; treat it as read-only, `ir()` gives a copy to edit.
        graph_hash: hash of the structure: nodes, attributes, inputs, outputs.
        weights_hash: hash of the initializers' names, types, shapes and values.
    """

    path: Path
    proto: onnx.ModelProto
    graph_hash: str
    weights_hash: str

    def ir(self) -> ir.Model:
        """Return a copy of the model in onnx-ir's form; editing it leaves this object alone."""
        return ir.from_proto(self.proto)


def prepare(path: str | os.PathLike[str]) -> PreparedModel:
    """Load a model, raise it to opset 19 or above, fold and simplify it, and name every node.

    BatchNorm after a convolution is folded into it, constants are folded, model-local functions are inlined,
    documentation strings and per-node metadata (exporters write source paths there) are dropped. Tensor names stay.
    The same file always gives the same graph.

    Raises:
        FileAccessError: missing or unreadable file, or external data that is missing.
        ModelError: not an ONNX model, or one that the checker refuses.
        UnsupportedModelError: an operator that is unknown or cannot be raised to a newer opset, or an input or output
            that is no tensor.
    """
    file = Path(path)
    header = load_header(file)
    tensor_specs(header)
    for name in external_files(header):
        if not (file.parent / name).exists():
            raise FileAccessError(
                f"Cannot read the model {str(file)!r}: its external data {name!r} is missing. "
                "Put that file beside the model; the two belong together."
            )
    try:
        model = onnx.load(file)
    except Exception as error:  # onnx raises ValidationError and protobuf's own types for broken external data
        line = " ".join(str(error).split()).rstrip(".")
        raise ModelError(f"Cannot read the model {str(file)!r}: {line}. Export it again.") from error
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _drop_initializers_from_inputs(model)
    opset = opset_of(model, file)
    check_operators(model, opset, file)
    if opset < MINIMUM_OPSET:
        if exceeds_one_file(model):
            raise UnsupportedModelError(
                f"{str(file)!r} has opset {opset} and is larger than 2 GB, which ONNX's version converter cannot hold; "
                f"opset {MINIMUM_OPSET} or above is needed. Export it again with opset {RAISED_OPSET}."
            )
        model = raise_opset(model, opset, file)
    model = _simplified(model, file)
    _drop_notes(model)
    _name_nodes(model)
    _check(model, file)
    return PreparedModel(file, model, graph_hash=_graph_hash(model), weights_hash=_weights_hash(model))


def save_model(model: onnx.ModelProto | ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model atomically; weights go to `NAME.onnx.data` beside it where one file could not hold them.

    Raises:
        FileAccessError: the folder cannot be written to, or the disk is full.
    """
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    target = Path(path)
    if not exceeds_one_file(proto):
        with atomic_path(target) as temporary:
            temporary.write_bytes(proto.SerializeToString(deterministic=True))
        return
    data = target.with_name(target.name + ".data")
    with atomic_path(target) as temporary, atomic_path(data) as weights:  # the data gets its name first
        ir.save(ir.from_proto(proto), temporary, external_data=weights.name)
        _point_to(temporary, weights.name, data.name)


def exceeds_one_file(model: onnx.ModelProto) -> bool:
    """Tell whether a model is too large for one protobuf message, so that its weights need files of their own."""
    try:
        return int(model.ByteSize()) >= PROTOBUF_LIMIT_BYTES
    except Exception:  # above 2 GB protobuf cannot even tell the size; it raises a type of its own
        return True


def open_session(
    model: onnx.ModelProto, *, execution: Execution, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Make an ONNX Runtime session of a model in memory, whatever its size; see `engines.onnxrt.make_session`.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    if not exceeds_one_file(model):
        return make_session(model.SerializeToString(), execution=execution, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_model(model, file)
        return make_session(file, execution=execution, threads=threads)


def constant_array(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the constant behind a value: an initializer, or the output of a Constant node; None for activations."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value
    return ir.convenience.get_const_tensor(value)


def is_activation(value: ir.Value | None) -> bool:
    """Tell whether a value is computed (or fed) at run time and holds floats."""
    return value is not None and constant_array(value) is None and value.dtype in FLOAT_TYPES


def name_of(value: ir.Value) -> str:
    """Return a value's name; every value of a prepared graph has one."""
    if value.name is None:
        raise AssertionError("a prepared graph holds an unnamed value")
    return value.name


def float_activations(model: ir.Model) -> list[str]:
    """Return the names of all float activations of the main graph, inputs first, then in the order of the nodes.

    BFLOAT16 is left out: numpy has no such type, so ONNX Runtime cannot hand it out.
    """
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return [
        name_of(value)
        for value in values
        if value.name and is_activation(value) and value.dtype != ir.DataType.BFLOAT16
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of graph tools (print, warnings) away from the user's terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _check(model: onnx.ModelProto, file: Path) -> None:
    if exceeds_one_file(model):
        return
    values = [*model.graph.input, *model.graph.output]
    rankless = [value.type.tensor_type for value in values if not value.type.tensor_type.HasField("shape")]
    for tensor in rankless:
        tensor.shape.SetInParent()  # the checker wants a shape there, and does not compare it with anything
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        line = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(f"{str(file)!r} is not a valid ONNX model: {line}. Export it again.") from error
    finally:
        for tensor in rankless:
            tensor.ClearField("shape")


def _simplified(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    inputs = list(model.graph.input)
    try:
        with quiet():
            slim = onnxslim.slim(model)
            inferred = _with_shapes(slim)
    except Exception as error:  # onnxslim and the inference raise whatever their parsers meet
        line = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{str(file)!r} cannot be simplified: {line}. Check it with `python -m onnx.checker`, or export it again."
        ) from error
    # Inputs that nothing reads are part of the model's interface; the simplifier drops them.
    kept = {value.name: value for value in inferred.graph.input}
    del inferred.graph.input[:]
    inferred.graph.input.extend(kept.get(value.name, value) for value in inputs)
    return inferred


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    if not exceeds_one_file(model):
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    large = ir.from_proto(model)
    ShapeInferencePass(data_prop=True)(large)  # takes the large weights away while it works
    return ir.to_proto(large)


def _drop_initializers_from_inputs(model: onnx.ModelProto) -> None:
    """Before IR version 4 every initializer had to be an input too; as inputs they would not be constants."""
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, 4)


def _drop_notes(model: onnx.ModelProto) -> None:
    for graph in nested_graphs(model.graph):
        for item in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
    model.ClearField("doc_string")


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give unnamed nodes and doubles a unique name, made from the first output: unique, and known to the user."""
    taken: set[str] = set()
    for node in (node for graph in nested_graphs(model.graph) for node in graph.node):
        if not node.name or node.name in taken:
            first = next((output for output in node.output if output), "")
            name = candidate = f"{node.op_type}:{first}"
            number = 1
            while candidate in taken:
                number += 1
                candidate = f"{name}:{number}"
            node.name = candidate
        taken.add(node.name)


def _graph_hash(model: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for value in [*model.graph.input, *model.graph.output]:
        digest.update(value.SerializeToString(deterministic=True))
    for opset in sorted(model.opset_import, key=lambda entry: entry.domain):
        digest.update(opset.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _weights_hash(model: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for initializer in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        digest.update(repr((initializer.name, initializer.data_type, list(initializer.dims))).encode())
        if initializer.data_type == onnx.TensorProto.STRING:
            digest.update(b"".join(initializer.string_data))
        else:  # the values, however the file stores them: the same weights in external data are the same weights
            digest.update(np.ascontiguousarray(onnx.numpy_helper.to_array(initializer)).tobytes())
    return digest.hexdigest()


def _point_to(path: Path, old: str, new: str) -> None:
    """Rename the external data file that a saved model refers to."""
    model = onnx.load(path, load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new
    path.write_bytes(model.SerializeToString(deterministic=True))
