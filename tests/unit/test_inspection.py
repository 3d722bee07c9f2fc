"""The layers of an engine on the terminal, as a GPU would give them; loading engines is tests/tensorrt/test_inspect.py.

The figures are made up.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from engines.runner import TensorSpec
from engines.sidecar import Environment, Sidecar, write_sidecar
from engines.trt_inspector import LayerTable, NodeRow, compare_tables
from engines.trt_layers import EngineLayer
from trt_int8.errors import ConfigError, EngineLoadError, MissingDependencyError
from trt_int8.inspection import Inspection, inspect
from trt_int8.inspection_tables import inspection_lines, inspection_tables, shorten, shorten_all

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


def printed(result: Any, width: int = 200) -> str:
    """All tables as text."""
    out = Console(file=io.StringIO(), width=width)
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
    assert line_of(text, "attention")[1:] == ["?", "-", "0.1000", "-", "+0.1000"]
    assert line_of(text, "fc")[1:] == ["fp32", "fp16", "0.2000", "0.2000", "+0.0000"]
    assert line_of(text, "layers of no node")[-3:] == ["0.1000", "-", "+0.1000"]
    assert line_of(text, "all layers")[-3:] == ["1.0000", "1.4000", "-0.4000"]
    order = ["conv, relu", "attention", "layers of no node", "fc", "all layers"]
    assert sorted(order, key=text.index) == order


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


def test_names_that_only_their_middle_tells_apart_are_left_whole() -> None:
    """No two names of a table read the same."""
    names = ["abcd1fghij", "abcd2fghij", "klmnopqrst"]
    assert shorten_all(names, 7) == dict(zip(names, ["abcd1fghij", "abcd2fghij", "kl...st"], strict=True))


def test_tables_fit_120_columns() -> None:
    """Long names are folded, and the figures stay."""
    node = "/backbone/stages.3/blocks.11/attention/projection"
    plain, wide = "Row major linear FP32 format", "Thirty-two wide channel vectorized row major Int8 format"
    copies = [
        EngineLayer(f"{node}_{which}_output_0_QuantizeLinear", "Reformat", "int8", (), (plain,), (wide,), "", 0.5)
        for which in ("query", "key")
    ]
    rows = tuple(NodeRow(f"{node}/{end}", "MatMul", "int8", f"{node}/{end}", "fp32", 0.1) for end in ("a", "b"))
    layers = (*copies, layer(f"{node}/a", "k", "fp32", 0.1), layer(f"{node}/b", "k", "fp32", 0.1))
    text = printed(inspection(table=LayerTable("m", rows, layers), against=fp16_table()), 120)

    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    assert text.count("NOT AS INTENDED") == 2
    assert text.count("0.5000") == 2


def test_a_model_that_wants_no_int8_is_told_so() -> None:
    """Not "0 of 0"."""
    assert fp16_table().summary == "the model asks for INT8 nowhere; 0 reformat layers"


def test_overlap_tells_another_model() -> None:
    """Of the side that names fewer nodes: Q/DQ nodes in the engine alone and nodes taken away do not count."""

    def table(nodes: str, found: str, *layers: str) -> LayerTable:
        rows = tuple(NodeRow(node, "Relu", "fp32", node if node in found else None, "fp32", 0.1) for node in nodes)
        return LayerTable("m", rows, tuple(EngineLayer(name, "k", "fp32", (name,), (), (), "") for name in layers))

    assert table("abcd", "ab", "a", "b").overlap == 1.0
    assert table("ab", "ab", "a", "b", "q", "dq").overlap == 1.0
    assert table("abcd", "a", "a", "x", "y", "z").overlap == 0.25
    assert table("ab", "", "x").overlap == 0.0
    assert LayerTable("m", (), ()).overlap == 1.0


def test_without_tensorrt_it_is_that_which_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the package for device memory, which is looked for after it."""

    def opened() -> None:
        raise AssertionError("the GPU was opened first")

    spec = TensorSpec("x", np.dtype(np.float32), (1, 3))
    plan = tmp_path / "m.engine"
    plan.write_bytes(b"plan")
    sidecar = Sidecar(
        4, hashlib.sha256(b"plan").hexdigest(), Environment("10.16", "GPU", "9.0", "13.0", None), "fp32",
        (spec,), (spec,), (), "m.onnx", "0", None, {}, 1.0, (),
    )  # fmt: skip
    write_sidecar(plan, sidecar)
    monkeypatch.setattr("trt_int8.inspection.open_device", opened)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="tensorrt"):
        inspect(plan)


def test_files_are_looked_at_before_tensorrt(tmp_path: Path) -> None:
    """What is wrong with them is said on machines without TensorRT too."""
    with pytest.raises(ConfigError, match="no TensorRT engine"):
        inspect(tmp_path / "m.onnx")
    (tmp_path / "m.engine").write_bytes(b"plan")
    with pytest.raises(EngineLoadError, match="--trust"):
        inspect(tmp_path / "m.engine")
