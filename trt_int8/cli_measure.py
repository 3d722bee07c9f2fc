"""The commands that measure models: bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trt_int8.cli_options import (
    BatchSize,
    DataOption,
    ExecutionName,
    JsonOption,
    OptionalData,
    PreprocessingOption,
    ThreadsOption,
    read_preprocessing,
    write_json,
)


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="ONNX files; the first is the reference.")],
    data: OptionalData = None,
    batch_size: BatchSize = None,
    preprocessing: PreprocessingOption = None,
    execution: Annotated[ExecutionName | None, typer.Option("--execution", help="For all models.")] = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="Interleaved rounds.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time for all rounds.")] = 10.0,
    json_file: JsonOption = None,
) -> None:
    """Time models side by side, in interleaved rounds."""
    from trt_int8.api import benchmark
    from trt_int8.console import benchmark_table, console
    from trt_int8.outputs import check_output
    from trt_int8.progress import track

    if json_file is not None:
        check_output(json_file, *models, data)
    result = benchmark(
        models,
        data,
        batch_size=batch_size,
        preprocessing=read_preprocessing(preprocessing),
        execution=execution,
        threads=threads,
        rounds=rounds,
        budget_s=seconds,
        track=track,
    ).to_json()
    write_json(json_file, result)
    out = console()
    out.print(benchmark_table(result))
    for line in [row["verdict"] for row in result["candidates"][1:]] + result["warnings"]:
        typer.echo(line)
    for row in result["candidates"]:
        if row["note"]:
            typer.echo(f"{row['name']}: {row['note']}")


def compare(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="FP32 ONNX file.")],
    candidates: Annotated[list[Path], typer.Argument(metavar="CANDIDATE...", help="ONNX files.")],
    data: DataOption,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help="Array of class labels.")] = None,
    batch_size: BatchSize = None,
    max_batches: Annotated[int | None, typer.Option("--max-batches", min=1, help="Use only so many.")] = None,
    preprocessing: PreprocessingOption = None,
    execution: Annotated[ExecutionName | None, typer.Option("--execution", help="Of the candidates.")] = None,
    threads: ThreadsOption = None,
    save_to: Annotated[Path | None, typer.Option("--save", metavar="DIR", help="Save for Polygraphy here.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare models' outputs and accuracy on the same data."""
    from trt_int8.api import compare as stage
    from trt_int8.console import accuracy_table, console
    from trt_int8.outputs import check_output
    from trt_int8.progress import track

    if json_file is not None:
        check_output(json_file, reference, *candidates, data)
    result = stage(
        reference,
        candidates,
        data,
        labels=labels,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=read_preprocessing(preprocessing),
        execution=execution,
        threads=threads,
        save_to=save_to,
        track=track,
    ).to_json()
    write_json(json_file, result)
    console().print(accuracy_table(result))
