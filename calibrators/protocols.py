"""What this floor asks of the ones above it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FloatArray = NDArray[np.floating[Any]]
Batch = Mapping[str, Array]

Item = TypeVar("Item")


class Track(Protocol):
    """Wraps an iterable to show its progress; the items pass through unchanged."""

    def __call__(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        """Return an iterable over the same items.

        Args:
            items: what is iterated.
            description: the step, as the user reads it: "calibrate".
            total: number of items where it is known.
        """
        ...


def untracked(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Show nothing: the `Track` of library use."""
    return items


@dataclass(frozen=True, slots=True)
class Activations:
    """What one batch did inside the model.

    Attributes:
        batch: index of the batch, counted from 0.
        samples: number of real samples in it; rows that padded it are already cut away from `values`.
        values: tensor name to activation, any shape, any floating dtype. Valid until the next batch is asked for.
    """

    batch: int
    samples: int
    values: Mapping[str, Array]


class ActivationSource(Protocol):
    """Runs a model over a stream of batches and hands out named activations, one batch at a time."""

    @property
    def tensors(self) -> Sequence[str]:
        """Names of the tensors that every batch delivers, in graph order."""
        ...

    def activations(self) -> Iterator[Activations]:
        """Run the model over the stream once."""
        ...

    def producer(self, tensor: str) -> str:
        """Name the node that produces `tensor`, or say that it is a model input; for messages."""
        ...
