"""`trt-int8 cache`: calibration files and TensorRT's calibration caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cache = typer.Typer(help="Show calibrations, write TensorRT's calibration cache.", no_args_is_help=True)


@cache.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="calibration.npz or a TensorRT cache.")],
    percentile: Annotated[float, typer.Option("--percentile", help="Of the percentile column.")] = 99.99,
) -> None:
    """Print range, share of zeros and the scale of each method, per tensor."""
    from trt_int8.caches import show_table
    from trt_int8.console import console

    table, lines = show_table(file, percentile)
    console().print(table)
    for line in lines:
        typer.echo(line)


@cache.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="calibration.npz")],
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("calibration.cache"),
    method: Annotated[str, typer.Option("--method", help="minmax, entropy, percentile, mse or auto.")] = "entropy",
    percentile: Annotated[float, typer.Option("--percentile", help="Of --method percentile.")] = 99.99,
    tensorrt: Annotated[
        str, typer.Option("--tensorrt", metavar="VERSION", help="Version that will read it.")
    ] = "10.16.1",
) -> None:
    """Write TensorRT's calibration cache for a version that still reads one (10 and older)."""
    from trt_int8.caches import export_cache

    typer.echo(export_cache(file, output, method=method, percentile=percentile, tensorrt_version=tensorrt))
