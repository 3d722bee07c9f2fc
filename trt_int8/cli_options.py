"""Options that several commands share, and what becomes of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

MethodName = Literal["minmax", "entropy", "percentile", "mse", "auto"]
TargetName = Literal["tensorrt", "cpu"]
QuantizedName = Literal["int8", "int8+fp16"]
ExecutionName = Literal["exact", "native"]

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help=".npz, folder of batches, image folder, package.module:callable, or Polygraphy inputs.",
    ),
]
TimedData = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help="As for calibrate (default: random numbers).")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples a batch (default 1).")]
TimedBatch = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Samples a batch (default 1; without --data as an engine was built)."),
]
MaxBatches = Annotated[int, typer.Option("--max-batches", min=1, help="Stop after so many batches.")]
PreprocessingOption = Annotated[
    Path | None,
    typer.Option("--preprocessing", metavar="YAML", help="Preprocessing of an image folder (see examples/)."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads inside an operator.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Batches run at a time, a thread each (default: one a core, 8 at most)."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
PercentileOption = Annotated[float, typer.Option("--percentile", help="Of --method percentile.")]
QuantizedOption = Annotated[
    QuantizedName, typer.Option("--precision", help="The other layers in FP32, or in FP16 (TensorRT alone).")
]
ResidualOption = Annotated[
    Literal["int8", "float"], typer.Option("--residual", help="Skip input of residual Adds (TensorRT alone).")
]
AttentionOption = Annotated[
    Literal["float", "int8"],
    typer.Option("--attention", help="Products of queries, keys and values (TensorRT alone)."),
]
ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", metavar="REGEX", help="Nodes left float.")]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="REGEX", help="Nodes in INT8 against a rule of speed or accuracy."),
]
TrustOption = Annotated[bool, typer.Option("--trust", help="Load engines that no sidecar vouches for.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use a calibration of another graph or other weights.")]


def write_json(path: Path | None, result: Any) -> None:
    """Write the result to the file of `--json`, where there is one."""
    if path is not None:
        from calibrators.files import write_text

        write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def read_preprocessing(path: Path | None) -> Preprocessing | None:
    """Read the file of `--preprocessing`, where there is one."""
    if path is None:
        return None
    from trt_int8.config import load_preprocessing

    return load_preprocessing(path)
