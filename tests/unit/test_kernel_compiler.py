"""Which compiler is taken, and for which code; NVRTC is a double here."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engines.errors import DeviceError, MissingDependencyError
from engines.kernel_compiler import compile_kernel, compiler_problem


class Result(Enum):
    NVRTC_SUCCESS = 0
    NVRTC_ERROR_COMPILATION = 6


OK = Result.NVRTC_SUCCESS


class Nvrtc(ModuleType):
    """The functions of `cuda.bindings.nvrtc` that are called; it compiles a program to its options."""

    nvrtcResult = Result  # noqa: N815

    def __init__(self, known: list[int], log: str = "") -> None:
        super().__init__("cuda.bindings.nvrtc")
        self._known = known
        self._log = log.encode()
        self._made = b""
        self.destroyed = 0

    def nvrtcVersion(self) -> Any:  # noqa: N802
        return OK, 13, 0

    def nvrtcGetSupportedArchs(self) -> Any:  # noqa: N802
        return OK, self._known

    def nvrtcCreateProgram(self, source: bytes, name: bytes, *headers: Any) -> Any:  # noqa: N802
        return OK, (source, name)

    def nvrtcCompileProgram(self, program: Any, count: int, options: list[bytes]) -> Any:  # noqa: N802
        self._made = b" ".join(options)
        return (Result.NVRTC_ERROR_COMPILATION if self._log else OK,)

    def nvrtcGetProgramLogSize(self, program: Any) -> Any:  # noqa: N802
        return OK, len(self._log) + 1

    def nvrtcGetProgramLog(self, program: Any, content: bytearray) -> Any:  # noqa: N802
        content[: len(self._log)] = self._log
        return (OK,)

    def nvrtcGetCUBINSize(self, program: Any) -> Any:  # noqa: N802
        return OK, len(self._made)

    def nvrtcGetCUBIN(self, program: Any, content: bytearray) -> Any:  # noqa: N802
        content[:] = self._made
        return (OK,)

    nvrtcGetPTXSize, nvrtcGetPTX = nvrtcGetCUBINSize, nvrtcGetCUBIN  # noqa: N815

    def nvrtcDestroyProgram(self, program: Any) -> Any:  # noqa: N802
        self.destroyed += 1
        return (OK,)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    compile_kernel.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, nvrtc: ModuleType) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", nvrtc)


@pytest.mark.parametrize(
    ("capability", "target"),
    [("8.9", "sm_89"), ("9.0", "sm_90"), ("12.1", "compute_90"), ("8.6", "compute_80"), ("7.5", "compute_80")],
)
def test_code_for_the_gpu_or_ptx_for_the_newest_before_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, target: str
) -> None:
    """A GPU that NVRTC does not know gets PTX, from which its driver makes code."""
    nvrtc = Nvrtc([80, 89, 90])
    install(monkeypatch, nvrtc)

    assert compile_kernel("source", "f", capability) == f"--gpu-architecture={target} --ftz=false".encode()
    assert nvrtc.destroyed == 1
    assert compile_kernel("source", "f", capability)
    assert nvrtc.destroyed == 1  # the second time it is there already


def test_an_error_is_quoted_and_its_text_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in the message, everything in the notes; the program is given back."""
    nvrtc = Nvrtc([90], "f.cu(3): warning: odd\nf.cu(7): error: x is undefined\n1 error detected\n")
    install(monkeypatch, nvrtc)
    with pytest.raises(
        DeviceError, match=r"kernel f with NVRTC \(--gpu.*\): f.cu\(7\): error: x is undefined. "
    ) as caught:
        compile_kernel("source", "f", "9.0")

    assert caught.value.__notes__ == ["f.cu(3): warning: odd\nf.cu(7): error: x is undefined\n1 error detected\n"]
    assert nvrtc.destroyed == 1


def test_what_is_missing_of_each_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library behind cuda-python; pycuda without nvcc."""

    class WithoutLibrary(Nvrtc):
        def nvrtcVersion(self) -> Any:  # noqa: N802
            raise RuntimeError('Failure finding "libnvrtc.so.13"')

    install(monkeypatch, WithoutLibrary([90]))
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setenv("PATH", str(tmp_path))

    expected = (
        'cuda-python finds no NVRTC: Failure finding "libnvrtc.so.13"; pycuda needs nvcc, which is not on the PATH'
    )
    assert compiler_problem() == expected
    with pytest.raises(MissingDependencyError, match="Cannot compile a kernel for the GPU: cuda-python finds no NVRTC"):
        compile_kernel("source", "f", "9.0")


def test_one_way_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC alone will do."""
    install(monkeypatch, Nvrtc([90]))
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    assert compiler_problem() is None
