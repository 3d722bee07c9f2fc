"""The command lint, and its findings as text: grouped, so that fifty nodes with one fault are one paragraph."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trt_int8.cli_options import JsonOption, ModelArgument, TargetName, write_json

if TYPE_CHECKING:
    from engines.lint_rules import Release

WIDTH = 120
"""Columns; results are read in pipes and logs as well as on terminals."""

KINDS_SHOWN = 5
"""Lines of different places that one rule gets."""

_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}


def lint(
    model: ModelArgument,
    tensorrt: Annotated[
        Literal["10", "11"] | None, typer.Option("--tensorrt", help="Release to check for (default: both).")
    ] = None,
    target: Annotated[
        TargetName | None, typer.Option("--target", help="Default: the model's own, tensorrt for others.")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUTPUT", help="Write a model with all mended that is safe to mend.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what keeps a quantized model from being fast, or right, and mend it.

    Ends with exit status 1 where there are errors, in the mended model with --fix.
    """
    from engines.lint import lint as check
    from engines.lint_fixes import mend
    from trt_int8.errors import UsageError
    from trt_int8.model_files import check_result_file, files_of
    from trt_int8.outputs import check_outputs

    release: Release | None = None if tensorrt is None else 10 if tensorrt == "10" else 11
    if target == "cpu" and (fix is not None or tensorrt is not None):
        option = "--fix" if fix is not None else "--tensorrt"
        raise UsageError(f"{option} does nothing for --target cpu: it is about TensorRT. Leave one of them out.")
    read = list(files_of(model))
    if json_file is not None:
        check_result_file(json_file, model)
    if fix is not None:
        written = [(fix, "--fix"), (fix.with_name(f"{fix.name}.data"), "--fix")]
        check_outputs([*written, *([] if json_file is None else [(json_file, "--json")])], *read)
        result = mend(model, fix, tensorrt=release, target=target).to_json()
        report = result["fix"]["after"]
        lines = [*report_lines(result), "", *mended_lines(result["fix"]), "", *report_lines(report)]
    else:
        result = report = check(model, tensorrt=release, target=target).to_json()
        lines = list(report_lines(result))
    write_json(json_file, result)
    for line in lines:
        typer.echo(line)
    if report["counts"]["error"]:
        raise typer.Exit(1)


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Show a report: a heading, a paragraph for each rule, a count.

    Args:
        report: `engines.lint.LintReport.to_json()`.
    """
    aim = "ONNX Runtime's integer kernels"
    if report["target"] == "tensorrt":
        aim = f"TensorRT {' and '.join(map(str, report['tensorrt']))}"
    form = f" ({report['integer']} as operators on integers)" if report["integer"] else ""
    yield (
        f"{report['model']} for {aim}: opset {report['opset']}, {report['quantized']} of {report['weighted']} "
        f"weighted nodes quantized{form}, {_count(report['pairs'], 'pair')} on activations"
    )
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for finding in report["findings"]:
        groups.setdefault((finding["severity"], finding["rule"]), []).append(finding)
    for (severity, rule), findings in groups.items():
        yield ""
        yield from _paragraph(severity, rule, findings, report["tensorrt"])
    counts = report["counts"]
    if report["findings"]:
        yield ""
    yield ", ".join(_count(counts[kind], kind) for kind in ("error", "warning", "note"))


def mended_lines(fix: Mapping[str, Any]) -> Iterator[str]:
    """Show what was mended and what was not.

    Args:
        fix: the part "fix" of `engines.lint_fixes.MendResult.to_json()`.
    """
    yield f"{fix['output']}: {_count(len(fix['mended']), 'place')} mended, {len(fix['left'])} left"
    for title, items in (("mended", fix["mended"]), ("left", fix["left"])):
        groups: dict[tuple[str, str], list[str]] = {}
        for item in items:
            groups.setdefault((item["rule"], item["what"]), []).append(item["node"])
        for (rule, what), nodes in groups.items():
            yield from _wrapped(f"{title}  {rule}: {what}: {_named(nodes)}", "  ")


def _paragraph(severity: str, rule: str, findings: Sequence[Mapping[str, Any]], asked: Sequence[int]) -> Iterator[str]:
    first = findings[0]
    title = typer.style(severity, fg=_COLORS[severity], bold=True)
    nodes = [finding["node"] for finding in findings if finding["node"] is not None]
    told = [f"{title}  {rule}", _count(len(nodes), "node") if nodes else "the model"]
    if first["releases"] and list(first["releases"]) != list(asked):
        told.append(f"TensorRT {' and '.join(map(str, first['releases']))} only")
    if not first["verified"]:
        told.append("unverified: no run on a GPU has confirmed it")
    yield "  ".join(told)
    kinds: dict[str, list[str]] = {}
    for finding in findings:
        kinds.setdefault(finding["what"], []).extend([] if finding["node"] is None else [finding["node"]])
    for what, names in list(kinds.items())[:KINDS_SHOWN]:
        yield from _wrapped(f"{what}: {_named(names)}" if names else what, "  ")
    if len(kinds) > KINDS_SHOWN:
        others = sum(len(names) for names in list(kinds.values())[KINDS_SHOWN:])
        yield f"  and {_count(others, 'node')} more like these; --json lists all"
    yield from _wrapped(f"cost: {first['cost']}", "  ")
    yield from _wrapped(f"fix: {first['fix']}{' --fix does it where that is safe.' if first['mendable'] else ''}", "  ")
    yield from _wrapped(f"source: {first['source']}", "  ")


def _named(names: Sequence[str]) -> str:
    """Name some nodes, and count the others."""
    shown = 3
    if len(names) <= shown + 1:
        return ", ".join(names)
    return f"{', '.join(names[:shown])} and {len(names) - shown} more"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _wrapped(text: str, indent: str) -> list[str]:
    """Fold a line; names are broken only where they alone are longer than it, for nothing of them is left out."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
