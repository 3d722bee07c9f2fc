"""engines.device: memory, copies, events, over the SIMULATED CUDA driver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from engines.device import Device, DeviceLibrary, UploadBuffers, open_device
from engines.errors import DeviceError, EngineError

LIBRARIES = ["cuda", pytest.param("pycuda", marks=pytest.mark.pycuda)]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> DeviceLibrary:
    return request.param


@pytest.fixture
def device(library: DeviceLibrary) -> Iterator[Device]:
    with open_device(library) as device:
        yield device


def download(device: Device, address: int, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    host = device.allocate_host(int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
    device.to_host(host, address)
    device.synchronize()
    return host.copy()


def test_says_what_it_is(device: Device) -> None:
    """The simulated device cannot be taken for a GPU; its stream is not the default one."""
    assert device.name == "SIMULATED"
    assert device.simulated
    assert device.compute_capability.replace(".", "").isdigit()
    assert device.cuda_version.count(".") == 1
    assert device.stream > 2
    assert device.pci_bus_id == "0000:51:4D.0"
    assert device.library.startswith(("pycuda ", "cuda-python "))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_what_goes_in_comes_out(device: Device, dtype: type) -> None:
    """Every dtype of a model's inputs survives the way to the device and back."""
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    address = device.allocate(values.nbytes)
    device.to_device(address, values)

    np.testing.assert_array_equal(download(device, address, values.shape, dtype), values)


def test_nothing_is_copied_without_an_error(device: Device) -> None:
    """Empty tensors have an address, and copies of no bytes."""
    address = device.allocate(0)
    empty = np.empty((0, 3), np.float32)
    device.to_device(address, empty)
    device.to_host(empty, address)
    device.synchronize()

    assert address != 0


def test_out_of_memory_says_how_much_was_asked(device: Device) -> None:
    """The size, what is free, and what to lower."""
    with pytest.raises(DeviceError, match=rf"{1 << 50} bytes were asked for, \d+ of \d+ are free. Lower the batch"):
        device.allocate(1 << 50)
    assert device.memory()[0] > 0  # and the device is usable


def test_memory_comes_back(device: Device, library: DeviceLibrary) -> None:
    """What is freed, and what a closed device held, is free again."""
    before = device.memory()[0]
    address = device.allocate(1 << 20)
    assert device.memory()[0] < before
    device.free(address)
    assert device.memory()[0] == before
    with open_device(library) as second:
        second.allocate(1 << 20)
        second.allocate_host(1 << 20)
    assert device.memory()[0] == before


def test_pinned_memory_is_the_callers_until_it_is_given_back(device: Device) -> None:
    """Arrays of their own, of any size; given back, and not again."""
    first, second, empty = (device.allocate_host(nbytes) for nbytes in (8, 1 << 20, 0))
    first[:], second[:] = 1, 2
    assert (first == 1).all()
    assert [array.nbytes for array in (first, second, empty)] == [8, 1 << 20, 0]
    for array in (first, second, empty):
        device.free_host(array)
    with pytest.raises(KeyError):
        device.free_host(first)


def test_views_of_pinned_memory_can_be_given_back(device: Device) -> None:
    """What is freed is known by its address, as other dtypes and shapes of it are."""
    device.free_host(device.allocate_host(32).view(np.float32).reshape(2, 4))


def test_addresses_that_are_not_the_devices_are_refused(device: Device) -> None:
    """A copy from nowhere is an error of ours, with the driver's own words, and the device is usable."""
    with pytest.raises(DeviceError, match=r"CUDA failed.*invalid argument"):
        device.to_host(np.empty(4, np.float32), 1 << 12)
    assert device.memory()[0] > 0


def test_a_second_close_does_nothing(device: Device) -> None:
    """Closing is safe in whatever order blocks end."""
    device.close()
    device.close()


def test_events_measure_the_stream(device: Device) -> None:
    """Time between two points is not negative; a mark can be moved on."""
    start = device.record()
    device.to_device(device.allocate(1 << 16), np.zeros(1 << 14, np.float32))
    end = device.record()
    device.synchronize()

    assert device.elapsed_ms(start, end) >= 0
    assert device.record(start) is start
    device.synchronize()
    assert device.elapsed_ms(end, start) >= 0


def test_a_mark_is_waited_for_and_what_follows_it_is_not(device: Device) -> None:
    """After the wait the copy before the mark is there; the one behind it is done by the next synchronisation."""
    address = device.allocate(16)
    device.to_device(address, np.arange(4, dtype=np.float32))
    before, after = (device.allocate_host(16).view(np.float32) for _ in range(2))
    before[:], after[:] = -1, -1
    start = device.record()
    device.to_host(before, address)
    end = device.record()
    device.to_host(after, address)
    device.wait(end)

    np.testing.assert_array_equal(before, [0, 1, 2, 3])
    np.testing.assert_array_equal(after, [-1] * 4)  # the simulated driver works as late as it may
    assert device.elapsed_ms(start, end) >= 0
    device.synchronize()
    np.testing.assert_array_equal(after, [0, 1, 2, 3])


def test_a_captured_graph_repeats_the_work(device: Device) -> None:
    """Nothing is copied by the capture; each launch copies what the host's memory holds then."""
    source = device.allocate_host(16).view(np.float32)
    address = device.allocate(16)
    source[:] = 1
    launch = device.capture(lambda: device.to_device(address, source))
    assert np.isnan(download(device, address, (4,))).all()  # the simulated driver's fresh memory
    for value in (2, 3):
        source[:] = value
        launch()
        np.testing.assert_array_equal(download(device, address, (4,)), [value] * 4)
    launch.release()


def test_a_graph_that_cannot_be_captured_leaves_the_stream_usable(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is an error of ours, and copies go on."""
    monkeypatch.setenv("TRTSIM_NO_GRAPHS", "1")
    with pytest.raises(EngineError):
        device.capture(lambda: None)
    values = np.ones(4, np.float32)
    address = device.allocate(values.nbytes)
    device.to_device(address, values)

    np.testing.assert_array_equal(download(device, address, values.shape), values)


def test_uploads_keep_one_buffer_for_each_name(device: Device) -> None:
    """The address stays while arrays fit; a larger array gets a new buffer, and the old one is given back."""
    with UploadBuffers(device) as buffers:
        first = buffers.upload("x", np.full(8, 1, np.float32))
        other = buffers.upload("y", np.full(8, 2, np.float32))
        assert buffers.upload("x", np.full(4, 3, np.float32)) == first
        assert first != other
        np.testing.assert_array_equal(download(device, first, (8,)), [3, 3, 3, 3, 1, 1, 1, 1])
        free = device.memory()[0]
        larger = buffers.upload("x", np.full(1 << 20, 4, np.float32))
        assert download(device, larger, (1 << 20,)).min() == 4
        assert device.memory()[0] < free
    buffers.free()


@pytest.mark.pycuda
def test_pycuda_captures_graphs_by_cuda_python_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda has no call for graphs: without cuda-python there is none, and the extra is named."""
    with open_device("pycuda") as device:
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
        with pytest.raises(DeviceError, match=r"capture a CUDA graph, which pycuda has no call for"):
            device.capture(lambda: None)


def test_devices_can_be_opened_one_after_the_other_and_side_by_side(library: DeviceLibrary) -> None:
    """What one of them closes, the other one keeps; each has a stream of its own."""
    values = np.arange(4, dtype=np.float32)
    with open_device(library) as first:
        with open_device(library) as second:
            assert first.stream != second.stream
            kept, given_back = first.allocate(16), second.allocate(16)
            second.to_device(given_back, values)
            first.to_device(kept, values)
        np.testing.assert_array_equal(download(first, kept, (4,)), values)
    with open_device(library) as third:
        address = third.allocate(16)
        third.to_device(address, values)
        np.testing.assert_array_equal(download(third, address, (4,)), values)


def test_a_device_can_be_opened_in_any_thread(library: DeviceLibrary) -> None:
    """The primary context is made current there too, also where another thread had it before."""

    def copy(value: int) -> list[float]:
        with open_device(library) as device:
            address = device.allocate(8)
            device.to_device(address, np.full(2, value, np.float32))
            return list(download(device, address, (2,)))

    assert copy(1) == [1, 1]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(copy, 2).result() == [2, 2]
    assert copy(3) == [3, 3]


def test_the_primary_context_is_used(device: Device) -> None:
    """TensorRT and PyTorch use it too; pycuda's own `autoinit` would make another one."""
    _, gpu = cuda.cuDeviceGet(0)
    _, primary = cuda.cuDevicePrimaryCtxRetain(gpu)
    _, current = cuda.cuCtxGetCurrent()

    assert int(current) == int(primary)


@pytest.mark.pycuda
def test_both_libraries_share_their_memory() -> None:
    """An address of one is an address of the other."""
    values = np.arange(6, dtype=np.float16)
    with open_device("pycuda") as one, open_device("cuda") as other:
        address = one.allocate(values.nbytes)
        one.to_device(address, values)
        one.synchronize()
        np.testing.assert_array_equal(download(other, address, (6,), np.float16), values)


STICKY = """
import ctypes, sys
import numpy as np
from engines.device import UploadBuffers, open_device
from engines.errors import DeviceError

with open_device(sys.argv[1]) as device:
    buffers = UploadBuffers(device)
    buffers.upload("x", np.ones(4, np.float32))
    event = device.record()
    pinned = device.allocate_host(4)
    ctypes.CDLL("libcuda.so.1").trtsim_illegal_access()
    for call in (
        device.synchronize, device.memory, device.record, lambda: device.allocate(4), lambda: device.allocate_host(4),
        lambda: device.wait(event),
    ):
        try:
            call()
        except DeviceError as error:
            print(error)
"""


def run_in_child(code: str, library: DeviceLibrary, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, library]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_after_an_illegal_access_all_calls_fail_and_closing_does_not(library: DeviceLibrary) -> None:
    """The error is the driver's; the block ends as ever, and so does the process."""
    result = run_in_child(STICKY, library)

    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert all("illegal memory access" in line and "CUDA_LAUNCH_BLOCKING=1" in line for line in lines)
    assert "PyCUDA WARNING" not in result.stderr


def test_without_a_gpu_the_driver_says_so(library: DeviceLibrary) -> None:
    """One line with the driver's reason and the command that shows more."""
    code = "import sys; from engines.device import open_device; open_device(sys.argv[1])"
    result = run_in_child(code, library, TRTSIM_NO_GPU="1")

    error = result.stderr.splitlines()[-1]
    assert "DeviceError: Cannot open an NVIDIA GPU: " in error
    assert "no CUDA-capable device is detected" in error
    assert "trt-int8 doctor" in error


def test_by_default_an_installed_library_is_taken() -> None:
    """pycuda where it is installed, cuda-python elsewhere."""
    expected = "pycuda" if find_spec("pycuda") else "cuda-python"
    with open_device() as device:
        assert device.library.split()[0] == expected
