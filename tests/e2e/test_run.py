"""`trt-int8 run` on a small PyTorch model: everything it writes, and going on after an interruption."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest

from trt_int8.backends import choose_backend
from trt_int8.cli import main

MODEL = '''
"""A residual network on 12x12 images with two channels."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 16)

    def forward(self, image):
        features = self.stem(image)
        features = torch.relu(features + self.branch(features))
        return self.head(features.mean(dim=(2, 3)))


def net(width=32):
    torch.manual_seed(3)
    return Net(width)
'''

LOADER = '''
"""Calibration data from code, which is interrupted once, at its third batch."""
from pathlib import Path

import numpy as np

MARK = Path(__file__).with_name("interrupted")


def batches():
    images = np.load(Path(__file__).with_name("data.npz"))["image"]
    for index, image in enumerate(images):
        if index == 3 and not MARK.exists():
            MARK.touch()
            raise KeyboardInterrupt
        yield {"image": image[None]}
'''

CONFIG = """
model:
  source: net.py:net
  arguments: {width: 32}
  inputs: [{name: image, shape: [1, 2, 12, 12]}]
data:
  calibration: data.npz
  evaluation: data.npz
  labels: label
quantize:
  methods: [minmax, entropy, auto]
  modes: [static, dynamic, weight-only]
benchmark: {rounds: 5, budget_s: 0.2, warmup_s: 0.02}
output: out
"""


ON_CPU = ["--backend", "onnxruntime"]
"""What these tests state is true of the processor; tests/tensorrt runs the same over TensorRT."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the model's code, data with labels, a configuration."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "net.py").write_text(MODEL)
    (folder / "loader.py").write_text(LOADER)
    (folder / "config.yaml").write_text(CONFIG)
    rng = np.random.default_rng(5)
    images = rng.normal(size=(40, 2, 12, 12)).astype(np.float32)
    np.savez(folder / "data.npz", image=images, label=rng.integers(0, 6, 40))
    return folder


@pytest.fixture(scope="module")
def finished(project: Path) -> Path:
    """The folder of a finished run."""
    assert main(["run", *ON_CPU, str(project / "config.yaml")]) == 0
    return project / "out"


def read(path: Path) -> dict:
    """Read a JSON file."""
    return json.loads(path.read_text())


def test_every_file_is_written_and_recorded(finished: Path):
    """A run leaves all its files, and the manifest's SHA-256 are theirs."""
    files = read(finished / "manifest.json")["files"]

    assert {"model.onnx", "calibration.npz", "calibration.cache", "model.int8.onnx", "model.int8.cpu.onnx"} <= set(
        files
    )
    assert {"model.fp16.onnx", "benchmark.json", "accuracy.json", "sizes.json", "methods/auto.onnx"} <= set(files)
    assert all(sha256((finished / name).read_bytes()).hexdigest() == entry["sha256"] for name, entry in files.items())
    assert (finished / "report.html").stat().st_size > 10_000
    assert (finished / "polygraphy" / "commands.sh").exists()
    assert not list(finished.rglob("*.part*"))


def test_accuracy_covers_every_model(finished: Path):
    """accuracy.json holds FP16, each method on both targets and the other modes; only TensorRT's are simulated."""
    result = read(finished / "accuracy.json")
    rows = {row["name"]: row for row in result["candidates"]}

    without_scales = {"INT8 dynamic, cpu", "INT8 weight-only, cpu"}
    assert set(rows) == {"FP16", "INT8+FP16 entropy, tensorrt"} | without_scales | {
        f"INT8 {method}, {target}" for method in ("minmax", "entropy", "auto") for target in ("tensorrt", "cpu")
    }
    assert all(row["samples"] == 40 and row["top1"] is not None for row in rows.values())
    assert rows["INT8 minmax, tensorrt"]["simulated"]
    assert rows["INT8 minmax, tensorrt"]["execution"] == "exact"
    assert not rows["INT8 minmax, cpu"]["simulated"]
    assert rows["INT8 minmax, tensorrt"]["sqnr_db"] > 30
    assert rows["FP16"]["sqnr_db"] > 50


def test_benchmark_times_what_this_machine_runs(finished: Path):
    """benchmark.json times FP32, FP16, the delivered CPU model and the other modes; nothing in it is simulated."""
    result = read(finished / "benchmark.json")
    modes = ["INT8 dynamic, cpu", "INT8 weight-only, cpu"]

    assert [row["name"] for row in result["candidates"]] == ["FP32", "FP16", "INT8 entropy, cpu", *modes]
    assert not any(row["simulated"] for row in result["candidates"])
    assert result["candidates"][0]["speedup"] == 1.0


def test_weights_are_stored_as_int8(finished: Path):
    """sizes.json: nearly all weight bytes of the INT8 model are INT8, and one byte each."""
    rows = {row["name"]: row for row in read(finished / "sizes.json")["models"]}
    full, small = rows["FP32"]["weight_bytes"], rows["INT8 entropy, tensorrt"]["weight_bytes"]

    weights = 2 * 32 * 9 + 32 * 32 * 9 + 32 * 16
    assert full["FLOAT"] >= 4 * weights
    assert small["INT8"] == pytest.approx(weights, abs=128)  # and the zero points


def test_names_and_interface_survive(finished: Path):
    """Every model of a run keeps the input and the output of the FP32 model, in name and type."""
    fp32 = onnx.load(finished / "model.onnx").graph
    for name in ("model.int8.onnx", "model.int8.cpu.onnx", "model.fp16.onnx"):
        graph = onnx.load(finished / name).graph

        assert [value.name for value in graph.input] == ["image"]
        assert list(graph.output) == list(fp32.output)


def test_resume_keeps_finished_stages(project: Path, finished: Path):
    """With --resume nothing that is unchanged is made again."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.onnx")}
    measured = read(finished / "benchmark.json")

    assert main(["run", *ON_CPU, str(project / "config.yaml"), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.onnx")} == before
    assert read(finished / "benchmark.json") == measured


def test_resume_makes_a_damaged_file_again(project: Path, finished: Path):
    """With --resume a stage whose file was changed runs again, and gives the same bytes."""
    original = (finished / "model.int8.onnx").read_bytes()
    (finished / "model.int8.onnx").write_bytes(original[:-100])

    assert main(["run", *ON_CPU, str(project / "config.yaml"), "--resume"]) == 0
    assert (finished / "model.int8.onnx").read_bytes() == original


def resumed(project: Path, *settings: str) -> int:
    """Run, or go on with, a short run in the folder `changing`."""
    words = ["--set", "quantize.methods=[minmax]", "--set", "quantize.method=minmax", "--set", "data.labels=null"]
    for setting in settings:
        words += ["--set", setting]
    return main(
        ["run", *ON_CPU, str(project / "config.yaml"), *words, "--output", str(project / "changing"), "--resume"]
    )


def test_resume_sees_changed_code_and_data(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """With --resume a model whose code changed is exported again, and data whose files changed are read again."""
    batches = tmp_path / "batches"
    batches.mkdir()
    images = np.load(project / "data.npz")["image"]
    for index in range(3):
        np.save(batches / f"{index}.npy", images[index : index + 1])
    (tmp_path / "changing_net.py").write_text(MODEL)
    settings = [f"model.source={tmp_path}/changing_net.py:net", f"data.calibration={batches}"]
    model, calibration = project / "changing" / "model.onnx", project / "changing" / "calibration.npz"

    assert resumed(project, *settings) == 0
    first = model.read_bytes(), calibration.read_bytes()
    np.save(batches / "1.npy", images[1:2] * 2)
    assert resumed(project, *settings) == 0
    second = model.read_bytes(), calibration.read_bytes()
    assert second[0] == first[0]
    assert second[1] != first[1]
    (tmp_path / "changing_net.py").write_text(MODEL.replace("manual_seed(3)", "manual_seed(4)"))
    assert resumed(project, *settings) == 0
    assert model.read_bytes() != first[0]


def test_resume_trusts_code_only_with_an_identity(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A calibration from a callable is kept with data_id; without one it is made again, and the line says why."""
    (tmp_path / "feed.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    with open(__file__ + '.count', 'a') as count:\n"
        "        count.write('.')\n"
        "    yield {'image': np.ones((1, 2, 12, 12), np.float32)}\n"
    )
    count = tmp_path / "feed.py.count"
    settings = [f"data.calibration={tmp_path}/feed.py:batches"]

    assert resumed(project, *settings) == 0
    before = len(count.read_text())
    capfd.readouterr()
    assert resumed(project, *settings) == 0
    assert len(count.read_text()) > before
    assert "data.data_id" in capfd.readouterr().err
    settings.append("data.data_id=ones")
    assert resumed(project, *settings) == 0
    before = len(count.read_text())
    assert resumed(project, *settings) == 0
    assert len(count.read_text()) == before
    assert "data.data_id" not in capfd.readouterr().err


def test_interrupted_run_goes_on(project: Path, capfd: pytest.CaptureFixture[str]):
    """Ctrl-C during calibration leaves whole files only; --resume goes on behind the finished export."""
    command = [
        "run",
        str(project / "config.yaml"),
        "--set",
        f"data.calibration={project / 'loader.py'}:batches",
        "--set",
        "quantize.methods=[minmax]",
        "--set",
        "quantize.method=minmax",
        "--output",
        str(project / "stopped"),
    ]
    assert main(command) == 130
    assert "--resume" in capfd.readouterr().err
    assert sorted(path.name for path in (project / "stopped").iterdir()) == [
        "export.json",
        "manifest.json",
        "model.onnx",
    ]
    exported = (project / "stopped" / "model.onnx").stat().st_mtime_ns

    assert main([*command, "--resume"]) == 0
    assert (project / "stopped" / "model.onnx").stat().st_mtime_ns == exported
    assert (project / "stopped" / "report.html").exists()


def test_folder_of_the_user_is_left_alone(project: Path, capfd: pytest.CaptureFixture[str]):
    """A run does not replace files in a folder that no run wrote."""
    folder = project / "mine"
    folder.mkdir()
    (folder / "model.onnx").write_text("precious")

    assert main(["run", *ON_CPU, str(project / "config.yaml"), "--output", str(folder)]) == 1
    assert "model.onnx" in capfd.readouterr().err
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("model.onnx", "precious")]


def test_stages_one_by_one(project: Path, capfd: pytest.CaptureFixture[str]):
    """Each stage works on its own, by the command line, on what the one before wrote."""
    at = project / "stages"
    data = ["--data", str(project / "data.npz")]

    def run(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 0
        return capfd.readouterr().out

    printed = run("export", f"{project}/net.py:net", "--input", "image:1x2x12x12", *data, "--output", at / "m.onnx")
    assert "output at batch 1: differs from PyTorch by at most" in printed
    run("calibrate", at / "m.onnx", *data, "--output", at / "c.npz")
    run("quantize", at / "m.onnx", "--calibration", at / "c.npz", "--output", at / "q.onnx", "--residual", "float")
    run("bench", at / "m.onnx", at / "q.onnx", "--rounds", "5", "--seconds", "0.2", "--json", at / "b.json")
    run("compare", at / "m.onnx", at / "q.onnx", *data, "--labels", "label", "--json", at / "a.json")
    run("cache", "export", at / "c.npz", "--output", at / "k.cache", "--method", "mse")

    assert set(read(at / "b.json")) >= {"rounds", "machine", "candidates"}
    assert read(at / "a.json")["candidates"][0]["sqnr_db"] > 30
    assert (at / "k.cache").read_text().startswith("TRT-101601-EntropyCalibration2\nimage: ")
    assert "image" in run("cache", "show", at / "c.npz")
    assert "scale" in run("cache", "show", at / "k.cache")


def test_models_of_one_file_name_are_told_apart(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Two files called model.onnx stand in the tables under their whole paths."""
    copy = tmp_path / "model.onnx"
    copy.write_bytes((finished / "model.onnx").read_bytes())
    models = [str(finished / "model.onnx"), str(copy)]

    assert main(["bench", *models, "--rounds", "5", "--seconds", "0.2", "--json", str(tmp_path / "b.json")]) == 0
    data = ["--data", str(finished.parent / "data.npz")]
    assert main(["compare", *models, *data, "--json", str(tmp_path / "a.json")]) == 0
    accuracy = read(tmp_path / "a.json")

    assert [row["name"] for row in read(tmp_path / "b.json")["candidates"]] == models
    assert [accuracy["reference"], accuracy["candidates"][0]["name"]] == models


def test_python_api_gives_the_same_scales(project: Path, finished: Path):
    """The Python API of the README gives the scales that the command line wrote."""
    from trt_int8 import Calibration, calibrate, quantize

    images = np.load(project / "data.npz")["image"]
    calibration = calibrate(finished / "model.onnx", ({"image": image[None]} for image in images))
    written = Calibration.load(finished / "calibration.npz")

    for method in ("minmax", "entropy", "percentile", "mse"):
        assert calibration.scales(method) == written.scales(method)
    result = quantize(finished / "model.onnx", calibration, output=project / "api.onnx")
    assert (project / "api.onnx").read_bytes() == (finished / "model.int8.onnx").read_bytes()
    assert result.held_back == ()


def test_init_writes_a_configuration_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`init` writes a file and never replaces one."""
    path = tmp_path / "config.yaml"

    assert main(["init", str(path)]) == 0
    text = path.read_text()
    assert "source:" in text
    assert main(["init", str(path)]) == 1
    assert "exists already" in capfd.readouterr().err
    assert path.read_text() == text


def test_doctor_answers(capfd: pytest.CaptureFixture[str]):
    """`doctor` names the versions in use."""
    assert main(["doctor"]) == 0
    assert "onnxruntime" in capfd.readouterr().out.lower()


@pytest.fixture
def unwritable_disk() -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    """Run the command line where no file can grow beyond 20 kB, as on a disk that is full."""

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        script = (
            "import resource, signal, sys\n"
            "from trt_int8.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        # Coverage, where it measures, would want to write its own file there.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, "-c", script, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_full_disk(
    project: Path, finished: Path, unwritable_disk: Callable[[list[str]], subprocess.CompletedProcess[str]]
):
    """A disk that fills up while the calibration is written: one line, status 1, no half file."""
    output = project / "full" / "calibration.npz"
    done = unwritable_disk(
        ["calibrate", str(finished / "model.onnx"), "--data", str(project / "data.npz"), "--output", str(output)]
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: Cannot write '{output}'")
    assert "Traceback" not in done.stderr
    assert list(output.parent.iterdir()) == []


def test_the_backend_and_its_reason_are_said(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr and in the manifest; asking for TensorRT where there is none ends with one line before any stage."""
    folder = project / "chosen"
    arguments = ["run", str(project / "config.yaml"), "--output", str(folder), "--set", "quantize.methods=[entropy]"]
    assert main([*arguments, *ON_CPU]) == 0
    assert "backend: onnxruntime (as asked for)" in capfd.readouterr().err
    assert read(folder / "manifest.json")["backend"] == {"name": "onnxruntime", "reason": "as asked for"}

    if choose_backend("auto").name == "onnxruntime":
        assert main([*arguments, "--backend", "tensorrt"]) == 1
        error = capfd.readouterr().err
        assert error.startswith("error: Cannot run on TensorRT: ")
        assert error.count("\n") == 1
