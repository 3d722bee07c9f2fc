"""Fetch NVIDIA's Python bindings and compile the SIMULATED libraries beneath them.

    python tests/trtsim/provision.py FOLDER

Into FOLDER go, for TensorRT 10 and 11, the real bindings from the package index and the compiled stand-in for
libnvinfer, and for both of them cuda-bindings and the stand-in for libcuda. What is there already is not fetched again.
Where it cannot be done, the reason is printed and left in FOLDER/unavailable.txt, and the exit status is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
BINDINGS = {10: "10.16.1.11", 11: "11.4.0.106"}
CUDA_BINDINGS = ("cuda-bindings==13.5.0", "cuda-pathfinder==1.9.0")
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
    driver = libraries / "libcuda.so.1"
    _compile("cc", SOURCES / "cuda.c", driver, "-std=c11")
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


def environment(folder: Path, version: int) -> dict[str, str]:
    """Environment variables of a process in which `import tensorrt` finds the simulated TensorRT of this version."""
    paths = [SOURCES / "packages", folder / f"bindings-{version}", folder / "cuda-bindings", *_given("PYTHONPATH")]
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
    reason = folder / "unavailable.txt"
    return reason.read_text().strip() if reason.exists() else None


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
    name = os.environ.get({"cc": "CC", "c++": "CXX"}[driver], driver)
    compiler = shutil.which(name)
    if compiler is None:
        raise UnavailableError(f"there is no C compiler {name!r} for the simulated TensorRT")
    library.parent.mkdir(parents=True, exist_ok=True)
    soname = f"-Wl,-soname,{library.name}"
    _run(f"{source.name} does not compile", [compiler, *COMPILE, soname, "-o", str(library), str(source), *options])


def _link(link: Path, library: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)


def _run(what: str, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line.lower()] or [result.stderr.strip()]
        raise UnavailableError(f"{what}: {errors[-1]}")


def main(folder: Path) -> int:
    reason = folder / "unavailable.txt"
    try:
        if sysconfig.get_platform() != "linux-x86_64":
            raise UnavailableError(f"TensorRT is simulated on linux-x86_64 only, this is {sysconfig.get_platform()}")
        provision(folder)
    except UnavailableError as error:
        folder.mkdir(parents=True, exist_ok=True)
        reason.write_text(f"{error}\n")
        print(f"No simulated TensorRT: {error}. Its tests will be skipped.", file=sys.stderr)
        return 1
    reason.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
