"""The machine that figures come from: processor, memory, GPU, versions.

A figure without its machine says nothing, so `benchmark.json` and the manifest carry `describe_machine()` and `doctor`
explains it. Nothing here imports torch or a CUDA package, and nothing creates a CUDA context: versions come from the
installed packages' metadata, and the GPU from the driver library itself.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.device import driver_release

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""The processor features that decide which INT8 kernels run, as Linux names them: six of x86, two of Arm."""

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnx": ("onnx",),
    "torch": ("torch",),
    "numpy": ("numpy",),
    "numba": ("numba",),
    "polygraphy": ("polygraphy",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
}
"""Package to the distributions that bring it; the first one installed gives the version."""

_CUDA_LIBRARY = "libcuda.so.1"
_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of cuda.h
_COMPUTE_CAPABILITY_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR of cuda.h


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor.

    Attributes:
        model: its marketing name, or the architecture where it has none.
        architecture: "x86_64", "aarch64", ...
        cores_physical: cores; None where the system does not say.
        cores_logical: hardware threads.
        cores_usable: hardware threads that this process may run on.
        features: those of `CPU_FEATURES` that are there, in that order.
    """

    model: str
    architecture: str
    cores_physical: int | None
    cores_logical: int
    cores_usable: int
    features: tuple[str, ...]

    @property
    def saturates_unsigned_products(self) -> bool:
        """Whether sums of two unsigned-times-signed 8-bit products saturate at 16 bits.

        x86 without VNNI or AMX multiplies with VPMADDUBSW, whose sums of two products saturate at 32767, while they
        can reach 2 * 255 * 127 = 64770. With weights of 7 bits they stay within 2 * 255 * 64 = 32640.
        """
        wide = {"avx512_vnni", "avx_vnni", "amx_int8"}
        return self.architecture in {"x86_64", "AMD64"} and not wide.intersection(self.features)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: its marketing name.
        compute_capability: (major, minor).
        memory_bytes: all of its memory.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class CudaDriver:
    """What the CUDA driver says.

    Attributes:
        error: why there is no usable GPU; None when the driver started.
        cuda_version: newest CUDA version that the driver serves, "13.0".
        module_version: version of the kernel module, "580.65.06"; None where the system does not show it.
        gpus: the GPUs, in the driver's order.
    """

    error: str | None
    cuda_version: str | None
    module_version: str | None
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything a figure depends on besides the model and the data.

    Attributes:
        cpu: the processor.
        memory_bytes: main memory.
        system: operating system and C library.
        python: Python's version.
        versions: package to version; None where it is not installed.
        cuda: the CUDA driver and its GPUs.
    """

    cpu: Cpu
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str | None]
    cuda: CudaDriver


def describe_machine() -> dict[str, Any]:
    """Return `read_machine()` as JSON gives it back: dicts, lists, strings and numbers."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(read_machine())))
    return plain


def read_machine() -> Machine:
    """Look at the machine that this process runs on; takes a few milliseconds."""
    import psutil

    return Machine(
        cpu=_read_cpu(),
        memory_bytes=int(psutil.virtual_memory().total),
        system=platform.platform(),
        python=platform.python_version(),
        versions={package: installed_version(*names) for package, names in PACKAGES.items()},
        cuda=read_cuda_driver(),
    )


def saturates_unsigned_products() -> bool:
    """Tell whether this machine needs 7-bit weights for exact INT8 sums; see `Cpu.saturates_unsigned_products`."""
    return _read_cpu().saturates_unsigned_products


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first of `distributions` that is installed, without importing it; None for none."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def parse_cpuinfo(text: str) -> tuple[str | None, frozenset[str]]:
    """Take the model name and the feature flags of the first processor from the text of Linux's /proc/cpuinfo.

    x86 lists its features under "flags", Arm under "Features"; Arm gives no model name.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name"), frozenset((fields.get("flags") or fields.get("Features") or "").split())


def read_cuda_driver(load: Callable[[str], Any] = ctypes.CDLL) -> CudaDriver:
    """Ask the CUDA driver for its GPUs.

    A GPU is there when `cuInit` says so; NVML may be missing, in containers for example. `cuInit` makes no context and
    takes no device memory. A child forked afterwards cannot use CUDA, one that is spawned can.

    Args:
        load: opens a shared library by name; raises OSError where there is none.
    """
    try:
        driver = load(_CUDA_LIBRARY)
    except OSError:
        return CudaDriver(f"no NVIDIA driver ({_CUDA_LIBRARY} is not installed)", None, None, ())
    status = driver.cuInit(0)
    if status != 0:
        return CudaDriver(_cuda_error(driver, "cuInit", status), None, driver_release(), ())
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    return CudaDriver(
        error=None if count.value else "the driver sees no GPU",
        cuda_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
        module_version=driver_release(),
        gpus=tuple(_read_gpu(driver, index) for index in range(count.value)),
    )


def _read_gpu(driver: Any, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory = ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), memory.value)


def _cuda_error(driver: Any, call: str, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return f"{call} failed with {status}: {(text.value or b'unknown error').decode(errors='replace')}"


def _read_cpu() -> Cpu:
    import psutil

    model, flags = parse_cpuinfo(_read_text("/proc/cpuinfo"))
    if not flags:
        # py-cpuinfo knows systems other than Linux too, but it starts processes and takes a second.
        import cpuinfo

        info = cpuinfo.get_cpu_info()
        model = model or info.get("brand_raw")
        flags = flags or frozenset(info.get("flags", ()))
    logical = os.cpu_count() or 1
    return Cpu(
        model=model or platform.machine(),
        architecture=platform.machine(),
        cores_physical=psutil.cpu_count(logical=False),
        cores_logical=logical,
        cores_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        features=tuple(feature for feature in CPU_FEATURES if feature in flags),
    )


def _read_text(path: str) -> str:
    """Return the text of a file of the /proc file system; empty where it does not exist."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
