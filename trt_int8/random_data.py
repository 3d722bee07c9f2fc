"""Inputs for where the user gives none: the shapes are the model's, the values mean nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from calibrators.protocols import Array
from engines.runner import TensorSpec
from trt_int8.errors import ConfigError


def random_feeds(inputs: Iterable[TensorSpec], batch_size: int) -> dict[str, Array]:
    """Make one batch of random numbers for a model: normal floats, zeros for every other type.

    Raises:
        ConfigError: an input has a dynamic axis beside the first, whose length only data can give.
    """
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape: list[int] = []
        for axis, length in enumerate(spec.shape or ()):
            if not isinstance(length, int) and axis > 0:
                raise ConfigError(
                    f"Cannot make random inputs for {spec}: axis {axis} has no fixed length. Give data with --data."
                )
            shape.append(length if isinstance(length, int) else batch_size)
        values: Any = np.zeros(shape)
        if np.issubdtype(spec.dtype, np.floating):
            values = generator.standard_normal(shape)
        feeds[spec.name] = np.asarray(values, dtype=spec.dtype)
    return feeds
