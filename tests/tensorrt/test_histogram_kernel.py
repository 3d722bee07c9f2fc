"""engines.histogram_kernel over the SIMULATED driver, which runs the kernel's own text: its counts are the CPU's."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibrators.counter import histogram_of
from calibrators.histogram import MagnitudeHistogram, bins_of, lower_edges
from engines.device import Device, DeviceArray, open_device
from engines.errors import DeviceError, MissingDependencyError
from engines.histogram_kernel import COUNTER_BYTES, TILE_BYTES, WINDOW, DeviceHistograms, kernel_source
from engines.kernel_compiler import compile_kernel, compiler_problem

pytestmark = pytest.mark.tensorrt(11)  # one is enough: no TensorRT is in it

LIBRARIES = ["cuda", pytest.param("pycuda", marks=pytest.mark.pycuda)]
TILE = TILE_BYTES // 4
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module", params=LIBRARIES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as opened:
        yield opened


def count(device: Device, *batches: Mapping[str, np.ndarray], offset: int = 0) -> dict[str, MagnitudeHistogram]:
    """The histograms of the arrays, counted on the device; `offset` bytes behind an aligned address."""
    histograms = DeviceHistograms(device, list(batches[0]))
    for batch in batches:
        addresses = {name: device.allocate(array.nbytes + offset) for name, array in batch.items()}
        for name, array in batch.items():
            device.to_device(addresses[name] + offset, np.ascontiguousarray(array))
        histograms.count(
            {name: DeviceArray(addresses[name] + offset, array.shape, array.dtype) for name, array in batch.items()}
        )
        device.synchronize()
        for address in addresses.values():
            device.free(address)
    found = histograms.histograms()
    histograms.free()
    return found


def assert_equal(found: MagnitudeHistogram, expected: MagnitudeHistogram) -> None:
    np.testing.assert_array_equal(found.bins, expected.bins)
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert (found.zeros, found.nonfinite) == (expected.zeros, expected.nonfinite)
    assert repr((found.minimum, found.maximum)) == repr((expected.minimum, expected.maximum))  # -0.0 too


def check(device: Device, *batches: Mapping[str, np.ndarray], offset: int = 0) -> None:
    """The device finds what the CPU's counter finds."""
    found = count(device, *batches, offset=offset)
    assert list(found) == list(batches[0])
    for name, histogram in found.items():
        assert_equal(histogram, histogram_of(*(batch[name] for batch in batches)))


patterns = st.one_of(
    st.sampled_from(
        [0, 1 << 31, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x00800000, 0x3F800000]
    ),
    st.integers(0, 2**32 - 1),
)
floats = hnp.arrays(np.uint32, st.integers(0, 70), elements=patterns).map(lambda bits: bits.view(np.float32))
halves = hnp.arrays(np.uint16, st.integers(0, 70)).map(lambda bits: bits.view(np.float16))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.tuples(floats, halves, floats), min_size=1, max_size=3), offset=st.sampled_from([0, 4, 16]))
def test_any_pattern_is_counted_as_on_the_processor(
    device: Device, batches: Sequence[tuple[np.ndarray, ...]], offset: int
) -> None:
    """NaN, infinities, both zeros, subnormal numbers, in tensors of any size, over several batches."""
    check(device, *(dict(zip("abc", batch, strict=True)) for batch in batches), offset=offset)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_size_around_a_tile(device: Device, dtype: Any) -> None:
    """Nothing is left out and nothing counted twice at the edges of tiles, of blocks and of tensors."""
    tile = TILE_BYTES // np.dtype(dtype).itemsize
    sizes = [0, 1, 3, 1023, 1024, tile - 1, 0, tile, tile + 1, 4 * tile, 0, 3 * tile + 5, 0]
    check(device, {str(i): RNG.normal(size=size).astype(dtype) for i, size in enumerate(sizes)})


@pytest.mark.parametrize("offset", [0, 2, 8])
def test_halves_of_every_pattern(device: Device, offset: int) -> None:
    """All 65536 FP16 numbers, at aligned addresses and at others."""
    check(device, {"h": np.arange(65536, dtype=np.uint16).view(np.float16)}, offset=offset)


def around_the_window() -> np.ndarray:
    """The window of 1.5 ends below 2.0. Bins beside its ends are filled, at places that a block does not look at."""
    values = np.full(2 * TILE, 1.5)
    above = int(bins_of(np.array(2.0)))
    bins = np.array([above - 1, above, above + 1, above - WINDOW - 1, above - WINDOW, above - WINDOW + 1])
    values[15 : 15 + 32 * bins.size : 32] = lower_edges(bins)
    return values


SPREADS = {
    "around the window": around_the_window(),
    "relu": np.maximum(RNG.normal(size=3 * TILE), 0),
    "all zero": np.zeros(TILE + 7),
    "all equal": np.full(2 * TILE + 1, -3.7),
    "two far octaves": np.where(RNG.random(2 * TILE) < 0.5, 1e-30, 1e30),
    "outliers": np.where(RNG.random(2 * TILE) < 1e-3, 1e4, 1.0) * RNG.normal(size=2 * TILE),
    "zeros, then values": np.concatenate([np.zeros(2 * TILE), RNG.normal(size=2 * TILE)]),
    "subnormal": RNG.normal(size=TILE) * 1e-40,
    "largest": np.full(100, np.finfo(np.float32).max),
    "nonfinite": np.resize([np.nan, np.inf, -np.inf, 1.0], TILE),
    "nothing finite": np.full(5, np.nan),
}


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_where_the_window_is_does_not_show(device: Device, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in it, below it and above it, whatever a block sees first, and however many blocks there are."""
    monkeypatch.setattr("engines.histogram_kernel.BLOCKS_PER_MULTIPROCESSOR", blocks)
    check(device, {name: values.astype(np.float32) for name, values in SPREADS.items()})


def test_batches_of_other_shapes_add_up(device: Device) -> None:
    """The last batch of a stream is shorter; a tensor may be empty in one."""
    check(device, *({"a": RNG.normal(size=(n, 3, 50)).astype(np.float32), "b": np.ones(n)[n // 2 :].astype(np.float32)}
                    for n in (4, 4, 1)))  # fmt: skip


def test_histograms_may_be_asked_for_in_between(device: Device) -> None:
    """They are those of the batches until then, and stay so."""
    values = RNG.normal(size=5000).astype(np.float32)
    histograms = DeviceHistograms(device, ["x"])
    address = device.allocate(values.nbytes)
    device.to_device(address, values)
    where = {"x": DeviceArray(address, values.shape, values.dtype)}
    assert histograms.histograms()["x"].count == 0
    histograms.count(where)
    once = histograms.histograms()["x"]
    histograms.count(where)
    twice = histograms.histograms()["x"]
    histograms.free()

    assert_equal(once, histogram_of(values))
    assert_equal(twice, histogram_of(values, values))


def test_counters_do_not_overflow_at_32_bits(device: Device) -> None:
    """A bin that holds almost 2**32 values goes on."""
    values = np.full(300, 1.5, np.float32)
    histograms = DeviceHistograms(device, ["a", "x"])
    address = device.allocate(values.nbytes)
    device.to_device(address, values)
    bin_of_it = int(bins_of(values[:1])[0])
    device.to_device(histograms._counters_address + COUNTER_BYTES + 8 * bin_of_it, np.array([2**32 - 100], np.uint64))
    one = DeviceArray(address, values.shape, values.dtype)
    histograms.count({"a": one, "x": one})
    found = histograms.histograms()
    histograms.free()

    assert found["a"].count == 300
    assert found["x"].count == 2**32 + 200


def test_a_lack_of_memory_names_the_histograms(device: Device) -> None:
    """Their number, their size, and that several passes need less."""
    with pytest.raises(DeviceError, match=r"Cannot count 9000 tensors on SIMULATED: .* 18874368000 .*--max-memory"):
        DeviceHistograms(device, [str(i) for i in range(9000)])


def test_memory_comes_back(device: Device) -> None:
    """What the counters took is free again."""
    before = device.memory()[0]
    histograms = DeviceHistograms(device, ["a", "b"])
    assert device.memory()[0] <= before - 2 * COUNTER_BYTES
    histograms.free()
    assert device.memory()[0] == before


@pytest.mark.pycuda
def test_what_is_left_of_a_closed_device_ends_in_any_thread() -> None:
    """Garbage is collected by whichever thread has it; pycuda warns of a module that ends without its context."""
    device = open_device("pycuda")
    left = [DeviceHistograms(device, ["a"])]
    left[0].free()
    device.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = Thread(target=left.clear)
        thread.start()
        thread.join()
        gc.collect()

    assert not caught


def test_a_program_that_does_not_compile_says_where(device: Device) -> None:
    """The first error is in the line, the compiler's whole text among the notes."""
    with pytest.raises(DeviceError, match=r"Cannot compile the kernel f with NVRTC .*: .*no_such_name") as caught:
        device.compile_kernel('extern "C" __global__ void f() { no_such_name(); other(); }', "f")
    assert "other" in "".join(caught.value.__notes__)


def test_an_unknown_name_is_the_drivers_error(device: Device) -> None:
    """The program has no such kernel."""
    with pytest.raises(DeviceError, match="not found"):
        device.compile_kernel('extern "C" __global__ void f() {}', "g")


def test_without_a_compiler_both_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing of each, and what to install."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)

    assert compiler_problem() == "cuda-python is not installed; pycuda is not installed"
    with pytest.raises(MissingDependencyError, match=r"cuda-python is not installed; .* nvidia-cuda-nvrtc"):
        compile_kernel("// nothing", "f", "9.0")


@pytest.mark.pycuda
def test_pycuda_alone_needs_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has no NVRTC."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_problem() == "cuda-python is not installed; pycuda needs nvcc, which is not on the PATH"


NVCC = """#!/bin/sh
# A SIMULATED nvcc: nvcc --cubin ... -arch sm_90 ... kernel.cu, as pycuda calls it.
case "$*" in --version) echo "nvcc, SIMULATED"; exit;; esac
echo "$*" >> {log}
for source; do :; done
grep -q no_such_name "$source" && {{ echo "kernel.cu(1): error: no_such_name is undefined" >&2; exit 1; }}
exec c++ -x c++ -std=c++17 -w -O1 -fPIC -shared -include {header} "$source" -o "${{source%.cu}}.cubin"
"""

BY_NVCC = """
import sys
sys.modules["cuda.bindings.nvrtc"] = None
import numpy as np
from calibrators.counter import histogram_of
from engines.device import DeviceArray, open_device
from engines.errors import DeviceError
from engines.histogram_kernel import DeviceHistograms

values = np.random.default_rng(0).normal(size=9000).astype(np.float32)
with open_device("pycuda") as device:
    histograms = DeviceHistograms(device, ["x"])
    address = device.allocate(values.nbytes)
    device.to_device(address, values)
    histograms.count({"x": DeviceArray(address, values.shape, values.dtype)})
    print(np.array_equal(histograms.histograms()["x"].counts, histogram_of(values).counts))
    try:
        device.compile_kernel("no_such_name", "f")
    except DeviceError as error:
        print(error)
"""


@pytest.mark.pycuda
def test_pycuda_alone_compiles_by_nvcc(tmp_path: Path) -> None:
    """For this GPU, with subnormal numbers; an error of the compiler's is quoted."""
    nvcc, log = tmp_path / "nvcc", tmp_path / "log"
    header = Path(__file__).parents[1] / "trtsim" / "kernel.h"
    nvcc.write_text(NVCC.format(header=header, log=log))
    nvcc.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", BY_NVCC]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    counted, refused = result.stdout.splitlines()
    assert counted == "True"
    assert refused.startswith("Cannot compile the kernel f with nvcc (sm_90 --ftz=false): kernel.cu(1): error: no_such")
    assert "-arch sm_90" in log.read_text()
    assert "--ftz=false" in log.read_text()


def test_the_source_is_complete_in_itself() -> None:
    """NVRTC would have to find a header."""
    assert "#include" not in kernel_source()
