"""A `Device` served by cuda-python, through CUDA's driver API.

The driver API is what pycuda uses too, so both behave alike; every call returns a status, and every status is checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Array
from engines.cuda_graph import GraphLaunch, capture_graph
from engines.device import NON_BLOCKING, Device, Event, Kernel, OutOfMemoryError, lost_context, no_gpu, version_text
from engines.errors import DeviceError
from engines.optional import require

ORDINAL = 0
"""The first GPU that the driver shows; CUDA_VISIBLE_DEVICES chooses which one that is."""

_ARGUMENT_BUFFER, _ARGUMENT_BUFFER_SIZE, _END = 1, 2, 0
"""CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END: cuda.h defines them as pointers."""

_BUS_ID_BYTES = 32  # "00000000:51:00.0" and the byte that ends it, and some to spare


class CudaPythonDevice(Device):
    """See `engines.device.Device`.

    Raises:
        MissingDependencyError: cuda-python is not installed.
        DeviceError: there is no GPU.
    """

    def __init__(self) -> None:
        self._driver = require("cuda.bindings.driver", "use the GPU through cuda-python")
        self.library = f"cuda-python {require('cuda.bindings', 'use the GPU').__version__}"
        self._open = False
        self._addresses: set[int] = set()
        self._pinned: set[int] = set()
        self._events: list[Event] = []
        self._modules: list[Any] = []
        driver = self._driver
        try:
            self._check(driver.cuInit(0))
            gpu = self._check(driver.cuDeviceGet(ORDINAL))
            self.name = bytes(self._check(driver.cuDeviceGetName(256, gpu))).split(b"\0")[0].decode(errors="replace")
            self.cuda_version = version_text(int(self._check(driver.cuDriverGetVersion())))
            attribute = driver.CUdevice_attribute
            major, minor, self.multiprocessors = (
                int(self._check(driver.cuDeviceGetAttribute(which, gpu)))
                for which in (
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                    attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                )
            )
            self.compute_capability = f"{major}.{minor}"
            bus = bytes(self._check(driver.cuDeviceGetPCIBusId(_BUS_ID_BYTES, gpu)))
            self.pci_bus_id = bus.split(b"\0")[0].decode()
            self._context = self._check(driver.cuDevicePrimaryCtxRetain(gpu))
        except (DeviceError, RuntimeError) as error:  # cuda-python raises RuntimeError where libcuda is missing
            raise no_gpu(error) from error
        self._open = True
        self._check(driver.cuCtxSetCurrent(self._context))
        self._stream = self._check(driver.cuStreamCreate(NON_BLOCKING))
        self.stream = _handle(self._stream)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of device memory."""
        free, total = self._check(self._driver.cuMemGetInfo())
        return int(free), int(total)

    def free(self, address: int) -> None:
        """Give back memory of `allocate`."""
        self._addresses.remove(address)
        self._check(self._driver.cuMemFree(address))

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Allocate pinned host memory."""
        address = int(self._check(self._driver.cuMemAllocHost(max(nbytes, 1))))
        self._pinned.add(address)
        # The array is a plain view: NumPy would free nothing, so `free_host` and `close` do.
        memory = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address)
        return np.ctypeslib.as_array(memory)[:nbytes]

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give back memory of `allocate_host`."""
        address = array.ctypes.data
        self._pinned.remove(address)
        self._check(self._driver.cuMemFreeHost(address))

    def to_device(self, address: int, array: Array) -> None:
        """Copy to the device, in the stream's order."""
        if array.nbytes:
            self._check(self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream))

    def to_host(self, array: Array, address: int) -> None:
        """Copy to the host, in the stream's order."""
        if array.nbytes:
            self._check(self._driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream))

    def clear(self, address: int, nbytes: int) -> None:
        """Fill with zeros, in the stream's order."""
        self._check(self._driver.cuMemsetD8Async(address, 0, nbytes, self._stream))

    def launch(self, kernel: Kernel, blocks: int, threads: int, *arguments: int) -> None:
        """Queue a run of a kernel."""
        values = np.array(arguments, np.uint64)
        size = ctypes.c_size_t(values.nbytes)
        # As pycuda does it: all arguments in one buffer. The driver reads it before the call returns.
        extra = np.array(
            [_ARGUMENT_BUFFER, values.ctypes.data, _ARGUMENT_BUFFER_SIZE, ctypes.addressof(size), _END], np.uint64
        )
        self._check(
            self._driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, self._stream, 0, extra.ctypes.data)
        )

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._check(self._driver.cuStreamSynchronize(self._stream))

    def record(self, event: Event | None = None) -> Event:
        """Mark this point of the stream."""
        if event is None:
            event = Event(self._check(self._driver.cuEventCreate(0)))
            self._events.append(event)
        self._check(self._driver.cuEventRecord(event, self._stream))
        return event

    def wait(self, event: Event) -> None:
        """Wait for a mark."""
        self._check(self._driver.cuEventSynchronize(event))

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Return the milliseconds between two points."""
        return float(self._check(self._driver.cuEventElapsedTime(start, end)))

    def capture(self, enqueue: Callable[[], None]) -> GraphLaunch:
        """Record a CUDA graph."""
        return capture_graph(self._driver, self._stream, enqueue)

    def close(self) -> None:
        """Give everything back."""
        if not self._open:
            return
        self._open = False
        driver = self._driver
        # After an illegal access every call fails, the releases too: the context is lost, and what broke it was
        # reported where it was found.
        driver.cuStreamSynchronize(self._stream)
        for event in self._events:
            driver.cuEventDestroy(event)
        for address in self._addresses:
            driver.cuMemFree(address)
        for address in self._pinned:
            driver.cuMemFreeHost(address)
        for module in self._modules:
            driver.cuModuleUnload(module)
        # The primary context stays retained, as CUDA's runtime library leaves it: what TensorRT or PyTorch still hold
        # in it would be lost with it, and making it anew takes a good part of a second.
        driver.cuStreamDestroy(self._stream)

    def _allocate(self, nbytes: int) -> int:
        address = int(self._check(self._driver.cuMemAlloc(nbytes)))
        self._addresses.add(address)
        return address

    def _load(self, image: bytes, name: str) -> Kernel:
        module = self._check(self._driver.cuModuleLoadData(image))
        self._modules.append(module)
        return Kernel(self._check(self._driver.cuModuleGetFunction(module, name.encode())))

    def _check(self, result: tuple[Any, ...]) -> Any:
        return check(self._driver, result)


def check(driver: Any, result: tuple[Any, ...]) -> Any:
    """Return what a call of cuda-python's driver API gave, without its status.

    Raises:
        OutOfMemoryError: the status says so.
        DeviceError: any other status than success.
    """
    status, *values = result
    if status == driver.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else tuple(values)
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemoryError(status.name)
    _, text = driver.cuGetErrorString(status)
    said = f"{status.name}{f' ({text.decode()})' if text else ''}"
    raise DeviceError(f"CUDA failed with {said}{lost_context(said)}")


def _handle(stream: Any) -> int:
    """Return a stream's handle; `int(stream)` is deprecated where cuda-python has a function for it."""
    try:
        from cuda.bindings.utils import get_cuda_native_handle
    except ImportError:
        return int(stream)
    return cast("int", get_cuda_native_handle(stream))
