"""Pieces that write into memory of their own: the same values as without, whatever is fed, and no more memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators.collector import collect
from calibrators.protocols import Activations
from engines import activations, pieces
from engines.activations import OnnxRuntimeActivations
from engines.blocked import channels_per_block
from engines.calibrated_tensors import tensors_to_calibrate
from engines.graph import PreparedModel, prepare
from engines.piece_buffers import ArraySpec, Memory, _arrange_carried, _Place, signature_of, specs_of
from engines.pieces import Piece

RNG = np.random.default_rng(8)


@dataclass
class Batch:
    feeds: Mapping[str, Any]
    samples: int = 1
    extras: Mapping[str, Any] = field(default_factory=dict)


def images(count: int, rows: int = 1, size: int = 8) -> list[Batch]:
    shape = (rows, 3, size, size)
    return [Batch({"x": RNG.normal(size=shape).astype(np.float32)}, samples=rows) for _ in range(count)]


@pytest.fixture
def pieced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are cut wherever they can be."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)


@pytest.fixture
def narrow(graph_builder: Any, tmp_path: Path, pieced: None) -> PreparedModel:
    """Three convolutions and a skip; 20 channels do not fill blocks of 8 or 16."""
    graph = graph_builder()
    x = graph.input("x", ("N", 3, "H", "W"))
    first = x = graph.node("Relu", [graph.conv(x, (3, 20), "stem")], "trunk")
    for k in range(2):
        x = graph.node("Relu", [graph.conv(x, (20, 20), f"c{k}")], f"r{k}")
    x = graph.conv(graph.node("Add", [x, first], "sum"), (20, 8), "head")
    return prepare(graph.save(tmp_path / "narrow.onnx", [x]))


def run_groups(source: OnnxRuntimeActivations, groups: Sequence[Sequence[Batch]]) -> list[dict[str, Any]]:
    """Return copies of each batch's activations, and whether they came in memory that stays."""
    found: dict[int, dict[str, Any]] = {}

    def take(part: Activations) -> None:
        tensors = found.setdefault(part.batch, {})
        tensors |= {name: np.array(values) for name, values in part.values.items()}
        tensors["in buffers"] = tensors.get("in buffers", False) or part.buffers is not None

    first = 0
    for group in groups:
        source.run_group(first, group, take)
        first += len(group)
    return [found[index] for index in range(first)]


def assert_same(source: OnnxRuntimeActivations, batches: Sequence[Batch], found: Sequence[Mapping[str, Any]]) -> None:
    for index, (batch, tensors) in enumerate(zip(batches, found, strict=True)):
        for name, values in source.run(index, batch).values.items():
            np.testing.assert_array_equal(np.ravel(tensors[name]), np.ravel(values), err_msg=f"{name} of batch {index}")


@pytest.mark.parametrize("rows", [1, 3])
def test_values_are_those_of_a_run_without(narrow: PreparedModel, rows: int) -> None:
    """From the second batch of a shape on, the arrays are given; also where the channels do not fill the blocks."""
    assert channels_per_block() in (None, 8, 16)
    source = OnnxRuntimeActivations(narrow, tensors_to_calibrate(narrow, "all"), [])
    assert len(source._pieces) > 2
    batches = images(6, rows)

    found = run_groups(source, [batches[:1], batches[1:3], batches[3:6]])

    assert [tensors["in buffers"] for tensors in found] == [False] + 5 * [True]
    assert_same(source, batches, found)


def test_padding_is_left_out(narrow: PreparedModel) -> None:
    """A batch that is filled up gives the values of its samples alone; the memory is used all the same."""
    source = OnnxRuntimeActivations(narrow, tensors_to_calibrate(narrow, "all"), [])
    batches = images(4, 3)
    batches[2].samples = 2

    found = run_groups(source, [batches[:1], batches[1:]])

    assert [tensors["in buffers"] for tensors in found] == [False, True, False, True]
    assert found[2]["x"].shape == (2, 3, 8, 8)
    assert_same(source, batches, found)


def test_shapes_take_turns(narrow: PreparedModel) -> None:
    """Each shape has its layout, all of them the same memory; batches of different shapes cannot share a group's."""
    source = OnnxRuntimeActivations(narrow, tensors_to_calibrate(narrow, "all"), [])
    small, large = images(4), images(4, size=12)
    mixed = [small[3], large[3]]

    found = run_groups(source, [small[:1], large[:1], small[1:3], large[1:3], mixed, small[:1]])

    assert [tensors["in buffers"] for tensors in found] == [*2 * [False], *4 * [True], *2 * [False], True]
    assert_same(source, [small[0], large[0], *small[1:3], *large[1:3], *mixed, small[0]], found)
    memory: Memory = source._memories.get_nowait()
    assert source._memories.empty()
    specs = source._specs[signature_of(large[0].feeds)]
    assert specs is not None
    assert memory._room.size < 3 * 2 * sum(-(-spec.nbytes // 64) * 64 for spec in specs.values())


def test_lengths_that_depend_on_values(graph_builder: Any, tmp_path: Path, pieced: None) -> None:
    """What given memory cannot hold is run without: the values that are not zero are selected, and then counted."""
    graph = graph_builder()
    x = graph.node("Relu", [graph.conv(graph.input(), (3, 16), "stem")], "trunk")
    y = graph.node("Relu", [graph.conv(x, (16, 16), "c0")], "r0")
    chosen = graph.node("GatherND", [y, graph.node("Transpose", [graph.node("NonZero", [y], "where")], "at")], "chosen")
    graph.node("Add", [graph.node("ReduceSum", [chosen], "sum", keepdims=0), graph.conv(y, (16, 8), "c1")], "out")
    model = prepare(graph.save(tmp_path / "chosen.onnx", ["out"]))
    source = OnnxRuntimeActivations(model, tensors_to_calibrate(model, "all"), [])
    batches = images(5)

    found = run_groups(source, [batches[:1], batches[1:4], batches[4:]])

    assert len({tensors["chosen"].size for tensors in found}) > 1
    assert not found[-1]["in buffers"]
    assert_same(source, batches, found)


def test_statistics_are_those_of_a_run_without(narrow: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histograms and ranges, one thread or two, to the last count."""
    names, batches = tensors_to_calibrate(narrow), images(23)
    with monkeypatch.context() as patch:
        patch.setattr(activations, "specs_of", lambda _: None)
        expected = collect(OnnxRuntimeActivations(narrow, names, batches, threads=1))

    for threads in (1, 2):
        source = OnnxRuntimeActivations(narrow, names, batches, threads=threads)
        for _ in range(2):  # the second time every group is run in memory of its own
            found = collect(source)
            for name, histogram in expected.histograms.items():
                assert found.histograms[name].bins.tolist() == histogram.bins.tolist()
                assert found.histograms[name].counts.tolist() == histogram.counts.tolist()
            assert collect(source, statistics="minmax").ranges == expected.reduced().ranges


def test_what_cannot_be_written_to_given_memory() -> None:
    """Sequences, text and arrays without values."""
    array = np.zeros((2, 3), np.float32)

    assert specs_of({"a": array}) is not None
    assert specs_of({"a": array, "b": [array]}) is None
    assert specs_of({"a": np.array(["text"])}) is None
    assert specs_of({"a": np.zeros((0, 3), np.float32)}) is None


def test_a_memory_keeps_few_layouts() -> None:
    """The oldest goes first; memory that has to grow is made anew, with all layouts."""
    memory = Memory()
    layouts: Any = [object() for _ in range(10)]
    for k, layout in enumerate(layouts):
        memory.keep((("x", "<f4", (k,)),), 4, layout)

    assert memory.find((("x", "<f4", (1,)),), 1) is None
    assert memory.find((("x", "<f4", (9,)),), 4) is layouts[9]
    assert memory.find((("x", "<f4", (9,)),), 5) is None
    assert memory.take(1000).ctypes.data % 64 == 0
    assert memory.find((("x", "<f4", (9,)),), 4) is None


@given(data=st.data(), group=st.integers(1, 3), count=st.integers(2, 9))
def test_nothing_lies_on_what_is_still_read(data: st.DataObject, group: int, count: int) -> None:
    """At every piece, what it makes, what it reads, and what pieces behind it read are apart.

    Each piece makes up to two tensors, whose readers are drawn.
    """
    made = [[f"t{k}.{n}" for n in range(data.draw(st.integers(1, 2)))] for k in range(count - 1)] + [[]]
    life = {name: (k, data.draw(st.integers(k + 1, count - 1))) for k in range(count) for name in made[k]}
    sizes = {name: data.draw(st.integers(1, 300)) for name in life}
    read = [tuple(name for name, (_, last) in life.items() if last == k) for k in range(count)]
    model: Any = [Piece(None, read[k], tuple(made[k]), frozenset()) for k in range(count)]
    places = {
        name: [_Place(ArraySpec(np.dtype(np.uint8), (size,))) for _ in range(group)] for name, size in sizes.items()
    }

    end = _arrange_carried(model, places)

    for k in range(count):
        used = sorted(
            (place.offset, place.offset + place.spec.nbytes)
            for name, (first, last) in life.items()
            if first <= k <= last
            for place in places[name]
        )
        assert all(one[1] <= other[0] for one, other in pairwise(used))
        assert all(start % 64 == 0 and stop <= end for start, stop in used)


def test_a_chain_takes_two_places() -> None:
    """Each piece reads one and writes the other, for a group of two batches."""
    names = [f"t{k}" for k in range(20)]
    model: Any = [
        Piece(None, (name,), (after,), frozenset()) for name, after in pairwise(["x", *names])
    ]  # nothing reads the last
    places = {name: [_Place(ArraySpec(np.dtype(np.float32), (16,))) for _ in range(2)] for name in names[:-1]}

    assert _arrange_carried(model, places) == 2 * 2 * 64
