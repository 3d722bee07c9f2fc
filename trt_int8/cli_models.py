"""The commands that make models: export, calibrate, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trt_int8.cli_options import (
    BatchSize,
    CalibrationOption,
    DataOption,
    ForceOption,
    MethodName,
    ModelArgument,
    OptionalData,
    PercentileOption,
    PreprocessingOption,
    TargetName,
    ThreadsOption,
    read_preprocessing,
)

ResidualName = Literal["int8", "float"]
TensorsName = Literal["quantized", "all"]


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="package.module:factory, a .pt2 or an .onnx file.")],
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("model.onnx"),
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME:SHAPE[:DTYPE]", help="In forward()'s order: image:1x3x224x224."),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option("--dynamic", metavar="NAME:AXIS=SYMBOL", help="Free axes beside the batch: image:2=height."),
    ] = None,
    argument: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the factory.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", metavar="FILE", help="Weights.")] = None,
    checkpoint_key: Annotated[str | None, typer.Option("--checkpoint-key", help="Where they lie in it.")] = None,
    opset: Annotated[int, typer.Option("--opset", min=19, help="ONNX opset.")] = 20,
    data: OptionalData = None,
    preprocessing: PreprocessingOption = None,
) -> None:
    """Export a PyTorch model to ONNX and check the outputs."""
    from trt_int8.export_options import model_config
    from trt_int8.export_stage import export_configured
    from trt_int8.outputs import check_output
    from trt_int8.progress import track

    check_output(output, model, data, checkpoint)
    config = model_config(
        model,
        inputs=input_ or [],
        dynamic=dynamic or [],
        arguments=argument or [],
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        opset=opset,
    )
    result = export_configured(config, output, data=data, preprocessing=read_preprocessing(preprocessing), track=track)
    typer.echo(f"{result.path}: opset {result.opset}, {result.size_bytes} bytes")
    for spec in (*result.inputs, *result.outputs):
        typer.echo(f"  {spec}")
    for difference in result.differences:
        batch = "" if difference.batch is None else f" at batch {difference.batch}"
        typer.echo(
            f"  {difference.output}{batch}: differs from PyTorch by at most {difference.max_abs:.3g}, "
            f"{difference.max_rel:.3g} of its largest magnitude"
        )
    for note in result.notes:
        typer.echo(note)


def calibrate(
    model: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("calibration.npz"),
    batch_size: BatchSize = None,
    max_batches: Annotated[int, typer.Option("--max-batches", min=1, help="Stop after so many batches.")] = 1000,
    tensors: Annotated[TensorsName, typer.Option("--tensors", help="Which tensors.")] = "quantized",
    preprocessing: PreprocessingOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Stream data through an FP32 model once, for all methods."""
    from trt_int8.calibration import calibrate as stage
    from trt_int8.outputs import check_output
    from trt_int8.progress import track

    check_output(output, model, data)
    calibration = stage(
        model,
        data,
        tensors=tensors,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=read_preprocessing(preprocessing),
        threads=threads,
        track=track,
    )
    calibration.save(output)
    fingerprint = calibration.fingerprint
    typer.echo(
        f"{output}: {len(calibration.tensors)} tensors, {fingerprint.batches} batches, {fingerprint.samples} samples"
    )
    for name in calibration.always_zero:
        typer.echo(f"{name} was always 0: its scale is 1")


def quantize(
    model: ModelArgument,
    calibration: CalibrationOption,
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("model.int8.onnx"),
    method: Annotated[MethodName, typer.Option("--method", help="Calibration method.")] = "entropy",
    percentile: PercentileOption = 99.99,
    target: Annotated[TargetName, typer.Option("--target", help="Whose kernels.")] = "tensorrt",
    residual: Annotated[ResidualName, typer.Option("--residual", help="Skip input of residual Adds.")] = "int8",
    exclude: Annotated[list[str] | None, typer.Option("--exclude", metavar="REGEX", help="Nodes left float.")] = None,
    data: OptionalData = None,
    preprocessing: PreprocessingOption = None,
    force: ForceOption = False,
) -> None:
    """Write an INT8 model with Q/DQ nodes from a calibration."""
    from calibrators.calibration import Calibration
    from trt_int8.outputs import check_output
    from trt_int8.progress import track
    from trt_int8.quantization import quantize as stage

    check_output(output, model, calibration, data)
    result = stage(
        model,
        Calibration.load(calibration),
        output=output,
        method=method,
        percentile=percentile,
        target=target,
        residual=residual,
        exclude=exclude or [],
        data=data,
        preprocessing=read_preprocessing(preprocessing),
        force=force,
        track=track,
    )
    decisions = result.placement.decisions
    typer.echo(
        f"{result.path}: {len(decisions) - len(result.held_back)} of {len(decisions)} weighted nodes in INT8, "
        f"{len(result.scales)} Q/DQ pairs on activations, target {result.target}, method {result.method}"
    )
    for decision in result.held_back:
        typer.echo(f"float: {decision.node} ({decision.op_type}): {decision.reason}")
    for line in [*result.notes, *(result.auto.reasons if result.auto is not None else ())]:
        typer.echo(line)
