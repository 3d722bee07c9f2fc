"""A finished run in one table: a row per model with accuracy, speed and size, and the findings in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_int8.console import ABSENT, make_table, number, size, size_table, sqnr

if TYPE_CHECKING:
    from rich.table import Table


def summarize_run(folder: Path) -> tuple[list[Table], list[str]]:
    """Return the tables of a finished run, and lines that say what they show.

    The second table has the weights by data type. The models of the methods that are not delivered are left out: they
    are stored like that of the delivered one.
    """
    accuracy, speed, sizes = (_read(folder / name) for name in ("accuracy.json", "benchmark.json", "sizes.json"))
    reference = accuracy["reference_scores"]
    scores = {row["name"]: row for row in [reference, *accuracy["candidates"]]}
    times = {row["name"]: row for row in speed["candidates"]}
    simulated = any(row["simulated"] for row in speed["candidates"])
    rows = [
        (
            item["name"],
            number(scores[item["name"]].get("top1"), ".2f"),
            number(scores[item["name"]].get("agreement"), ".2f"),
            sqnr(scores[item["name"]]),
            *_speed(times.get(item["name"])),
            *((ABSENT, ABSENT) if simulated else (size(item["file_bytes"]), f"{item['ratio']:.2f}x")),
        )
        for item in sizes["models"]
    ]
    columns = ("model", "top-1 %", "agrees with FP32 %", "SQNR dB", "median ms", "speed-up", "file", "smaller")
    lines = [row["verdict"] for row in speed["candidates"][1:] if not row["simulated"]] + list(speed["warnings"])
    lines += accuracy["warnings"]
    if simulated:
        lines.append("TensorRT and the GPU are SIMULATED here: no figure of the engines is a GPU's.")
    elif any(row["simulated"] for row in accuracy["candidates"]):
        lines.append(
            "Accuracy of the tensorrt models is that of their Q/DQ nodes run as exact fake quantization by ONNX "
            "Runtime; no GPU was measured."
        )
    title = f"{folder.name}: {reference['samples']} samples"
    delivered = [item for item in sizes["models"] if not item["file"].startswith("methods/")]
    tables = [make_table(title, columns, rows)]
    if any(item["weight_bytes"] for item in delivered):  # engines do not tell
        tables.append(size_table(delivered))
    return tables, lines


def _speed(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None or row["simulated"]:
        return ABSENT, ABSENT
    return f"{row['median_ms']:.3f}", f"{row['speedup']:.2f}x"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))
