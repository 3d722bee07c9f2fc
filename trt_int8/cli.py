"""The command line: flags to one call of a stage, its result to a table.

Results go to stdout, progress and log to stderr. Exit status: 0 fine, 1 something the user can mend, 2 usage, 3 a gate
that the user set was missed. A bug keeps its traceback. Heavy packages are imported inside the commands, so that
--help is quick.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trt_int8 import __version__, siblings
from trt_int8.cli_cache import cache

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

app = typer.Typer(
    name="trt-int8",
    help="PyTorch models to measured, explained INT8 and FP16 models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache, name="cache")


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

MethodName = Literal["minmax", "entropy", "percentile", "mse", "auto"]
TargetName = Literal["tensorrt", "cpu"]
ResidualName = Literal["int8", "float"]
TensorsName = Literal["quantized", "all"]
ExecutionName = Literal["exact", "native"]
BackendName = Literal["auto", "onnxruntime"]

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help=".npz, folder of batches, image folder, package.module:callable, or Polygraphy inputs.",
    ),
]
OptionalData = Annotated[str | None, typer.Option("--data", metavar="DATA", help="As for calibrate.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples a batch (default 1).")]
PreprocessingOption = Annotated[
    Path | None,
    typer.Option("--preprocessing", metavar="YAML", help="Preprocessing of an image folder (see examples/)."),
]
CalibrationOption = Annotated[Path, typer.Option("--calibration", metavar="FILE", help="calibration.npz")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads inside an operator.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
PercentileOption = Annotated[float, typer.Option("--percentile", help="Of --method percentile.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use a calibration of another graph or other weights.")]


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """PyTorch models to measured, explained INT8 and FP16 models."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("trt_int8").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder of the run.")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the stages that are done.")] = False,
) -> None:
    """Run all stages on scikit-learn's handwritten digits."""
    from trt_int8.demo.configuration import demo_config
    from trt_int8.progress import track

    _run(demo_config(output, track=track), output, resume=resume)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Written by `trt-int8 init`.")],
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the run (default runs/NAME).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: a.b=c.")] = None,
    backend: Annotated[BackendName, typer.Option("--backend", help="What runs the models.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the stages that are done.")] = False,
) -> None:
    """Run all stages on the model that a configuration names."""
    from trt_int8.config import load_config

    settings = load_config(config, set_ or [])
    _note(f"backend: onnxruntime ({'as asked' if backend == 'onnxruntime' else 'the only one of this version'})")
    _run(settings, output, resume=resume)


@app.command()
def init(
    output: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The file to write.")] = Path("trt-int8.yaml"),
) -> None:
    """Write a commented configuration to start from."""
    from calibrators.files import write_text
    from trt_int8.config_template import template
    from trt_int8.errors import ConfigError

    if output.exists():
        raise ConfigError(f"Cannot write {str(output)!r}: it exists already, and is left alone. Name another file.")
    write_text(output, template())
    typer.echo(f"{output}: edit it, then `trt-int8 run {output}`")


@app.command()
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
    result = export_configured(config, output, data=data, preprocessing=_preprocessing(preprocessing), track=track)
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


@app.command()
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
        preprocessing=_preprocessing(preprocessing),
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


@app.command()
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
        preprocessing=_preprocessing(preprocessing),
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


@app.command()
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
        preprocessing=_preprocessing(preprocessing),
        execution=execution,
        threads=threads,
        rounds=rounds,
        budget_s=seconds,
        track=track,
    ).to_json()
    _write_json(json_file, result)
    out = console()
    out.print(benchmark_table(result))
    for line in [row["verdict"] for row in result["candidates"][1:]] + result["warnings"]:
        typer.echo(line)
    for row in result["candidates"]:
        if row["note"]:
            typer.echo(f"{row['name']}: {row['note']}")


@app.command()
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
        preprocessing=_preprocessing(preprocessing),
        execution=execution,
        threads=threads,
        save_to=save_to,
        track=track,
    ).to_json()
    _write_json(json_file, result)
    console().print(accuracy_table(result))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]) -> None:
    """Write report.html again from the files of a run."""
    from trt_int8.progress import track
    from trt_int8.report import render_report

    typer.echo(str(render_report(folder, track=track)))


@app.command()
def doctor() -> None:
    """Say what INT8 and FP16 can gain on this machine."""
    from trt_int8.console import console
    from trt_int8.doctor import diagnose, render

    console().print(render(diagnose()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments without the program's name; those of the process where None.
    """
    from calibrators.errors import TrtInt8Error

    siblings.check()
    try:
        app(args=None if argv is None else list(argv), prog_name="trt-int8")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except TrtInt8Error as error:
        from trt_int8.errors import GateMissedError, UsageError

        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        return 2 if isinstance(error, UsageError) else 3 if isinstance(error, GateMissedError) else 1
    return 0


def _run(config: Any, output: Path | None, *, resume: bool) -> None:
    from trt_int8.console import console
    from trt_int8.pipeline import Pipeline
    from trt_int8.progress import track
    from trt_int8.summary import summarize_run

    pipeline = Pipeline(config, output=output, resume=resume, track=track, announce=_note)
    data_log = logging.getLogger("trt_int8.data")
    level = data_log.level
    data_log.setLevel(logging.WARNING)  # a run opens the same data several times; once would do to say what is not fed
    try:
        result = pipeline.run()
    except KeyboardInterrupt:
        _note(f"interrupted: the stages that are done lie in {pipeline.folder}; the same command with --resume goes on")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        data_log.setLevel(level)
    tables, lines = summarize_run(result.folder)
    out = console()
    for table in tables:
        out.print(table)
    for line in lines:
        typer.echo(line)
    typer.echo(f"results: {result.folder} (benchmark.json, accuracy.json, model.int8.onnx, ...)")
    typer.echo(f"report: {result.report}")


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _write_json(path: Path | None, result: Any) -> None:
    if path is not None:
        from calibrators.files import write_text

        write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def _preprocessing(path: Path | None) -> Preprocessing | None:
    if path is None:
        return None
    from trt_int8.config import load_preprocessing

    return load_preprocessing(path)
