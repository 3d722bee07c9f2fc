"""Random inputs for a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from engines.runner import TensorSpec
from trt_int8.errors import ConfigError
from trt_int8.random_data import id_tables, random_feeds


def test_shapes_and_types_are_the_models():
    """The batch is filled in, fixed axes are kept, integers are zero, scalars are scalars."""
    specs = [
        TensorSpec("x", np.dtype(np.float32), ("batch", 3)),
        TensorSpec("ids", np.dtype(np.int64), (2, 4)),
        TensorSpec("t", np.dtype(np.float64), ()),
    ]
    feeds = random_feeds(specs, 5)

    assert {name: (value.shape, value.dtype.name) for name, value in feeds.items()} == {
        "x": ((5, 3), "float32"),
        "ids": ((2, 4), "int64"),
        "t": ((), "float64"),
    }
    assert not feeds["ids"].any()
    np.testing.assert_array_equal(feeds["x"], random_feeds(specs, 5)["x"])


def test_an_engine_gives_dynamic_axes_their_length():
    """What its kernels were chosen for; a batch size that was asked for goes before it, and lengths the model fixes."""
    specs = [TensorSpec("x", np.dtype(np.float32), ("batch", 3, "width"))]
    shapes = {"x": (8, 5, 16)}

    assert random_feeds(specs, built_for=shapes)["x"].shape == (8, 3, 16)
    assert random_feeds(specs, 2, built_for=shapes)["x"].shape == (2, 3, 16)
    assert random_feeds([TensorSpec("x", np.dtype(np.float32), (4, "n"))], 2, built_for=shapes)["x"].shape == (4, 5)


def test_without_anything_the_batch_is_one():
    """A model and nothing else."""
    assert random_feeds([TensorSpec("x", np.dtype(np.float32), ("batch", 3))])["x"].shape == (1, 3)


def test_free_axis_needs_data():
    """A dynamic axis beside the batch has no length without data."""
    with pytest.raises(ConfigError, match="axis 2 has no fixed length"):
        random_feeds([TensorSpec("x", np.dtype(np.float32), ("batch", 3, "height"))], 1)


def test_ids_are_those_of_their_tables() -> None:
    """Every row may come, no other; a mask hides nothing; of what is not known zeros are always valid."""
    int64 = np.dtype(np.int64)
    specs = [TensorSpec(name, int64, (50, 20)) for name in ("ids", "types", "attention_mask", "other")]
    feeds = random_feeds(specs, tables={"ids": 100, "types": 2})

    assert set(feeds["ids"].ravel()) == set(range(100))
    assert set(feeds["types"].ravel()) == {0, 1}
    assert feeds["attention_mask"].all()
    assert not feeds["other"].any()


def test_tables_are_found_in_the_graph(graph_builder: Any, tmp_path: Path) -> None:
    """Behind casts and reshapes, in a Constant node, along any axis; of two tables the shorter one counts."""
    graph = graph_builder()
    for name in ("ids", "types", "columns", "mask"):
        graph.input(name, ("n", 4), TensorProto.INT32)
    wide = graph.node("Cast", [graph.node("Unsqueeze", ["ids", graph.constant(np.array([1]))])], to=TensorProto.INT64)
    table = graph.node("Constant", [], "table", value=numpy_helper.from_array(np.ones((3, 6), np.float32)))
    looked_up = [
        graph.node("Gather", [graph.normal((30, 6)), wide]),
        graph.node("Gather", [graph.normal((20, 6)), wide]),
        graph.node("Gather", [table, "types"]),
        graph.node("Gather", [graph.normal((6, 40)), "columns"], axis=1),
        graph.node("Gather", [graph.node("Cast", ["mask"], to=1), graph.constant(np.array([0]))]),
    ]
    model = graph.save(tmp_path / "m.onnx", looked_up)

    assert id_tables(model) == {"ids": 20, "types": 3, "columns": 40}
