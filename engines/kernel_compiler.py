"""CUDA C to code for one GPU, at run time: by NVRTC where cuda-python and that library are installed, else by nvcc.

NVRTC is a library of 100 MB that pip installs; nvcc is part of the CUDA toolkit, and needs a host compiler beside it.
pycuda knows nvcc alone. Both make code for the GPU itself (CUBIN), which a driver loads whatever the release of the
compiler; for a GPU that NVRTC is too old to know it makes PTX, from which the driver makes code.
"""

from __future__ import annotations

import logging
import shutil
from functools import cache
from typing import Any

from engines.errors import DeviceError, MissingDependencyError
from engines.optional import require

_log = logging.getLogger(__name__)

_PURPOSE = "compile a kernel for the GPU"

_OPTIONS = ("--ftz=false",)
"""Subnormal numbers are kept, whatever the user's defaults for nvcc say."""


def compiler_problem() -> str | None:
    """Tell why no kernel can be compiled here, None where one can."""
    problems = [problem for problem in (_nvrtc_problem(), _nvcc_problem()) if problem is not None]
    return "; ".join(problems) if len(problems) == 2 else None


@cache
def compile_kernel(source: str, name: str, compute_capability: str) -> bytes:
    """Compile a program, once in a process.

    Args:
        source: CUDA C, complete in itself.
        name: of its kernel, for messages.
        compute_capability: of the GPU, such as "9.0".

    Returns:
        What the driver loads: CUBIN, or PTX.

    Raises:
        MissingDependencyError: there is neither NVRTC nor pycuda with nvcc; says what is missing of each.
        DeviceError: the program does not compile; the compiler's whole text is among the error's notes.
    """
    architecture = int(compute_capability.replace(".", ""))
    nvrtc = _nvrtc_problem()
    if nvrtc is None:
        return _compile_by_nvrtc(require("cuda.bindings.nvrtc", _PURPOSE), source, name, architecture)
    nvcc = _nvcc_problem()
    if nvcc is None:
        _log.debug("%s; nvcc compiles %s", nvrtc, name)
        return _compile_by_nvcc(source, name, architecture)
    raise MissingDependencyError(
        f"Cannot {_PURPOSE}: {nvrtc}; {nvcc}. Install cuda-python and NVRTC with `pip install 'trt-int8[cuda]' "
        "nvidia-cuda-nvrtc` (nvidia-cuda-nvrtc-cu12 for CUDA 12), or pycuda and the CUDA toolkit."
    )


def _nvrtc_problem() -> str | None:
    try:
        nvrtc = require("cuda.bindings.nvrtc", _PURPOSE)
    except MissingDependencyError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError)
        return "cuda-python is not installed" if missing else f"cuda-python cannot be loaded: {_line(error.__cause__)}"
    try:
        _check(nvrtc, nvrtc.nvrtcVersion())
    except (RuntimeError, OSError, DeviceError) as error:  # the library is looked for at the first call
        return f"cuda-python finds no NVRTC: {_line(error)}"
    return None


def _nvcc_problem() -> str | None:
    try:
        require("pycuda.driver", _PURPOSE)
    except MissingDependencyError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError)
        return "pycuda is not installed" if missing else f"pycuda cannot be loaded: {_line(error.__cause__)}"
    return None if shutil.which("nvcc") else "pycuda needs nvcc, which is not on the PATH"


def _compile_by_nvrtc(nvrtc: Any, source: str, name: str, architecture: int) -> bytes:
    known = sorted(_check(nvrtc, nvrtc.nvrtcGetSupportedArchs()))
    exact = architecture in known
    target = architecture if exact else max((one for one in known if one < architecture), default=min(known))
    options = [f"--gpu-architecture={'sm' if exact else 'compute'}_{target}", *_OPTIONS]
    program = _check(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
            raise _refused("NVRTC", name, options, log.rstrip("\0") or status.name)
        if exact:
            return _text(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        return _text(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compile_by_nvcc(source: str, name: str, architecture: int) -> bytes:
    compiler = require("pycuda.compiler", _PURPOSE)
    options = list(_OPTIONS)
    try:
        image: bytes = compiler.compile(source, options=options, no_extern_c=True, arch=f"sm_{architecture}")
    except require("pycuda.driver", _PURPOSE).CompileError as error:
        text = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr
        raise _refused("nvcc", name, [f"sm_{architecture}", *options], str(text or error)) from error
    return image


def _text(nvrtc: Any, program: Any, size_of: Any, content_of: Any) -> bytes:
    content = bytearray(_check(nvrtc, size_of(program)))
    _check(nvrtc, content_of(program, content))  # fills it
    return bytes(content)


def _check(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"NVRTC failed with {status.name}")
    return values[-1] if values else None


def _refused(compiler: str, name: str, options: list[str], log: str) -> DeviceError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no reason given")
    error = DeviceError(
        f"Cannot compile the kernel {name} with {compiler} ({' '.join(options)}): {first}. Expected a compiler of CUDA "
        "12 or newer that knows this GPU; `--backend onnxruntime` calibrates on the processor."
    )
    error.add_note(log)
    return error


def _line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
