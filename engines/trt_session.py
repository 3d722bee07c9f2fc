"""A live engine: its execution context, and buffers for its inputs and outputs on both sides."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Array
from engines.cuda_graph import GraphLaunch
from engines.device import Device, DeviceArray
from engines.errors import DeviceError, EngineLoadError, InferenceError
from engines.profiles import ShapeRange, choose_profile
from engines.trt_log import LogLines
from engines.trt_types import numpy_dtype

_log = logging.getLogger(__name__)


class _Buffer:
    """Device memory and pinned host memory of one tensor; they grow and never shrink."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host: NDArray[np.uint8] | None = None
        self._size = -1
        self.address = 0

    def reserve_device(self, nbytes: int) -> None:
        if nbytes > self._size:
            if self.address:
                self._device.free(self.address)
                self.address, self._size = 0, -1  # there may be no memory for the next one
            self.address = self._device.allocate(nbytes)
            self._size = nbytes

    def host(self, shape: Sequence[int], dtype: np.dtype[np.generic]) -> Array:
        """Return the pinned memory as an array of this shape."""
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = count * dtype.itemsize
        if self._host is None or self._host.nbytes < nbytes:
            if self._host is not None:
                self._device.free_host(self._host)
                self._host = None
            self._host = self._device.allocate_host(nbytes)
        view: Array = self._host[:nbytes].view(dtype).reshape(shape)
        return view

    def free(self) -> None:
        if self.address:
            self._device.free(self.address)
        if self._host is not None:
            self._device.free_host(self._host)
        self.address, self._size, self._host = 0, -1, None


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: np.dtype[np.generic]
    buffer: _Buffer


class EngineSession:
    """Runs an engine on one stream: `bind`, `copy_in`, `execute`, `copy_out`, `synchronize`, `results`, in that order.

    The steps only queue work, so that each can be timed by events around it; `execute` may be repeated. `copy_in` is
    `stage`, the host's part of it, and `upload`, the stream's.

    Args:
        trt: the module `tensorrt`.
        engine: a deserialized engine.
        device: where it runs; it and the engine must live longer than the session.
        name: of the engine, for messages.
        log: collects TensorRT's log as long as the session lives.
        fetched: outputs that `copy_out` copies to the host and `results` returns; None for all.

    Attributes:
        name: of the engine.
        device: where it runs.
        device_memory_bytes: scratch memory of the execution context; weights, inputs and outputs are not in it.

    Raises:
        EngineLoadError: the context needs more device memory than there is, or the engine is of a kind that is not
            supported here.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        device: Device,
        name: str,
        log: LogLines,
        *,
        fetched: Collection[str] | None = None,
    ) -> None:
        self.device = device
        self.name = name
        self.device_memory_bytes = int(engine.device_memory_size_v2)
        self._log = log
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        on_host = [tensor for tensor in names if engine.get_tensor_location(tensor) != trt.TensorLocation.DEVICE]
        if on_host:
            raise EngineLoadError(
                f"Cannot run the engine {name}: TensorRT reads or writes {on_host[0]!r} as a shape, on the host. "
                "Export the model with that shape fixed, or computed from another input's shape."
            )
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineLoadError(
                f"Cannot run the engine {name}: TensorRT could not make a context, which takes "
                f"{self.device_memory_bytes} bytes of device memory ({log.quote()}). Free device memory, or build "
                "the engine with a lower workspace limit or a smaller largest shape."
            )
        inputs = [tensor for tensor in names if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT]
        outputs = [tensor for tensor in names if tensor not in inputs]

        def tensors(of: list[str]) -> dict[str, _Tensor]:
            return {
                tensor: _Tensor(tensor, numpy_dtype(trt, tensor, engine.get_tensor_dtype(tensor)), _Buffer(device))
                for tensor in of
            }

        self._inputs, self._outputs = tensors(inputs), tensors(outputs)
        self._fetched = {name: tensor for name, tensor in self._outputs.items() if fetched is None or name in fetched}
        self._dynamic = [tensor for tensor in inputs if -1 in tuple(engine.get_tensor_shape(tensor))]
        self._profiles = [
            {tensor: _shape_range(engine.get_tensor_profile_shape(tensor, index)) for tensor in self._dynamic}
            for index in range(engine.num_optimization_profiles)
        ]
        self._allocators: dict[str, Any] = {}
        self._output_allocator = _output_allocator_class(trt)
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._output_shapes: dict[str, tuple[int, ...] | None] = {}
        self._staged: dict[str, Array] = {}
        self._graph: GraphLaunch | None = None

    @property
    def context(self) -> Any:
        """TensorRT's execution context, for its profiler and inspector."""
        return self._context

    @property
    def captured(self) -> bool:
        """Whether `execute` launches a CUDA graph."""
        return self._graph is not None

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Set the shapes of all inputs, choose the profile that holds them, and make room for inputs and outputs.

        Raises:
            InferenceError: no optimization profile holds the shapes; names its min, opt and max.
            DeviceError: out of device memory.
        """
        wanted = {name: tuple(shapes[name]) for name in self._inputs}
        if wanted == self._shapes:
            return
        self._shapes = None
        self._drop_graph()
        self._choose_profile(wanted)
        for name, shape in wanted.items():
            if name in self._dynamic and not self._context.set_input_shape(name, shape):
                raise InferenceError(f"{self.name} does not take {shape} for {name!r}: {self._log.take()}.")
            tensor = self._inputs[name]
            tensor.buffer.reserve_device(int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize)
            self._context.set_tensor_address(name, tensor.buffer.address)
        for name, tensor in self._outputs.items():
            known = tuple(self._context.get_tensor_shape(name))
            if -1 in known:
                self._output_shapes[name] = None
                if name not in self._allocators:
                    self._allocators[name] = self._output_allocator(tensor.buffer)
                    self._context.set_output_allocator(name, self._allocators[name])
            else:
                self._output_shapes[name] = known
                tensor.buffer.reserve_device(int(np.prod(known, dtype=np.int64)) * tensor.dtype.itemsize)
                if name in self._fetched:
                    tensor.buffer.host(known, tensor.dtype)  # here and not between the run and its copies
                self._context.set_tensor_address(name, tensor.buffer.address)
        self._shapes = wanted

    def copy_in(self, feeds: Mapping[str, Array]) -> None:
        """Copy the inputs into pinned memory, and queue their copies to the device."""
        self.stage(feeds)
        self.upload()

    def stage(self, feeds: Mapping[str, Array]) -> None:
        """Copy inputs of the bound shapes into pinned memory; earlier copies from there must be complete."""
        for name, tensor in self._inputs.items():
            self._staged[name] = tensor.buffer.host(feeds[name].shape, tensor.dtype)
            np.copyto(self._staged[name], feeds[name])

    def upload(self) -> None:
        """Queue the copies of what was staged to the device."""
        for name, host in self._staged.items():
            self.device.to_device(self._inputs[name].buffer.address, host)

    def execute(self) -> None:
        """Queue one run of the engine.

        Raises:
            InferenceError: TensorRT refused.
            KeyboardInterrupt: Ctrl-C came while TensorRT called back, which it swallows.
        """
        if self._graph is not None:
            self._graph()
            return
        for allocator in self._allocators.values():
            allocator.error = None
        queued = self._context.execute_async_v3(self.device.stream)
        self._raise_interrupt()
        if not queued:
            for allocator in self._allocators.values():
                if allocator.error is not None:
                    raise InferenceError(f"{self.name} failed: {allocator.error}") from allocator.error
            raise InferenceError(f"{self.name} failed in TensorRT: {self._log.take()}.")

    def copy_out(self) -> None:
        """Queue the copies of all outputs into pinned memory; shapes known only now are read first."""
        for name, tensor in self._fetched.items():
            self.device.to_host(tensor.buffer.host(self._shape_of(name), tensor.dtype), tensor.buffer.address)

    def results(self) -> dict[str, Array]:
        """Return copies of the outputs, after `synchronize`."""
        return {
            name: tensor.buffer.host(self._shape_of(name), tensor.dtype).copy()
            for name, tensor in self._fetched.items()
        }

    def on_device(self) -> dict[str, DeviceArray]:
        """Return where the inputs and outputs lie, after `execute`; the next run overwrites them."""
        shapes = self._shapes or {}
        return {
            name: DeviceArray(
                tensor.buffer.address, shapes[name] if name in shapes else self._shape_of(name), tensor.dtype
            )
            for name, tensor in (self._inputs | self._outputs).items()
        }

    def synchronize(self) -> None:
        """Wait for everything that was queued.

        Raises:
            DeviceError: some of it failed.
        """
        self.device.synchronize()

    def capture(self) -> str | None:
        """Capture `execute` at the bound shapes as a CUDA graph, until other shapes are bound.

        One run must have been made at these shapes: TensorRT's first run does work that cannot be captured.

        Returns:
            None where the graph is in use; else why it is not, and `execute` goes on without.
        """
        unknown = [name for name, shape in self._output_shapes.items() if shape is None]
        if unknown:
            return f"the shape of output {unknown[0]!r} is known only after the run"
        try:
            self._graph = self.device.capture(self.execute)
        except (DeviceError, InferenceError) as error:
            self._log.take()
            # CUDA's runtime library, through which TensorRT launches, keeps the error of what could not be captured
            # until somebody asks for it: a run of no consequence does, and the next one counts again.
            with suppress(DeviceError, InferenceError):
                self.execute()
                self.synchronize()
            self._log.take()
            return str(error)
        return None

    def close(self) -> None:
        """Give the context back, and the graph; buffers are the device's. A second call does nothing."""
        self._drop_graph()
        self._context = None

    def free_buffers(self) -> None:
        """Give the memory of inputs and outputs back, after `close`, where the device stays open."""
        for tensor in (self._inputs | self._outputs).values():
            tensor.buffer.free()

    def _shape_of(self, output: str) -> tuple[int, ...]:
        known = self._output_shapes[output]
        found: tuple[int, ...] = self._allocators[output].shape if known is None else known
        return found

    def _raise_interrupt(self) -> None:
        allocators = self._allocators.values()
        if self._log.interrupted or any(isinstance(item.error, KeyboardInterrupt) for item in allocators):
            self._log.interrupted = False
            raise KeyboardInterrupt

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self.device.synchronize()
            self._graph.release()
            self._graph = None

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        active = self._context.active_optimization_profile
        chosen = choose_profile(self.name, self._profiles, shapes, preferred=active)
        if chosen != active:
            # The old profile's shapes and addresses may still be in use by queued work.
            self.device.synchronize()
            if not self._context.set_optimization_profile_async(chosen, self.device.stream):
                raise InferenceError(f"{self.name} cannot switch to profile {chosen}: {self._log.take()}.")
            self.device.synchronize()


def _shape_range(shapes: Sequence[Sequence[int]]) -> ShapeRange:
    minimum, optimum, maximum = (tuple(int(length) for length in shape) for shape in shapes)
    return ShapeRange(minimum, optimum, maximum)


def _output_allocator_class(trt: Any) -> Any:
    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc]  # TensorRT ships no types
        """Makes room for an output once TensorRT knows how large it is, and keeps its shape."""

        def __init__(self, buffer: _Buffer) -> None:
            trt.IOutputAllocator.__init__(self)
            self._buffer = buffer
            self.shape: tuple[int, ...] = ()
            self.error: BaseException | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            # TensorRT swallows an exception; a null address makes the run fail, and `execute` finds the reason here.
            try:
                self._buffer.reserve_device(size)
            except BaseException as error:
                self.error = error
                return 0
            return self._buffer.address

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Sequence[int]) -> None:
            try:
                self.shape = tuple(int(length) for length in shape)
            except KeyboardInterrupt as error:
                self.error = error

    return OutputAllocator
