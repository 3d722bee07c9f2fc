"""Activations of a model that stay on the GPU: it is run there, and its activations are counted there.

Per batch only the inputs cross the bus, and of each tensor a few numbers back. Implements
`calibrators.protocols.CountingSource` over whatever runs the model: TensorRT (`engines.gpu_tensorrt`) or ONNX Runtime's
CUDA provider (`engines.gpu_onnxrt`).

The counts are exactly those of the activations that were computed, which the processor would count alike. The
activations themselves are not the processor's to the last bit: a GPU adds up in another order, and TensorRT and the
CUDA provider fuse other nodes than ONNX Runtime does on the processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from calibrators.collector import nonfinite_error
from calibrators.errors import CalibrationError
from calibrators.histogram import MagnitudeHistogram
from calibrators.protocols import Activations, Array, CalibrationBatch
from engines.activations import real_shape
from engines.device import Device, DeviceArray, OutOfMemoryError
from engines.errors import DeviceError, EngineBuildError, InferenceError
from engines.graph import PreparedModel
from engines.histogram_kernel import DTYPES, DeviceHistograms
from engines.onnxrt import check_feeds, tensor_specs


class GpuModel(Protocol):
    """Runs a model on a GPU, and leaves there what it computes."""

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, DeviceArray]:
        """Queue one run in the device's stream.

        Args:
            feeds: checked already; they need not stay.

        Returns:
            Where the tensors lie, inputs among them, until the next run.
        """
        ...

    def close(self) -> None:
        """Give everything back; the device stays open."""
        ...


@dataclass(frozen=True, slots=True)
class _Running:
    """A batch that is on the GPU."""

    index: int
    samples: int
    shapes: dict[str, tuple[int, ...]]
    sizes: list[int]


class GpuActivations:
    """Runs a model once over a stream on a GPU, and counts the activations there.

    While the GPU works on a batch, the next one is read. Use it as a context manager.

    Args:
        prepared: the model.
        tensors: names from `engines.calibrated_tensors.tensors_to_calibrate`.
        batches: the stream; consumed once.
        device: the GPU; closed in the end, with all that is on it.
        model: runs the model on that device; closed before it.
        first: index of the first batch of the stream, where others were run before it; for messages.

    Raises:
        MissingDependencyError: nothing compiles the kernel that counts.
        DeviceError: there is not enough device memory for the histograms.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        tensors: Sequence[str],
        batches: Iterable[CalibrationBatch],
        *,
        device: Device,
        model: GpuModel,
        first: int = 0,
    ) -> None:
        self.tensors = list(tensors)
        self._path = prepared.path
        self._batches = batches
        self._first = first
        self._inputs, _ = tensor_specs(prepared.proto)
        self._input_names = {spec.name for spec in self._inputs}
        self._producers = {output: node.name for node in prepared.proto.graph.node for output in node.output}
        self._device = device
        self._model = model
        self._running: _Running | None = None
        self._stack = ExitStack()
        self._stack.callback(device.close)
        self._stack.callback(model.close)
        with self._stack:
            self._histograms = DeviceHistograms(device, self.tensors)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give model and device back."""
        self._stack.close()

    def batches(self) -> Iterator[CalibrationBatch]:
        """Start reading the stream."""
        return iter(self._batches)

    def restart(self, batches: Iterable[CalibrationBatch], first: int = 0) -> None:
        """Forget what was counted, and go on with another stream.

        Args:
            batches: the stream; consumed once.
            first: index of its first batch, for messages.
        """
        if self._running is not None:  # an error ended the stream before
            self._running = None
            self._device.synchronize()
        self._histograms.clear()
        self._batches, self._first = batches, first

    def start(self, index: int, batch: CalibrationBatch) -> None:
        """Queue the run of a batch, and the counting of its activations. The one before must be finished.

        Args:
            index: of the batch, counted from 0 in this stream.
            batch: what is fed.

        Raises:
            InferenceError: the batch does not fit the model, or the GPU failed on it; the batch is named.
            DeviceError: the activations do not fit into the device's memory.
            CalibrationError: a tensor is neither float32 nor float16.
        """
        index += self._first
        check_feeds(f"batch {index}", self._inputs, batch.feeds)
        try:
            arrays = self._model.run(batch.feeds)
            real = {name: self._real(name, arrays, batch) for name in self.tensors}
            self._histograms.count(real)
        except InferenceError as error:
            raise InferenceError(f"Calibration of {self._path.name} failed in batch {index}: {error}") from error
        except DeviceError as error:
            raise self._failed(index, error) from error
        shapes = {name: value.shape for name, value in batch.feeds.items()}
        self._running = _Running(index, batch.samples, shapes, [array.size for array in real.values()])

    def finish(self) -> Activations:
        """Wait for the batch that was started.

        Returns:
            What is known of it; its values stay on the GPU.

        Raises:
            NonFiniteActivationError: an activation is NaN or infinite; names the tensor, the batch and the node.
            InferenceError: the GPU failed; names the batch.
        """
        if self._running is None:
            raise RuntimeError("finish() without start()")
        running, self._running = self._running, None
        try:
            self._device.synchronize()
        except DeviceError as error:
            raise self._failed(running.index, error) from error
        for tensor, bad, size in zip(self.tensors, self._histograms.nonfinite, running.sizes, strict=True):
            if bad:  # the first batch with such a value ends the pass, so all of them are this batch's
                raise nonfinite_error(tensor, running.index, self.producer(tensor), int(bad), size)
        return Activations(running.index, running.samples, {}, running.shapes)

    def histograms(self) -> dict[str, MagnitudeHistogram]:
        """Copy the counts of all batches so far to the host."""
        return self._histograms.histograms()

    def producer(self, tensor: str) -> str:
        """Name the node that produces `tensor`."""
        return "model input" if tensor in self._input_names else f"node {self._producers.get(tensor, '?')!r}"

    def _real(self, name: str, arrays: Mapping[str, DeviceArray], batch: CalibrationBatch) -> DeviceArray:
        """Return a tensor without the rows that only pad the batch, which are its last ones."""
        if name not in arrays:
            raise EngineBuildError(
                f"Cannot calibrate tensor {name!r} of {self.producer(name)} on the GPU: what runs {self._path.name} "
                "there does not give it out. Leave it out of the tensors, or calibrate with --backend onnxruntime."
            )
        array = arrays[name]
        if array.dtype not in DTYPES:
            raise CalibrationError(
                f"Cannot calibrate tensor {name!r} of {self.producer(name)} on the GPU: its dtype is {array.dtype}; "
                "expected float32 or float16. Leave it out of the tensors, or calibrate with --backend onnxruntime."
            )
        rows = next((value.shape[0] for value in batch.feeds.values() if value.ndim), None)
        if rows is None or batch.samples >= rows:
            return array
        return replace(array, shape=real_shape(name, array.shape, batch.samples, rows, fed=name in self._input_names))

    def _failed(self, index: int, error: DeviceError) -> DeviceError | InferenceError:
        if isinstance(error.__cause__, OutOfMemoryError):
            return DeviceError(
                f"Cannot calibrate {len(self.tensors)} tensors of {self._path.name} at a time on "
                f"{self._device.name}: in batch {index} their activations do not fit into its memory ({error}) "
                "Give --max-memory, which takes several passes, or a smaller --batch-size."
            )
        return InferenceError(f"Calibration of {self._path.name} failed on the GPU in batch {index}: {error}")
