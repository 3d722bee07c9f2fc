"""Models run by ONNX Runtime, and the rule by which a model file is run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import onnx

from calibrators.errors import FileAccessError
from calibrators.protocols import Array
from engines.errors import InferenceError, ModelError, UnsupportedModelError
from engines.runner import TensorSpec

if TYPE_CHECKING:
    import onnxruntime

Execution = Literal["exact", "native"]

Provider = str | tuple[str, Mapping[str, Any]]
"""An execution provider of ONNX Runtime by its name, or with options."""

TARGET_KEY = "trt_int8.target"
"""Metadata key of our models: the target ("tensorrt" or "cpu") that the Q/DQ nodes were placed for."""

PRECISION_KEY = "trt_int8.precision"
"""Metadata key of our models: "fp32", "fp16", "int8" or "int8+fp16"."""


def load_header(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file without the weights that lie outside it.

    Raises:
        FileAccessError: missing, a folder, or unreadable.
        ModelError: not an ONNX model.
    """
    file = Path(path)
    if file.is_dir():
        raise FileAccessError(f"Cannot read the model: {str(file)!r} is a folder; expected an ONNX file.")
    if not file.is_file():
        raise FileAccessError(f"Cannot read the model: there is no file {str(file)!r}.")
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise FileAccessError(f"Cannot read the model {str(file)!r}: {error}.") from error
    except Exception as error:  # protobuf raises its own types, which differ between its implementations
        raise ModelError(
            f"{str(file)!r} is not an ONNX model: {file.stat().st_size} bytes that protobuf cannot parse. "
            "Export it with `trt-int8 export`, or name the right file."
        ) from error
    if not model.graph.output or not model.opset_import:
        raise ModelError(
            f"{str(file)!r} is not an ONNX model: it holds no graph with outputs and opsets. "
            "Export it with `trt-int8 export`, or name the right file."
        )
    return model


def tensor_specs(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the specs of a model's inputs (initializers left out) and outputs.

    Raises:
        UnsupportedModelError: one of them is a sequence, a map or an optional value, or has no type.
    """
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in constants)
    return inputs, tuple(_spec(value) for value in model.graph.output)


def execution_of(metadata: Mapping[str, str]) -> Execution:
    """Choose how a model file is run when the user does not say.

    A placement for TensorRT runs exactly as written: Q/DQ as fake quantization, which is what TensorRT computes up to
    rounding, while ONNX Runtime's own fusions would add quantization points that TensorRT does not have. Everything
    else runs the way ONNX Runtime runs it by default.
    """
    return "exact" if metadata.get(TARGET_KEY) == "tensorrt" else "native"


class OnnxRuntimeRunner:
    """Runs an ONNX file on ONNX Runtime's CPU provider. Implements `engines.runner.Runner`.

    Args:
        model: the file.
        name: name in tables; the file's name where None.
        execution: "exact" switches every graph optimization off, "native" leaves ONNX Runtime's default; None follows
            `execution_of`.
        threads: threads inside an operator; None takes ONNX Runtime's default, one per physical core.

    Raises:
        FileAccessError: the file is missing or unreadable.
        ModelError: the file is not an ONNX model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        name: str | None = None,
        execution: Execution | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(model)
        header = load_header(self.path)
        self.metadata = {entry.key: entry.value for entry in header.metadata_props}
        self.name = name or self.path.name
        self.execution: Execution = execution or execution_of(self.metadata)
        self.simulated = self.metadata.get(TARGET_KEY) == "tensorrt"
        self.threads = threads
        self.inputs, self.outputs = tensor_specs(header)
        self._session: onnxruntime.InferenceSession | None = None

    def make_session(self) -> onnxruntime.InferenceSession:
        """Make a session of its own, as the runner's are made."""
        return make_session(self.path, execution=self.execution, threads=self.threads)

    def __enter__(self) -> Self:
        """Make the session."""
        self._session = self.make_session()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drop the session."""
        self._session = None

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see `engines.runner.Runner.infer`."""
        if self._session is None:
            raise RuntimeError("infer() outside of `with runner:`")
        check_feeds(self.name, self.inputs, feeds)
        names = [spec.name for spec in self.outputs]
        try:
            values = self._session.run(names, dict(feeds))
        except Exception as error:  # ONNX Runtime raises its own classes, which share no base
            raise InferenceError(f"{self.name} failed in ONNX Runtime: {_first_line(error)}") from error
        return dict(zip(names, values, strict=True))


def make_session(
    model: str | os.PathLike[str] | bytes,
    *,
    execution: Execution,
    threads: int | None = None,
    optimized_model: Path | None = None,
    settings: Mapping[str, str] | None = None,
    providers: Sequence[Provider] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Make an ONNX Runtime session, on the CPU if nothing else is said.

    Args:
        model: a file, or a serialised model.
        execution: see `OnnxRuntimeRunner`.
        threads: threads inside an operator; None takes ONNX Runtime's default.
        optimized_model: where the graph is written as ONNX Runtime optimises it; None for nowhere.
        settings: further entries of the session's configuration.
        providers: what runs the nodes, in the order in which they are asked.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Warnings about unused initializers and the like are no news to the user, and errors are raised besides.
    options.log_severity_level = 4
    # Idle worker threads would spin for tens of milliseconds after a run, and slow down whatever runs next: another
    # session of a benchmark, the counting of a calibration.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    if optimized_model is not None:
        options.optimized_model_filepath = os.fspath(optimized_model)
    if threads is not None:
        options.intra_op_num_threads = threads
    if execution == "exact":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    source: Any = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime raises its own classes, which share no base
        what = "the model" if isinstance(model, bytes) else repr(os.fspath(model))
        raise ModelError(f"ONNX Runtime cannot load {what}: {_first_line(error)}") from error


def check_feeds(model: str, inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Check names, dtypes and shapes of `feeds` against `inputs`.

    Raises:
        InferenceError: with what was found and what the model expects.
    """
    expected = {spec.name: spec for spec in inputs}
    wanted = "; ".join(str(spec) for spec in inputs)
    for name in feeds:
        if name not in expected:
            raise InferenceError(f"{model} has no input {name!r}. Its inputs are {wanted}.")
    for name, spec in expected.items():
        if name not in feeds:
            raise InferenceError(f"{model} needs the input {name!r}, which was not given. Its inputs are {wanted}.")
        value = feeds[name]
        if value.dtype != spec.dtype:
            raise InferenceError(f"{model}: input {name!r} has dtype {value.dtype.name}; expected {spec}.")
        if not shape_fits(value.shape, spec.shape):
            raise InferenceError(f"{model}: input {name!r} has shape {value.shape}; expected {spec}.")


def shape_fits(shape: Sequence[int], expected: Sequence[int | str | None] | None) -> bool:
    """Tell whether `shape` has the rank and the fixed lengths of `expected` (None: any shape fits)."""
    if expected is None:
        return True
    return len(shape) == len(expected) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, expected, strict=True)
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    tensor = value.type.tensor_type
    if kind != "tensor_type" or not tensor.elem_type:
        found = "no type" if kind in (None, "tensor_type") else f"the type {kind.removesuffix('_type')}"
        raise UnsupportedModelError(
            f"The input or output {value.name!r} has {found}; expected a tensor. Export the model without it."
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(
            axis.dim_value if axis.HasField("dim_value") else (axis.dim_param or None) for axis in tensor.shape.dim
        )
    return TensorSpec(value.name, dtype, shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
