"""What the zoo's models are fed: fields that are smooth as photographs are, sound-like signals, token ids, masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

Kind = Literal["field", "normal", "ids", "mask", "flag"]
Feeds = dict[str, NDArray[Any]]

BATCH = 8
CALIBRATION_BATCHES = 4
LENGTHS = (12, 9, 16, 7, 14)
"""Of the axes that a model leaves open: batches differ."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model, and how its values come about.

    Attributes:
        name: of the graph's input.
        shape: without the batch; a string is an axis that the model leaves open.
        kind: "field": smooth over all axes but the first, which holds channels; "normal": independent numbers; "ids":
            whole numbers below `limit`; "mask": 1 for the tokens of a sample, 0 for its padding; "flag": one boolean
            for the whole batch, without a batch axis.
        limit: of ids.
        batch: the size of the batch, where the model fixes it.
    """

    name: str
    shape: tuple[int | str, ...]
    kind: Kind = "field"
    limit: int = 0
    batch: int | None = None

    def value_info(self) -> onnx.ValueInfoProto:
        """Return the graph's input."""
        types = {"ids": TensorProto.INT64, "mask": TensorProto.INT64, "flag": TensorProto.BOOL}
        shape = () if self.kind == "flag" else (self.batch or "N", *self.shape)
        return helper.make_tensor_value_info(self.name, types.get(self.kind, TensorProto.FLOAT), shape)

    def draw(self, random: np.random.Generator, count: int, length: int) -> NDArray[Any]:
        """Make a batch of `count` samples; open axes have `length`."""
        shape = tuple(length if isinstance(axis, str) else axis for axis in self.shape)
        if self.kind == "flag":
            return np.asarray(bool(random.integers(2)))
        if self.kind == "ids":
            return random.integers(0, self.limit, (count, *shape))
        if self.kind == "mask":
            lengths = random.integers(shape[-1] // 2, shape[-1] + 1, count)
            return (np.arange(shape[-1]) < lengths[:, None]).astype(np.int64)
        if self.kind == "normal":
            return random.normal(size=(count, *shape)).astype(np.float32)
        return _field(random, (count, *shape))


def batches(inputs: Sequence[Input], count: int, *, seed: int) -> list[Feeds]:
    """Return batches for a model, the same ones for the same seed."""
    random = np.random.default_rng(seed)
    return [
        {entry.name: entry.draw(random, entry.batch or BATCH, LENGTHS[index % len(LENGTHS)]) for entry in inputs}
        for index in range(count)
    ]


def calibration_batches(inputs: Sequence[Input]) -> list[Feeds]:
    """Return what a model is calibrated on."""
    return batches(inputs, CALIBRATION_BATCHES, seed=1)


def held_back_batches(inputs: Sequence[Input]) -> list[Feeds]:
    """Return what a model is judged on: 16 samples, or 4 of one that takes them one by one."""
    return batches(inputs, 4 if inputs[0].batch == 1 else 2, seed=2)


def _field(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Sum waves of all lengths whose amplitude falls with their frequency, as in photographs; and a little noise."""
    axes = tuple(range(2, len(shape)))
    spectrum = np.fft.fftn(random.normal(size=shape), axes=axes)
    squares = [np.fft.fftfreq(shape[axis]).reshape(-1, *[1] * (len(shape) - 1 - axis)) ** 2 for axis in axes]
    frequency = np.sqrt(sum(squares, start=np.zeros(())))
    smooth = np.fft.ifftn(spectrum / (frequency + 0.05), axes=axes).real
    smooth /= smooth.std()
    gain = np.exp(random.normal(0.0, 0.3, (shape[0], *[1] * (len(shape) - 1))))  # dark and bright, quiet and loud
    return (gain * (smooth + 0.05 * random.normal(size=shape))).astype(np.float32)
