"""The commands that measure models: bench, compare, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trt_int8.cli_options import (
    BatchSize,
    DataOption,
    ExecutionName,
    ForceOption,
    JsonOption,
    PreprocessingOption,
    ThreadsOption,
    TimedBatch,
    TimedData,
    TrustOption,
    read_preprocessing,
    write_json,
)

ShapesName = Literal["min", "opt", "max", "all"]


def bench(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="ONNX files and engines; the first is the reference.")
    ],
    data: TimedData = None,
    batch_size: TimedBatch = None,
    shapes: Annotated[
        ShapesName | None,
        typer.Option("--shapes", help="Of dynamic axes: as built for or calibrated (default: as the data are)."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME=MIN,OPT,MAX", help="Those of an input: ids=1x8,8x32,8x128, or one."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="Shapes of ONNX files: as calibrated.")
    ] = None,
    preprocessing: PreprocessingOption = None,
    execution: Annotated[ExecutionName | None, typer.Option("--execution", help="For all ONNX files.")] = None,
    threads: ThreadsOption = None,
    transfers: Annotated[
        bool | None,
        typer.Option("--transfers/--no-transfers", help="Engines: time copies to and from the GPU too, or not."),
    ] = None,
    no_cuda_graph: Annotated[bool, typer.Option("--no-cuda-graph", help="Engines: launch kernel by kernel.")] = False,
    trust: TrustOption = False,
    force: ForceOption = False,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="Interleaved rounds.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time for all rounds.")] = 10.0,
    json_file: JsonOption = None,
) -> None:
    """Time models side by side, in interleaved rounds."""
    from trt_int8.api import benchmark
    from trt_int8.build_options import parse_shapes
    from trt_int8.console import benchmark_table, console, gpu_state, shared_notes, verdict_lines
    from trt_int8.model_files import check_result_file
    from trt_int8.progress import track

    if json_file is not None:
        check_result_file(json_file, *models, data)
    result = benchmark(
        models,
        data,
        batch_size=batch_size,
        shapes=shapes,
        shape_ranges=parse_shapes(shape, one_will_do=True) if shape else None,
        calibration=calibration,
        preprocessing=read_preprocessing(preprocessing),
        execution=execution,
        threads=threads,
        transfers=transfers,
        cuda_graph=not no_cuda_graph,
        trust=trust,
        force=force,
        rounds=rounds,
        budget_s=seconds,
        track=track,
    ).to_json()
    write_json(json_file, result)
    out = console()
    for index, part in enumerate(result["shapes"] or [result]):
        alike = [other["shape"] for other in result["shapes"] if other["inputs"] == part["inputs"]]
        if alike and part["shape"] != alike[0]:
            continue  # timed once, and shown
        if alike:
            typer.echo(f"{chr(10) if index else ''}Shapes: {', '.join(alike)}")
        out.print(benchmark_table(part))
        state = [line] if (line := gpu_state(part)) else []
        for line in [*state, *verdict_lines(part), *part["warnings"], *part["notes"], *shared_notes(part)]:
            typer.echo(line)


def compare(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="ONNX file or engine, FP32.")],
    candidates: Annotated[list[Path], typer.Argument(metavar="CANDIDATE...", help="ONNX files and engines.")],
    data: DataOption,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help="Array of class labels.")] = None,
    batch_size: BatchSize = None,
    max_batches: Annotated[int | None, typer.Option("--max-batches", min=1, help="Use only so many.")] = None,
    preprocessing: PreprocessingOption = None,
    execution: Annotated[ExecutionName | None, typer.Option("--execution", help="Of ONNX candidates.")] = None,
    threads: ThreadsOption = None,
    trust: TrustOption = False,
    save_to: Annotated[Path | None, typer.Option("--save", metavar="DIR", help="Save for Polygraphy here.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare models' outputs and accuracy on the same data."""
    from trt_int8.api import compare as stage
    from trt_int8.console import accuracy_table, console
    from trt_int8.model_files import check_result_file
    from trt_int8.progress import track

    if json_file is not None:
        check_result_file(json_file, reference, *candidates, data)
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
        trust=trust,
        save_to=save_to,
        track=track,
    ).to_json()
    write_json(json_file, result)
    console().print(accuracy_table(result))
    for line in result["warnings"]:
        typer.echo(f"warning: {line}")


def inspect(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="TensorRT engine.")],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FILE", help="ONNX file it was built from (default: beside it).")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="ENGINE", help="Another engine of the same network.")
    ] = None,
    data: TimedData = None,
    batch_size: TimedBatch = None,
    preprocessing: PreprocessingOption = None,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Runs that layers are timed in (default 20).")
    ] = None,
    no_profile: Annotated[bool, typer.Option("--no-profile", help="Time nothing.")] = False,
    trust: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Show which layers of an engine really run in INT8, and how long each takes."""
    from trt_int8.console import console
    from trt_int8.idle_options import refuse_idle
    from trt_int8.inspection import DEFAULT_RUNS
    from trt_int8.inspection import inspect as stage
    from trt_int8.inspection_tables import inspection_lines, inspection_tables
    from trt_int8.model_files import check_result_file

    if json_file is not None:
        check_result_file(json_file, engine, model, against, data)
    refuse_idle({"--runs": no_profile and runs is not None}, "--no-profile times nothing", "leave --no-profile out")
    result = stage(
        engine,
        model=model,
        against=against,
        data=data,
        batch_size=batch_size,
        preprocessing=read_preprocessing(preprocessing),
        runs=0 if no_profile else runs or DEFAULT_RUNS,
        trust=trust,
    ).to_json()
    write_json(json_file, result)
    out = console()
    for table in inspection_tables(result):
        out.print(table)
    for line in inspection_lines(result):
        typer.echo(line)
