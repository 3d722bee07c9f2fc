"""What the package promises as a whole: its names, its imports, its wheel."""

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import trt_int8
from trt_int8 import siblings

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnxruntime", "onnx", "numpy", "numba", "matplotlib", "polygraphy", "pydantic", "sklearn")


def modules_after(code: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def test_import_is_light():
    """`import trt_int8` loads no heavy package."""
    assert not modules_after("import trt_int8") & set(HEAVY)


def test_help_is_light():
    """`trt-int8 --help` shows every command without loading a heavy package."""
    code = "from trt_int8.cli import main\nassert main(['--help']) == 0"
    loaded = modules_after(code)

    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_calibrators_know_no_runtime():
    """The package `calibrators` imports with neither onnx nor a runtime."""
    modules = " , ".join(
        f"calibrators.{file.stem}" for file in (ROOT / "calibrators").glob("*.py") if file.stem != "__init__"
    )

    assert not modules_after(f"import {modules}") & {"onnx", "onnx_ir", "onnxruntime", "torch"}


def test_public_names():
    """The documented names are these, and each resolves."""
    names = {
        "Calibration",
        "Pipeline",
        "benchmark",
        "build_engine",
        "calibrate",
        "compare",
        "convert_fp16",
        "export_onnx",
        "lint",
        "quantize",
    }

    assert set(trt_int8.__all__) - {"__version__"} == names
    assert all(callable(getattr(trt_int8, name)) for name in names)


def test_names_stay_functions_after_their_modules_are_loaded():
    """Loading the implementation does not put modules in the place of the public functions."""
    code = (
        "import trt_int8.api, trt_int8.cli, trt_int8.benchmarking, trt_int8.calibration\n"
        "from trt_int8 import benchmark, calibrate, compare, quantize\n"
        "assert all(callable(item) for item in (benchmark, calibrate, compare, quantize))"
    )

    assert "trt_int8.api" in modules_after(code)


def test_unknown_name_is_an_attribute_error():
    """A misspelt public name is reported as Python reports it."""
    with pytest.raises(AttributeError, match="calibrat"):
        trt_int8.calibrat  # noqa: B018


def test_sibling_packages_are_ours():
    """The check of `calibrators` and `engines` passes here, and stops at a name that is somebody else's."""
    siblings.check()

    with pytest.raises(ImportError, match="'json' resolves to"):
        siblings.check(("json",))


def test_wheel(tmp_path: Path):
    """The wheel builds, holds exactly the three packages with their data files, and runs from an empty folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}

    assert tops == {"trt_int8", "calibrators", "engines", f"trt_int8-{trt_int8.__version__}.dist-info"}
    assert {"trt_int8/templates/report.html.j2", "trt_int8/py.typed", "calibrators/py.typed"} <= set(names)
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import trt_int8.cli as cli\n"
        "print(cli.__file__)\n"
        "cli.main(['-h'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(unpacked))
    assert "calibrate" in done.stdout


def test_console_script():
    """The command `trt-int8` is the function `main`."""
    (script,) = entry_points(group="console_scripts", name="trt-int8")

    assert script.value == "trt_int8.cli:main"
