"""The explanation of a placement on the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from engines.pair_rules import RULES
from engines.placement import ActivationPoint, Decision, Placement, WeightPoint
from trt_int8.explanation import explanation_tables

PLACEMENT = Placement(
    "tensorrt",
    (
        ActivationPoint("x", "x", (("conv", 0),), "weighted-inputs", "input of Conv"),
        ActivationPoint("skip", "x", (("add", 1), ("add", 0)), "average-pool", "reads INT8: Add 'add'"),
        ActivationPoint("whole", "whole", None, "weighted-inputs", "input of Conv"),
    ),
    (WeightPoint("conv", 1, 0, "x"), WeightPoint("up", 1, None, "whole")),
    (
        Decision("conv", "Conv", True, "weighted-inputs", "all inputs"),
        Decision("up", "ConvTranspose", True, "weighted-inputs", "all inputs"),
        Decision("fc", "Gemm", False, "excluded", "excluded by 'fc'"),
    ),
)


def rows(number: int) -> list[list[str]]:
    """The cells of a printed table, without title and heading."""
    out = io.StringIO()
    table = explanation_tables(PLACEMENT, {"x": 0.5, "skip": 0.5, "whole": 0.123456789})[number]
    Console(file=out, width=120).print(table)
    return [[cell for cell in line.strip().split("  ") if cell] for line in out.getvalue().splitlines()]


def cells(number: int) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in rows(number)[4:] if row]


def test_every_weighted_node_has_its_row() -> None:
    """Node, operator, what it computes on, the granularity of its weight, and the rule; the title counts."""
    assert rows(0)[0] == ["Weighted nodes: 2 of 3 compute on INT8"]
    assert cells(0) == [
        ["conv", "Conv", "INT8", "per channel, axis 0", "weighted-inputs"],
        ["up", "ConvTranspose", "INT8", "one", "weighted-inputs"],
        ["fc", "Gemm", "float", "excluded"],
    ]


def test_a_weight_that_is_only_stored_as_int8_computes_on_float() -> None:
    """The title counts arithmetic, not storage."""
    stored = Placement(
        "cpu", (), (WeightPoint("fc", 1, 0, "x"),), (Decision("fc", "Gemm", True, "weight-only", "why"),)
    )
    out = io.StringIO()
    tables = explanation_tables(stored, {})
    Console(file=out, width=120).print(tables[0])

    assert [str(table.title).split(":")[0] for table in tables] == ["Weighted nodes", "Why"]  # no pairs, no table
    assert "0 of 1 compute on INT8" in out.getvalue()
    assert "float" in out.getvalue()


def test_every_pair_names_its_readers_once() -> None:
    """Rule, readers and scale of each pair; a node that reads it twice stands there once."""
    assert cells(1) == [
        ["x", "weighted-inputs", "conv", "0.5"],
        ["skip", "average-pool", "add", "0.5"],
        ["whole", "weighted-inputs", "all its readers", "0.123457"],
    ]


def test_every_reason_is_given_once_with_its_count() -> None:
    """Equal reasons are counted, in the order in which they first came up; a pair gives that of its rule."""
    why = next(rule.why for rule in RULES if rule.name == "average-pool")
    assert cells(2) == [
        ["weighted-inputs", "all inputs", "2"],
        ["excluded", "excluded by 'fc'", "1"],
        ["weighted-inputs", "all inputs of weighted operators are quantized", "2"],
        ["average-pool", why, "1"],
    ]
