"""The export stage: a PyTorch model becomes an ONNX file that is proved to compute the same.

The file appears under its name only after all checks: shapes inferred, the checker passed, outputs compared.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.checker
import onnx.shape_inference

from calibrators.errors import FileAccessError
from calibrators.files import atomic_path, sha256_of_file
from calibrators.protocols import Array, Track, untracked
from engines.errors import ModelError
from engines.graph import PROTOBUF_LIMIT_BYTES, quiet
from engines.onnxrt import PRECISION_KEY, OnnxRuntimeRunner, load_header, tensor_specs
from engines.prepare_simplify import share_constants
from engines.prepare_slim import slim
from engines.runner import TensorSpec
from trt_int8.capture import DynamicAxes, capture
from trt_int8.errors import ExportError
from trt_int8.input_binding import program_samples
from trt_int8.models import load_model
from trt_int8.reproduction import (
    DEFAULT_TOLERANCE,
    OutputDifference,
    Reference,
    batch_of,
    check_reproduction,
    with_batch,
)

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

DEFAULT_OPSET = 20


@dataclass(frozen=True, slots=True)
class ExportResult:
    """An exported model.

    Attributes:
        path: the ONNX file.
        data_path: the file beside it that holds the weights, where one file could not hold all.
        inputs: the model's inputs.
        outputs: the model's outputs.
        opset: version of the standard operators.
        differences: from the reference, for each output and batch size; empty where nothing could be compared.
        sha256: of `path`.
        size_bytes: of both files together.
        notes: what a user should know.
    """

    path: Path
    data_path: Path | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    differences: tuple[OutputDifference, ...]
    sha256: str
    size_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "file": self.path.name,
            "data_file": None if self.data_path is None else self.data_path.name,
            "inputs": [_spec_to_json(spec) for spec in self.inputs],
            "outputs": [_spec_to_json(spec) for spec in self.outputs],
            "opset": self.opset,
            "differences": [asdict(difference) for difference in self.differences],
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "notes": list(self.notes),
        }


def export_onnx(
    model: torch.nn.Module | ExportedProgram | str | os.PathLike[str],
    inputs: Mapping[str, Array | torch.Tensor],
    output: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    dynamic: DynamicAxes | None = None,
    output_names: Sequence[str] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    simplify: bool = True,
    external_data_above: int = PROTOBUF_LIMIT_BYTES,
    track: Track = untracked,
) -> ExportResult:
    """Write a PyTorch model as an ONNX file that is simplified, checked, and compared with the model.

    Nodes and activations are named after their modules (`layer2.0.conv1/Conv`). BatchNorm is folded into the
    convolution, transposed convolution or linear layer before it.

    Args:
        model: an FP32 module on the CPU, or a program of `torch.export`; what `load_model` takes
            (`package.module:factory`, a `.pt2` file); or an `.onnx` file, which is simplified and checked in the same
            way, with itself as the reference.
        inputs: real samples: input name to array, the batch axis first. The names become those of the graph's inputs.
            They are bound to the parameters of `forward` by name where all of them are parameters, else by position.
            May be empty for a program, which is checked with the inputs that it was made with, and for an `.onnx`
            file, which is not run then.
        output: the file to write; weights that one file cannot hold go to `NAME.onnx.data` beside it.
        opset: ONNX opset to write; a file keeps its own.
        dynamic: input name to axis to symbol: the axes that stay free. By default axis 0 of every input that has axes
            is "batch"; `{}` fixes all. Only for modules: programs and files have axes of their own.
        output_names: names for the outputs; else the keys of a dict, "output" for a single tensor, "output_0",
            "output_1" for a tuple. Not for files.
        tolerance: largest difference from the reference that is let pass, relative to the output's largest magnitude.
        simplify: fold and merge nodes by onnxslim.
        external_data_above: bytes of weights above which they go to a file of their own.
        track: shows progress.

    Returns:
        What was written, and how far it is from the reference.

    Raises:
        ExportError: the samples do not fit, the model cannot be exported, or the file does not reproduce it.
        ModelError: the `.onnx` file is no ONNX model.
        FileAccessError: a file cannot be read or written.
        ConfigError: an entry point names nothing.
    """
    source = _opened(os.fspath(model)) if isinstance(model, str | os.PathLike) else model
    samples = {name: _array(value) for name, value in inputs.items()} or _samples_of(source)
    free = _free_axes(source, samples, dynamic)
    target = Path(output)
    with _staging_folder(target) as folder:
        export = _Export(folder / target.name, samples, free, tolerance, simplify, external_data_above)

        def make() -> None:
            if isinstance(source, Path):
                export.take_file(source)
            else:
                export.trace(source, opset, output_names)

        for step in track((make, export.write, export.check), "export to ONNX", 3):
            step()
        return export.publish(target)


@dataclass(slots=True)
class _Export:
    """An export under way: its file, in a folder that nobody looks into, and what is known of it so far."""

    file: Path
    samples: Mapping[str, Array]
    free: DynamicAxes
    tolerance: float
    simplify: bool
    external_data_above: int
    proto: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    reference: Reference | None = None
    differences: list[OutputDifference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def data_file(self) -> Path:
        return self.file.with_name(self.file.name + ".data")

    def trace(self, model: torch.nn.Module | ExportedProgram, opset: int, output_names: Sequence[str] | None) -> None:
        """Take the graph from PyTorch."""
        samples = self.samples
        if batch_of(samples, self.free) == 1:
            # PyTorch's tracer takes a length of 1 for a constant more readily than any other.
            samples = with_batch(samples, self.free, 2)
        captured = capture(model, samples, opset=opset, dynamic=self.free, output_names=output_names)
        self.reference = captured.reference
        self.proto = _simplified(captured.proto) if self.simplify else captured.proto
        onnx.helper.set_model_props(self.proto, {PRECISION_KEY: "fp32"})
        specs = {spec.name: spec for spec in tensor_specs(self.proto)[0]}
        unused = [name for name in samples if name not in specs]
        if unused:
            self.notes.append(f"No output depends on {', '.join(unused)}: left out of the graph.")
        for name, spec in specs.items():
            for axis, symbol in self.free.get(name, {}).items():
                if spec.shape is not None and isinstance(spec.shape[axis], int):
                    raise ExportError(
                        f"PyTorch fixed axis {axis} ({symbol}) of input {name!r} at {spec.shape[axis]}. "
                        "Look for that number in forward, or leave the axis out of dynamic."
                    )

    def take_file(self, source: Path) -> None:
        """Take the graph from an ONNX file."""
        try:
            proto = onnx.load(source)
        except Exception as error:  # onnx and protobuf raise classes of their own for broken or missing external data
            raise ModelError(f"Cannot read the model {str(source)!r}: {_one_line(error)}.") from error
        self.proto = _simplified(proto) if self.simplify else proto
        if not self.samples:
            self.notes.append("Nothing to compare with: the model is an .onnx file, and there are no sample inputs.")
            return
        self.notes.append("No PyTorch model to compare with: compared with the .onnx file as it was given.")

        def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
            with OnnxRuntimeRunner(source) as runner:
                return runner.infer(feeds)

        self.reference = reference

    def write(self) -> None:
        """Write the file, infer its shapes, and have it checked."""
        external = _weight_bytes(self.proto) > self.external_data_above
        onnx.save_model(
            self.proto,
            self.file,
            save_as_external_data=external,
            all_tensors_to_one_file=True,
            location=self.data_file.name,
        )
        try:
            onnx.shape_inference.infer_shapes_path(self.file, data_prop=True)
            onnx.checker.check_model(self.file, full_check=True)
        except Exception as error:  # the inference and the checker are C++ with error classes of their own
            raise ExportError(
                f"The graph is not valid ONNX: {_one_line(error)}. Try another opset, or simplify=False."
            ) from error
        kept = [node.name for node in self.proto.graph.node if node.op_type == "BatchNormalization"]
        if kept:
            self.notes.append(f"BatchNorm stays where it follows no layer with weights: {', '.join(kept)}.")
        if self.data_file.is_file():
            self.notes.append(f"The weights lie in {self.data_file.name}: keep it beside the model.")

    def check(self) -> None:
        """Compare the file with its reference."""
        if self.reference is not None:
            try:
                self.differences = check_reproduction(self.file, self.reference, self.samples, tolerance=self.tolerance)
            except ModelError as error:
                reason = _one_line(error.__cause__ or error).replace(str(self.file), self.file.name)
                raise ExportError(
                    f"ONNX Runtime refuses the exported model: {reason}. Try another opset, or simplify=False."
                ) from error

    def publish(self, target: Path) -> ExportResult:
        """Move what was written to its place.

        The old model goes first and the new one comes last, so that no model ever lies beside another one's weights.
        """
        inputs, outputs = tensor_specs(load_header(self.file))
        sha256, size = sha256_of_file(self.file), self.file.stat().st_size
        data = target.with_name(self.data_file.name)
        external = self.data_file.is_file()
        target.unlink(missing_ok=True)
        if external:
            size += self.data_file.stat().st_size
            with atomic_path(data) as temporary:
                self.data_file.replace(temporary)
        else:
            data.unlink(missing_ok=True)
        with atomic_path(target) as temporary:
            self.file.replace(temporary)
        return ExportResult(
            path=target,
            data_path=data if external else None,
            inputs=inputs,
            outputs=outputs,
            opset=next((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), 0),
            differences=tuple(self.differences),
            sha256=sha256,
            size_bytes=size,
            notes=tuple(self.notes),
        )


def _opened(source: str) -> torch.nn.Module | ExportedProgram | Path:
    if not source.lower().endswith(".onnx"):
        return load_model(source)
    load_header(source)
    return Path(source)


def _samples_of(source: torch.nn.Module | ExportedProgram | Path) -> dict[str, Array]:
    if isinstance(source, Path):
        return {}
    from torch.export import ExportedProgram

    return program_samples(source) if isinstance(source, ExportedProgram) else {}


def _array(value: Array | torch.Tensor) -> Array:
    return value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()


def _free_axes(
    source: torch.nn.Module | ExportedProgram | Path, samples: Mapping[str, Array], dynamic: DynamicAxes | None
) -> DynamicAxes:
    """Return the axes of a module that stay free, checked against the samples; none for programs and files."""
    if isinstance(source, Path) or not _is_module(source):
        if dynamic is not None:
            raise ExportError("Cannot choose the free axes of a program or an .onnx file: they are part of it.")
        if not samples and not isinstance(source, Path):
            raise ExportError("Cannot check the program: it keeps no sample inputs of its own. Give one per input.")
        return {}
    if not samples:
        raise ExportError("Cannot export without sample inputs: PyTorch traces the model on them. Give one per input.")
    if dynamic is None:
        dynamic = {name: {0: "batch"} for name, value in samples.items() if value.ndim}
    lengths: dict[str, tuple[str, int]] = {}
    for name, axes in dynamic.items():
        if name not in samples:
            raise ExportError(
                f"Cannot keep axes of {name!r} free: there is no such input. The inputs are {', '.join(samples)}."
            )
        shape = samples[name].shape
        for axis, symbol in axes.items():
            if not 0 <= axis < len(shape):
                raise ExportError(f"Cannot keep axis {axis} of {name!r} free: its sample has shape {shape}.")
            other, length = lengths.setdefault(symbol, (name, shape[axis]))
            if shape[axis] != length or length == 0:
                raise ExportError(
                    f"The sample inputs do not fit together: {symbol!r} is {length} in {other!r} and {shape[axis]} in "
                    f"{name!r}. Give as many samples for each input, and at least one."
                )
    return dynamic


def _is_module(source: torch.nn.Module | ExportedProgram) -> bool:
    import torch

    return isinstance(source, torch.nn.Module)


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        with quiet():
            simple = slim(proto)
            share_constants(simple)
            return simple
    except Exception as error:  # onnxslim raises whatever its parser meets
        raise ExportError(f"onnxslim cannot simplify the graph: {_one_line(error)}. Try simplify=False.") from error


def _weight_bytes(proto: onnx.ModelProto) -> int:
    # Protobuf's own ByteSize fails on what is too large for one message, which is what this is to find out.
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in proto.graph.initializer
    )


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside `target`, from where a file moves to its place by renaming; remove it afterwards."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.stem}."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise FileAccessError(
            f"Cannot write {str(target)!r}: {error.strerror or error}. Free space, or choose another folder."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600].rstrip(".") or type(error).__name__


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype.name, "shape": None if spec.shape is None else list(spec.shape)}
