"""What `trt_int8.machine` reads, on this machine and from the texts and drivers of others."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import onnxruntime
import pytest

from trt_int8 import machine
from trt_int8.machine import Cpu, Gpu, describe_machine, installed_version, parse_cpuinfo, read_cuda_driver

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: something else
flags\t\t: fpu
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp sve i8mm
CPU implementer\t: 0x41
"""


class FakeCuda:
    """A CUDA driver library of two GPUs."""

    def __init__(self, status: int = 0, gpus: int = 2) -> None:
        self.status = status
        self.gpus = gpus

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's own names
        return self.status

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"no CUDA-capable device is detected"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12040
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = [b"NVIDIA L4", b"Tesla V100"][device.value]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: N802
        memory._obj.value = [24 << 30, 16 << 30][device.value]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: [8, 7], 76: [9, 0]}[attribute][device.value]
        return 0


def test_reads_x86_features() -> None:
    """The first processor's name and flags are taken."""
    model, flags = parse_cpuinfo(XEON)

    assert model == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert {"avx512_vnni", "amx_int8"} <= flags


def test_reads_arm_features() -> None:
    """Arm lists "Features" and gives no model name."""
    model, flags = parse_cpuinfo(GRAVITON)

    assert model is None
    assert {"asimddp", "i8mm"} <= flags


@pytest.mark.parametrize(
    ("architecture", "features", "saturates"),
    [
        ("x86_64", ("avx2",), True),
        ("x86_64", ("avx2", "avx512f"), True),
        ("x86_64", ("avx2", "avx512f", "avx512_vnni"), False),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("x86_64", ("amx_int8",), False),
        ("aarch64", ("asimddp",), False),
    ],
)
def test_saturation_is_a_matter_of_vnni_and_amx(architecture: str, features: tuple[str, ...], saturates: bool) -> None:
    """Only x86 without VNNI and AMX adds products in 16 bits."""
    cpu = Cpu("some", architecture, 2, 4, 4, features)

    assert cpu.saturates_unsigned_products is saturates


def test_asks_the_driver_for_its_gpus() -> None:
    """Names, compute capabilities, memory and the CUDA version come from the driver library."""
    driver = read_cuda_driver(lambda name: FakeCuda())

    assert driver.error is None
    assert driver.cuda_version == "12.4"
    assert driver.gpus == (Gpu("NVIDIA L4", (8, 9), 24 << 30), Gpu("Tesla V100", (7, 0), 16 << 30))


def test_a_driver_without_gpu_says_why() -> None:
    """The driver's own words are passed on when cuInit fails."""
    driver = read_cuda_driver(lambda name: FakeCuda(status=100))

    assert driver.error == "cuInit failed with 100: no CUDA-capable device is detected"
    assert driver.gpus == ()


def test_a_driver_that_counts_no_gpu_is_no_gpu() -> None:
    """cuInit may succeed with every GPU hidden."""
    assert read_cuda_driver(lambda name: FakeCuda(gpus=0)).error == "the driver sees no GPU"


def test_no_driver_library_is_no_gpu() -> None:
    """A machine without NVIDIA's driver is described, not an error."""

    def missing(name: str) -> Any:
        raise OSError(name)

    driver = read_cuda_driver(missing)

    assert driver.error is not None
    assert "libcuda.so.1" in driver.error
    assert driver.gpus == ()


def test_other_systems_are_read_by_py_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc/cpuinfo, name and features come from py-cpuinfo."""
    found = {"brand_raw": "Some CPU", "flags": ["sse2", "avx2", "avx_vnni"]}
    monkeypatch.setattr(machine, "_read_text", lambda path: "")
    monkeypatch.setattr("cpuinfo.get_cpu_info", lambda: found)

    cpu = machine.read_machine().cpu

    assert cpu.model == "Some CPU"
    assert cpu.features == ("avx2", "avx_vnni")


def test_versions_come_without_imports() -> None:
    """The version is the installed package's; the first distribution found wins, none gives None."""
    assert installed_version("no-such-distribution", "onnxruntime") == onnxruntime.__version__
    assert installed_version("no-such-distribution") is None


def test_this_machine_is_described_in_json() -> None:
    """The description survives JSON unchanged and holds what a figure needs."""
    description = describe_machine()

    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["cpu"]["cores_logical"] >= description["cpu"]["cores_usable"] >= 1
    assert description["memory_bytes"] > 0
    assert description["versions"]["onnxruntime"] == onnxruntime.__version__


def test_importing_and_describing_loads_no_heavy_package() -> None:
    """Neither torch nor onnxruntime is imported to learn its version."""
    code = (
        "import sys; from trt_int8.machine import describe_machine; describe_machine(); "
        "print([name for name in ('torch', 'onnxruntime', 'onnx', 'numba') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
