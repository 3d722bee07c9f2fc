"""What this machine has, and what INT8 and FP16 can gain on it.

Only what can be known without running a model is said here; how fast a model really is, `trt-int8 bench` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.optional import require
from engines.trt_checks import WHEELS
from trt_int8 import __version__
from trt_int8.backends import (
    MINIMUM_CAPABILITY,
    Installed,
    Load,
    choose_backend,
    driver_problem,
    loading_problem,
)
from trt_int8.machine import PACKAGES, Cpu, CudaDriver, Gpu, Machine, installed_version, read_machine

if TYPE_CHECKING:
    from rich.console import RenderableType

INT8_TENSOR_CORES = (7, 2)
FP16_TENSOR_CORES = (7, 0)
"""Compute capabilities from which GPUs have tensor cores for a type."""

CALIBRATORS_END = 11
"""First major version of TensorRT without INT8 calibrators."""

_X86 = frozenset({"x86_64", "AMD64"})


@dataclass(frozen=True, slots=True)
class _Extra:
    """An optional package: the distributions that it stands for, what shows that it can be loaded, what it brings."""

    distributions: tuple[str, ...]
    brings: str
    module: str | None = None


_EXTRAS = {
    "tensorrt10, tensorrt11": _Extra(
        PACKAGES["tensorrt"], "NVIDIA's engine: build makes engines, bench and compare run them", "tensorrt"
    ),
    "pycuda": _Extra(
        ("pycuda",), "device memory for engines; compiled on installation against a CUDA toolkit", "pycuda.driver"
    ),
    "cuda": _Extra(
        ("cuda-python", "cuda-bindings"),
        "device memory and CUDA graphs for engines; NVIDIA's own wheels",
        "cuda.bindings.driver",
    ),
    "nvidia-ml-py": _Extra(("nvidia-ml-py",), "clocks, temperature and power beside the times of engines", "pynvml"),
    "ray": _Extra(("ray",), "work spread over several machines"),
    "modelopt": _Extra(("nvidia-modelopt",), "NVIDIA's quantizer, for quantization-aware training"),
}
"""Optional packages by the name of the extra that brings them. Those that take long to load have no `module`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        what: what was looked at.
        found: what is there.
        meaning: what follows from it for quantized models; empty where nothing does.
    """

    what: str
    found: str
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Findings under one title."""

    title: str
    findings: tuple[Finding, ...]


def diagnose(
    machine: Machine | None = None, installed: Installed = installed_version, load: Load = require
) -> tuple[Section, ...]:
    """Look at the machine and say what it means.

    Args:
        machine: the machine; the one that this process runs on where None.
        installed: gives the version of the first one installed of several distributions, None for none.
        load: imports an optional package, to see whether it can be.
    """
    machine = machine or read_machine()
    backend = choose_backend(cuda=machine.cuda, load=load, installed=installed)
    return (
        Section("Machine", _machine(machine)),
        Section(
            "NVIDIA GPU",
            (*_gpu(machine.cuda, installed), Finding("run --backend auto", f"takes {backend.name}", backend.reason)),
        ),
        Section("What can be gained here", _gains(machine)),
        Section("Versions", _versions(machine)),
        Section(
            "Optional packages",
            tuple(
                Finding(name, _state(extra, installed(*extra.distributions), load), extra.brings)
                for name, extra in _EXTRAS.items()
            ),
        ),
    )


def render(diagnosis: Sequence[Section]) -> RenderableType:
    """Lay a diagnosis out as one table per section."""
    from rich.console import Group

    from trt_int8.console import make_table

    return Group(
        *(
            make_table(
                section.title,
                ("", "found", "what it means"),
                [(finding.what, finding.found, finding.meaning) for finding in section.findings],
                left=3,
            )
            for section in diagnosis
        )
    )


def _machine(machine: Machine) -> tuple[Finding, ...]:
    cpu = machine.cpu
    cores = f"{cpu.cores_logical} threads" + ("" if cpu.cores_physical is None else f", {cpu.cores_physical} cores")
    held = cpu.cores_usable < cpu.cores_logical
    return (
        Finding("system", machine.system),
        Finding("processor", cpu.model),
        Finding("cores", cores, f"this process may use {cpu.cores_usable}: give --threads" if held else ""),
        Finding("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        Finding("features", ", ".join(cpu.features) or "none that matter here", _int8_arithmetic(cpu)),
    )


def _int8_arithmetic(cpu: Cpu) -> str:
    if "amx_int8" in cpu.features:
        return "AMX: exact INT8 sums, a tile of them per instruction"
    if cpu.saturates_unsigned_products:
        return "no VNNI or AMX: pairs of 8-bit products saturate, so --target cpu writes 7-bit weights"
    if cpu.architecture in _X86:
        return "VNNI: exact INT8 sums, four products per lane and instruction"
    if {"i8mm", "asimddp"} & set(cpu.features):
        return "dot-product instructions: exact INT8 sums"
    return ""


def _state(extra: _Extra, version: str | None, load: Load) -> str:
    if version is None:
        return "not installed"
    problem = loading_problem(extra.module, load) if extra.module else None
    return version if problem is None else f"{version}, but {problem}"


def _gpu(cuda: CudaDriver, installed: Installed) -> tuple[Finding, ...]:
    tensorrt = installed(*PACKAGES["tensorrt"])
    findings = [Finding("GPU", gpu.name, _tensor_cores(gpu)) for gpu in cuda.gpus]
    if cuda.error is not None:
        findings.append(Finding("GPU", f"none: {cuda.error}", "TensorRT's speed cannot be measured here"))
    else:
        driver = f"{cuda.module_version or 'version not shown'}, for CUDA up to {cuda.cuda_version}"
        needed = ", ".join(
            f"{release} or newer for CUDA {cuda_release[0]}" for cuda_release, release in WHEELS.values()
        )
        meaning = driver_problem(cuda, installed) or f"TensorRT's wheels need {needed}"
        findings.append(Finding("driver", driver, meaning))
    if tensorrt is None:
        findings.append(Finding("TensorRT", "not installed", "--target tensorrt writes models for it all the same"))
    elif int(tensorrt.partition(".")[0]) < CALIBRATORS_END:
        findings.append(Finding("TensorRT", tensorrt, "takes Q/DQ models; has INT8 calibrators, deprecated since 10.1"))
    else:
        findings.append(Finding("TensorRT", tensorrt, "takes Q/DQ models; has no INT8 calibrators any more"))
    return tuple(findings)


def _tensor_cores(gpu: Gpu) -> str:
    capability = ".".join(map(str, gpu.compute_capability))
    kinds = [
        kind
        for kind, minimum in (("FP16", FP16_TENSOR_CORES), ("INT8", INT8_TENSOR_CORES))
        if gpu.compute_capability >= minimum
    ]
    cores = f"tensor cores for {' and '.join(kinds)}" if kinds else "no tensor cores for FP16 or INT8"
    taken = "" if gpu.compute_capability >= MINIMUM_CAPABILITY else "; too old for TensorRT, which begins with 7.5"
    return f"compute capability {capability}: {cores}{taken}"


def _gains(machine: Machine) -> tuple[Finding, ...]:
    cpu = machine.cpu
    if cpu.architecture not in _X86:
        unknown = "not measured for trt-int8 on this kind of processor; use bench"
        speed = [Finding("INT8 speed", "not known", unknown), Finding("FP16 speed", "not known", unknown)]
    else:
        speed = [
            Finding("INT8 speed", "some", "convolutions gain, less than they would with VNNI; measure with bench")
            if cpu.saturates_unsigned_products
            else Finding("INT8 speed", "much", "convolutions gain most, depthwise ones least; measure with bench"),
            Finding(
                "FP16 speed", "none", "ONNX Runtime has no fast FP16 kernels on x86 processors: FP16 figures need a GPU"
            ),
        ]
    if any(gpu.compute_capability >= INT8_TENSOR_CORES for gpu in machine.cuda.gpus):
        speed.append(
            Finding("on the GPU", "INT8 and FP16", "both have tensor cores: INT8 must beat FP16, not only FP32")
        )
    return (
        *speed,
        Finding("size", "4x with INT8, 2x with FP16", "of the weights, on any machine"),
        Finding("accuracy", "can be judged", "--target tensorrt runs exactly as TensorRT computes, up to rounding"),
    )


def _versions(machine: Machine) -> tuple[Finding, ...]:
    versions = {"trt-int8": __version__, "python": machine.python, **machine.versions}
    return tuple(Finding(name, version or "not installed") for name, version in versions.items() if name != "tensorrt")
