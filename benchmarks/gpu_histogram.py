"""How fast histograms are counted on a GPU, against the speed at which the same GPU copies memory.

    python benchmarks/gpu_histogram.py [--rounds 50] [--mebibytes 1024]

A copy reads and writes, so its bandwidth counts each byte twice; the kernel reads each byte once. The two take turns,
each timed by the GPU's own clock. What is counted are kinds of activations that differ in what they cost: where the
values are spread over many bins, where they meet in few, where they are zero. First the counts are compared with those
of the processor's kernel. On the simulated GPU of the tests that comparison is all there is.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from calibrators.counter import histogram_of
from engines.device import Device, DeviceArray, open_device
from engines.histogram_kernel import DeviceHistograms
from engines.optional import require

AIM = 0.8
"""Of the bandwidth of a copy."""

TENSORS = 56
"""As many as Q/DQ needs scales for in ResNet-50."""


def kinds(size: int) -> dict[str, np.ndarray]:
    """Return arrays of activations, by what is special about them."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=size).astype(np.float32)
    return {
        "behind a ReLU": np.maximum(normal, 0),
        "normal": normal,
        "normal, FP16": rng.normal(size=2 * size).astype(np.float16),
        "heavy tails": (normal * np.exp(rng.normal(0, 2, size))).astype(np.float32),
        "one value": np.full(size, 0.7, np.float32),
    }


def main() -> None:
    """Compare the counts, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--mebibytes", type=int, default=1024, help="of activations in a batch")
    options = parser.parse_args()
    with open_device("cuda") as device:
        print(f"{device.name}, compute capability {device.compute_capability}, {device.library}\n")
        octets = (1 if device.simulated else options.mebibytes) * 2**20 // TENSORS // 16 * 16
        arrays = kinds(octets // 4)
        for name, array in arrays.items():
            compare(device, name, array)
        print("the counts of all kinds are those of the processor")
        if device.simulated:
            print("the GPU is SIMULATED: nothing is measured")
            return
        print("\n| activations | kernel GB/s | copy GB/s | ratio (lowest to highest) |\n|---|---|---|---|")
        ratios = [measure(device, name, array, options.rounds) for name, array in arrays.items()]
    print(f"\nlowest ratio {min(ratios):.2f}; the aim is {AIM}")


def upload(device: Device, array: np.ndarray) -> dict[str, DeviceArray]:
    """Put the same array on the device as often as there are tensors, each at an address of its own."""
    found = {}
    for index in range(TENSORS):
        found[str(index)] = DeviceArray(device.allocate(array.nbytes), array.shape, array.dtype)
        device.to_device(found[str(index)].address, array)
    device.synchronize()
    return found


def compare(device: Device, name: str, array: np.ndarray) -> None:
    """Count on both sides; stop where they differ."""
    histograms, where = DeviceHistograms(device, ["x"]), device.allocate(array.nbytes)
    device.to_device(where, array)
    histograms.count({"x": DeviceArray(where, array.shape, array.dtype)})
    found, expected = histograms.histograms()["x"], histogram_of(array)
    if not (np.array_equal(found.bins, expected.bins) and np.array_equal(found.counts, expected.counts)):
        raise SystemExit(f"the counts of {name!r} differ from the processor's")
    histograms.free()
    device.free(where)


def measure(device: Device, name: str, array: np.ndarray, rounds: int) -> float:
    """Time counting and copying in turn, print a row, and return the median of the ratios."""
    driver: Any = require("cuda.bindings.driver", "measure a copy")
    where = upload(device, array)
    target = device.allocate(TENSORS * array.nbytes)  # one place for all copies would stay in the cache
    histograms = DeviceHistograms(device, list(where))
    octets = TENSORS * array.nbytes

    def copy() -> None:
        for index, tensor in enumerate(where.values()):
            place = target + index * array.nbytes
            (status,) = driver.cuMemcpyDtoDAsync(place, tensor.address, array.nbytes, device.stream)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise SystemExit(f"the copy failed: {status.name}")

    def count() -> None:
        histograms.count(where)

    def seconds(work: Callable[[], None]) -> float:
        start = device.record()
        work()
        end = device.record()
        device.wait(end)
        return device.elapsed_ms(start, end) / 1000

    for work in (copy, count, copy, count):
        seconds(work)
    pairs = [(octets / seconds(count) / 1e9, 2 * octets / seconds(copy) / 1e9) for _ in range(rounds)]
    ratios = sorted(kernel / memory for kernel, memory in pairs)
    kernel, memory = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"| {name} | {kernel:.0f} | {memory:.0f} | {spread} |")
    histograms.free()
    for address in (target, *(tensor.address for tensor in where.values())):
        device.free(address)
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
