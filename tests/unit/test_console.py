"""Tables of results on the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from trt_int8.console import (
    accuracy_table,
    benchmark_table,
    console,
    gpu_state,
    make_table,
    shared_notes,
    size_table,
    verdict_lines,
)


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
    fed = {"batch_size": 8, "inputs": {"image": [8, 3, 224, 224], "scale": []}}
    return {"rounds": 20, "timed": timed, "candidates": list(rows), **fed}


def shown(data: dict[str, Any], width: int = 120) -> list[str]:
    return lines_of(benchmark_table(data), width)


def lines_of(table: Table, width: int = 120) -> list[str]:
    out = Console(file=io.StringIO(), width=width)
    out.print(table)
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
    """On the line of the row itself; where that is every row, in the title alone."""
    some = shown(result(engine("a"), engine("b") | {"simulated": True}))
    assert [line.split()[:2] for line in some if "(simulated)" in line] == [["b", "(simulated)"]]

    title, *rows = shown(result(*(engine(name) | {"simulated": True} for name in "ab")))
    assert title.startswith("Speed, compute on the GPU (simulated): ")
    assert not any("simulated" in line for line in rows)


def test_the_title_says_what_was_timed() -> None:
    """Batch size and shapes, of a table with engines and of one without."""
    for rows, start in (([engine("e")], "Speed, compute on the GPU: "), ([row("m.onnx")], "Speed: ")):
        text = " ".join(" ".join(shown(result(*rows))).split())
        assert text.startswith(f"{start}batch of 8, image 8x3x224x224, scale scalar, 20 interleaved rounds")


def test_long_names_are_folded_and_nothing_is_wider_than_120_columns() -> None:
    """Every letter of a name is there, so that two names never read the same; figures stay whole."""
    names = [f"a/very/long/path/that/two/files/share/{end}.engine" for end in ("int8+fp16", "fp16")]
    lines = shown(result(*(engine(name) for name in names)))

    assert max(map(len, lines)) <= 120
    letters = "".join(line[:30].split(" ")[1] for line in lines if line.startswith(" "))
    assert all(name in letters for name in names)
    assert sum("12345.6" in line for line in lines) == 2


def test_output_into_a_pipe_is_120_columns_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest's captured stdout is no terminal; a wider COLUMNS is heeded."""
    monkeypatch.setenv("COLUMNS", "80")
    assert console().width == 120
    monkeypatch.setenv("COLUMNS", "200")
    assert console().width == 200


def test_cells_of_text_are_folded() -> None:
    """Rich would end a long word with an ellipsis."""
    assert "…" not in "".join(lines_of(make_table("", ["name", "n"], [["x" * 300, "1"]])))


def test_a_note_is_printed_once() -> None:
    """With the rows that it is about, unless all have it; rows without one are not named."""
    same = result(row("a", note="n"), row("b", note="n"))
    assert list(shared_notes(same)) == ["n"]
    mixed = result(row("a", note=""), row("b", note="n"), row("c", note="m"), row("d", note="n"))
    assert list(shared_notes(mixed)) == ["b, d: n", "c: m"]


def test_identical_outputs_are_called_so() -> None:
    """Their SQNR is infinite, which JSON has not."""
    scores = {"samples": 4, "top1": None, "top5": None, "agreement": 100.0, "cosine": 1.0, "max_abs": 0.0}
    rows = [
        {"name": "a", **scores, "sqnr_db": None, "identical": True},
        {"name": "b", **scores, "sqnr_db": 31.26, "identical": False},
        {"name": "c", **scores, "sqnr_db": None, "identical": False},
    ]
    lines = lines_of(accuracy_table({"reference": "r", "reference_scores": {"samples": 4}, "candidates": rows}))

    found = {line.split()[0]: line.split()[5] for line in lines if line.split()[:1] in (["a"], ["b"], ["c"])}
    assert found == {"a": "identical", "b": "31.3", "c": "-"}


def test_the_state_of_the_gpu_is_one_line() -> None:
    """The widest range over all engines; empty where no GPU told."""
    other = engine("b", clock_sm_mhz=[1890, 1900, 1910], temperature_c=[45, 60])

    assert gpu_state(result(engine("a"), row("m.onnx"), other)) == (
        "GPU during the runs: multiprocessors 1890 to 1980 MHz, memory 2619 MHz, temperature 41 to 60 degrees C"
    )
    silent = {"clock_sm_mhz": None, "clock_memory_mhz": None, "temperature_c": None}
    assert gpu_state(result(engine("a", **silent))) == ""
    assert gpu_state(result(row("m.onnx"))) == ""


def test_numbers_never_squeeze_the_names_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A size table with many data types on 120 columns still says which model each row is."""
    types = ("FLOAT", "INT64", "FLOAT16", "INT8", "INT32", "UINT8")
    weights = dict.fromkeys(types, 307_410)
    models = [{"name": "INT8+FP16 auto", "file_bytes": 1_240_000, "ratio": 1.0, "weight_bytes": weights}]
    console().print(size_table(models))

    shown = capsys.readouterr().out
    assert "INT8+FP16 auto" in shown
    assert all(name in shown for name in types)
    assert max(map(len, shown.splitlines())) <= 120


def test_one_reason_against_several_verdicts_is_one_line() -> None:
    """Verdicts come first; what stands in the way of the others is said once, with their names."""
    rows = ("", "b is faster", "c against a: no verdict, W", "d against a: no verdict, V", "e against a: no verdict, W")
    result = {"candidates": [{"name": name, "verdict": text} for name, text in zip("abcde", rows, strict=True)]}

    assert verdict_lines(result) == ["b is faster", "c, e: no verdict, W", "d: no verdict, V"]
