"""What this floor asks of the ones above it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from calibrators.histogram import MagnitudeHistogram  # imports numba, which takes its time


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
        values: tensor name to its values, in any order and shape, any floating dtype. Valid until the next batch is
            asked for.
        input_shapes: model input to the shape that was fed, rows that pad a batch included.
        buffers: an object that names the arrays of `values` where these are the same for many batches, filled anew for
            each, so that what is needed to count them can be kept beside the object; None where they are not.
    """

    batch: int
    samples: int
    values: Mapping[str, Array]
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: object | None = None


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


@runtime_checkable
class ConcurrentSource(Protocol):
    """Runs a model on several batches at a time, in threads of the caller's."""

    @property
    def tensors(self) -> Sequence[str]:
        """Names of the tensors that every batch delivers, in graph order."""
        ...

    @property
    def workers(self) -> int:
        """Number of batches that are best run at a time."""
        ...

    def batches(self) -> Iterator[CalibrationBatch]:
        """Read the stream once; from one thread only."""
        ...

    def run(self, index: int, batch: CalibrationBatch) -> Activations:
        """Run the model on a batch; what it gives does not depend on other runs, nor on their number.

        Args:
            index: of the batch in the stream, counted from 0.
            batch: the batch.
        """
        ...

    def producer(self, tensor: str) -> str:
        """Name the node that produces `tensor`, or say that it is a model input; for messages."""
        ...


@runtime_checkable
class GroupedSource(ConcurrentSource, Protocol):
    """Runs a model piece by piece, each piece on a few batches in turn, while its weights are in the cache."""

    @property
    def group_size(self) -> int:
        """Number of batches that are best run together now; it may change while batches are run."""
        ...

    def run_group(self, first: int, batches: Sequence[CalibrationBatch], take: Callable[[Activations], None]) -> None:
        """Run the model on consecutive batches; what it gives does not depend on how they are grouped.

        Args:
            first: index of the first batch in the stream, counted from 0.
            batches: one or more.
            take: is handed activations of one batch, those of a piece while they are in the cache: some of the tensors,
                each once for every batch. They are valid until it returns. If it raises, neither this batch nor a later
                one is run any further.

        Raises:
            Exception: what the first of the batches that failed raised.
        """
        ...


@runtime_checkable
class CountingSource(Protocol):
    """Runs a model where its activations cannot be reached, and counts them there; one batch at a time."""

    @property
    def tensors(self) -> Sequence[str]:
        """Names of the tensors that are counted, in graph order."""
        ...

    def batches(self) -> Iterator[CalibrationBatch]:
        """Read the stream once."""
        ...

    def start(self, index: int, batch: CalibrationBatch) -> None:
        """Begin to run and to count a batch; the one before is finished.

        Args:
            index: of the batch in the stream, counted from 0.
            batch: the batch.
        """
        ...

    def finish(self) -> Activations:
        """Wait for the batch that was begun, and return what is known of it; without values."""
        ...

    def histograms(self) -> Mapping[str, MagnitudeHistogram]:
        """Return the counts of all batches so far, which are finished."""
        ...

    def producer(self, tensor: str) -> str:
        """Name the node that produces `tensor`, or say that it is a model input; for messages."""
        ...


class CalibrationBatch(Protocol):
    """One batch of calibration data. Its arrays stay as they are when further batches are read."""

    @property
    def feeds(self) -> Mapping[str, Array]:
        """Input name to array."""
        ...

    @property
    def samples(self) -> int:
        """Number of real samples; rows beyond it are padding."""
        ...

    @property
    def extras(self) -> Mapping[str, Array]:
        """Other arrays of the batch by name, a row for each real sample; asked for where padding is left out."""
        ...


class DeviceBuffers(Protocol):
    """Device memory for TensorRT's calibrators: one buffer for each name, kept from its first upload until `free`.

    TensorRT reads a batch at the addresses that `upload` returned, from the same thread, right after `get_batch` came
    back. So an upload is complete when the call returns, and its memory belongs to the device's primary context, which
    is the one that TensorRT works in.
    """

    def upload(self, name: str, array: Array) -> int:
        """Copy `array` to the device.

        The first upload under a name allocates its buffer; a later array that fits is copied to the same address, and
        a larger one gets a new buffer in place of the old.

        Args:
            name: of the model input.
            array: any dtype and shape, C-contiguous; not kept.

        Returns:
            The buffer's device address.

        Raises:
            TrtInt8Error: the device has no memory left; says how much was asked for.
        """
        ...

    def free(self) -> None:
        """Give all memory back; a second call does nothing."""
        ...

    def __enter__(self) -> Self:
        """Return the object itself."""
        ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Call `free`."""
        ...
