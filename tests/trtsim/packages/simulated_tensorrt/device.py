"""Memory and streams of the SIMULATED CUDA driver, as the simulated TensorRT sees them."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from simulated_tensorrt.graph import NUMPY_TYPES

_cuda = ctypes.CDLL("libcuda.so.1")
_cuda.trtsim_bytes.restype = ctypes.c_void_p
_cuda.trtsim_bytes.argtypes = [ctypes.c_uint64, ctypes.POINTER(ctypes.c_size_t)]
_Call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_cuda.trtsim_enqueue.argtypes = [ctypes.c_void_p, _Call, ctypes.c_void_p]
_cuda.cuStreamSynchronize.argtypes = [ctypes.c_void_p]

_work: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)


class IllegalAccessError(Exception):
    """An address that is not device memory of the right size."""


def take_context() -> None:
    """Make a context current: the thread's own, or the primary one."""
    _cuda.trtsim_context()


def array_at(address: int, data_type: int, shape: Sequence[int]) -> NDArray[np.generic]:
    """The array at a device address; writing to it writes to the device.

    Raises:
        IllegalAccessError: the address is no device memory of this context, or there is too little of it.
    """
    dtype = np.dtype(NUMPY_TYPES[data_type])
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    left = ctypes.c_size_t()
    start = _cuda.trtsim_bytes(address, ctypes.byref(left))
    if not start:
        raise IllegalAccessError(f"0x{address:x} is no device memory of the current context")
    if left.value < size:
        raise IllegalAccessError(f"the memory at 0x{address:x} has {left.value} bytes, {size} are needed")
    return np.frombuffer((ctypes.c_uint8 * size).from_address(start), dtype).reshape(shape)


def enqueue(stream: int, work: Callable[[], None]) -> bool:
    """Put work on a stream. It stays for the life of the process, as a captured graph may run it again."""
    number = next(_numbers)
    _work[number] = work
    return _cuda.trtsim_enqueue(stream or None, _run, number) == 0


def synchronize(stream: int) -> bool:
    return _cuda.cuStreamSynchronize(stream or None) == 0


def illegal_access() -> None:
    """Fail every later call, as CUDA does."""
    _cuda.trtsim_illegal_access()


@_Call
def _run(number: int) -> None:
    _work[number]()


ctypes.pythonapi.Py_IncRef(ctypes.py_object(_run))  # a stream may be emptied while the interpreter ends
