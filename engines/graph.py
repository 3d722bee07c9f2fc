"""Preparation of a graph: one deterministic function that every stage applies to the same file.

`calibrate`, `quantize` and the FP16 conversion all work on the graph that `prepare` returns, so that the tensor names
of a calibration always fit. Tensor names of the file are kept; only tensors that folding makes superfluous disappear.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibrators.errors import FileAccessError
from calibrators.files import atomic_path
from engines.errors import ModelError
from engines.garbage import garbage_collection_off
from engines.last_made import LastMade, digest_of
from engines.onnxrt import Execution, Provider, load_header, make_session, tensor_specs
from engines.opset import MINIMUM_OPSET, check_operators, check_training, nested_graphs, opset_of, raise_opset
from engines.outside_weights import (
    SPILLED_BYTES,
    SPILLED_MODEL_BYTES,
    Spill,
    bring_inside,
    hidden_outside,
    hide_outside,
    initializer_bytes,
    outside_bytes,
    restore_outside,
    rooted,
    take_outside,
)
from engines.prepare_fold import fold_affine
from engines.prepare_group_norm import FIRST_WITH_CHANNELS, write_group_norms_out
from engines.prepare_large import fold_moved_weights
from engines.prepare_layer_norm import join_layer_norms
from engines.prepare_layout import cancel_transposes
from engines.prepare_names import drop_initializers_from_inputs, drop_notes, graph_hash, name_nodes, weights_hash
from engines.prepare_operators import rename_operators
from engines.prepare_padding import write_pads_out
from engines.prepare_simplify import simplify
from engines.size import external_files

if TYPE_CHECKING:
    import onnxruntime

PROTOBUF_LIMIT_BYTES = 2**31 - 2**20
"""Protobuf's limit for one message, less a margin for everything beside the weights."""

FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)

_SCRATCH = "trt_int8.scratch"

_IrModel: TypeAlias = ir.Model


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A graph that is ready to be calibrated and quantized.

    Attributes:
        path: the file it came from.
        proto: the prepared model; treat it as read-only, `ir()` gives a copy to edit.
        graph_hash: hash of the structure: nodes, attributes, inputs, outputs.
        weights_hash: hash of the initializers' names, types, shapes and values.
        scratch: the file of large weights that were moved or changed; keep this object while `proto` is in use.
    """

    path: Path
    proto: onnx.ModelProto
    graph_hash: str
    weights_hash: str
    scratch: Spill | None = field(default=None, repr=False, compare=False)

    @garbage_collection_off()
    def ir(self) -> ir.Model:
        """Return a copy of the model in onnx-ir's form; editing it leaves this object alone."""
        model = ir.from_proto(self.proto)
        model.meta[_SCRATCH] = self.scratch  # it refers to the file
        return model

    def editable(self) -> onnx.ModelProto:
        """Return a copy of the model in ONNX's form; editing it leaves this object alone."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        return model

    def replaced(self, model: _IrModel) -> PreparedModel:
        """Return another graph in place of this one, with hashes of its own."""
        proto = ir.to_proto(model)
        return PreparedModel(self.path, proto, graph_hash(proto), weights_hash(proto), self.scratch)


_last: LastMade[PreparedModel] = LastMade()


@garbage_collection_off()
def prepare(path: str | os.PathLike[str]) -> PreparedModel:
    """Load a model, raise it to opset 19 or above, fold and simplify it, and name every node.

    BatchNormalization is folded into the weights before it or after it, constants are folded, `auto_pad` is written
    out, layer normalizations become one node each, Transposes around element-wise nodes cancel, model-local functions
    are inlined, documentation strings and per-node metadata (exporters write source paths there) are dropped. Tensor
    names stay. The same file always gives the same graph, and what was prepared last is kept and known again by the
    hash of the file, so that the stages of a run prepare a model once.

    The large weights of a model beyond 2 GB stay in their files, which must not change while the model is in use. Those
    of a model of more than 32 MiB are moved to a temporary file, so that none of the tools copies them.

    Raises:
        FileAccessError: missing or unreadable file, external data that is missing, or no room for temporary files.
        ModelError: not an ONNX model, or one that the checker refuses.
        UnsupportedModelError: an operator that is unknown or cannot be raised to a newer opset, or an input or output
            that is no tensor.
    """
    file = Path(path)
    digest = digest_of(file)
    known = _last.find(file, digest)
    if known is not None:
        return replace(known, path=file)
    _last.forget()
    prepared, beside = _prepared(file)
    if digest == digest_of(file):
        _last.keep(file, digest, beside, prepared)
    return prepared


def _prepared(file: Path) -> tuple[PreparedModel, list[str]]:
    """Prepare a model; return it with the names of its external data files."""
    header = load_header(file)
    tensor_specs(header)
    beside = external_files(header)
    for name in beside:
        if not (file.parent / name).exists():
            raise FileAccessError(
                f"Cannot read the model {str(file)!r}: its external data {name!r} is missing. "
                "Put that file beside the model; the two belong together."
            )
    model = _with_weights(header, file)
    del header
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    scratch = None
    has_bodies = len(list(nested_graphs(model.graph))) > 1  # they may read weights, and are not looked into for it
    if SPILLED_MODEL_BYTES <= initializer_bytes(model) < PROTOBUF_LIMIT_BYTES and not has_bodies:
        scratch = Spill(SPILLED_BYTES)
        model = scratch.take(model)
    drop_initializers_from_inputs(model)
    opset = opset_of(model, file)
    check_operators(model, opset, file)
    check_training(model, opset, file)
    if opset < FIRST_WITH_CHANNELS:
        write_group_norms_out(model)
    hidden = hide_outside(model)
    if opset < MINIMUM_OPSET:
        model = raise_opset(model, opset, file)
    if scratch is not None:  # the weights are in memory as far as something asks for them
        restore_outside(model, hidden)
        hidden = {}
    elif hidden:
        scratch = Spill()
    model = _simplified(model, hidden, scratch, file, beyond=bool(hidden))
    drop_notes(model)
    name_nodes(model)
    _check(model, file)
    return PreparedModel(file, model, graph_hash(model), weights_hash(model), scratch), beside


def save_model(model: onnx.ModelProto | ir.Model, path: str | os.PathLike[str], *, loads: bool = False) -> None:
    """Write a model atomically; weights go to `NAME.onnx.data` beside it where one file could not hold them.

    Args:
        model: the model.
        path: where to.
        loads: let ONNX Runtime load the file, optimizations off, before it gets its name.

    Raises:
        FileAccessError: the folder cannot be written to, or the disk is full.
        ModelError: ONNX Runtime was to load it and refuses.
    """
    target = Path(path)
    if not exceeds_one_file(model):
        with atomic_path(target) as temporary:
            temporary.write_bytes(_serialized(model))
            if loads:
                make_session(temporary, execution="exact")
        return
    data = target.with_name(target.name + ".data")
    with atomic_path(target) as temporary, atomic_path(data) as weights:  # the data gets its name first
        ir.save(model if isinstance(model, ir.Model) else ir.from_proto(model), temporary, external_data=weights.name)
        if loads:
            make_session(temporary, execution="exact")
        _point_to(temporary, weights.name, data.name)


def exceeds_one_file(model: onnx.ModelProto | ir.Model) -> bool:
    """Tell whether a model is too large for one protobuf message, so that its weights need files of their own."""
    if isinstance(model, ir.Model):
        tensors = (value.const_value for value in model.graph.initializers.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) >= PROTOBUF_LIMIT_BYTES
    try:
        return int(model.ByteSize()) + outside_bytes(model) >= PROTOBUF_LIMIT_BYTES
    except Exception:  # above 2 GB protobuf cannot even tell the size; it raises a type of its own
        return True


def open_session(
    model: onnx.ModelProto,
    *,
    execution: Execution,
    threads: int | None = None,
    providers: Sequence[Provider] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Make an ONNX Runtime session of a model in memory, whatever its size; see `engines.onnxrt.make_session`.

    Weights that are outside are shared with their file. Only where the others exceed what one message holds is
    everything written to a temporary folder.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    if not exceeds_one_file(model) or (outside_bytes(model) and _fits_one_message(model)):
        content, settings = for_session(model)
        return make_session(content, execution=execution, threads=threads, settings=settings, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_model(model, file)
        return make_session(file, execution=execution, threads=threads, providers=providers)


def for_session(model: onnx.ModelProto) -> tuple[bytes, dict[str, str]]:
    """Return a model as one message, and the settings by which ONNX Runtime finds the weights that are outside of it.

    Args:
        model: what is in memory of it fits one message.
    """
    if not outside_bytes(model):
        return model.SerializeToString(), {}
    relative, root = rooted(model)
    return relative.SerializeToString(), {"session.model_external_initializers_file_folder_path": os.fspath(root)}


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


def _with_weights(header: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """Load the external data of a model; beyond 2 GB, all but the large weights."""
    try:
        if initializer_bytes(header) < PROTOBUF_LIMIT_BYTES:
            onnx.load_external_data_for_model(header, os.fspath(file.parent))
        else:
            take_outside(header, file.parent)
    except ModelError:
        raise
    except Exception as error:  # onnx raises ValidationError and protobuf's own types for broken external data
        line = " ".join(str(error).split()).rstrip(".")
        raise ModelError(f"Cannot read the model {str(file)!r}: {line}. Export it again.") from error
    return header


def _simplified(
    model: onnx.ModelProto, hidden: dict[str, onnx.TensorProto], keep: Spill | None, file: Path, *, beyond: bool
) -> onnx.ModelProto:
    """Simplify and fold a model; beyond 2 GB, `hidden` are the weights that the simplifier must not see."""
    try:
        with quiet():
            simple = simplify(model, None if keep is None or beyond else keep.take)
    except FileAccessError:
        raise
    except Exception as error:  # onnxslim and the inference raise whatever their parsers meet
        line = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{str(file)!r} cannot be simplified: {line}. Check it with `python -m onnx.checker`, or export it again."
        ) from error
    restore_outside(simple, hidden)
    graph = ir.from_proto(simple)
    moved = fold_moved_weights(graph, keep) if beyond and keep is not None else 0
    turned = cancel_transposes(graph)
    moved += turned + join_layer_norms(graph) + write_pads_out(graph)
    if not (moved + rename_operators(graph) + fold_affine(graph, keep)):
        return simple
    RemoveUnusedNodesPass()(graph)
    folded = ir.to_proto(graph)
    # A bias that was added behind a Transpose, say, lies next to its convolution now.
    return _simplified(folded, hide_outside(folded) if beyond else {}, keep, file, beyond=beyond)


def _serialized(model: onnx.ModelProto | ir.Model) -> bytes:
    """Return a model with all of its weights as one message."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    if outside_bytes(proto):
        if proto is model:
            proto = onnx.ModelProto()
            proto.CopyFrom(model)
        bring_inside(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def _fits_one_message(model: onnx.ModelProto) -> bool:
    try:
        return int(model.ByteSize()) < PROTOBUF_LIMIT_BYTES
    except Exception:  # see `exceeds_one_file`
        return False


def _check(model: onnx.ModelProto, file: Path) -> None:
    if exceeds_one_file(model):
        return  # the checker wants the external data in the current directory
    values = [*model.graph.input, *model.graph.output]
    rankless = [value.type.tensor_type for value in values if not value.type.tensor_type.HasField("shape")]
    for tensor in rankless:
        tensor.shape.SetInParent()  # the checker wants a shape there, and does not compare it with anything
    try:
        with hidden_outside(model):
            onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        line = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(f"{str(file)!r} is not a valid ONNX model: {line}. Export it again.") from error
    finally:
        for tensor in rankless:
            tensor.ClearField("shape")


def _point_to(path: Path, old: str, new: str) -> None:
    """Rename the external data file that a saved model refers to."""
    model = onnx.load(path, load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new
    path.write_bytes(model.SerializeToString(deterministic=True))
