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


def test_free_axis_needs_data():
    """A dynamic axis beside the batch has no length without data."""
    with pytest.raises(ConfigError, match="axis 2 has no fixed length"):
        random_feeds([TensorSpec("x", np.dtype(np.float32), ("batch", 3, "height"))], 1)
