"""engines.device: memory, copies, events, over the SIMULATED CUDA driver."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from engines.device import Device, DeviceLibrary, UploadBuffers, open_device
from engines.errors import DeviceError, EngineError

LIBRARIES: list[DeviceLibrary] = ["cuda", "pycuda"] if find_spec("pycuda") else ["cuda"]


@pytest.fixture(params=LIBRARIES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as device:
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


def test_memory_comes_back(device: Device) -> None:
    """What is freed, and what a closed device held, is free again."""
    before = device.memory()[0]
    address = device.allocate(1 << 20)
    assert device.memory()[0] < before
    device.free(address)
    assert device.memory()[0] == before
    with open_device(LIBRARIES[0]) as second:
        second.allocate(1 << 20)
        second.allocate_host(1 << 20)
    assert device.memory()[0] == before


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


def test_by_default_an_installed_library_is_taken() -> None:
    """pycuda where it is installed, cuda-python elsewhere."""
    expected = "pycuda" if "pycuda" in LIBRARIES else "cuda-python"
    with open_device() as device:
        assert device.library.split()[0] == expected
