"""Histograms counted on the GPU, where the activations are: the same bins and the same counts as on the processor.

The kernel is in histogram_kernel.cu. It is launched once for a batch, over all tensors; what comes back to the host
after each batch is two numbers and the extreme values of each tensor, and the counters when a histogram is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from calibrators.histogram import BINS, BINS_PER_OCTAVE, FINITE_BINS, SHIFT, MagnitudeHistogram
from engines.device import Device, DeviceArray, OutOfMemoryError
from engines.errors import DeviceError

KERNEL = "count_magnitudes"

THREADS = 512
VECTORS = 4
WINDOW = 8 * BINS_PER_OCTAVE - 32
"""Bins that a block counts in shared memory: 8 octaves, less what the kernel's other variables take of 32 KiB."""

TILE_BYTES = THREADS * VECTORS * 16
"""What a block counts between two looks at where it is."""

BLOCKS_PER_MULTIPROCESSOR = 3

COUNTER_BYTES = 8 * BINS
"""Device memory that the histogram of one tensor takes."""

_LARGEST_SHARE = 2**31
"""Values that a block may count before it empties its window, whose counters have 32 bits."""

_TENSOR = np.dtype([("address", "<u8"), ("size", "<u8"), ("first_tile", "<u8"), ("half", "<u8")])
_TOTALS = np.dtype([("zeros", "<u8"), ("nonfinite", "<u8"), ("highest", "<u4"), ("lowest", "<u4")])
"""As the kernel has them: `Tensor` and `Totals`."""

DTYPES = (np.dtype(np.float32), np.dtype(np.float16))
"""What the kernel counts. FP16 is widened to FP32 first, as on the processor."""


def kernel_source() -> str:
    """Return the kernel's text, its constants in front."""
    constants = {
        "BINS": BINS, "SHIFT": SHIFT, "THREADS": THREADS, "VECTORS": VECTORS, "WINDOW": WINDOW
    }  # fmt: skip
    defined = "".join(f"#define {name} {value}u\n" for name, value in constants.items())
    text = files("engines").joinpath("histogram_kernel.cu").read_text(encoding="utf-8")
    return f'{defined}#line 1 "histogram_kernel.cu"\n{text}'


class DeviceHistograms:
    """The counters of some tensors on a GPU.

    Args:
        device: where they are; must stay open as long as they are used.
        tensors: names, in the order of the histograms.

    Raises:
        MissingDependencyError: there is no compiler for the kernel.
        DeviceError: the kernel does not compile, or there is not enough device memory for the counters.
    """

    def __init__(self, device: Device, tensors: Sequence[str]) -> None:
        self._device = device
        self._tensors = list(tensors)
        self._kernel = device.compile_kernel(kernel_source(), KERNEL)
        self._counted: tuple[DeviceArray, ...] | None = None
        self._blocks = 0
        number = len(self._tensors)
        self._table = device.allocate_host((number + 1) * _TENSOR.itemsize).view(_TENSOR)
        self._totals = device.allocate_host(number * _TOTALS.itemsize).view(_TOTALS)
        self._counters = device.allocate_host(COUNTER_BYTES).view(np.uint64)
        try:
            self._table_address = device.allocate(self._table.nbytes)
            self._totals_address = device.allocate(self._totals.nbytes)
            self._counters_address = device.allocate(number * COUNTER_BYTES)
        except DeviceError as error:
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            free, total = device.memory()
            raise DeviceError(
                f"Cannot count {number} tensors on {device.name}: their histograms take {number * COUNTER_BYTES} bytes "
                f"of device memory, and {free} of {total} are free. Count fewer at a time with --max-memory, which "
                "takes several passes, or on the processor with --backend onnxruntime."
            ) from error
        self.clear()

    def clear(self) -> None:
        """Forget what was counted; everything queued must be done."""
        self._device.clear(self._totals_address, self._totals.nbytes)
        self._device.clear(self._counters_address, len(self._tensors) * COUNTER_BYTES)
        self._totals[:] = 0

    def count(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Queue the counting of one batch.

        Args:
            arrays: each tensor's values, float32 or float16. They must stay in place until `Device.synchronize`.
        """
        batch = tuple(arrays[name] for name in self._tensors)
        if batch != self._counted:
            self._device.synchronize()  # the table may still be on its way
            self._write_table(batch)
            self._device.to_device(self._table_address, self._table)
            self._counted = batch
        if self._blocks:
            addresses = (self._totals_address, self._counters_address)
            self._device.launch(
                self._kernel, self._blocks, THREADS, self._table_address, len(self._tensors), *addresses
            )
        self._device.to_host(self._totals, self._totals_address)

    @property
    def nonfinite(self) -> NDArray[np.uint64]:
        """How many values of each tensor were NaN or infinite, of all batches; known after `Device.synchronize`."""
        return self._totals["nonfinite"]

    def histograms(self) -> dict[str, MagnitudeHistogram]:
        """Return the histograms of everything counted so far; later counts do not change them. Waits for the device."""
        self._device.synchronize()
        return {name: self._histogram(index) for index, name in enumerate(self._tensors)}

    def free(self) -> None:
        """Give the memory back."""
        for address in (self._table_address, self._totals_address, self._counters_address):
            self._device.free(address)
        for array in (self._table, self._totals, self._counters):
            self._device.free_host(array.view(np.uint8))

    def _write_table(self, batch: Sequence[DeviceArray]) -> None:
        sizes = np.array([array.size for array in batch], np.int64)
        octets = sizes * [array.dtype.itemsize for array in batch]
        tiles = -(-octets // TILE_BYTES)
        self._table["address"][:-1] = [array.address for array in batch]
        self._table["size"][:-1] = sizes
        self._table["half"][:-1] = [array.dtype == np.float16 for array in batch]
        self._table["first_tile"] = np.concatenate([[0], np.cumsum(tiles)])
        total = int(tiles.sum())
        least = -(-total * (TILE_BYTES // 2) // _LARGEST_SHARE)
        self._blocks = min(total, max(least, BLOCKS_PER_MULTIPROCESSOR * self._device.multiprocessors))

    def _histogram(self, index: int) -> MagnitudeHistogram:
        totals = self._totals[index]
        self._device.to_host(self._counters, self._counters_address + index * COUNTER_BYTES)
        self._device.synchronize()
        counts = self._counters[:FINITE_BINS].astype(np.int64)
        counts[0] += int(totals["zeros"])
        bins = np.flatnonzero(counts).astype(np.int32)
        return MagnitudeHistogram(
            bins=bins,
            counts=counts[bins],
            minimum=_value_of(~int(totals["lowest"]) & 0xFFFFFFFF) if bins.size else 0.0,
            maximum=_value_of(int(totals["highest"])) if bins.size else 0.0,
            zeros=int(totals["zeros"]),
            nonfinite=int(totals["nonfinite"]),
        )


def _value_of(key: int) -> float:
    """Return the float of one of the kernel's keys, which ascend with the values."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32)) + 0.0
