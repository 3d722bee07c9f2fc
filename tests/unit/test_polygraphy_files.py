"""The `polygraphy/` folder of a run: readable by Polygraphy, and its commands run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import load_json

from engines.onnxrt import OnnxRuntimeRunner
from trt_int8.errors import FileAccessError
from trt_int8.polygraphy_commands import commands_script
from trt_int8.polygraphy_files import MAX_BATCHES, MAX_BYTES, Recording, file_stems


def perturbed(model: Path, name: str, noise: float) -> Path:
    """Write a copy of `model` whose weights are off by `noise` times a normal deviate."""
    rng = np.random.default_rng(1)
    proto = onnx.load(model)
    for weight in proto.graph.initializer:
        values = numpy_helper.to_array(weight)
        weight.CopyFrom(
            numpy_helper.from_array(values + rng.normal(0, noise, values.shape).astype(np.float32), weight.name)
        )
    path = model.with_name(name)
    onnx.save(proto, path)
    return path


def record(models: list[OnnxRuntimeRunner], batches: int = 2) -> Recording:
    """Record what `models` make of random batches of three images."""
    rng = np.random.default_rng(2)
    recording = Recording(models)
    sessions = [model.make_session() for model in models]
    for _ in range(batches):
        feeds = {"input": rng.normal(size=(3, 3, 8, 8)).astype(np.float32)}
        results = RunResults()
        for name, session in zip(recording.names, sessions, strict=True):
            results.append((name, [IterationResult({"logits": session.run(None, feeds)[0]}, 0.5, name)]))
        recording.add(feeds, results)
    return recording


def result_of(name: str, **outputs: Any) -> RunResults:
    """Make one model's results of one batch."""
    return RunResults([(name, [IterationResult(outputs, 0.1, name)])])


def run_commands(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a run folder's commands from somewhere else, with the `polygraphy` of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(folder / "polygraphy" / "commands.sh")],
        cwd="/",
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_run_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    """FP32 reproduces itself from the file and from the script, a close candidate passes: exit status 0.

    The candidate is placed for TensorRT: where that is not installed, the script says that its build is left out.
    """
    close = perturbed(tiny_model, "it's close.onnx", 0.001)
    proto = onnx.load(close)
    onnx.helper.set_model_props(proto, {"trt_int8.target": "tensorrt"})
    onnx.save(proto, close)
    models = [OnnxRuntimeRunner(tiny_model, name="FP32 model"), OnnxRuntimeRunner(close)]
    folder = tiny_model.parent / "a run"
    record(models).write(folder)
    (tmp_path / "tensorrt.py").write_text("raise ImportError\n")

    done = run_commands(folder, PYTHONPATH=str(tmp_path))

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED | Runtime") == 3
    assert "is not there: it's close.onnx built by TensorRT." in done.stdout


def test_commands_fail_for_a_broken_candidate(tiny_model: Path) -> None:
    """A candidate that computes something else gives exit status 1, and the checks before it still run."""
    models = [OnnxRuntimeRunner(tiny_model), OnnxRuntimeRunner(perturbed(tiny_model, "broken.onnx", 3.0))]
    recording = record(models)
    recording.write(tiny_model.parent)

    done = run_commands(tiny_model.parent)

    assert done.returncode == 1
    assert done.stdout.count("PASSED | Runtime") == 2
    assert [check.passed for check in recording.check()] == [False, False]


def test_files_hold_what_was_fed_and_given(tiny_model: Path) -> None:
    """Polygraphy reads the inputs, each model's outputs and the script's batches back as they were."""
    model = OnnxRuntimeRunner(tiny_model)
    written = record([model], batches=3).write(tiny_model.parent)

    folder = tiny_model.parent / "polygraphy"
    inputs = load_json(str(folder / "inputs.json"))
    outputs = RunResults.load(str(folder / "tiny_outputs.json"))["tiny"]
    with model:
        for feeds, iteration in zip(inputs, outputs, strict=True):
            np.testing.assert_array_equal(model.infer(feeds)["logits"], iteration["logits"])
    script: dict[str, Any] = {"__file__": str(folder / "data_loader.py")}
    exec((folder / "data_loader.py").read_text(), script)
    for loaded, feeds in zip(script["load_data"](), inputs, strict=True):
        np.testing.assert_array_equal(loaded["input"], feeds["input"])
    assert set(written) == set(folder.iterdir())
    assert os.access(folder / "commands.sh", os.X_OK)


def test_recording_copies(tiny_model: Path) -> None:
    """Buffers that are used again do not change what was recorded."""
    recording = Recording([OnnxRuntimeRunner(tiny_model)])
    image, logits = np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 7), np.float32)
    recording.add({"input": image}, result_of("tiny", logits=logits))
    image += 1.0
    logits += 1.0
    recording.write(tiny_model.parent)

    folder = tiny_model.parent / "polygraphy"
    assert not load_json(str(folder / "inputs.json"))[0]["input"].any()
    assert not RunResults.load(str(folder / "tiny_outputs.json"))["tiny"][0]["logits"].any()


def test_recording_is_bounded_in_batches(tiny_model: Path) -> None:
    """After sixteen batches nothing more is kept."""
    assert record([OnnxRuntimeRunner(tiny_model)], batches=MAX_BATCHES + 5).batches == MAX_BATCHES


def test_recording_is_bounded_in_bytes(tiny_model: Path) -> None:
    """Batches of a third of the room: three fit, a fourth does not, and a small one after it is not taken either."""
    recording = Recording([OnnxRuntimeRunner(tiny_model)])
    large = np.zeros(MAX_BYTES // 3 - 64, np.int8)
    for image in [large] * 4 + [large[:1]]:
        recording.add({"input": image}, result_of("tiny", logits=np.zeros(1, np.float32)))

    assert recording.batches == 3


def test_first_batch_is_always_kept(tiny_model: Path) -> None:
    """One batch larger than the room is still recorded: commands without data would be of no use."""
    recording = Recording([OnnxRuntimeRunner(tiny_model)])
    recording.add({"input": np.zeros(MAX_BYTES + 1, np.int8)}, result_of("tiny", logits=np.zeros(1, np.float32)))

    assert recording.batches == 1


def test_check_by_hand(tiny_model: Path) -> None:
    """Outputs (3, 4) and (3, 4.5): cosine 27 / (5 sqrt(29.25)), SNR 20 dB; of two batches the worse one is told."""
    models = [OnnxRuntimeRunner(tiny_model, name=name) for name in ("reference", "candidate")]
    recording = Recording(models)
    for candidate in ([3.0, 4.5], [3.0, 4.0]):
        results = result_of("reference", y=np.array([[3.0, 4.0]], np.float32))
        results.extend(result_of("candidate", y=np.array([candidate], np.float32)))
        recording.add({"input": np.zeros(1, np.float32)}, results)

    cosine, snr = recording.check()

    assert (cosine.name, cosine.metric, cosine.passed) == ("candidate", "cosine_similarity", True)
    assert cosine.worst == {"y": pytest.approx(27 / (5 * 29.25**0.5))}
    assert (snr.metric, snr.passed) == ("snr", True)
    assert snr.worst == {"y": pytest.approx(20.0)}


def test_identical_outputs_have_no_finite_snr(tiny_model: Path) -> None:
    """Polygraphy gives infinity, which JSON cannot hold: None, and the check passes."""
    models = [OnnxRuntimeRunner(tiny_model, name=name) for name in ("first", "second")]

    _, snr = record(models).check()

    assert snr.worst == {"logits": None}
    assert snr.passed


def test_integer_outputs_are_checked_too(tiny_model: Path) -> None:
    """Class numbers of int64 go through Polygraphy's metrics as any other output."""
    recording = Recording([OnnxRuntimeRunner(tiny_model, name=name) for name in ("first", "second")])
    results = result_of("first", y=np.array([3, 4]))
    results.extend(result_of("second", y=np.array([3, 4])))
    recording.add({"input": np.zeros(1, np.float32)}, results)

    assert all(check.passed for check in recording.check())


@pytest.mark.parametrize("method", ["check", "write"])
def test_polygraphy_is_quiet(tiny_model: Path, capfd: pytest.CaptureFixture[str], method: str) -> None:
    """Its logger prints nothing, not even about outputs that fail."""
    models = [OnnxRuntimeRunner(tiny_model), OnnxRuntimeRunner(perturbed(tiny_model, "broken.onnx", 3.0))]
    recording = record(models)

    getattr(recording, method)(*([tiny_model.parent] if method == "write" else []))

    assert capfd.readouterr() == ("", "")


def test_names_become_distinct_file_names() -> None:
    """Suffix, blanks, slashes and leading dots go; what would be the same file gets a number."""
    assert file_stems(["model.onnx", "model", "INT8 (entropy)", "../x", "", "model.int8.onnx"]) == [
        "model",
        "model-2",
        "INT8_entropy_",
        "_x",
        "model-3",
        "model.int8",
    ]


def test_unwritable_folder_is_one_clear_error(tiny_model: Path) -> None:
    """A file where the folder should be is named."""
    with pytest.raises(FileAccessError, match="Cannot write"):
        record([OnnxRuntimeRunner(tiny_model)], batches=1).write(tiny_model)


def test_models_without_a_file_have_no_commands(fake_runner: Any) -> None:
    """What Polygraphy cannot load is not written down; the script still runs."""
    script = commands_script(
        [fake_runner()], [], folder=Path(), inputs="inputs.json", loader="loader.py", reference_outputs="outputs.json"
    )

    assert "polygraphy run" not in script
    assert subprocess.run(["bash", "-c", script], check=False).returncode == 0


def test_a_name_of_two_lines_is_one_comment(tiny_model: Path, tmp_path: Path) -> None:
    """Names are shown in comments of the script, and none of them is run."""
    record([OnnxRuntimeRunner(tiny_model, name="FP32\nexit 7")]).write(tmp_path)

    assert "# FP32 exit 7 still gives" in (tmp_path / "polygraphy" / "commands.sh").read_text()
