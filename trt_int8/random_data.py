"""Inputs for where the user gives none: the shapes are the model's, the values mean nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calibrators.protocols import Array
from engines.runner import TensorSpec
from trt_int8.errors import ConfigError


def random_feeds(
    inputs: Iterable[TensorSpec],
    batch_size: int | None = None,
    *,
    built_for: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Array]:
    """Make one batch of random numbers for a model: normal floats, zeros for every other type.

    Args:
        inputs: the model's inputs; lengths that they fix are kept.
        batch_size: length of a first axis that is dynamic; None takes that of `built_for`, or 1.
        built_for: input name to the shape that an engine's kernels were chosen for: it gives dynamic axes their length.

    Raises:
        ConfigError: an input has a dynamic axis beside the first, whose length only data or an engine can give.
    """
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape: list[int] = []
        usual = (built_for or {}).get(spec.name, ())
        for axis, fixed in enumerate(spec.shape or ()):
            length = fixed if isinstance(fixed, int) else usual[axis] if axis < len(usual) else None
            if axis == 0 and not isinstance(fixed, int):
                length = batch_size or length or 1
            if length is None:
                raise ConfigError(
                    f"Cannot make random inputs for {spec}: axis {axis} has no fixed length. Give data with --data."
                )
            shape.append(length)
        values: Any = np.zeros(shape)
        if np.issubdtype(spec.dtype, np.floating):
            values = generator.standard_normal(shape)
        feeds[spec.name] = np.asarray(values, dtype=spec.dtype)
    return feeds
