"""The command line: flags to one call of a stage, its result to a table.

Results go to stdout, progress and log to stderr. Exit status: 0 fine, 1 something the user can mend, 2 usage, 3 a gate
that the user set was missed. A bug keeps its traceback. Heavy packages are imported inside the commands, so that
--help is quick.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trt_int8 import __version__, siblings
from trt_int8.cli_cache import cache
from trt_int8.cli_lint import lint
from trt_int8.cli_measure import bench, compare, inspect
from trt_int8.cli_models import build, calibrate, export, quantize

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


BackendName = Literal["auto", "onnxruntime", "tensorrt"]
BackendOption = Annotated[
    BackendName, typer.Option("--backend", help="What runs the models; auto takes TensorRT where a GPU is.")
]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """PyTorch models to measured, explained INT8 and FP16 models."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("trt_int8").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder of the run.")] = Path("runs/demo"),
    backend: BackendOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the stages that are done.")] = False,
) -> None:
    """Run all stages on scikit-learn's handwritten digits."""
    from trt_int8.demo.configuration import demo_config
    from trt_int8.progress import track

    _run(demo_config(output, track=track), output, backend=backend, resume=resume)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Written by `trt-int8 init`.")],
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the run (default runs/NAME).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: a.b=c.")] = None,
    backend: BackendOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the stages that are done.")] = False,
) -> None:
    """Run all stages on the model that a configuration names."""
    from trt_int8.config import load_config

    settings = load_config(config, set_ or [])
    _run(settings, output, backend=backend, resume=resume)


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


for _command in (export, calibrate, quantize, build, bench, compare, inspect, lint):
    app.command()(_command)


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


def _run(config: Any, output: Path | None, *, backend: BackendName, resume: bool) -> None:
    from trt_int8.console import console
    from trt_int8.pipeline import Pipeline
    from trt_int8.progress import track
    from trt_int8.summary import summarize_run

    pipeline = Pipeline(config, output=output, backend=backend, resume=resume, track=track, announce=_note)
    _note(f"backend: {pipeline.backend.name} ({pipeline.backend.reason})")
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
