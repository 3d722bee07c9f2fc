"""Small batches joined into larger ones."""

import numpy as np

from engines.runner import TensorSpec
from trt_int8.data import DataBatch
from trt_int8.joining import joined

FREE = (TensorSpec("x", np.dtype(np.float32), ("batch", None)),)
FIXED = (TensorSpec("x", np.dtype(np.float32), (1, 2)),)


def batch(index: int, rows: int = 1, width: int = 2) -> DataBatch:
    """Return a batch whose values name it."""
    feeds = {"x": np.full((rows, width), index, np.float32)}
    return DataBatch(index, rows, feeds, {"label": np.full(rows, index)}, f"hash {index}")


def test_samples_keep_their_order():
    """Single samples become batches of the asked size; the rest makes a short one, labels go along."""
    found = list(joined([batch(index) for index in range(5)], FREE, 2))

    assert [item.samples for item in found] == [2, 2, 1]
    assert [item.feeds["x"][:, 0].tolist() for item in found] == [[0, 1], [2, 3], [4]]
    assert found[1].extras["label"].tolist() == [2, 3]
    assert found[1].rolling_hash == "hash 3"


def test_other_shapes_are_not_joined():
    """Neighbours of another length stay apart."""
    found = list(joined([batch(0), batch(1, width=3), batch(2, width=3)], FREE, 8))

    assert [item.feeds["x"].shape for item in found] == [(1, 2), (2, 3)]


def test_fixed_batch_is_left_alone():
    """A model with a fixed batch gets its batches as they were."""
    assert [item.samples for item in joined([batch(0), batch(1)], FIXED, 8)] == [1, 1]


def test_nothing_gives_nothing():
    """An empty stream stays empty."""
    assert list(joined([], FREE, 4)) == []
