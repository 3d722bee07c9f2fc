"""Weights that stay in the file they came from, so that a model of many gigabytes is held in memory once at most.

The description of a model (`onnx.ModelProto`) names such a weight by the absolute path, offset and length of its bytes.
onnx-ir maps it into memory when its values are asked for, and so does ONNX Runtime. Such a description is for
use inside a process: `engines.graph.save_model` writes models whose data lies beside them, under a relative name.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnx_ir as ir

from calibrators.errors import FileAccessError
from engines.errors import ModelError

OUTSIDE_BYTES = 2**20
"""Of a model beyond 2 GB, weights from this size on stay outside; the others are read."""

SPILLED_MODEL_BYTES = 2**25
"""Weights of a smaller model that has this many bytes of them are moved to a temporary file."""

SPILLED_BYTES = 2**16
"""Of these, weights from this size on."""

_CHUNK = 2**22


def initializer_bytes(model: onnx.ModelProto) -> int:
    """Return the size of a model's weights, wherever they are stored, without reading them."""
    return sum(_bytes(tensor) for tensor in model.graph.initializer)


def take_outside(model: onnx.ModelProto, folder: Path) -> None:
    """Read a model's external data, but for the large weights, which get absolute paths.

    Args:
        model: loaded without its external data; edited in place.
        folder: of the model's file.

    Raises:
        ModelError: external data outside of the folder, or shorter than the weight.
    """
    kept: dict[str, tuple[str, int]] = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        size = _bytes(tensor)
        offset = int(entries.get("offset", 0))
        if tensor.data_location != onnx.TensorProto.EXTERNAL or size < OUTSIDE_BYTES or not _mappable(tensor, offset):
            continue
        path = _contained(entries["location"], folder, tensor.name)
        length = int(entries.get("length", size))
        if length != size or path.stat().st_size < offset + size:
            raise ModelError(
                f"Cannot read the weight {tensor.name!r}: it takes {size} bytes, and {str(path)!r} holds "
                f"{max(path.stat().st_size - offset, 0)} from byte {offset} on ({length} stated). "
                "Copy or export the model again."
            )
        kept[tensor.name] = (os.fspath(path), offset)
        tensor.data_location = onnx.TensorProto.DEFAULT  # keeps the next line from reading it
    onnx.external_data_helper.load_external_data_for_model(model, os.fspath(folder))
    for tensor in model.graph.initializer:
        if tensor.name in kept:
            _point(tensor, *kept[tensor.name])


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Tell whether the values of a tensor are in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def outside_bytes(model: onnx.ModelProto) -> int:
    """Return the size of the weights that are outside."""
    return sum(_bytes(tensor) for tensor in model.graph.initializer if is_outside(tensor))


def rooted(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Path]:
    """Return a copy of a model that names its outside weights relative to a folder, and that folder.

    ONNX Runtime maps the weights of such a model into memory and takes no absolute paths.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    entries = [
        entry
        for tensor in copy.graph.initializer
        if is_outside(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    folder = Path(os.path.commonpath([Path(entry.value).parent for entry in entries]))
    for entry in entries:
        entry.value = os.path.relpath(entry.value, folder)
    return copy, folder


def read_chunks(tensor: onnx.TensorProto) -> Iterator[bytes]:
    """Read the bytes of a tensor that is outside, a few at a time."""
    path, offset = _place(tensor)
    left = _bytes(tensor)
    with path.open("rb") as file:
        file.seek(offset)
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise ModelError(f"Cannot read the weight {tensor.name!r}: {str(path)!r} became shorter.")
            left -= len(chunk)
            yield chunk


def read_inside(tensor: onnx.TensorProto) -> None:
    """Read a tensor that is outside into its description; edits it in place."""
    tensor.raw_data = b"".join(read_chunks(tensor))
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def bring_inside(model: onnx.ModelProto) -> None:
    """Read all weights that are outside into the model; edits it in place."""
    for tensor in model.graph.initializer:
        if is_outside(tensor):
            read_inside(tensor)


def hide_outside(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Make inputs of the weights that are outside, so that no tool reads, copies or folds them.

    Args:
        model: edited in place.

    Returns:
        What `restore_outside` needs.
    """
    hidden = {tensor.name: tensor for tensor in model.graph.initializer if is_outside(tensor)}
    if hidden:
        stored = [tensor for tensor in model.graph.initializer if tensor.name not in hidden]
        copies = {name: _copy(tensor) for name, tensor in hidden.items()}
        del model.graph.initializer[:]
        model.graph.initializer.extend(stored)
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            for name, tensor in copies.items()
        )
        return copies
    return {}


def restore_outside(model: onnx.ModelProto, hidden: dict[str, onnx.TensorProto]) -> None:
    """Make weights again of what `hide_outside` made inputs, as far as something still reads it; edits in place."""
    if not hidden:
        return
    inputs = [value for value in model.graph.input if value.name not in hidden]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    read = _read_names(model.graph)
    model.graph.initializer.extend(tensor for name, tensor in hidden.items() if name in read)


@contextmanager
def hidden_outside(model: onnx.ModelProto) -> Iterator[None]:
    """Make inputs of the weights that are outside meanwhile; edits a model in place, and restores what is read."""
    hidden = hide_outside(model)
    try:
        yield
    finally:
        restore_outside(model, hidden)


class Spill:
    """A file of its own for large weights; it goes when nothing holds this object.

    Args:
        least: bytes; smaller weights stay in memory. None for `OUTSIDE_BYTES`.
    """

    def __init__(self, least: int | None = None) -> None:
        self._least = OUTSIDE_BYTES if least is None else least
        self._folder: Path | None = None
        self._places: dict[bytes, int] = {}

    @property
    def folder(self) -> Path | None:
        """Where the file lies; None while nothing was written."""
        return self._folder

    def __call__(self, value: ir.Value) -> None:
        """Write a large constant to the file, and let the value refer to it; small ones stay as they are."""
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < self._least:
            return
        file, offset = self._write(np.ascontiguousarray(tensor.numpy()).data)
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(
            os.fspath(file), offset, tensor.nbytes, tensor.dtype, shape=shape, name=str(value.name)
        )

    def take(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Write the large weights of a model to the file, and return its description without them.

        Args:
            model: loses its large weights; what they took is free when nothing holds it any more.
        """
        moved = False
        for tensor in model.graph.initializer:
            if is_outside(tensor) or len(tensor.raw_data) < self._least or not _mappable(tensor, 0):
                continue
            file, offset = self._write(tensor.raw_data)
            tensor.ClearField("raw_data")
            _point(tensor, os.fspath(file), offset)
            moved = True
        if not moved:
            return model
        description = onnx.ModelProto()
        description.CopyFrom(model)
        return description

    def _write(self, content: bytes | memoryview) -> tuple[Path, int]:
        """Append to the file; equal contents have the same place, so that descriptions tell what is equal."""
        digest = hashlib.sha256(content).digest()
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="trt-int8-")).resolve()
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            file = self._folder / "weights"
            if digest not in self._places:
                with file.open("ab") as stream:
                    stream.write(b"\0" * (-stream.tell() % 64))
                    place = stream.tell()
                    stream.write(content)
                self._places[digest] = place
        except OSError as error:
            raise FileAccessError(
                f"Cannot keep the weights of the model in a temporary file: {error}. They take as much room as the "
                "model's own file; name a folder that has it by the environment variable TMPDIR."
            ) from error
        return file, self._places[digest]


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _read_names(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _read_names(attribute.g)
    return names


def _bytes(tensor: onnx.TensorProto) -> int:
    dtype = ir.DataType(tensor.data_type)
    return 0 if dtype == ir.DataType.STRING else math.ceil(math.prod(tensor.dims) * dtype.itemsize)


def _mappable(tensor: onnx.TensorProto, offset: int) -> bool:
    """Only what numpy has a type of its own for, and what starts where that type may."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    whole = dtype.itemsize == ir.DataType(tensor.data_type).itemsize
    return dtype.isbuiltin == 1 and whole and offset % dtype.itemsize == 0


def _contained(location: str, folder: Path, name: str) -> Path:
    base = folder.resolve()
    path = (base / location).resolve()
    if not path.is_relative_to(base):
        raise ModelError(
            f"Cannot read the weight {name!r}: its external data {location!r} lies outside the directory of the model. "
            "Put that file beside the model."
        )
    return path


def _point(tensor: onnx.TensorProto, path: str, offset: int) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", path), ("offset", str(offset)), ("length", str(_bytes(tensor)))):
        tensor.external_data.add(key=key, value=value)


def _place(tensor: onnx.TensorProto) -> tuple[Path, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return Path(entries["location"]), int(entries.get("offset", 0))
