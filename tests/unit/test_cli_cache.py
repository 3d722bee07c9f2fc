"""`trt-int8 cache` on the command line: what goes to stdout, the exit status, and one line for what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibrators.tensorrt_cache import TensorRTCache
from trt_int8.calibration import calibrate
from trt_int8.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its status, stdout and stderr."""

    def command(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(["cache", *map(str, words)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def folder(module_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two calibrations a.npz and b.npz of one model, data.npz and wide.npz, a TensorRT cache."""
    path = tmp_path_factory.mktemp("cache")
    for name, seed in (("a", 0), ("b", 1)):
        data = np.random.default_rng(seed).random((16, 3, 8, 8), dtype=np.float32)
        calibrate(module_tiny_model, {"input": data}, tensors="all").save(path / f"{name}.npz")
    data = np.random.default_rng(2).random((16, 3, 8, 8), dtype=np.float32)
    np.savez(path / "data.npz", input=data)
    np.savez(path / "wide.npz", input=255 * data)
    TensorRTCache(7203, "EntropyCalibration2", {"input": 0.01, "relu": 0.02, "logits": 0.03}).save(path / "k.cache")
    TensorRTCache(7203, "EntropyCalibration2", {"input": 0.01, "conv": 0.02}).save(path / "part.cache")
    (path / "table").write_text("input 2.64\nrelu 1.5\n")
    return path


def test_merge(run: Run, folder: Path, tmp_path: Path):
    """Two calibrations become a file."""
    status, out, _ = run("merge", folder / "a.npz", folder / "b.npz", "--output", tmp_path / "c.npz")

    assert status == 0
    assert "32 samples of 2 calibrations" in out
    assert (tmp_path / "c.npz").exists()


def test_equal_files(run: Run, folder: Path):
    """No empty table: a line says that all are equal."""
    status, out, _ = run("diff", folder / "a.npz", folder / "a.npz")

    assert status == 0
    assert "5 tensors in both, 5 of them equal" in out
    assert "scales that differ" not in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("show", "k.cache", "--percentile", "99"), "--percentile would change nothing: a TensorRT cache holds"),
        (("export", "a.npz", "--percentile", "99"), "--percentile would change nothing: the method is entropy."),
        (("export", "k.cache", "--percentile", "99"), "--percentile would change nothing: a TensorRT cache holds"),
        (("diff", "a.npz", "k.cache", "--percentile", "99"), "--percentile would change nothing: the method is"),
        (
            ("diff", "k.cache", "part.cache", "--method", "mse", "--percentile", "99"),
            "--method and --percentile would change nothing: TensorRT caches hold",
        ),
        (
            ("check", "a.npz", "--data", "data.npz", "--model", "m.onnx", "--percentile", "99"),
            "--percentile would change nothing: the method is entropy",
        ),
    ],
)
def test_options_without_effect(words: tuple[str, ...], line: str, run: Run, folder: Path, tmp_path: Path):
    """Refused as usage, before the model is looked at."""
    files = {path.name: str(path) for path in folder.iterdir()}
    output = ["--output", tmp_path / "k.cache"] if words[0] == "export" else []
    status, out, err = run(*(files.get(word, word) for word in words), *output)

    assert (status, out) == (2, "")
    assert err.startswith(f"error: {line}")


def test_diff(run: Run, folder: Path, tmp_path: Path):
    """A calibration against a cache: a table, the tensors that only one of them holds, and JSON."""
    file = tmp_path / "diff.json"
    status, out, _ = run("diff", folder / "a.npz", folder / "k.cache", "--method", "minmax", "--json", file)

    assert status == 0
    assert "only in A: conv" in out
    assert {row["tensor"] for row in json.loads(file.read_text())["tensors"]} == {"input", "relu", "logits"}


def test_import(run: Run, folder: Path, module_tiny_model: Path, tmp_path: Path):
    """A cache becomes a model, and the summary says what was found."""
    output, file = tmp_path / "q.onnx", tmp_path / "i.json"
    words = ("import", folder / "k.cache", "--model", module_tiny_model, "--output", output, "--json", file)
    status, out, _ = run(*words)

    assert status == 0
    assert "2 of 2 weighted nodes in INT8" in out
    assert "2 of 2 tensors that Q/DQ needs found in the cache: 2 by name" in out
    assert output.exists()
    assert json.loads(file.read_text())["tensorrt"] == "7.2.3"


def test_import_of_a_part(run: Run, folder: Path, module_tiny_model: Path, tmp_path: Path):
    """A cache that lacks a scale is refused in one line; with --allow-missing or --rename it is not."""
    words = ("import", folder / "part.cache", "--model", module_tiny_model, "--output", tmp_path / "q.onnx")
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "'relu' (the cache holds only 'conv', from which Relu computes it)" in err
    assert not (tmp_path / "q.onnx").exists()

    status, out, _ = run(*words, "--allow-missing")
    assert status == 0
    assert "1 of 2 tensors" in out
    assert "float: fc (Gemm): the cache has no scale for its input 'relu'" in out

    assert run(*words, "--rename", "conv=relu")[0] == 0


def test_check(run: Run, folder: Path, module_tiny_model: Path, tmp_path: Path):
    """The verdict is the last line; it costs the exit status only where a limit is given and exceeded."""
    words = ("check", folder / "a.npz", "--model", module_tiny_model, "--json", tmp_path / "c.json")
    status, out, _ = run(*words, "--data", folder / "data.npz", "--max-clipped", 50)
    assert status == 0
    assert out.splitlines()[-1].startswith("fine: ")

    status, out, _ = run(*words, "--data", folder / "wide.npz", "--batch-size", 4)
    assert status == 0
    assert out.splitlines()[-1].endswith("was /255 forgotten?")
    assert json.loads((tmp_path / "c.json").read_text())["verdict"] == "gross"

    status, out, err = run(*words, "--data", folder / "wide.npz", "--max-clipped", 50)
    assert status == 3
    assert "clip more than 50 %" in err
    assert "grossly different input" in out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["merge", "a.npz", "a.npz", "--output", "c.npz"], "same data"),
        (["merge", "a.npz", "k.cache", "--output", "c.npz"], "k.cache"),
        (["diff", "a.npz", "table"], "ONNX Runtime's calibration table"),
        (["diff", "a.npz", "nothing"], "there is no file"),
        (["import", "table", "--model", "MODEL", "--output", "q.onnx"], "ONNX Runtime's calibration table"),
        (["import", "a.npz", "--model", "MODEL", "--output", "q.onnx"], "a .npz archive"),
        (["import", "k.cache", "--model", "table", "--output", "q.onnx"], "is not an ONNX model"),
        (["export", "table", "--output", "k"], "ONNX Runtime's calibration table"),
        (["export", "k.cache", "--tensorrt", "11.1.0", "--output", "k"], "reads no calibration cache"),
        (["check", "k.cache", "--data", "data.npz", "--model", "MODEL"], "k.cache"),
        (["check", "a.npz", "--data", "a.npz", "--model", "MODEL"], "input"),
    ],
)
def test_bad_input(
    words: list[str], found: str, run: Run, folder: Path, module_tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a user gets wrong ends in one line with exit status 1, and no file is left."""
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    status, out, err = run(*(str(module_tiny_model) if word == "MODEL" else word for word in words))

    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert found in err
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "a.npz", "--output", "c.npz"],
        ["merge", "a.npz", "b.npz"],
        ["import", "k.cache"],
        ["import", "k.cache", "--model", "m", "--rename", "x"],
        ["export", "k.cache", "--method", "mse", "--output", "k"],
        ["diff", "a.npz"],
        ["check", "a.npz", "--model", "m"],
    ],
)
def test_usage(words: list[str], run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What the command line does not take ends with exit status 2."""
    monkeypatch.chdir(folder)

    assert run(*words)[0] == 2
