"""Inputs for where the user gives none: the shapes are the model's, the values mean nothing, but are valid."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from calibrators.protocols import Array
from engines.onnxrt import load_header
from engines.runner import TensorSpec
from trt_int8.errors import ConfigError

_KEEPING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators between an input of ids and its table that leave the ids as they are."""


def random_feeds(
    inputs: Iterable[TensorSpec],
    batch_size: int | None = None,
    *,
    built_for: Mapping[str, Sequence[int]] | None = None,
    tables: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Make one batch of random numbers for a model: normal floats, ids that its tables hold, masks that hide nothing.

    Of what is no float, an input is a mask where its name says so, and is filled with ones; ids of a table whose length
    is not known, and everything else, are zeros.

    Args:
        inputs: the model's inputs; lengths that they fix are kept.
        batch_size: length of a first axis that is dynamic; None takes that of `built_for`, or 1.
        built_for: input name to the shape that an engine's kernels were chosen for: it gives dynamic axes their length.
        tables: input name to the number of rows of the table that its numbers are looked up in, from `id_tables`.

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
        elif spec.name in (tables or {}):
            values = generator.integers(0, (tables or {})[spec.name], shape)
        elif "mask" in spec.name.lower():
            values = np.ones(shape)
        feeds[spec.name] = np.asarray(values, dtype=spec.dtype)
    return feeds


def id_tables(model: str | os.PathLike[str]) -> dict[str, int]:
    """Return which inputs of an ONNX model are looked up in tables, each with the rows of its shortest table.

    Args:
        model: the file; its weights are not read.

    Raises:
        FileAccessError, ModelError: it cannot be read.
    """
    graph = load_header(model).graph
    origin = {value.name: value.name for value in graph.input}
    rows = {weight.name: list(weight.dims) for weight in graph.initializer}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            rows[node.output[0]] = list(node.attribute[0].t.dims)
        if node.op_type in _KEEPING and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        if node.op_type == "DequantizeLinear" and node.input[0] in rows:
            rows[node.output[0]] = rows[node.input[0]]
        if node.op_type != "Gather" or node.input[0] not in rows or node.input[1] not in origin:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        name, length = origin[node.input[1]], rows[node.input[0]][axis]
        found[name] = min(length, found.get(name, length))
    return found
