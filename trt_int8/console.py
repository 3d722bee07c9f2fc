"""Results on the terminal: tables on stdout, one function for each kind of result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trt_int8.timing import NO_VERDICT

ABSENT = "-"

LEAST_NAME = 16
"""Characters that a column of names keeps, however many numbers stand beside it."""

IDENTICAL = "identical"

PIPED_WIDTH = 120


def console() -> Console:
    """Return a console on stdout; where the output goes to a file or a pipe, tables are up to 120 columns wide."""
    out = Console()
    return out if out.is_terminal else Console(width=max(out.width, PIPED_WIDTH))


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Make a plain table; the first `left` columns are text, folded where it is too long, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        if index < left:
            # A name is never cut: what tells two apart may be its end. Nor do numbers squeeze it out of a narrow table.
            table.add_column(column, overflow="fold", min_width=None if index else LEAST_NAME)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def benchmark_table(result: Mapping[str, Any]) -> Table:
    """Show `benchmark.json`."""
    if any(row["gpu"] for row in result["candidates"]):
        return _engine_table(result)
    columns = ("model", "median ms", "p90", "p95", "p99", "samples/s", "speed-up", "95 % interval")
    rows = [
        (
            _name(row, result),
            f"{row['median_ms']:.3f}",
            f"{row['p90_ms']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['samples_per_s']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
        )
        for row in result["candidates"]
    ]
    return make_table(_speed_title(result, "Speed"), columns, rows)


def gpu_state(result: Mapping[str, Any]) -> str:
    """Say in a line how the GPU was during a benchmark, of `benchmark.json`; empty where it did not tell."""
    figures = [row["gpu"] for row in result["candidates"] if row["gpu"]]

    def span(key: str) -> tuple[int, int] | None:
        found = [gpu[key] for gpu in figures if gpu[key]]
        return (min(item[0] for item in found), max(item[-1] for item in found)) if found else None

    parts = [
        f"{what} {found[0]}{f' to {found[1]}' if found[1] != found[0] else ''} {unit}"
        for what, key, unit in (
            ("multiprocessors", "clock_sm_mhz", "MHz"),
            ("memory", "clock_memory_mhz", "MHz"),
            ("temperature", "temperature_c", "degrees C"),
        )
        if (found := span(key))
    ]
    return f"GPU during the runs: {', '.join(parts)}" if parts else ""


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the verdicts of a benchmark; where one reason stands in the way of several, one line for all of them."""
    lines: list[str] = []
    without: dict[str, list[str]] = {}
    for row in result["candidates"][1:]:
        _, none, why = row["verdict"].partition(NO_VERDICT)
        if none:
            without.setdefault(why, []).append(row["name"])
        else:
            lines.append(row["verdict"])
    return lines + [f"{', '.join(names)}{NO_VERDICT}{why}" for why, names in without.items()]


def shared_notes(result: Mapping[str, Any]) -> Iterator[str]:
    """Give the notes on the rows of `benchmark.json`: each once, with the rows that it is about, if it is not all."""
    rows = result["candidates"]
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        names = [row["name"] for row in rows if row["note"] == note]
        yield note if len(names) == len(rows) else f"{', '.join(names)}: {note}"


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """Show `accuracy.json`."""
    columns = ("model", "samples", "top-1 %", "top-5 %", "agreement %", "SQNR dB", "cosine", "largest error")
    reference = result.get("reference_scores") or {}
    all_simulated = bool(reference.get("simulated")) and _all_simulated(result)
    mark = ", simulated" if reference.get("simulated") and not all_simulated else ""
    rows = [
        (
            f"{result['reference']} (reference{mark})",
            number(reference.get("samples"), "d"),
            number(reference.get("top1"), ".2f"),
            number(reference.get("top5"), ".2f"),
            ABSENT,
            ABSENT,
            ABSENT,
            ABSENT,
        )
    ]
    rows += [
        (
            str(row["name"]) if all_simulated else _marked(row),
            number(row["samples"], "d"),
            number(row["top1"], ".2f"),
            number(row["top5"], ".2f"),
            number(row["agreement"], ".2f"),
            sqnr(row),
            number(row["cosine"], ".5f"),
            number(row["max_abs"], ".4g"),
        )
        for row in result["candidates"]
    ]
    return make_table(f"Accuracy{' (simulated)' if all_simulated else ''}", columns, rows)


def size_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Show model sizes; the first one is the reference."""
    types = list(dict.fromkeys(name for model in models for name in model["weight_bytes"]))
    rows = [
        (
            str(model["name"]),
            size(model["file_bytes"]),
            f"{model['ratio']:.2f}x",
            *(size(model["weight_bytes"].get(name, 0)) for name in types),
        )
        for model in models
    ]
    return make_table("Size, and weights by data type", ("model", "file", "smaller", *types), rows)


def number(value: float | None, form: str) -> str:
    """Format a number, or a dash where there is none."""
    return ABSENT if value is None else format(value, form)


def sqnr(row: Mapping[str, Any]) -> str:
    """Format the `sqnr_db` of a row of `accuracy.json`, which has no number for identical outputs."""
    return IDENTICAL if row.get("identical") else number(row.get("sqnr_db"), ".1f")


def size(count: int) -> str:
    """Format a number of bytes."""
    if count == 0:
        return ABSENT
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _engine_table(result: Mapping[str, Any]) -> Table:
    """Show a benchmark of engines, and of whatever ran beside them."""
    what, key, title = {
        "gpu compute": ("compute on the GPU", "latency_ms", "+ copies"),
        "with transfers": ("with transfers", "compute_ms", "compute"),
        "host": ("arrays in, arrays out", "compute_ms", "compute"),
    }[result["timed"]]
    columns = ("model", "precision", "median ms", "p99", title, "samples/s", "speed-up (95 %)", "mJ each", "MiB")
    rows = []
    for row in result["candidates"]:
        gpu = row["gpu"] or {}
        size_bytes = gpu.get("engine_bytes")
        rows.append(
            (
                _name(row, result),
                row["precision"] or ABSENT,
                f"{row['median_ms']:.3f}",
                f"{row['p99_ms']:.3f}",
                number(gpu.get(key), ".3f"),
                f"{row['samples_per_s']:.1f}",
                f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})",
                number(gpu.get("energy_mj_per_inference"), ".3g"),
                number(None if size_bytes is None else size_bytes / 2**20, ".2f"),
            )
        )
    return make_table(_speed_title(result, f"Speed, {what}"), columns, rows, left=2)


def _speed_title(result: Mapping[str, Any], start: str) -> str:
    fed = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in result["inputs"].items())
    simulated = " (simulated)" if _all_simulated(result) else ""
    return f"{start}{simulated}: batch of {result['batch_size']}, {fed}, {result['rounds']} interleaved rounds"


def _all_simulated(result: Mapping[str, Any]) -> bool:
    """Tell whether every row is simulated: then the title says so, once."""
    return all(row.get("simulated") for row in result["candidates"])


def _name(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return str(row["name"]) if _all_simulated(result) else _marked(row)


def _marked(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (simulated)" if row.get("simulated") else str(row["name"])
