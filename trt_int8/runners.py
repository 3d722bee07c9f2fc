"""What runs a model file: ONNX Runtime an `.onnx`, TensorRT an `.engine`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engines.onnxrt import Execution, OnnxRuntimeRunner
from engines.sidecar import is_engine
from engines.trt_runner import TensorRTRunner

AnyRunner = OnnxRuntimeRunner | TensorRTRunner


def open_runner(
    model: str | os.PathLike[str],
    *,
    name: str | None = None,
    execution: Execution | None = None,
    threads: int | None = None,
    trust: bool = False,
    cuda_graph: bool = False,
) -> AnyRunner:
    """Return the runner of a model file; it is not entered yet.

    Args:
        model: an ONNX file or a plan file.
        name: name in tables; the file's name where None.
        execution: of ONNX files: "exact" or "native"; None follows each file's own rule.
        threads: of ONNX files: threads inside an operator; None takes ONNX Runtime's default.
        trust: of plan files: load one that no sidecar covers.
        cuda_graph: of plan files: launch runs as a CUDA graph where it can be captured.

    Raises:
        FileAccessError: the file is missing or cannot be read.
        ModelError: it is no ONNX model.
        EngineLoadError: it is no plan that can be loaded here.
    """
    if is_engine(model):
        return TensorRTRunner(model, name=name, trust=trust, cuda_graph=cuda_graph)
    return OnnxRuntimeRunner(model, name=name, execution=execution, threads=threads)


def titles(models: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Name models by their files, and by their whole paths where two files have one name."""
    files = [Path(model).name for model in models]
    return files if len(set(files)) == len(files) else [os.fspath(model) for model in models]
