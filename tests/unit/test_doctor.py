"""What `doctor` says about machines of all kinds, this one included."""

from __future__ import annotations

import onnxruntime
import pytest
from rich.console import Console

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


def nothing(*names: str) -> None:
    return None


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
    sections = diagnose(machine(*features), nothing)

    assert kernels in said(sections, "Machine", "features")
    assert said(sections, "What can be gained here", "INT8 speed").startswith(gain)


def test_fp16_needs_a_gpu_on_x86() -> None:
    """No gain is promised where the runtime has no kernels."""
    assert said(diagnose(machine("avx2"), nothing), "What can be gained here", "FP16 speed").startswith("none")


def test_other_processors_are_not_guessed_about() -> None:
    """On Arm nothing was measured, and that is what is said."""
    sections = diagnose(machine("asimddp", architecture="aarch64"), nothing)

    assert "exact INT8 sums" in said(sections, "Machine", "features")
    assert said(sections, "What can be gained here", "INT8 speed").startswith("not known")


def test_a_held_back_process_is_told_its_threads() -> None:
    """Where fewer threads may be used than there are, the option is named."""
    assert "may use 2: give --threads" in said(diagnose(machine(usable=2), nothing), "Machine", "cores")
    assert "--threads" not in said(diagnose(machine(usable=8), nothing), "Machine", "cores")


def test_no_gpu_says_why() -> None:
    """The reason is the driver's, and what cannot be done is named."""
    text = said(diagnose(machine(), nothing), "NVIDIA GPU", "GPU")

    assert text == "none: no NVIDIA driver (libcuda.so.1 is not installed) | TensorRT's speed cannot be measured here"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "6.1: no tensor cores for FP16 or INT8; too old for TensorRT 11, which begins with 7.5"),
        ((7, 0), "7.0: tensor cores for FP16; too old for TensorRT 11, which begins with 7.5"),
        ((7, 2), "7.2: tensor cores for FP16 and INT8; too old for TensorRT 11, which begins with 7.5"),
        ((7, 5), "7.5: tensor cores for FP16 and INT8"),
        ((10, 0), "10.0: tensor cores for FP16 and INT8"),
    ],
)
def test_compute_capability_is_explained(capability: tuple[int, int], expected: str) -> None:
    """Tensor cores for FP16 begin with 7.0, for INT8 with 7.2, TensorRT 11 with 7.5; 10.0 is newer than 9.0."""
    sections = diagnose(gpu_machine(*capability), nothing)

    assert said(sections, "NVIDIA GPU", "GPU") == f"NVIDIA X | compute capability {expected}"


def test_fp16_is_the_figure_to_beat_on_a_gpu() -> None:
    """With tensor cores for both, a speed-up over FP32 alone would flatter INT8."""
    assert "INT8 must beat FP16" in said(diagnose(gpu_machine(8, 9), nothing), "What can be gained here", "on the GPU")


def test_driver_is_shown() -> None:
    """Kernel module and CUDA version stand side by side."""
    assert said(diagnose(gpu_machine(8, 9), nothing), "NVIDIA GPU", "driver").startswith(
        "580.65.06, for CUDA up to 13.0"
    )


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
    sections = diagnose(machine(), lambda *names: version if "tensorrt" in names else None)

    assert expected in said(sections, "NVIDIA GPU", "TensorRT")


def test_optional_packages_are_found_by_any_of_their_names() -> None:
    """The five extras are listed, with the version of whichever distribution brings them."""
    sections = diagnose(machine(), lambda *names: "1.2.3" if "cuda-bindings" in names else None)

    (section,) = (section for section in sections if section.title == "Optional packages")
    assert [finding.what for finding in section.findings] == ["tensorrt", "pycuda", "cuda", "ray", "modelopt"]
    assert [finding.found for finding in section.findings] == ["not installed"] * 2 + ["1.2.3"] + ["not installed"] * 2
    assert all(finding.meaning for finding in section.findings)


def test_every_line_is_rendered() -> None:
    """The tables lose nothing that was found."""
    sections = diagnose(gpu_machine(8, 9), nothing)
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
