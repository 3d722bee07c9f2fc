"""Device memory, pinned host memory, one stream, events, kernels: all that engines and calibrators need of CUDA.

Two packages can serve it, pycuda and cuda-python; `open_device` takes the one that is there. Both work in the device's
primary context, which is the one that TensorRT and PyTorch use: memory of another context would be refused by them, or
read as zeros.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NewType, Self

import numpy as np
from numpy.typing import NDArray

from calibrators.protocols import Array
from engines.cuda_graph import GraphLaunch
from engines.errors import DeviceError, MissingDependencyError
from engines.kernel_compiler import compile_kernel

DeviceLibrary = Literal["pycuda", "cuda"]

Event = NewType("Event", object)
"""A point in the stream, as `Device.record` gives it."""

Kernel = NewType("Kernel", object)
"""A function that runs on the device, as `Device.compile_kernel` gives it."""

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: no implicit waiting for the default stream. pycuda has no name for it."""

SIMULATED = "SIMULATED"
"""Name of the device that tests stand in for a GPU; its figures are no GPU's."""


_LOST = re.compile(
    r"illegal (memory|instruction|address)|ILLEGAL_(ADDRESS|INSTRUCTION)|misaligned|launch (failure|timed out)"
    r"|LAUNCH_(FAILED|TIMEOUT)|assert|stack error|HARDWARE_STACK|invalid program counter|INVALID_PC",
    re.IGNORECASE,
)
"""What the driver says of kernels that went wrong: after that every call fails, the releases too."""


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An array in device memory.

    Attributes:
        address: where it begins.
        shape: its shape; the values lie close together.
        dtype: of its elements.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class OutOfMemoryError(DeviceError):
    """The driver has no memory left; `Device.allocate` says how much was asked for."""


class Device(ABC):
    """One GPU, and one stream on it that is not the default stream.

    Copies are asynchronous: they are done in the stream's order, and complete after `synchronize`. Everything that was
    allocated here is given back by `close`. A device belongs to the thread that opened it.

    Attributes:
        library: what serves it, with its version: "pycuda 2026.1".
        name: of the GPU, as the driver says it.
        compute_capability: such as "9.0".
        cuda_version: newest CUDA that the driver serves, such as "13.0".
        pci_bus_id: where it is plugged in, such as "0000:51:00.0": NVML knows it by that name, whatever
            CUDA_VISIBLE_DEVICES shows.
        stream: handle of the stream, a cudaStream_t.
        multiprocessors: number of them.
    """

    library: str
    name: str
    compute_capability: str
    cuda_version: str
    pci_bus_id: str
    stream: int
    multiprocessors: int

    @property
    def simulated(self) -> bool:
        """Whether this is no GPU at all but its stand-in in tests."""
        return self.name == SIMULATED

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of device memory."""

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory and return its address.

        Args:
            nbytes: size; of 0 at least one byte is allocated, as TensorRT takes no null address.

        Raises:
            DeviceError: the device has not enough left; says how much was asked for.
        """
        try:
            return self._allocate(max(nbytes, 1))
        except OutOfMemoryError as error:
            free, total = self.memory()
            raise DeviceError(
                f"Out of device memory on {self.name}: {nbytes} bytes were asked for, {free} of {total} are free. "
                "Lower the batch size or the profile's largest shape, or load fewer engines at a time."
            ) from error

    @abstractmethod
    def free(self, address: int) -> None:
        """Give back memory of `allocate`."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Allocate pinned host memory: copies from and to it run beside the host and at full speed."""

    @abstractmethod
    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give back memory of `allocate_host`; no view of it may be used afterwards."""

    @abstractmethod
    def to_device(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the device; it must live and stay unchanged until `synchronize`."""

    @abstractmethod
    def to_host(self, array: Array, address: int) -> None:
        """Fill a C-contiguous array from the device; its content is there after `synchronize`."""

    @abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Fill memory of the device with zeros."""

    def compile_kernel(self, source: str, name: str) -> Kernel:
        """Compile CUDA C for this GPU; see `engines.kernel_compiler.compile_kernel`.

        Args:
            source: the program.
            name: of the function in it, declared `extern "C" __global__`.

        Returns:
            The function; it lives as long as the device.

        Raises:
            MissingDependencyError: there is no compiler.
            DeviceError: the program does not compile, or cannot be loaded.
        """
        return self._load(compile_kernel(source, name, self.compute_capability), name)

    @abstractmethod
    def launch(self, kernel: Kernel, blocks: int, threads: int, *arguments: int) -> None:
        """Queue one run of a kernel.

        Args:
            kernel: of `compile_kernel`.
            blocks: number of blocks, in one dimension.
            threads: threads of a block, in one dimension.
            arguments: of the function, each of 64 bits: addresses and unsigned numbers.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work in the stream is done.

        Raises:
            DeviceError: some of that work failed.
        """

    @abstractmethod
    def record(self, event: Event | None = None) -> Event:
        """Mark this point of the stream.

        Args:
            event: an earlier mark to move here; without one a new mark is made, which lives as long as the device.
        """

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Wait until the stream has passed a mark; what was queued after it goes on.

        Raises:
            DeviceError: some of the work before the mark failed.
        """

    @abstractmethod
    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Return the milliseconds of the device's own clock between two points that it has passed."""

    @abstractmethod
    def capture(self, enqueue: Callable[[], None]) -> GraphLaunch:
        """Record what `enqueue` puts into the stream as a CUDA graph.

        Returns:
            The graph; calling it launches it in the stream. Release it before the device is closed.

        Raises:
            DeviceError: it could not be captured; the stream is usable as before.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for the stream and give everything back; a second call does nothing."""

    @abstractmethod
    def _allocate(self, nbytes: int) -> int:
        """Allocate device memory; raises OutOfMemoryError."""

    @abstractmethod
    def _load(self, image: bytes, name: str) -> Kernel:
        """Load a function of a compiled program."""

    def __enter__(self) -> Self:
        """Return the device itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


class UploadBuffers:
    """Device memory by name, for TensorRT's calibrators. Implements `calibrators.protocols.DeviceBuffers`.

    Args:
        device: where the memory is; must stay open as long as the buffers are in use.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, tuple[int, int]] = {}

    def upload(self, name: str, array: Array) -> int:
        """Copy `array` to the device and return its address; see `DeviceBuffers.upload`."""
        address, size = self._buffers.get(name, (0, -1))
        if array.nbytes > size:
            if size >= 0:
                del self._buffers[name]
                self._device.free(address)
            address = self._device.allocate(array.nbytes)
            self._buffers[name] = address, array.nbytes
        self._device.to_device(address, array)
        self._device.synchronize()
        return address

    def free(self) -> None:
        """Give all memory back; a second call does nothing."""
        while self._buffers:
            _, (address, _) = self._buffers.popitem()
            self._device.free(address)

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Call `free`."""
        self.free()


def open_device(library: DeviceLibrary | None = None) -> Device:
    """Open the GPU: by pycuda where it is installed, else by cuda-python.

    Args:
        library: take this package and no other.

    Raises:
        MissingDependencyError: neither package is installed, or can be loaded.
        DeviceError: there is no GPU, or it cannot be opened.
    """
    from engines.device_cuda import CudaPythonDevice
    from engines.device_pycuda import PycudaDevice

    openers: dict[DeviceLibrary, Callable[[], Device]] = {"pycuda": PycudaDevice, "cuda": CudaPythonDevice}
    if library is not None:
        return openers[library]()
    missing: list[MissingDependencyError] = []
    for opener in openers.values():
        try:
            return opener()
        except MissingDependencyError as error:
            missing.append(error)
    unusable = [str(error) for error in missing if not isinstance(error.__cause__, ModuleNotFoundError)]
    raise MissingDependencyError(
        unusable[0]
        if unusable
        else "Cannot use the GPU: neither pycuda nor cuda-python is installed. Install one of them with "
        "`pip install 'trt-int8[cuda]'` (ready to use) or `pip install 'trt-int8[pycuda]'` (compiles, needs the CUDA "
        "toolkit)."
    ) from missing[-1]


def driver_release(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the release of the NVIDIA driver, such as "580.65.06"; None where the system does not tell.

    Args:
        file: where the kernel module says it: "NVRM version: NVIDIA UNIX ... Kernel Module  580.65.06  ...".
    """
    try:
        words = file.read_text(errors="replace").split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def version_text(number: int) -> str:
    """Return CUDA's version number as people write it: 13000 is "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def lost_context(text: str) -> str:
    """Return what to do about an error of CUDA that leaves nothing usable in the process; empty for other errors.

    Such an error is of a kernel, and comes up in whatever call is next.

    Args:
        text: the driver's words, or the name of its status.
    """
    if _LOST.search(text) is None:
        return ""
    return (
        ". A kernel failed, and this process can do nothing more on the GPU; other processes can. Run the command "
        "again with CUDA_LAUNCH_BLOCKING=1 in front: then the error comes up in the very call that caused it"
    )


def no_gpu(reason: Exception) -> DeviceError:
    """Make the error for a GPU that cannot be opened."""
    line = " ".join(str(reason).split()).rstrip(".")
    return DeviceError(
        f"Cannot open an NVIDIA GPU: {line}. Expected a driver and a GPU that it sees; `trt-int8 doctor` shows what "
        "is there. In a container, start it with the GPUs."
    )
