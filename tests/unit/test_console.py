"""Tables of results on the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from trt_int8.console import benchmark_table, gpu_state


def row(name: str, gpu: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    figures = {
        "name": name, "precision": None, "median_ms": 1.5, "p90_ms": 1.6, "p95_ms": 1.7, "p99_ms": 1.8,
        "samples_per_s": 12345.6, "speedup": 2.0, "speedup_low": 1.95, "speedup_high": 2.05, "simulated": False,
    }  # fmt: skip
    return {**figures, "gpu": gpu, **changes}


def engine(name: str, **figures: Any) -> dict[str, Any]:
    gpu = {
        "compute_ms": 0.111, "latency_ms": 0.222, "energy_mj_per_inference": 12.34, "engine_bytes": 3 * 2**20,
        "clock_sm_mhz": [1900, 1950.0, 1980], "clock_memory_mhz": [2619, 2619, 2619], "temperature_c": [41, 52],
    }  # fmt: skip
    return row(name, {**gpu, **figures}, precision="int8+fp16")


def result(*rows: dict[str, Any], timed: str = "gpu compute") -> dict[str, Any]:
    return {"rounds": 20, "timed": timed, "candidates": list(rows)}


def shown(data: dict[str, Any], width: int = 120) -> list[str]:
    out = Console(file=io.StringIO(), width=width)
    out.print(benchmark_table(data))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("timed", "column", "value"),
    [("gpu compute", "+ copies", "0.222"), ("with transfers", "compute", "0.111"), ("host", "compute", "0.111")],
)
def test_engines_are_shown_with_the_gpus_figures(timed: str, column: str, value: str) -> None:
    """At 120 columns a row is one line, and holds the time that the table does not compare as well."""
    lines = shown(result(engine("model.int8+fp16.engine"), timed=timed))

    (line,) = [line for line in lines if line.strip().startswith("model.int8+fp16.engine")]
    assert line.split() == [
        "model.int8+fp16.engine", "int8+fp16", "1.500", "1.800", value, "12345.6", "2.00x", "(1.95", "to", "2.05)",
        "12.3", "3.00",
    ]  # fmt: skip
    assert any(column in line for line in lines)


def test_other_models_have_dashes_where_engines_have_figures() -> None:
    """An ONNX file beside an engine; figures that a GPU did not give are dashes too."""
    lines = shown(result(row("m.onnx"), engine("e", energy_mj_per_inference=None), timed="host"))

    onnx, plan = (next(line.split() for line in lines if line.split()[:1] == [name]) for name in ("m.onnx", "e"))
    assert onnx[-2:] == ["-", "-"]
    assert onnx[1:5] == ["-", "1.500", "1.800", "-"]
    assert plan[-2:] == ["-", "3.00"]


def test_without_engines_the_table_has_no_gpu_columns() -> None:
    """ONNX Runtime's percentiles are all shown."""
    text = "\n".join(shown(result(row("m.onnx"), timed="host")))

    assert "p95" in text
    assert "mJ" not in text


def test_simulated_rows_are_marked() -> None:
    """On the line of the row itself."""
    assert "(simulated)" in "\n".join(shown(result(engine("e") | {"simulated": True})))


def test_the_state_of_the_gpu_is_one_line() -> None:
    """The widest range over all engines; empty where no GPU told."""
    other = engine("b", clock_sm_mhz=[1890, 1900, 1910], temperature_c=[45, 60])

    assert gpu_state(result(engine("a"), row("m.onnx"), other)) == (
        "GPU during the runs: multiprocessors 1890 to 1980 MHz, memory 2619 MHz, temperature 41 to 60 degrees C"
    )
    silent = {"clock_sm_mhz": None, "clock_memory_mhz": None, "temperature_c": None}
    assert gpu_state(result(engine("a", **silent))) == ""
    assert gpu_state(result(row("m.onnx"))) == ""
