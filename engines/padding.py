"""Which positions of a batch are padding, and where they lie in every activation, so that statistics leave them out.

Sequences of different lengths are filled up to one length, and a mask or their lengths tell what is real. The model
computes something at the filled-up positions as well, which no answer depends on, and whose range says nothing.

Where positions lie in the tensors of a graph, `engines.sequence_axes` finds.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calibrators.errors import CalibrationError
from calibrators.protocols import Array
from engines.errors import ModelError
from engines.runner import TensorSpec

Role = Literal["samples", "positions", "samples x positions", "positions x samples", "other"]
"""What an axis counts; a product is two axes that were merged, the outer one first."""

Real = NDArray[np.bool_]
"""Shape (samples, positions): True where a position is real."""


@dataclass(frozen=True, slots=True)
class Padding:
    """The array that tells real positions from padding.

    Attributes:
        array: its name, of a model input or of an array that goes along with the inputs.
        kind: "mask": shape (samples, positions), 1 or True where a position is real; "lengths": shape (samples,), the
            number of real positions, which come first.
    """

    array: str
    kind: Literal["mask", "lengths"]

    def __str__(self) -> str:
        """Give `mask 'attention_mask'`."""
        return f"{self.kind} {self.array!r}"

    @classmethod
    def parse(cls, text: str) -> Padding:
        """Return the padding that gives a text.

        Raises:
            CalibrationError: there is none.
        """
        kind, _, quoted = text.partition(" ")
        try:
            array = ast.literal_eval(quoted)
        except (ValueError, SyntaxError):
            array = None
        if isinstance(array, str) and kind == "mask":
            return cls(array, "mask")
        if isinstance(array, str) and kind == "lengths":
            return cls(array, "lengths")
        raise CalibrationError(
            f"Cannot tell what padding the calibration left out: it says {text!r}; expected mask 'NAME' or lengths "
            "'NAME'. Calibrate again."
        )


@dataclass(frozen=True, slots=True)
class PaddedTensors:
    """Where padding lies in the tensors of a model.

    Attributes:
        padding: the array that tells it.
        sequence: name of the input, and its axis, whose length is that of the sequences.
        roles: tensor to the roles of its axes; those without positions are not in it.
        unknown: tensors of which the graph does not tell; their padding is counted.
    """

    padding: Padding
    sequence: tuple[str, int]
    roles: Mapping[str, tuple[Role, ...]]
    unknown: tuple[str, ...]

    def real(self, feeds: Mapping[str, Array], extras: Mapping[str, Array], samples: int) -> Real:
        """Return which positions of a batch are real; those of rows that fill it up are not.

        Args:
            feeds: model input to array.
            extras: the other arrays of the batch.
            samples: number of real samples.

        Raises:
            CalibrationError: see `real_positions`.
        """
        arrays = {**extras, **feeds}
        value = feeds[self.sequence[0]]
        found = real_positions(self.padding, arrays[self.padding.array], value.shape[self.sequence[1]], "a batch")
        rows = np.zeros((len(value), found.shape[1]), dtype=bool)
        rows[:samples] = found[:samples]
        return rows

    def without(self, tensor: str, values: Array, real: Real) -> Array:
        """Return the values of a tensor at real positions.

        Args:
            tensor: one of `roles`.
            values: with padding.
            real: which positions are real.

        Returns:
            The values in some order; `values` itself where nothing is left out.

        Raises:
            CalibrationError: its shape is not the one that the graph states.
        """
        if real.all():
            return values
        roles = self.roles[tensor]
        merged = next((axis for axis, role in enumerate(roles) if " x " in role), None)
        if merged is not None:
            flat = real if roles[merged] == "samples x positions" else real.T
            keep, leading = flat.reshape(-1), [merged]
        else:
            batch = [axis for axis, role in enumerate(roles) if role == "samples"]
            leading = [*batch, *(axis for axis, role in enumerate(roles) if role == "positions")]
            # What is computed for all samples at once is used where a position is real in one of them.
            rows = (
                np.repeat(real, max(1, values.shape[batch[0]] // len(real)), axis=0)
                if batch
                else np.asarray(real.any(axis=0))
            )
            keep = _product(rows, len(leading) - len(batch))
        moved = values.transpose([*leading, *(axis for axis in range(values.ndim) if axis not in leading)])
        if moved.shape[: keep.ndim] != keep.shape:
            raise CalibrationError(
                f"Cannot leave the padding out of {tensor!r}: its shape is {values.shape}, and {real.shape[0]} samples "
                f"of {real.shape[1]} positions were fed; the graph states axes of {', '.join(roles)}. Leave the "
                f"{self.padding} out."
            )
        return moved[keep]


def sequence_axis(inputs: Sequence[TensorSpec], padding: Padding) -> tuple[str, int]:
    """Return which axis of which input is the sequence: its name, and the number of the axis.

    It is the second axis of the mask, where that is an input; else the first free axis after the batch of the first
    input that has two axes, or its second one where all are fixed.

    Raises:
        ModelError: the mask has another number of axes, or no input has two.
    """
    for spec in inputs:
        rank = 2 if padding.kind == "mask" else 1
        if spec.name == padding.array and spec.shape is not None and len(spec.shape) != rank:
            expected = "(samples, positions)" if rank == 2 else "(samples,)"
            raise ModelError(
                f"Cannot leave padding out by the {padding}: the model's input is {spec}; expected the shape "
                f"{expected}. Give an array of that shape beside the inputs, and name it."
            )
        if spec.name == padding.array and padding.kind == "mask":
            return spec.name, 1
    for spec in inputs:
        if spec.name != padding.array and spec.shape is not None and len(spec.shape) >= 2:
            free = (axis for axis, length in enumerate(spec.shape) if axis > 0 and not isinstance(length, int))
            return spec.name, next(free, 1)
    raise ModelError(
        f"Cannot leave padding out by the {padding}: no input of the model has an axis of positions beside that of the "
        f"samples; its inputs are {'; '.join(map(str, inputs))}."
    )


def real_positions(padding: Padding, values: Array, length: int, where: str) -> Real:
    """Return which positions are real.

    Args:
        padding: what the array is.
        values: its values in a batch.
        length: number of positions that are fed.
        where: the batch, for messages.

    Raises:
        CalibrationError: they are of another shape, or are none that a mask or lengths can have, or leave no position.
    """
    found = f"Cannot leave the padding out of {where}: the {padding}"
    if padding.kind == "lengths":
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise CalibrationError(
                f"{found} are {values.dtype} of shape {values.shape}; expected whole numbers, one for each sample."
            )
        if values.size and (values.min() < 0 or values.max() > length):
            raise CalibrationError(
                f"{found} are {values.min()} to {values.max()}; expected 0 to {length}, the number of positions that "
                "are fed."
            )
        real = np.arange(length) < values[:, None]
    else:
        if values.ndim != 2 or values.shape[1] != length:
            raise CalibrationError(
                f"{found} has shape {values.shape}; expected (samples, {length}): {length} positions are fed."
            )
        real = values.astype(bool)
        if not np.array_equal(real, values):
            raise CalibrationError(f"{found} holds other numbers than 0 and 1; expected 1 where a position is real.")
    if not real.any():
        raise CalibrationError(
            f"{found} leaves nothing: all {real.size} positions are padding. Expected 1 (or True) where a position is "
            "real; a mask the other way round must be inverted where the data are made."
        )
    return real


def _product(rows: Real, axes: int) -> Real:
    """Return where all of several axes of positions are real: shape (samples, positions, ..., positions).

    Args:
        rows: shape (samples, positions), or (positions,) for all samples.
        axes: number of axes of positions.
    """
    keep = rows
    for _ in range(axes - 1):
        keep = keep[..., None] & rows.reshape(*rows.shape[:-1], *(1,) * (keep.ndim - rows.ndim + 1), rows.shape[-1])
    return keep
