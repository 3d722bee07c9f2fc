"""An inspection on the terminal: the layers, the copies between them, what differs from another engine, and a summary.

All take `Inspection.to_json()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from trt_int8.console import ABSENT, make_table, number

_WIDTH = 44
"""Longest name of a node or layer in a table: what fuses many nodes is named by all of them."""

_SAME = '"'


def inspection_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Show the nodes in their layers, the other layers, and the differences where there is another engine."""
    title = f"Layers of {result['engine']}{_simulated(result)}"
    if result["rows"]:
        columns = ("node", "operator", "intended", "kernel", "layer", "", "ms")
        yield make_table(title, columns, _node_rows(result), left=6)
    else:
        yield make_table(title, ("layer", "kind", "kernel", "ms"), _layer_rows(result), left=3)
    loose = {layer["name"] for layer in _of_no_node(result)}
    between = [layer for layer in result["layers"] if layer["reformat"] or layer["name"] in loose]
    if result["rows"] and between:
        names = ("layer", "kind", "from", "to", "ms")
        yield make_table(f"Reformat layers and others of no node{_simulated(result)}", names, _rows(between), left=4)
    if result["against"] is not None:
        yield _difference_table(result)


def inspection_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Sum an inspection up, one line for each fact."""
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in result["shapes"].items())
    yield f"TensorRT {result['tensorrt']} on {result['device']}; inputs: {shapes}"
    yield result["summary"]
    yield from _shares(result)
    if result["runs"]:
        yield (
            f"Times are means of {result['runs']} runs in which each layer was waited for: they say how a run divides "
            "up, and their sum is no run time (see `trt-int8 bench`)."
        )
    if result["against"] is not None:
        yield f"Against {result['against']['engine']}: a negative difference is time that {result['engine']} saves."
    yield from result["notes"]


def shorten(text: str, width: int) -> str:
    """Take the middle out of a text that is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return f"{text[: width - 3 - tail]}...{text[len(text) - tail :]}"


def _node_rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    shown: set[str] = set()
    for row in result["rows"]:
        layer = row["layer"]
        repeated = layer in shown
        shown.add(layer)
        yield (
            shorten(row["node"], _WIDTH),
            row["op_type"],
            row["intended"] or ABSENT,
            row["precision"] or ("?" if layer else ABSENT),
            _SAME if repeated and layer else shorten(layer or ABSENT, _WIDTH),
            _remark(row),
            _SAME if repeated and layer else number(row["layer_ms"], ".4f"),
        )


def _remark(row: Mapping[str, Any]) -> str:
    if row["layer"] is None:
        return "removed"
    if row["in_region"] and row["precision"] is None:
        return "kernels not told"
    return "NOT AS INTENDED" if row["wider"] else ""


def _layer_rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for layer in result["layers"]:
        yield (
            shorten(layer["name"], 2 * _WIDTH),
            layer["kind"],
            layer["precision"] or "?",
            number(layer["time_ms"], ".4f"),
        )


def _of_no_node(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the layers that no node is shown in: copies into another layout or type, and Q/DQ left to themselves."""
    shown = {row["layer"] for row in result["rows"]}
    return [layer for layer in result["layers"] if layer["name"] not in shown]


def _rows(layers: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for layer in layers:
        yield (
            shorten(layer["name"], _WIDTH),
            layer["kind"],
            shorten(", ".join(layer["inputs"]) or ABSENT, _WIDTH),
            shorten(", ".join(layer["outputs"]) or ABSENT, _WIDTH),
            number(layer["time_ms"], ".4f"),
        )


def _difference_table(result: Mapping[str, Any]) -> Table:
    other = result["against"]["engine"]
    rows = [
        (
            shorten(", ".join(item["nodes"]), 2 * _WIDTH),
            _kernels(item["second_precisions"]),
            _kernels(item["first_precisions"]),
            number(item["second_ms"], ".4f"),
            number(item["first_ms"], ".4f"),
            number(item["difference_ms"], "+.4f"),
        )
        for item in result["differences"]
    ]
    if result["runs"] and result["rows"] and result["against"]["rows"]:
        own, others = (
            sum(layer["time_ms"] or 0.0 for layer in _of_no_node(table)) for table in (result, result["against"])
        )
        rows.append(("layers of no node", ABSENT, ABSENT, f"{own:.4f}", f"{others:.4f}", f"{own - others:+.4f}"))
    title = f"{result['engine']} against {other}{_simulated(result)}"
    return make_table(title, ("nodes", "kernel", "against", "ms", "against", "difference"), rows, left=3)


def _kernels(precisions: Sequence[str | None]) -> str:
    return ", ".join(name or "?" for name in precisions) or ABSENT


def _shares(result: Mapping[str, Any]) -> Iterator[str]:
    if result["int8_share"] is None:
        return
    copies = sum(layer["time_ms"] or 0.0 for layer in result["layers"] if layer["reformat"])
    total = sum(layer["time_ms"] or 0.0 for layer in result["layers"])
    line = f"Of the layers' time {result['int8_share']:.1%} is in INT8 layers, {copies / total:.1%} in reformat layers"
    if result["unknown_share"]:
        line += f", {result['unknown_share']:.1%} in regions whose kernels TensorRT does not tell"
    yield line


def _simulated(result: Mapping[str, Any]) -> str:
    return " (SIMULATED)" if result["simulated"] else ""
