"""Fetch NVIDIA's Python bindings and compile the SIMULATED libraries beneath them.

    python tests/trtsim/provision.py FOLDER

Into FOLDER go, for TensorRT 10 and 11, the real bindings from the package index and the compiled stand-in for
libnvinfer, and for both of them cuda-bindings, the stand-in for libcuda, and pycuda, compiled against it by the script
of the container image, which takes a minute. What is there already is not made again. Where it cannot be done, the
reason is printed and left in FOLDER/unavailable.txt (of pycuda alone: FOLDER/pycuda-unavailable.txt), and the exit
status is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
REPOSITORY = SOURCES.parents[1]
BINDINGS = {10: "10.16.1.11", 11: "11.4.0.106"}
CUDA_BINDINGS = ("cuda-bindings==13.5.0", "cuda-pathfinder==1.9.0")
PYCUDA_COMPILER_NEEDS = ("pytools==2026.1.1", "platformdirs==4.14.5", "siphash24==1.9")
CUDA_HEADERS = ("nvidia-cuda-runtime==13.5.37", "nvidia-cuda-profiler-api==13.5.25")
COMPILE = ["-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]


class UnavailableError(Exception):
    """Why there is no simulation here."""


def provision(folder: Path) -> None:
    """Fill `folder`.

    Raises:
        UnavailableError: a compiler or a package is missing.
    """
    for version, release in BINDINGS.items():
        _install(folder / f"bindings-{version}", f"tensorrt-cu13-bindings=={release}")
    _install(folder / "cuda-bindings", *CUDA_BINDINGS)
    libraries = folder / "lib"
    compiler = libraries / "libnvrtc.so.13"
    flags = f"-x c++ -std=c++17 -w -O1 -fPIC -shared -fvisibility=hidden -include {SOURCES / 'kernel.h'}"
    _compile("cc", SOURCES / "nvrtc.c", compiler, "-std=c11",
             f'-DCOMPILER="{_compiler("c++")}"', f'-DKERNEL_FLAGS="{flags}"')  # fmt: skip
    driver = libraries / "libcuda.so.1"
    # Linked against the compiler, whatever it calls of it: so NVIDIA's is not looked for.
    _compile("cc", SOURCES / "cuda.c", driver, "-std=c11", "-Wl,--no-as-needed", str(compiler))
    _link(libraries / "libcuda.so", driver)
    runtime = libraries / "libcudart.so.13"
    _compile("cc", SOURCES / "cudart.c", runtime, "-std=c11", str(driver))
    _link(libraries / "libcudart.so", runtime)
    for version, release in BINDINGS.items():
        major, minor, patch, _ = map(int, release.split("."))
        number = f"-DSIMULATED_VERSION={major * 10000 + minor * 100 + patch}"
        library = libraries / str(version) / f"libnvinfer.so.{version}"
        _compile("c++", SOURCES / "nvinfer.cpp", library, number)
        for other in ("libnvinfer_plugin", "libnvonnxparser"):
            _link(library.with_name(f"{other}.so.{version}"), library)


def provision_pycuda(folder: Path) -> None:
    """Compile pycuda for the simulated driver that `provision` made; quickly, not for speed.

    Raises:
        UnavailableError: it cannot be had.
    """
    target = folder / "pycuda"
    _install(folder / "pytools", *PYCUDA_COMPILER_NEEDS)
    if target.is_dir():
        return
    _install(folder / "cuda-headers", *CUDA_HEADERS)
    (include,) = (folder / "cuda-headers").glob("nvidia/*/include")
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    inputs = ["--constraints", str(REPOSITORY / "constraints.txt"), "--cuda", str(include.parent)]
    made_for = ["--driver", str(folder / "lib"), "--python", sys.executable, "--flags", "-O0 -g0"]
    _run("pycuda cannot be compiled",
         [str(REPOSITORY / "docker" / "build_pycuda.sh"), *inputs, *made_for, "--output", str(wheels)])  # fmt: skip
    (wheel,) = wheels.glob("pycuda-*.whl")
    _install(target, str(wheel))


def environment(folder: Path, version: int) -> dict[str, str]:
    """Environment variables of a process in which `import tensorrt` finds the simulated TensorRT of this version."""
    packages = [folder / name for name in (f"bindings-{version}", "cuda-bindings", "pycuda", "pytools")]
    paths = [SOURCES / "packages", *packages, *_given("PYTHONPATH")]
    libraries = [folder / "lib", folder / "lib" / str(version), *_given("LD_LIBRARY_PATH")]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "TRTSIM_VERSION": str(version),
    }


def unavailable(folder: Path) -> str | None:
    """The reason why there is no simulation in `folder`, None where there is one."""
    if not folder.is_dir():
        return f"the simulated TensorRT is not built: python tests/trtsim/provision.py {folder}"
    return _reason(folder / "unavailable.txt")


def pycuda_unavailable(folder: Path) -> str | None:
    """The reason why the simulation in `folder` is without pycuda, None where it has it."""
    return _reason(folder / "pycuda-unavailable.txt")


def _reason(file: Path) -> str | None:
    return file.read_text().strip() if file.exists() else None


def _given(variable: str) -> Iterator[str]:
    if os.environ.get(variable):
        yield os.environ[variable]


def _install(target: Path, *requirements: str) -> None:
    if target.is_dir():
        return
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"]
    _run(f"Python {sys.version_info[0]}.{sys.version_info[1]} gets no {' '.join(requirements)}",
         [*command, str(part), *requirements])  # fmt: skip
    part.rename(target)


def _compile(driver: str, source: Path, library: Path, *options: str) -> None:
    compiler = _compiler(driver)
    library.parent.mkdir(parents=True, exist_ok=True)
    soname = f"-Wl,-soname,{library.name}"
    _run(f"{source.name} does not compile", [compiler, *COMPILE, soname, "-o", str(library), str(source), *options])


def _compiler(driver: str) -> str:
    name = os.environ.get({"cc": "CC", "c++": "CXX"}[driver], driver)
    compiler = shutil.which(name)
    if compiler is None:
        raise UnavailableError(f"there is no C compiler {name!r} for the simulated TensorRT")
    return compiler


def _link(link: Path, library: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)


def _run(what: str, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        of_a_compiler = [line for line in lines if re.search(r":\d+: (fatal )?error: ", line)]
        errors = of_a_compiler[:1] or [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no reason"]
        raise UnavailableError(f"{what}: {errors[-1]}")


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for what, make in (("unavailable", _provision_here), ("pycuda-unavailable", provision_pycuda)):
        reason = folder / f"{what}.txt"
        try:
            make(folder)
        except UnavailableError as error:
            reason.write_text(f"{error}\n")
            missing = "pycuda" if make is provision_pycuda else "TensorRT"
            print(f"No simulated {missing}: {error}. Its tests will be skipped.", file=sys.stderr)
            return 1
        reason.unlink(missing_ok=True)
    return 0


def _provision_here(folder: Path) -> None:
    if sysconfig.get_platform() != "linux-x86_64":
        raise UnavailableError(f"TensorRT is simulated on linux-x86_64 only, this is {sysconfig.get_platform()}")
    provision(folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
