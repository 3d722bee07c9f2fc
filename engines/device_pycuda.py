"""A `Device` served by pycuda.

The context comes from `pycuda.autoprimaryctx`, which retains the primary one; `pycuda.autoinit` would make a context of
its own, in which TensorRT's memory is not valid.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Array
from engines.cuda_graph import GraphLaunch, capture_graph
from engines.device import NON_BLOCKING, Device, Event, Kernel, OutOfMemoryError, lost_context, no_gpu, version_text
from engines.errors import DeviceError, MissingDependencyError
from engines.optional import require


class PycudaDevice(Device):
    """See `engines.device.Device`.

    Raises:
        MissingDependencyError: pycuda is not installed, or was compiled for another CUDA driver.
        DeviceError: there is no GPU.
    """

    def __init__(self) -> None:
        self._driver = require("pycuda.driver", "use the GPU through pycuda")
        self.library = f"pycuda {require('pycuda', 'use the GPU').VERSION_TEXT}"
        self._open = False
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._events: list[Any] = []
        self._modules: list[Any] = []
        self._functions: list[Any] = []
        try:
            primary = require("pycuda.autoprimaryctx", "use the GPU through pycuda")
        except (self._driver.Error, RuntimeError) as error:  # RuntimeError: pycuda found no device
            raise no_gpu(error) from error
        self._context = None
        if self._driver.Context.get_current() is None:  # pycuda made it current in the thread of its import alone
            self._context = primary.context
            self._context.push()
        self.name = str(primary.device.name())
        self.compute_capability = "{}.{}".format(*primary.device.compute_capability())
        self.pci_bus_id = str(primary.device.pci_bus_id())
        self.multiprocessors = int(primary.device.multiprocessor_count)
        self.cuda_version = version_text(self._driver.get_driver_version())
        with self._errors():
            self._stream = self._driver.Stream(NON_BLOCKING)
        self._open = True
        self.stream = int(self._stream.handle)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of device memory."""
        with self._errors():
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def free(self, address: int) -> None:
        """Give back memory of `allocate`."""
        with self._errors():
            self._memory.pop(address).free()

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Allocate pinned host memory."""
        with self._errors():
            array: NDArray[np.uint8] = self._driver.pagelocked_empty(max(nbytes, 1), np.uint8)
        self._pinned[array.ctypes.data] = array.base
        return array[:nbytes]

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give back memory of `allocate_host`."""
        with self._errors():
            self._pinned.pop(array.ctypes.data).free()

    def to_device(self, address: int, array: Array) -> None:
        """Copy to the device, in the stream's order."""
        if array.nbytes:
            with self._errors():
                self._driver.memcpy_htod_async(address, _octets(array), self._stream)

    def to_host(self, array: Array, address: int) -> None:
        """Copy to the host, in the stream's order."""
        if array.nbytes:
            with self._errors():
                self._driver.memcpy_dtoh_async(_octets(array), address, self._stream)

    def clear(self, address: int, nbytes: int) -> None:
        """Fill with zeros, in the stream's order."""
        with self._errors():
            self._driver.memset_d8_async(address, 0, nbytes, self._stream)

    def launch(self, kernel: Kernel, blocks: int, threads: int, *arguments: int) -> None:
        """Queue a run of a kernel."""
        with self._errors():
            self._functions[cast("int", kernel)](
                *map(np.uint64, arguments), grid=(blocks, 1), block=(threads, 1, 1), stream=self._stream
            )

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self._errors():
            self._stream.synchronize()

    def record(self, event: Event | None = None) -> Event:
        """Mark this point of the stream."""
        with self._errors():
            mark: Any = event
            if event is None:
                mark = self._driver.Event()
                self._events.append(mark)
            mark.record(self._stream)
        return Event(mark)

    def wait(self, event: Event) -> None:
        """Wait for a mark."""
        with self._errors():
            cast("Any", event).synchronize()

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Return the milliseconds between two points."""
        with self._errors():
            return float(cast("Any", start).time_till(end))

    def capture(self, enqueue: Callable[[], None]) -> GraphLaunch:
        """Record a CUDA graph; pycuda has none, so cuda-python must be installed too."""
        try:
            driver = require("cuda.bindings.driver", "capture a CUDA graph, which pycuda has no call for")
        except MissingDependencyError as error:
            raise DeviceError(str(error)) from error
        return capture_graph(driver, driver.CUstream(self.stream), enqueue)

    def close(self) -> None:
        """Give everything back."""
        if not self._open:
            return
        self._open = False
        try:
            self._stream.synchronize()
        except self._driver.Error:
            # After an illegal access every call fails, the releases too: the context is lost, and what broke it was
            # reported where it was found. pycuda would print two lines for each.
            _keep_forever((*self._memory.values(), *self._pinned.values(), *self._events, *self._modules))
            _keep_forever((*self._functions, self._stream))
        else:
            for memory in (*self._memory.values(), *self._pinned.values()):
                with suppress(self._driver.Error):
                    memory.free()
        self._memory.clear()
        self._pinned.clear()
        self._events.clear()
        self._functions.clear()
        self._modules.clear()
        del self._stream
        if self._context is not None:
            self._context.pop()

    def _allocate(self, nbytes: int) -> int:
        with self._errors():
            memory = self._driver.mem_alloc(nbytes)
        self._memory[int(memory)] = memory
        return int(memory)

    def _load(self, image: bytes, name: str) -> Kernel:
        with self._errors():
            module = self._driver.module_from_buffer(image)
            self._modules.append(module)
            # A function keeps its module, which has to end with the device and in its thread: so it is not handed out.
            # What holds a kernel may be collected later, by another thread, in which the context is not current.
            self._functions.append(module.get_function(name))
        return Kernel(len(self._functions) - 1)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.MemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        except self._driver.Error as error:
            raise DeviceError(f"CUDA failed: {error}{lost_context(str(error))}") from error


def _keep_forever(objects: Iterable[object]) -> None:
    """Keep objects from being freed, at the end of the process too."""
    for item in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def _octets(array: Array) -> NDArray[np.uint8]:
    """View an array as bytes: the buffer protocol, by which pycuda takes arrays, knows not every dtype."""
    return array.reshape(-1).view(np.uint8)
