"""Where samples and positions of sequences lie in the tensors of a graph.

It is found by shape inference: lengths are given to the free axes, one of them is changed at a time, and the axes that
follow it are the ones. A length that the graph fixes is recognised where it stands, unless another axis has it as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from engines.graph import PreparedModel
from engines.memory import inferred_shapes
from engines.onnxrt import tensor_specs
from engines.padding import PaddedTensors, Padding, Role, sequence_axis
from engines.runner import TensorSpec

_SAMPLES = (7, 13)
_POSITIONS = (11, 17)
"""Lengths that are tried: prime, and short, as tables of positions may be."""

_OTHER = 19
"""From here on lengths of other free axes."""


def find_padding(prepared: PreparedModel, tensors: Sequence[str], padding: Padding) -> PaddedTensors:
    """Find where padding lies in the tensors of a model.

    Args:
        prepared: the model.
        tensors: names of activations.
        padding: the array that tells real positions.

    Raises:
        ModelError: no input has an axis of positions.
    """
    inputs, _ = tensor_specs(prepared.proto)
    sequence = sequence_axis(inputs, padding)
    found = _Axes(prepared, inputs, sequence)
    roles = {name: found.roles(name) for name in tensors}
    return PaddedTensors(
        padding,
        sequence,
        {name: known for name, known in roles.items() if known},
        tuple(name for name, known in roles.items() if known is None),
    )


class _Axes:
    """The roles of the axes in a graph."""

    def __init__(self, prepared: PreparedModel, inputs: Sequence[TensorSpec], sequence: tuple[str, int]) -> None:
        name, axis = sequence
        inputs = _with_shared_names(inputs)
        shape = next(spec.shape for spec in inputs if spec.name == name) or (None, None)
        batch, positions = shape[0], shape[axis]
        self._fixed_samples = batch if isinstance(batch, int) else None
        self._fixed_positions = positions if isinstance(positions, int) else None
        self._position_axis = axis
        lengths: dict[str, int] = defaultdict(count(_OTHER, 2).__next__)

        def inferred(samples: int, steps: int) -> dict[str, tuple[int, ...]]:
            def length(spec: TensorSpec, index: int, stated: int | str | None) -> int:
                if isinstance(stated, int):
                    return stated
                if (stated is not None and stated == positions) or (spec.name, index) == sequence:
                    return steps
                if (stated is not None and stated == batch) or (stated is None and index == 0):
                    return samples
                if stated is None and positions is None and index == axis:
                    return steps
                return lengths[stated or f"{spec.name}:{index}"]

            fed = {
                spec.name: tuple(length(spec, index, stated) for index, stated in enumerate(spec.shape))
                for spec in inputs
                if spec.shape is not None
            }
            return inferred_shapes(prepared, fed)

        self._base = inferred(_SAMPLES[0], _POSITIONS[0])
        self._more_samples = inferred(_SAMPLES[1], _POSITIONS[0])
        self._more_positions = inferred(_SAMPLES[0], _POSITIONS[1])
        graph = prepared.proto.graph
        self._producers = {output: node for node in graph.node for output in node.output}
        softmax = [node for node in graph.node if node.op_type == "Softmax"]
        self._weights_of_attention = {name for node in softmax for name in (*node.input, *node.output)}
        self._weight_lengths = {length for weight in graph.initializer for length in weight.dims}

    def roles(self, tensor: str) -> tuple[Role, ...] | None:
        """Return the role of every axis; nothing for a tensor without positions, None where it cannot be told."""
        known = self._base.get(tensor), self._more_samples.get(tensor), self._more_positions.get(tensor)
        base, more_samples, more_positions = known
        if base is None or more_samples is None or more_positions is None:
            return None
        if not len(base) == len(more_samples) == len(more_positions):
            return None
        batch = self._batch(base, more_samples)
        if self._fixed_positions is not None:
            return self._by_length(tensor, base, batch)
        moving = [axis for axis, length in enumerate(base) if more_positions[axis] != length]
        if not moving:
            return ()
        samples = self._fixed_samples or _SAMPLES[0]
        if samples > 1 and len(moving) == 1:
            axis = moving[0]
            if (base[axis], more_positions[axis]) == (samples * _POSITIONS[0], samples * _POSITIONS[1]):
                return self._merged(tensor, base, axis)
        if any((base[axis], more_positions[axis]) != _POSITIONS for axis in moving):
            return None
        return _assigned(base, batch, moving)

    def _by_length(self, tensor: str, base: tuple[int, ...], batch: Sequence[int] | None) -> tuple[Role, ...] | None:
        """Return the roles in a graph that fixes the number of positions."""
        length = self._fixed_positions or 0
        samples = self._fixed_samples or _SAMPLES[0]
        if len(base) == 2 and base[0] == samples * length:
            return ("positions", "other") if samples == 1 else self._merged(tensor, base, 0)
        found = [axis for axis, other in enumerate(base) if other == length and axis not in (batch or ())]
        if not found:
            return ()
        if tensor in self._weights_of_attention and found[-2:] == [len(base) - 2, len(base) - 1]:
            found = found[-2:]
        elif len(base) == 3 and self._position_axis in found:
            found = [self._position_axis]
        elif len(found) > 1 or (len(base) == 2 and length in self._weight_lengths):
            return None
        return _assigned(base, batch, found)

    def _batch(self, base: tuple[int, ...], more_samples: tuple[int, ...]) -> list[int] | None:
        """Return the axis of the samples, or none; None where that is unclear."""
        if self._fixed_samples is None:
            found = [axis for axis, length in enumerate(base) if more_samples[axis] != length]
            return None if len(found) > 1 or any(base[axis] % _SAMPLES[0] for axis in found) else found
        if self._fixed_samples == 1 or base[:1] == (1,):
            return []
        return [axis for axis in (0, 1) if axis < len(base) and base[axis] == self._fixed_samples][:1] or None

    def _merged(self, tensor: str, base: tuple[int, ...], merged: int) -> tuple[Role, ...] | None:
        """Return the roles of a tensor with one axis for both; which is the outer one, its origin tells."""
        pending, seen = [tensor], {tensor}
        while pending:
            node = self._producers.get(pending.pop(0))
            for name in () if node is None else node.input:
                if name in seen:
                    continue
                seen.add(name)
                if name not in self._base or not self._holds_all(name):
                    continue
                if self._is_merged(name):
                    pending.append(name)
                    continue
                roles = self.roles(name) or ()
                if "samples" in roles and "positions" in roles:
                    outer_samples = roles.index("samples") < roles.index("positions")
                    role: Role = "samples x positions" if outer_samples else "positions x samples"
                    return tuple(role if axis == merged else "other" for axis in range(len(base)))
        return None

    def _is_merged(self, name: str) -> bool:
        samples = self._fixed_samples or _SAMPLES[0]
        return samples * (self._fixed_positions or _POSITIONS[0]) in self._base[name]

    def _holds_all(self, name: str) -> bool:
        """Tell whether a tensor has as many values as there are positions of all samples, or more."""
        samples = self._fixed_samples or _SAMPLES[0]
        return int(np.prod(self._base[name])) % (samples * (self._fixed_positions or _POSITIONS[0])) == 0


def _with_shared_names(inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return inputs without the symbols that only one axis has: exporters make them up, and they relate nothing."""
    uses = Counter(axis for spec in inputs for axis in spec.shape or () if isinstance(axis, str))
    return [
        spec
        if spec.shape is None
        else replace(
            spec, shape=tuple(None if isinstance(axis, str) and uses[axis] == 1 else axis for axis in spec.shape)
        )
        for spec in inputs
    ]


def _assigned(base: tuple[int, ...], batch: Sequence[int] | None, positions: Sequence[int]) -> tuple[Role, ...] | None:
    if batch is None or set(batch) & set(positions):
        return None
    return tuple(
        "positions" if axis in positions else "samples" if axis in batch else "other" for axis in range(len(base))
    )
