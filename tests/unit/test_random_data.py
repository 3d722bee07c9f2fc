"""Random inputs for a model."""

import numpy as np
import pytest

from engines.runner import TensorSpec
from trt_int8.errors import ConfigError
from trt_int8.random_data import random_feeds


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
