"""How much memory exposed activations take, and how tensors are shared out over passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import ModelError
from engines.graph import prepare
from engines.memory import activation_bytes, split_tensors, weight_bytes


def test_sizes_by_hand(tiny_model: Path) -> None:
    """float32 times the elements of the shape, for the batch that is fed."""
    prepared = prepare(tiny_model)
    sizes = activation_bytes(prepared, ["input", "relu", "logits"], {"input": (5, 3, 8, 8)})

    assert sizes == {"input": 4 * 5 * 3 * 64, "relu": 4 * 5 * 8 * 64, "logits": 4 * 5 * 16}
    assert weight_bytes(prepared) == 4 * (8 * 3 * 9 + 8 + 16 * 512 + 16)


def test_shapes_follow_reshapes_and_large_weights(graph_builder: Any, tmp_path: Path) -> None:
    """Constants that shapes are computed from are kept; weights are looked at by their shape alone."""
    graph = graph_builder()
    x = graph.node("Reshape", [graph.input("x", ("N", "L", 64)), graph.constant(np.int64([-1, 64]))], "flat")
    graph.node("MatMul", [x, graph.normal((64, 32))], "y")
    prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))

    assert activation_bytes(prepared, ["flat", "y"], {"x": (2, 7, 64)}) == {"flat": 4 * 14 * 64, "y": 4 * 14 * 32}


def test_a_shape_that_depends_on_values_is_not_known(graph_builder: Any, tmp_path: Path) -> None:
    """It is None, not a guess."""
    graph = graph_builder()
    graph.node("NonZero", [graph.input("x", ("N", 4))], "where")
    floats = graph.node("Cast", ["where"], "floats", to=1)
    graph.node("MatMul", [graph.constant(np.ones((1, 2), np.float32)), floats], "y")
    prepared = prepare(graph.save(tmp_path / "m.onnx", ["y"]))

    assert activation_bytes(prepared, ["x", "y"], {"x": (2, 4)}) == {"x": 32, "y": None}


def test_passes_by_hand() -> None:
    """The largest first, each into the first pass with room; the order of a pass is that of the graph."""
    sizes = {"a": 3, "b": 5, "c": None, "d": 7, "e": 4}

    assert split_tensors(sizes, 10) == [["a", "c", "d"], ["b", "e"]]
    assert split_tensors(sizes, 19) == [list(sizes)]


@given(st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=12), st.integers(9, 30))
def test_every_tensor_has_one_pass_that_fits(values: list[int | None], limit: int) -> None:
    """None is lost, none is doubled, and none of the passes exceeds the limit."""
    sizes = {f"t{index}": value for index, value in enumerate(values)}
    passes = split_tensors(sizes, limit)

    assert sorted(name for names in passes for name in names) == sorted(sizes)
    assert all(sum(sizes[name] or 0 for name in names) <= limit for names in passes)


def test_a_tensor_that_is_too_large_alone() -> None:
    """It is named, with both sizes."""
    with pytest.raises(ModelError, match=r"1\.00 MiB of activations .*: 'b' alone takes 2\.00 MiB.*--max-memory"):
        split_tensors({"a": 10, "b": 2**21}, 2**20)
