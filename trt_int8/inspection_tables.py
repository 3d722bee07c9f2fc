"""An inspection on the terminal: the layers, the copies between them, what differs from another engine, and a summary.

All take `Inspection.to_json()`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from trt_int8.console import ABSENT, make_table, number

_WIDTH = 88
"""Longest name of nodes or a layer in a table, some lines of its column: what fuses many nodes is named by them all."""

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
        runs = f"{result['runs']} run{'' if result['runs'] == 1 else 's'}"
        yield (
            f"Times are means of {runs} in which each layer was waited for: they say how a run divides up, and their "
            "sum is no run time (see `trt-int8 bench`)."
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


def shorten_all(texts: Iterable[str], width: int) -> dict[str, str]:
    """Shorten texts, but for those that only their middle tells apart."""
    short = {text: shorten(text, width) for text in texts}
    shared = Counter(short.values())
    return {text: text if shared[cut] > 1 else cut for text, cut in short.items()}


def _node_rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    shown: set[str] = set()
    nodes = shorten_all((row["node"] for row in result["rows"]), _WIDTH)
    layers = shorten_all((row["layer"] or ABSENT for row in result["rows"]), _WIDTH)
    for row in result["rows"]:
        layer = row["layer"]
        repeated = layer in shown
        shown.add(layer)
        yield (
            nodes[row["node"]],
            row["op_type"],
            row["intended"] or ABSENT,
            row["precision"] or ("?" if layer else ABSENT),
            _SAME if repeated and layer else layers[layer or ABSENT],
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
    names = shorten_all((layer["name"] for layer in result["layers"]), _WIDTH)
    for layer in result["layers"]:
        yield (
            names[layer["name"]],
            layer["kind"],
            layer["precision"] or "?",
            number(layer["time_ms"], ".4f"),
        )


def _of_no_node(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the layers that no node is shown in: copies into another layout or type, and Q/DQ left to themselves."""
    shown = {row["layer"] for row in result["rows"]}
    return [layer for layer in result["layers"] if layer["name"] not in shown]


def _rows(layers: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    names = shorten_all((layer["name"] for layer in layers), _WIDTH)
    for layer in layers:
        yield (
            names[layer["name"]],
            layer["kind"],
            _formats(layer["inputs"]),
            _formats(layer["outputs"]),
            number(layer["time_ms"], ".4f"),
        )


def _formats(texts: Sequence[str]) -> str:
    """Name layouts and types without the word that TensorRT ends them with: "Row major linear FP32 format"."""
    return shorten(", ".join(text.removesuffix(" format") for text in texts) or ABSENT, _WIDTH)


def _difference_table(result: Mapping[str, Any]) -> Table:
    other = result["against"]["engine"]
    names = shorten_all((", ".join(item["nodes"]) for item in result["differences"]), _WIDTH)
    found: list[tuple[str, str, str, float | None, float | None]] = [
        (
            names[", ".join(item["nodes"])],
            _kernels(item["second_precisions"]),
            _kernels(item["first_precisions"]),
            item["second_ms"] if item["second_layers"] else None,
            item["first_ms"] if item["first_layers"] else None,
        )
        for item in result["differences"]
    ]
    if result["runs"]:
        if result["rows"] and result["against"]["rows"]:
            sides = [_of_no_node(table) for table in (result, result["against"])]
            own, others = (_time(side) if side else None for side in sides)
            found.append(("layers of no node", ABSENT, ABSENT, own, others))
        found.sort(key=lambda row: -abs((row[3] or 0.0) - (row[4] or 0.0)))
        found.append(("all layers", "", "", _time(result["layers"]), _time(result["against"]["layers"])))
    rows = [
        (
            *words,
            number(own, ".4f"),
            number(others, ".4f"),
            number(None if own is None and others is None else (own or 0.0) - (others or 0.0), "+.4f"),
        )
        for *words, own, others in found
    ]
    title = f"{result['engine']} against {other}{_simulated(result)}"
    return make_table(title, ("nodes", "kernel", "against", "ms", "against", "difference"), rows, left=3)


def _time(layers: Iterable[Mapping[str, Any]]) -> float:
    return sum(layer["time_ms"] or 0.0 for layer in layers)


def _kernels(precisions: Sequence[str | None]) -> str:
    return ", ".join(name or "?" for name in precisions) or ABSENT


def _shares(result: Mapping[str, Any]) -> Iterator[str]:
    if result["int8_share"] is None:
        return
    copies = _time(layer for layer in result["layers"] if layer["reformat"])
    total = _time(result["layers"])
    line = f"Of the layers' time {result['int8_share']:.1%} is in INT8 layers, {copies / total:.1%} in reformat layers"
    if result["unknown_share"]:
        line += f", {result['unknown_share']:.1%} in regions whose kernels TensorRT does not tell"
    yield line


def _simulated(result: Mapping[str, Any]) -> str:
    return " (SIMULATED)" if result["simulated"] else ""
