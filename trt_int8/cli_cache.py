"""`trt-int8 cache`: calibration files and TensorRT's calibration caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trt_int8.cli_options import (
    AttentionOption,
    BatchSize,
    DataOption,
    ExcludeOption,
    ForceOption,
    IncludeOption,
    JsonOption,
    MaxBatches,
    MethodName,
    PercentileOption,
    PreprocessingOption,
    QuantizedOption,
    ResidualOption,
    WorkersOption,
    read_preprocessing,
    write_json,
)

cache = typer.Typer(
    help="Show, compare, merge and check calibrations; read and write TensorRT's calibration cache.",
    no_args_is_help=True,
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="calibration.npz or a TensorRT cache.")]
MethodOption = Annotated[MethodName, typer.Option("--method", help="Of a calibration's methods.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="Show so many tensors.")]


@cache.command()
def show(
    file: FileArgument,
    percentile: Annotated[float, typer.Option("--percentile", help="Of the percentile column.")] = 99.99,
) -> None:
    """Print range, zeros, and scale and clipped share of each method, per tensor."""
    from trt_int8.caches import show_table
    from trt_int8.console import console

    table, lines = show_table(file, percentile)
    console().print(table)
    for line in lines:
        typer.echo(line)


@cache.command()
def export(
    file: FileArgument,
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("calibration.cache"),
    method: Annotated[
        MethodName | None, typer.Option("--method", help="Of a calibration's methods (default entropy).")
    ] = None,
    percentile: PercentileOption = 99.99,
    tensorrt: Annotated[
        str, typer.Option("--tensorrt", metavar="VERSION", help="Version that will read it: 7.2.3, 8.6.1, 10.16.1.")
    ] = "10.16.1",
) -> None:
    """Write TensorRT's calibration cache for a version that still reads one (10 and older)."""
    from trt_int8.caches import export_cache

    typer.echo(export_cache(file, output, method=method, percentile=percentile, tensorrt_version=tensorrt))


@cache.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A.npz B.npz ...", help="Calibrations of one model.")],
    output: Annotated[Path, typer.Option("--output", help="File to write.")],
    force: Annotated[bool, typer.Option("--force", help="Merge the same data twice, or of other releases.")] = False,
) -> None:
    """Merge calibrations on different data, exactly as if one pass had seen them all."""
    from trt_int8.cache_merge import merge_calibrations

    for line in merge_calibrations(files, output=output, force=force).lines():
        typer.echo(line)


@cache.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="calibration.npz or a TensorRT cache.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    method: MethodOption = "entropy",
    percentile: PercentileOption = 99.99,
    limit: LimitOption = 30,
    json: JsonOption = None,
) -> None:
    """Rank tensors by how far their scales moved from A to B."""
    from trt_int8.cache_diff import diff_caches
    from trt_int8.console import console

    result = diff_caches(first, second, method=method, percentile=percentile)
    if result.changed:
        console().print(result.table(limit))
    for line in result.lines(limit):
        typer.echo(line)
    write_json(json, result.to_json())


@cache.command("import")
def import_(
    old: Annotated[Path, typer.Argument(metavar="OLD.cache", help="TensorRT's calibration cache, 7 to 10.")],
    model: Annotated[Path, typer.Option("--model", metavar="MODEL", help="The FP32 ONNX file.")],
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("model.int8.onnx"),
    residual: ResidualOption = "int8",
    attention: AttentionOption = "float",
    exclude: ExcludeOption = None,
    include: IncludeOption = None,
    precision: QuantizedOption = "int8",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave nodes float whose scales the cache lacks.")
    ] = False,
    rename: Annotated[
        list[str] | None, typer.Option("--rename", metavar="CACHE=GRAPH", help="A tensor that is called otherwise.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Turn a TensorRT calibration cache into a Q/DQ model, which TensorRT 11 builds."""
    from trt_int8.cache_import import import_cache, parse_renamed

    result = import_cache(
        old,
        model,
        output=output,
        residual=residual,
        attention=attention,
        exclude=exclude or [],
        include=include or [],
        precision=precision,
        allow_missing=allow_missing,
        renamed=parse_renamed(rename or []),
    )
    for line in result.lines():
        typer.echo(line)
    write_json(json, result.to_json())


@cache.command()
def check(
    calibration: Annotated[Path, typer.Argument(metavar="FILE", help="calibration.npz")],
    data: DataOption,
    model: Annotated[Path, typer.Option("--model", metavar="MODEL", help="The FP32 ONNX file that was calibrated.")],
    method: MethodOption = "entropy",
    percentile: PercentileOption = 99.99,
    batch_size: BatchSize = None,
    max_batches: MaxBatches = 1000,
    max_clipped: Annotated[
        float | None,
        typer.Option("--max-clipped", metavar="PERCENT", min=0, max=100, help="Exit with 3 if a tensor clips more."),
    ] = None,
    limit: LimitOption = 30,
    preprocessing: PreprocessingOption = None,
    threads: WorkersOption = None,
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Say whether new data leave the calibrated ranges."""
    from calibrators.calibration import Calibration
    from trt_int8.cache_check import check_data
    from trt_int8.console import console
    from trt_int8.progress import track

    result = check_data(
        Calibration.load(calibration),
        data,
        model,
        method=method,
        percentile=percentile,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=read_preprocessing(preprocessing),
        threads=threads,
        force=force,
        track=track,
    )
    console().print(result.table(limit))
    for line in result.lines():
        typer.echo(line)
    write_json(json, result.to_json())
    result.require_clipped(max_clipped)
