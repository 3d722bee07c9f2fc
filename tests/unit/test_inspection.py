"""The layers of an engine on the terminal, as a GPU would give them; loading engines is tests/tensorrt/test_inspect.py.

The figures are made up.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.sidecar import Environment
from engines.trt_inspector import LayerTable, NodeRow, compare_tables
from engines.trt_layers import EngineLayer
from trt_int8.errors import ConfigError, EngineLoadError
from trt_int8.inspection import Inspection, inspect
from trt_int8.inspection_tables import inspection_lines, inspection_tables, shorten

REGION = "{ForeignNode[/a...//b]}"


def layer(name: str, kind: str, precision: str | None, time: float, **how: Any) -> EngineLayer:
    return EngineLayer(name, kind, precision, (), ("Row major FP32",), ("Row major Int8",), "", time, **how)


def int8_table() -> LayerTable:
    """conv and relu in one INT8 layer, fc in FP32 against the model's wish, a region, a copy, a removed node."""
    rows = (
        NodeRow("conv", "Conv", "int8", "conv + relu", "int8", 0.6),
        NodeRow("relu", "Relu", "fp32", "conv + relu", "int8", 0.6),
        NodeRow("fc", "Gemm", "int8", "fc", "fp32", 0.2),
        NodeRow("attention", "MatMul", "int8", REGION, None, 0.1, in_region=True),
        NodeRow("dropout", "Identity", "fp32", None, None, None),
    )
    layers = (
        layer("copy to conv", "Reformat", "fp32", 0.1),
        layer("conv + relu", "CaskConvolution", "int8", 0.6),
        layer("fc", "CaskGemm", "fp32", 0.2),
        layer(REGION, "Myelin", None, 0.1, region=("/a", "/b")),
    )
    return LayerTable("m.int8.engine", rows, layers)


def fp16_table() -> LayerTable:
    """The same in FP16: conv and relu apart."""
    rows = (
        NodeRow("conv", "Conv", "fp16", "conv", "fp16", 0.9),
        NodeRow("relu", "Relu", "fp16", "relu", "fp16", 0.3),
        NodeRow("fc", "Gemm", "fp16", "fc", "fp16", 0.2),
    )
    layers = (layer("conv", "k", "fp16", 0.9), layer("relu", "k", "fp16", 0.3), layer("fc", "k", "fp16", 0.2))
    return LayerTable("m.fp16.engine", rows, layers)


def inspection(*, simulated: bool = False, against: LayerTable | None = None, table: LayerTable | None = None) -> Any:
    found = table or int8_table()
    return Inspection(
        table=found,
        model="m.int8.onnx",
        environment=Environment("10.16.1.11", "NVIDIA H200", "9.0", "13.0", "580.1"),
        simulated=simulated,
        runs=20,
        shapes={"x": (8, 3, 32, 32)},
        notes=("a note",),
        against=against,
        differences=() if against is None else compare_tables(against, found),
    ).to_json()


def printed(result: Any) -> str:
    """All tables as text."""
    out = Console(file=io.StringIO(), width=200)
    for table in inspection_tables(result):
        out.print(table)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def line_of(text: str, start: str) -> list[str]:
    """Return the cells of the row that starts with a word."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start + " ")]
    return line.split()


def test_each_node_is_marked_for_what_became_of_it() -> None:
    """What fell short, what is not told, what was removed; a fused node shares its layer's time."""
    text = printed(inspection())

    assert line_of(text, "conv") == ["conv", "Conv", "int8", "int8", "conv", "+", "relu", "0.6000"]
    assert line_of(text, "relu") == ["relu", "Relu", "fp32", "int8", '"', '"']
    assert line_of(text, "fc") == ["fc", "Gemm", "int8", "fp32", "fc", "NOT", "AS", "INTENDED", "0.2000"]
    assert line_of(text, "attention")[3:] == ["?", REGION, "kernels", "not", "told", "0.1000"]
    assert line_of(text, "dropout")[3:] == ["-", "-", "removed", "-"]


def test_copies_are_listed_with_their_types() -> None:
    """A layer that no node is in takes time as well."""
    cells = line_of(printed(inspection()), "copy to conv")

    assert cells[-7:] == ["Row", "major", "FP32", "Row", "major", "Int8", "0.1000"]


def test_the_summary_says_how_the_time_divides_up() -> None:
    """0.6 of 1.0 ms in INT8, 0.1 in copies, 0.1 not told; and that the sum is no run time."""
    lines = list(inspection_lines(inspection()))

    assert lines[0] == "TensorRT 10.16.1.11 on NVIDIA H200; inputs: x (8, 3, 32, 32)"
    assert lines[1] == (
        "1 of 3 intended layers run INT8; 1 in regions whose kernels TensorRT does not tell; 1 reformat layer"
    )
    assert lines[2] == (
        "Of the layers' time 60.0% is in INT8 layers, 10.0% in reformat layers, 10.0% in regions whose kernels "
        "TensorRT does not tell"
    )
    assert "their sum is no run time" in lines[3]
    assert lines[-1] == "a note"


def test_a_simulation_says_so_and_has_no_shares() -> None:
    """Titles and summary; no share of INT8 is worked out from its times."""
    result = inspection(simulated=True, against=fp16_table())

    titles = [str(table.title) for table in inspection_tables(result)]
    assert all(title.endswith("(SIMULATED)") for title in titles)
    assert len(titles) == 3
    lines = list(inspection_lines(result))
    assert lines[1].startswith("SIMULATED, no statement about a GPU: 1 of 3")
    assert not any("Of the layers' time" in line for line in lines)


def test_differences_are_of_layers_and_complete() -> None:
    """conv and relu together, the largest first; nodes that one engine is without; copies in a row of their own."""
    text = printed(inspection(against=fp16_table())).partition("against m.fp16.engine")[2]

    assert line_of(text, "conv, relu")[2:] == ["int8", "fp16", "0.6000", "1.2000", "-0.6000"]
    assert line_of(text, "attention")[1:] == ["?", "-", "0.1000", "0.0000", "+0.1000"]
    assert line_of(text, "fc")[1:] == ["fp32", "fp16", "0.2000", "0.2000", "+0.0000"]
    assert line_of(text, "layers of no node")[-3:] == ["0.1000", "0.0000", "+0.1000"]
    assert text.index("conv, relu") < text.index("attention") < text.index("fc")


def test_without_a_model_the_layers_are_listed() -> None:
    """Kinds and kernels, copies among them; nothing is said of an intention."""
    result = inspection(table=LayerTable("m.engine", (), int8_table().layers))
    text = printed(result)

    assert line_of(text, "fc") == ["fc", "CaskGemm", "fp32", "0.2000"]
    assert "intended" not in text
    assert next(iter(list(inspection_lines(result))[1:])) == "4 layers; 1 reformat layer"


def test_long_names_lose_their_middle() -> None:
    """Both ends of a fused layer's name stay."""
    assert shorten("abc", 3) == "abc"
    assert shorten("abcdefghij", 7) == "ab...ij"
    assert shorten("abcdefghijk", 8) == "abc...jk"


def test_files_are_looked_at_before_tensorrt(tmp_path: Path) -> None:
    """What is wrong with them is said on machines without TensorRT too."""
    with pytest.raises(ConfigError, match="no TensorRT engine"):
        inspect(tmp_path / "m.onnx")
    (tmp_path / "m.engine").write_bytes(b"plan")
    with pytest.raises(EngineLoadError, match="--trust"):
        inspect(tmp_path / "m.engine")
