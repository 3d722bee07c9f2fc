"""The commands that make models: export, calibrate, quantize, build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trt_int8.cli_options import (
    AttentionOption,
    BatchSize,
    DataOption,
    ExcludeOption,
    ForceOption,
    IncludeOption,
    MaxBatches,
    MethodName,
    ModelArgument,
    PreprocessingOption,
    QuantizedOption,
    ResidualOption,
    TargetName,
    WorkersOption,
    read_preprocessing,
)

ModeName = Literal["static", "dynamic", "weight-only"]
WeightsName = Literal["per-channel", "per-tensor"]
ActivationsName = Literal["symmetric", "affine"]
TensorsName = Literal["quantized", "tensorrt", "cpu", "all"]
CalibrateBackend = Literal["auto", "onnxruntime", "cuda", "tensorrt"]
SearchName = Literal["minmax", "entropy", "percentile", "mse"]
StatisticsName = Literal["histogram", "minmax"]
EngineName = Literal["fp32", "tf32", "fp16", "int8", "int8+fp16"]
CalibratorWord = Literal["entropy2", "minmax", "percentile"]
CompatibilityName = Literal["none", "ampere_plus", "same_compute_capability"]
ShortBatchName = Literal["drop", "pad"]


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
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="What a factory's model is checked on (default: random numbers)."),
    ] = None,
    preprocessing: PreprocessingOption = None,
) -> None:
    """Export a PyTorch model to ONNX and check the outputs."""
    from trt_int8.export_options import model_config
    from trt_int8.export_stage import export_configured
    from trt_int8.idle_options import refuse_idle, refuse_unread_preprocessing
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
    refuse_unread_preprocessing(preprocessing, data)
    refuse_idle(
        {"--data": data is not None and config.kind != "factory"},
        f"only what a factory makes is fed, to be exported and checked; {model} holds its graph",
        "export from package.module:factory",
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
    max_batches: MaxBatches = 1000,
    tensors: Annotated[TensorsName, typer.Option("--tensors", help="For which targets.")] = "quantized",
    preprocessing: PreprocessingOption = None,
    threads: WorkersOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Calibrate anew, whatever the file there holds.")] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", metavar="BATCHES", min=1, help="Keep the state so often (default: 1/min)."),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option("--max-memory", metavar="MIB", min=0, help="For activations; more take several passes."),
    ] = None,
    statistics: Annotated[
        StatisticsName, typer.Option("--statistics", help="minmax keeps ranges alone: faster, for that method only.")
    ] = "histogram",
    stop_when_stable: Annotated[
        SearchName | None, typer.Option("--stop-when-stable", help="Stop once this method's scales have settled.")
    ] = None,
    backend: Annotated[
        CalibrateBackend,
        typer.Option("--backend", help="Runs the model: onnxruntime on the CPU; cuda or tensorrt count on the GPU."),
    ] = "onnxruntime",
    padding_mask: Annotated[
        str | None,
        typer.Option("--padding-mask", metavar="NAME", help="Mask of (samples, positions): 0 is left out."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="NAME", help="Real positions of each sample; the rest is left out."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Count on a Ray cluster: auto, HOST:PORT, ray://..., local."),
    ] = None,
) -> None:
    """Stream data through an FP32 model once, for all methods."""
    from trt_int8.calibrate_stage import calibrate_into
    from trt_int8.calibration_job import CalibrationJob
    from trt_int8.outputs import check_output
    from trt_int8.progress import track

    check_output(output, model, data)
    job = CalibrationJob(
        model,
        data,
        tensors=tensors,
        batch_size=batch_size,
        max_batches=max_batches,
        preprocessing=read_preprocessing(preprocessing),
        threads=threads,
        statistics=statistics,
        stop_when_stable=stop_when_stable,
        max_memory_bytes=None if max_memory is None else int(max_memory * 2**20),
        backend=backend,
        padding_mask=padding_mask,
        lengths=lengths,
        ray=ray,
    )
    result = calibrate_into(
        output,
        job,
        method=stop_when_stable or ("minmax" if statistics == "minmax" else "entropy"),
        checkpoint_every=checkpoint_every,
        resume=resume,
        force=force,
        track=track,
    )
    fingerprint = result.calibration.fingerprint
    typer.echo(
        f"{output}: {len(result.calibration.tensors)} tensors, {fingerprint.batches} batches, "
        f"{fingerprint.samples} samples"
        + (" (kept: same model, data and settings; --force calibrates anew)" if result.kept else "")
    )
    for line in result.notes:
        typer.echo(line)


def quantize(
    model: ModelArgument,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="calibration.npz; needed in the mode static.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="File to write.")] = Path("model.int8.onnx"),
    mode: Annotated[
        ModeName, typer.Option("--mode", help="Scales of activations: calibrated, found at every run, or none.")
    ] = "static",
    method: Annotated[MethodName, typer.Option("--method", help="Calibration method.")] = "entropy",
    percentile: Annotated[
        float, typer.Option("--percentile", help="Of --method percentile, and where auto tries it.")
    ] = 99.99,
    target: Annotated[TargetName, typer.Option("--target", help="Whose kernels.")] = "tensorrt",
    precision: QuantizedOption = "int8",
    weights: Annotated[WeightsName, typer.Option("--weights", help="Scales of a weight.")] = "per-channel",
    activations: Annotated[
        ActivationsName, typer.Option("--activations", help="Codes of activations; affine for --target cpu alone.")
    ] = "symmetric",
    residual: ResidualOption = "int8",
    attention: AttentionOption = "float",
    smooth: Annotated[
        float | None,
        typer.Option("--smooth", metavar="ALPHA", min=0, max=1, help="Even out normalized activations; with --data."),
    ] = None,
    exclude: ExcludeOption = None,
    include: IncludeOption = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="With --smooth: calibration data; else with auto: held-back data."),
    ] = None,
    held_back: Annotated[
        str | None,
        typer.Option("--held-back", metavar="DATA", help="With --method auto and --smooth: what auto judges on."),
    ] = None,
    preprocessing: PreprocessingOption = None,
    force: ForceOption = False,
    explain: Annotated[bool, typer.Option("--explain", help="List every node and every Q/DQ pair: why.")] = False,
) -> None:
    """Write an INT8 model: with Q/DQ nodes from a calibration, or in another mode."""
    from calibrators.calibration import Calibration
    from trt_int8.outputs import check_output
    from trt_int8.progress import track
    from trt_int8.quantization import quantize as stage

    check_output(output, model, calibration, data, held_back)
    result = stage(
        model,
        None if calibration is None else Calibration.load(calibration),
        output=output,
        mode=mode,
        method=method,
        percentile=percentile,
        target=target,
        precision=precision,
        weights=weights,
        activations=activations,
        residual=residual,
        attention=attention,
        smooth=smooth,
        exclude=exclude or [],
        include=include or [],
        data=data,
        held_back=held_back,
        preprocessing=read_preprocessing(preprocessing),
        force=force,
        track=track,
    )
    decisions = result.placement.decisions
    how = f"method {result.method}" if result.mode == "static" else f"mode {result.mode}"
    what = "weights stored as INT8" if result.mode == "weight-only" else "weighted nodes in INT8"
    typer.echo(
        f"{result.path}: {len(decisions) - len(result.held_back)} of {len(decisions)} {what}, "
        f"{len(result.scales)} Q/DQ pairs on activations, target {result.target}, precision {result.precision}, {how}"
    )
    if explain:
        from trt_int8.console import console
        from trt_int8.explanation import explanation_tables

        console().print(*explanation_tables(result.placement, result.scales), sep="\n")
    else:
        for decision in result.held_back:
            typer.echo(f"float: {decision.node} ({decision.op_type}): {decision.reason}")
    for node in result.held:
        typer.echo(f"fp32: {node.node} ({node.op_type}): {node.reason}")
    for line in [*result.notes, *(result.auto.reasons if result.auto is not None else ())]:
        typer.echo(line)


def build(
    model: ModelArgument,
    precision: Annotated[EngineName, typer.Option("--precision", help="What the engine computes in.")] = "int8",
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write into.")] = Path("engines"),
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="STEM", help="Writes DIR/STEM.PRECISION.engine (default: the model's name)."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Scales, FP16 range and shapes of an FP32 model."),
    ] = None,
    method: Annotated[MethodName, typer.Option("--method", help="Calibration method.")] = "entropy",
    percentile: Annotated[
        float, typer.Option("--percentile", help="Of --method percentile, or --calibrator percentile.")
    ] = 99.99,
    residual: ResidualOption = "int8",
    attention: AttentionOption = "float",
    exclude: ExcludeOption = None,
    include: IncludeOption = None,
    force: ForceOption = False,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="MIN,OPT,MAX", help="Batches it takes (default: as calibrated).")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME=MIN,OPT,MAX", help="Of an input: x=1x3x32x32,8x3x32x32,64x3x32x32."),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option("--workspace", metavar="MIB", min=1, help="Most device memory of a kernel.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option("--optimization-level", min=0, max=5, help="How long TensorRT searches (default 3).")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="FILE", help="Kept kernel times (default DIR/timing.cache)."),
    ] = None,
    no_timing_cache: Annotated[bool, typer.Option("--no-timing-cache", help="Keep no kernel times.")] = False,
    hardware_compatibility: Annotated[
        CompatibilityName, typer.Option("--hardware-compatibility", help="Other GPUs it must run on.")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Newer TensorRT must be able to load it.")
    ] = False,
    implicit: Annotated[
        bool, typer.Option("--implicit", help="INT8 by a calibrator of TensorRT's (10 and older).")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="With --implicit: what to calibrate on, as for calibrate."),
    ] = None,
    calibrator: Annotated[
        CalibratorWord | None, typer.Option("--calibrator", help="With --data: which one (default entropy2).")
    ] = None,
    batch_size: BatchSize = None,
    max_batches: MaxBatches = 1000,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FILE", help="With --data: kept scales (default DIR/MODEL.CALIBRATOR.cache)."),
    ] = None,
    preprocessing: PreprocessingOption = None,
    data_id: Annotated[
        str | None,
        typer.Option("--data-id", help="Name of data that come from code, so that their scales are read back."),
    ] = None,
    short_batch: Annotated[
        ShortBatchName, typer.Option("--short-batch", help="Of a batch that lacks samples, in --data.")
    ] = "drop",
) -> None:
    """Build a TensorRT engine from a model and its calibration."""
    from trt_int8.build_options import parse_batch, parse_shapes, summary_lines
    from trt_int8.building import build_engine
    from trt_int8.errors import UsageError
    from trt_int8.progress import track

    if no_timing_cache and timing_cache is not None:
        raise UsageError("--no-timing-cache contradicts --timing-cache; give one of them.")
    built = build_engine(
        model,
        output,
        precision=precision,
        calibration=calibration,
        method=method,
        percentile=percentile,
        residual=residual,
        attention=attention,
        exclude=exclude or [],
        include=include or [],
        force=force,
        shapes=parse_shapes(shape or []),
        batch=None if batch is None else parse_batch(batch),
        workspace_bytes=None if workspace is None else workspace * 2**20,
        optimization_level=optimization_level,
        timing_cache=None if no_timing_cache else timing_cache or output / "timing.cache",
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        implicit=implicit,
        data=data,
        calibrator=calibrator,
        batch_size=batch_size,
        max_batches=max_batches,
        cache=cache,
        preprocessing=read_preprocessing(preprocessing),
        data_id=data_id,
        short_batch=short_batch,
        name=name,
        track=track,
    )
    for line in summary_lines(built, precision):
        typer.echo(line)
