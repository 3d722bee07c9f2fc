"""What `doctor` says about machines of all kinds, this one included."""

from __future__ import annotations

from types import SimpleNamespace

import onnxruntime
import pytest
from rich.console import Console

from engines.errors import MissingDependencyError
from trt_int8.doctor import Section, diagnose, render
from trt_int8.machine import Cpu, CudaDriver, Gpu, Machine

NO_GPU = CudaDriver("no NVIDIA driver (libcuda.so.1 is not installed)", None, None, ())
VERSIONS: dict[str, str | None] = {"onnxruntime": "1.31.1", "tensorrt": None, "numba": None}


def machine(*features: str, architecture: str = "x86_64", usable: int = 8, cuda: CudaDriver = NO_GPU) -> Machine:
    cpu = Cpu("Some CPU", architecture, 4, 8, usable, features)
    return Machine(cpu, 16 << 30, "Linux", "3.12.1", VERSIONS, cuda)


def gpu_machine(*capability: int) -> Machine:
    return machine(
        "avx2", cuda=CudaDriver(None, "13.0", "580.65.06", (Gpu("NVIDIA X", (capability[0], capability[1]), 1),))
    )


def said(sections: tuple[Section, ...], title: str, what: str) -> str:
    """Return what was found and what it means, of one line."""
    (finding,) = (
        finding
        for section in sections
        if section.title == title
        for finding in section.findings
        if finding.what == what
    )
    return f"{finding.found} | {finding.meaning}"


def look(
    machine: Machine, versions: dict[str, str] | None = None, unloadable: dict[str, Exception] | None = None
) -> tuple[Section, ...]:
    """Diagnose a machine with these distributions; modules load where their package is installed."""
    versions = versions or {}
    modules = {"tensorrt": "tensorrt", "pycuda": "pycuda", "cuda": "cuda-bindings", "pynvml": "nvidia-ml-py"}

    def load(module: str, purpose: str) -> SimpleNamespace:
        package = module.partition(".")[0]
        cause = (unloadable or {}).get(module)
        if modules[package] not in versions:
            cause = ModuleNotFoundError(f"No module named {package!r}", name=package)
        if cause is not None:
            raise MissingDependencyError(f"Cannot {purpose}") from cause
        return SimpleNamespace(__version__=versions[modules[package]])

    def installed(*names: str) -> str | None:
        return next((versions[name] for name in names if name in versions), None)

    return diagnose(machine, installed, load)


@pytest.mark.parametrize(
    ("features", "kernels", "gain"),
    [
        (("avx2",), "7-bit weights", "some"),
        (("avx2", "avx512f"), "7-bit weights", "some"),
        (("avx2", "avx512_vnni"), "VNNI: exact", "much"),
        (("avx2", "avx_vnni"), "VNNI: exact", "much"),
        (("avx512_vnni", "amx_int8"), "AMX: exact", "much"),
    ],
)
def test_x86_features_decide_about_int8(features: tuple[str, ...], kernels: str, gain: str) -> None:
    """Without VNNI and AMX products saturate, which costs a bit of the weights; with them INT8 pays."""
    sections = look(machine(*features))

    assert kernels in said(sections, "Machine", "features")
    assert said(sections, "What can be gained here", "INT8 speed").startswith(gain)


def test_fp16_needs_a_gpu_on_x86() -> None:
    """No gain is promised where the runtime has no kernels."""
    assert said(look(machine("avx2")), "What can be gained here", "FP16 speed").startswith("none")


def test_other_processors_are_not_guessed_about() -> None:
    """On Arm nothing was measured, and that is what is said."""
    sections = look(machine("asimddp", architecture="aarch64"))

    assert "exact INT8 sums" in said(sections, "Machine", "features")
    assert said(sections, "What can be gained here", "INT8 speed").startswith("not known")


def test_a_held_back_process_is_told_its_threads() -> None:
    """Where fewer threads may be used than there are, the option is named."""
    assert "may use 2: give --threads" in said(look(machine(usable=2)), "Machine", "cores")
    assert "--threads" not in said(look(machine(usable=8)), "Machine", "cores")


def test_no_gpu_says_why() -> None:
    """The reason is the driver's, and what cannot be done is named."""
    text = said(look(machine()), "NVIDIA GPU", "GPU")

    assert text == "none: no NVIDIA driver (libcuda.so.1 is not installed) | TensorRT's speed cannot be measured here"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "6.1: no tensor cores for FP16 or INT8; too old for TensorRT, which begins with 7.5"),
        ((7, 0), "7.0: tensor cores for FP16; too old for TensorRT, which begins with 7.5"),
        ((7, 2), "7.2: tensor cores for FP16 and INT8; too old for TensorRT, which begins with 7.5"),
        ((7, 5), "7.5: tensor cores for FP16 and INT8"),
        ((10, 0), "10.0: tensor cores for FP16 and INT8"),
    ],
)
def test_compute_capability_is_explained(capability: tuple[int, int], expected: str) -> None:
    """Tensor cores for FP16 begin with 7.0, for INT8 with 7.2, TensorRT with 7.5; 10.0 is newer than 9.0."""
    sections = look(gpu_machine(*capability))

    assert said(sections, "NVIDIA GPU", "GPU") == f"NVIDIA X | compute capability {expected}"


def test_fp16_is_the_figure_to_beat_on_a_gpu() -> None:
    """With tensor cores for both, a speed-up over FP32 alone would flatter INT8."""
    assert "INT8 must beat FP16" in said(look(gpu_machine(8, 9)), "What can be gained here", "on the GPU")


def test_driver_is_shown() -> None:
    """Kernel module and CUDA version stand side by side."""
    assert said(look(gpu_machine(8, 9)), "NVIDIA GPU", "driver").startswith("580.65.06, for CUDA up to 13.0")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("8.6.1", "has INT8 calibrators"),
        ("10.16.1.11", "has INT8 calibrators"),
        ("11.4.0.106", "no INT8 calibrators any more"),
        (None, "writes models for it all the same"),
    ],
)
def test_calibrators_end_with_tensorrt_11(version: str | None, expected: str) -> None:
    """Whether there are calibrators follows from the installed version."""
    sections = look(machine(), {"tensorrt": version} if version else None)

    assert expected in said(sections, "NVIDIA GPU", "TensorRT")


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [
        (
            "tensorrt-cu13-bindings",
            "the driver serves CUDA 12.4, and TensorRT's wheel is for CUDA 13, which needs driver 580 or",
        ),
        ("tensorrt-cu12-bindings", "TensorRT's wheels need 535 or newer for CUDA 12, 580 or newer for CUDA 13"),
    ],
)
def test_a_driver_too_old_for_the_installed_wheel_is_named(wheel: str, expected: str) -> None:
    """The wheels for CUDA 13 need a driver that serves it; those for CUDA 12 run on it."""
    old = machine(cuda=CudaDriver(None, "12.4", "550.54.14", (Gpu("NVIDIA X", (8, 9), 1),)))
    sections = look(old, {wheel: "10.16.1.11"})

    assert said(sections, "NVIDIA GPU", "driver").startswith(f"550.54.14, for CUDA up to 12.4 | {expected}")


def test_optional_packages_are_found_by_any_of_their_names() -> None:
    """The extras are listed, with the version of whichever distribution brings them, and what they bring."""
    (section,) = (
        section for section in look(machine(), {"cuda-bindings": "1.2.3"}) if section.title == "Optional packages"
    )

    found = {finding.what: finding.found for finding in section.findings}
    assert found.pop("cuda") == "1.2.3"
    assert found == dict.fromkeys(
        ["tensorrt10, tensorrt11", "pycuda", "nvidia-ml-py", "ray", "modelopt"], "not installed"
    )
    assert all(finding.meaning for finding in section.findings)


@pytest.mark.parametrize(
    ("module", "distribution", "extra"),
    [("tensorrt", "tensorrt", "tensorrt10, tensorrt11"), ("pycuda.driver", "pycuda", "pycuda")],
)
def test_an_installed_package_that_cannot_be_loaded_says_why(module: str, distribution: str, extra: str) -> None:
    """Bindings without their libraries, or pycuda without a driver, are installed and of no use."""
    sections = look(machine(), {distribution: "10.1"}, {module: ImportError("libX.so.10: cannot open\nshared object")})

    assert said(sections, "Optional packages", extra).startswith(
        "10.1, but cannot be loaded: libX.so.10: cannot open shared object |"
    )


@pytest.mark.parametrize(
    ("computer", "expected"),
    [
        (gpu_machine(8, 9), "takes tensorrt | found NVIDIA X, TensorRT 10.16 and cuda-python"),
        (machine(), "takes onnxruntime | no NVIDIA driver (libcuda.so.1 is not installed)"),
    ],
)
def test_the_backend_that_run_would_take_is_named(computer: Machine, expected: str) -> None:
    """With the reason, as `run` itself gives it."""
    sections = look(computer, {"tensorrt": "10.16", "cuda-bindings": "13.0"})

    assert said(sections, "NVIDIA GPU", "run --backend auto") == expected


def test_every_line_is_rendered() -> None:
    """The tables lose nothing that was found."""
    sections = look(gpu_machine(8, 9))
    out = Console(width=250)
    with out.capture() as captured:
        out.print(render(sections))
    text = captured.get()

    for section in sections:
        assert section.title in text
        for finding in section.findings:
            assert finding.what in text
            assert finding.found in text
            assert finding.meaning in text


def test_this_machine_can_be_diagnosed() -> None:
    """Without arguments it is this machine, with what is installed here."""
    sections = diagnose()

    assert said(sections, "Versions", "onnxruntime").startswith(onnxruntime.__version__)
