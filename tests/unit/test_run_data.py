"""The data of a run, and the shapes that they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.runner import TensorSpec
from trt_int8.config import RunConfig
from trt_int8.run_data import RunData

FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> RunData:
    """A folder of three batches of (4, length, 3), with a state."""
    for index, length in enumerate((5, 9, 5)):
        arrays = {"x": np.zeros((4, length, 3), np.float32), "state": np.zeros((2, 4), np.float32)}
        np.savez(tmp_path / f"{index}.npz", **arrays)
    return RunData(RunConfig.model_validate({"model": {"source": "m.onnx"}, "data": {"calibration": str(tmp_path)}}))


def test_shapes_are_read_where_more_than_the_batch_is_free(data: RunData) -> None:
    """Each with its number of batches."""
    inputs = [TensorSpec("x", FLOAT32, ("n", "t", 3)), TensorSpec("state", FLOAT32, (2, "n"))]

    assert data.judged_shapes(inputs) == {"x": {(4, 5, 3): 2, (4, 9, 3): 1}, "state": {(2, 4): 3}}


def test_nothing_is_read_where_the_batch_alone_is_free(data: RunData) -> None:
    """Its sizes are known without; these inputs would not fit the data."""
    assert data.judged_shapes([TensorSpec("x", FLOAT32, ("n", 7)), TensorSpec("state", FLOAT32, (2, "n"))]) == {}
