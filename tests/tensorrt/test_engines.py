"""Engines built, loaded and run over the SIMULATED TensorRT: every call is real, no figure is a GPU's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt
from onnx import TensorProto, helper

from calibrators.errors import FileAccessError
from calibrators.tensorrt import ImplicitCalibrator, scales_calibrator, streaming_calibrator
from engines.device import UploadBuffers, open_device
from engines.errors import EngineBuildError, EngineLoadError, InferenceError
from engines.onnxrt import load_header, tensor_specs
from engines.profiles import ShapeRange, batch_profile
from engines.sidecar import Provenance, read_sidecar, sidecar_path, write_sidecar
from engines.trt_builder import build_engine
from engines.trt_inspector import layer_table
from engines.trt_log import tensorrt_log
from engines.trt_options import BuildOptions
from engines.trt_profile import inspect_engine
from engines.trt_runner import TensorRTRunner
from engines.trt_timing_cache import TimingCacheFile
from trt_int8.api import calibrate, quantize
from trt_int8.quantization import convert_fp16

RNG = np.random.default_rng(11)
BATCHES = [{"input": RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


def options(model: Path, **changes: Any) -> BuildOptions:
    inputs, _ = tensor_specs(load_header(model))
    return replace(BuildOptions(profiles=[batch_profile(inputs, 1, 4, 8)]), **changes)


@pytest.fixture
def models(tiny_model: Path) -> dict[str, Path]:
    """The tiny model in the types of each precision."""
    folder = tiny_model.parent
    calibration = calibrate(tiny_model, BATCHES)
    quantize(tiny_model, calibration, output=folder / "int8.onnx", method="minmax", target="tensorrt")
    quantize(tiny_model, calibration, output=folder / "mixed.onnx", method="minmax", precision="int8+fp16")
    convert_fp16(tiny_model, calibration, output=folder / "fp16.onnx")
    return {
        "fp32": tiny_model,
        "tf32": tiny_model,
        "fp16": folder / "fp16.onnx",
        "int8": folder / "int8.onnx",
        "int8+fp16": folder / "mixed.onnx",
    }


@pytest.fixture
def engine(tiny_model: Path) -> Path:
    path = tiny_model.with_name("tiny.fp32.engine")
    build_engine(tiny_model, path, options(tiny_model))
    return path


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "int8", "int8+fp16"])
def test_engines_answer_as_their_models_do(
    models: dict[str, Path], run_model: Callable[..., Any], precision: Any, tmp_path: Path
) -> None:
    """Built from our own files, loaded, run at several batch sizes: ONNX Runtime's exact answers."""
    path = tmp_path / f"m.{precision}.engine"
    built = build_engine(models[precision], path, options(models[precision], precision=precision))

    assert built.path == path
    with TensorRTRunner(path) as runner:
        for batch in (4, 1, 8):
            feeds = {"input": RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32)}
            answer = runner.infer(feeds)["logits"]
            expected = run_model(models[precision], feeds)["logits"]
            assert answer.dtype == np.float32
            np.testing.assert_allclose(answer, expected, atol=2e-3 if "fp16" in precision else 1e-4)


def test_the_sidecar_tells_the_engines_origin(models: dict[str, Path], tmp_path: Path) -> None:
    """Release, device, precision, profiles, model, calibration and options are there, and the device is SIMULATED."""
    path = tmp_path / "m.int8.engine"
    chosen = options(models["int8"], precision="int8", workspace_bytes=1 << 28, optimization_level=2)
    build_engine(models["int8"], path, chosen, calibration=Provenance("minmax", "ab"))
    sidecar = read_sidecar(path)

    assert sidecar is not None
    assert sidecar.environment.tensorrt == trt.__version__
    assert sidecar.environment.gpu == "SIMULATED"
    assert sidecar.precision == "int8"
    assert sidecar.profiles == ({"input": ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))},)
    assert sidecar.calibration == Provenance("minmax", "ab")
    assert sidecar.options["optimization_level"] == 2
    assert sidecar.options["implicit"] is False
    assert sidecar.plan_bytes == path.stat().st_size
    assert [str(spec) for spec in sidecar.inputs] == ["input: float32 (batch, 3, 8, 8)"]


def test_a_runner_describes_itself_before_it_is_entered(engine: Path) -> None:
    """Inputs and outputs come from the sidecar, and figures from here are marked as simulated."""
    runner = TensorRTRunner(engine)

    assert [str(spec) for spec in (*runner.inputs, *runner.outputs)] == [
        "input: float32 (batch, 3, 8, 8)",
        "logits: float32 (batch, 16)",
    ]
    assert runner.simulated
    assert runner.execution == "native"
    assert runner.name == engine.name


def test_a_runner_may_be_entered_again(engine: Path) -> None:
    """Everything is given back in between, and answers stay; outside of the block there is no session."""
    runner = TensorRTRunner(engine)
    with open_device() as device:
        free = device.memory()[0]
        answers = []
        for _ in range(2):
            with runner:
                answers.append(runner.infer(BATCHES[0])["logits"])
            assert device.memory()[0] == free
    np.testing.assert_array_equal(*answers)
    with pytest.raises(RuntimeError, match="outside"):
        runner.infer(BATCHES[0])


def test_answers_belong_to_the_caller(engine: Path) -> None:
    """A later run leaves earlier answers alone."""
    with TensorRTRunner(engine) as runner:
        first = runner.infer(BATCHES[0])["logits"]
        kept = first.copy()
        runner.infer(BATCHES[1])
        np.testing.assert_array_equal(first, kept)


def test_a_shape_outside_the_profile_names_the_profile(engine: Path) -> None:
    """The message holds min, opt and max; the runner works on."""
    with TensorRTRunner(engine) as runner:
        with pytest.raises(InferenceError, match=r"shape \(9, 3, 8, 8\).*min \(1, 3.*opt \(4, 3.*max \(8, 3"):
            runner.infer({"input": np.zeros((9, 3, 8, 8), np.float32)})
        with pytest.raises(InferenceError, match="dtype float64"):
            runner.infer({"input": np.zeros((1, 3, 8, 8))})
        assert runner.infer(BATCHES[0])["logits"].shape == (4, 16)


def test_the_profile_that_holds_the_shape_is_chosen(tiny_model: Path, run_model: Callable[..., Any]) -> None:
    """Two profiles: each shape runs by the one that it fits in, back and forth."""
    inputs, _ = tensor_specs(load_header(tiny_model))
    profiles = [batch_profile(inputs, 1, 1, 2), batch_profile(inputs, 4, 6, 8)]
    path = tiny_model.with_name("two.engine")
    build_engine(tiny_model, path, BuildOptions(profiles=profiles))

    with TensorRTRunner(path) as runner:
        for batch in (1, 8, 2, 4):
            feeds = {"input": RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32)}
            np.testing.assert_allclose(runner.infer(feeds)["logits"], run_model(tiny_model, feeds)["logits"], atol=1e-4)
        with pytest.raises(InferenceError, match=r"max \(2, 3, 8, 8\) or min \(4,"):
            runner.infer({"input": np.zeros((3, 3, 8, 8), np.float32)})


def test_output_shapes_known_only_at_run_time(tmp_path: Path, graph_builder: Any) -> None:
    """NonZero gives as many indices as there are non-zeros: the answer has that shape each time, larger or smaller."""
    builder = graph_builder()
    builder.input("x", (2, 4))
    builder.nodes_of("NonZero", ["x"], ["indices"])
    output = helper.make_tensor_value_info("indices", TensorProto.INT64, [2, "found"])
    model = builder.save(tmp_path / "nonzero.onnx", [output])
    path = tmp_path / "nonzero.engine"
    build_engine(model, path)

    with TensorRTRunner(path, cuda_graph=True) as runner:
        for values in ([[1, 0, 0, 0], [0, 0, 0, 2]], [[1, 1, 1, 1], [1, 1, 1, 1]], [[0] * 4, [0] * 4]):
            x = np.array(values, np.float32)
            np.testing.assert_array_equal(runner.infer({"x": x})["indices"], np.nonzero(x))
        assert runner.graph_fallback is not None
        assert "known only after the run" in runner.graph_fallback


def test_a_captured_graph_answers_as_plain_runs_do(engine: Path) -> None:
    """After the first run at a shape its graph is launched on the data of each run; other shapes are captured anew."""
    with TensorRTRunner(engine) as plain, TensorRTRunner(engine, cuda_graph=True) as graph:
        for batch in (4, 4, 2, 4, 4):
            feeds = {"input": RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32)}
            np.testing.assert_array_equal(graph.infer(feeds)["logits"], plain.infer(feeds)["logits"])
            assert graph.session.captured
        assert graph.graph_fallback is None
        assert not plain.session.captured


def test_a_graph_that_cannot_be_captured_is_reported(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go on without, and the reason is kept."""
    monkeypatch.setenv("TRTSIM_NO_GRAPHS", "1")
    with TensorRTRunner(engine, cuda_graph=True) as runner:
        first, second = (runner.infer(BATCHES[0])["logits"] for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert runner.graph_fallback == "CUDA cannot begin to capture a CUDA graph: CUDA_ERROR_NOT_SUPPORTED"
        assert not runner.session.captured


def test_a_model_of_other_types_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """An engine takes its types from the model, so a precision that the model does not have is an error."""
    for precision, name, found in (
        ("int8", "fp32", "it holds float32 alone; expected Q/DQ nodes"),
        ("fp16", "int8", "it holds Q/DQ nodes; expected FP16 tensors"),
        ("fp32", "fp16", "it holds FP16 tensors; expected float32 alone"),
        ("int8+fp16", "int8", "expected Q/DQ nodes and FP16 tensors"),
        ("int8", "int8+fp16", "it holds Q/DQ nodes and FP16 tensors; expected Q/DQ nodes"),
    ):
        model = models[name]
        with pytest.raises(EngineBuildError, match=found):
            build_engine(model, tmp_path / "m.engine", options(model, precision=precision))
    assert not (tmp_path / "m.engine").exists()


def test_a_model_for_the_cpu_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Its unsigned codes are no TensorRT quantization."""
    quantize(tiny_model, calibrate(tiny_model, BATCHES), output=tmp_path / "cpu.onnx", target="cpu")

    with pytest.raises(EngineBuildError, match="--target tensorrt"):
        build_engine(tmp_path / "cpu.onnx", tmp_path / "m.engine", options(tiny_model, precision="int8"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"profiles": ()}, "no optimization profile"),
        ({"profiles": [{"inputs": ShapeRange((1,), (1,), (1,))}]}, "'inputs', which is no input"),
        ({"precision": "int4"}, "no precision 'int4'"),
        ({"workspace_bytes": 0}, "workspace limit"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"hardware_compatibility": "volta"}, "ampere_plus"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny_model: Path, changes: dict[str, Any], problem: str) -> None:
    """One line says what was found and what was expected."""
    with pytest.raises(EngineBuildError, match=problem):
        build_engine(tiny_model, tiny_model.with_name("m.engine"), options(tiny_model, **changes))


def test_an_operator_that_tensorrt_does_not_take_is_named(tmp_path: Path, graph_builder: Any) -> None:
    """The parser's error names the node, its operator and the opset."""
    builder = graph_builder()
    builder.input("x", (1, 4))
    builder.node("Det", [builder.node("Reshape", ["x", builder.constant(np.array([2, 2]))])], "y")
    model = builder.save(tmp_path / "det.onnx", [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])])

    with pytest.raises(EngineBuildError, match=r"(?s)opset 20.*Det") as caught:
        build_engine(model, tmp_path / "m.engine")
    assert "n_y" in str(caught.value)


def test_a_failed_build_quotes_the_log(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT gave no plan: the error holds its log, and nothing is written."""
    monkeypatch.setenv("TRTSIM_FAIL", "build")
    path = tiny_model.with_name("m.engine")

    with pytest.raises(EngineBuildError) as caught:
        build_engine(tiny_model, path, options(tiny_model))
    assert caught.value.log_lines
    assert "without it (--exclude)" in str(caught.value)
    assert not path.exists()
    assert not sidecar_path(path).exists()


def test_the_timing_cache_is_kept_between_builds(tiny_model: Path, tmp_path: Path) -> None:
    """It is made by the first build and read by the second."""
    cache = tmp_path / "timing.cache"
    chosen = options(tiny_model, timing_cache=cache)
    build_engine(tiny_model, tmp_path / "one.engine", chosen)
    kept = cache.read_bytes()
    second = build_engine(tiny_model, tmp_path / "two.engine", chosen)
    assert kept
    assert cache.read_bytes() == kept
    assert not any("timing cache" in note for note in second.notes)


def written_by_another_release(cache: Path) -> None:
    """Make a timing cache, and its record, of what this TensorRT does not take."""
    record = cache.with_name(f"{cache.name}.json")
    old = hashlib.sha256(cache.read_bytes()).hexdigest()
    cache.write_bytes(b"TIMING CACHE OF ANOTHER RELEASE")
    record.write_text(record.read_text().replace(old, hashlib.sha256(cache.read_bytes()).hexdigest()))


def test_a_timing_cache_of_another_release_is_made_anew(tiny_model: Path, tmp_path: Path) -> None:
    """It is known to be ours by its record, however often the release changes."""
    cache = tmp_path / "timing.cache"
    chosen = options(tiny_model, timing_cache=cache)
    build_engine(tiny_model, tmp_path / "m.engine", chosen)
    kept = cache.read_bytes()
    for _ in range(2):
        written_by_another_release(cache)
        again = build_engine(tiny_model, tmp_path / "m.engine", chosen)
        assert any("timing.cache is of another GPU" in note for note in again.notes)
        assert cache.read_bytes() == kept
    assert not any("timing cache" in note for note in build_engine(tiny_model, tmp_path / "m.engine", chosen).notes)


def test_a_crash_between_a_timing_cache_and_its_record_does_no_harm(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record goes first and still knows the cache that was there."""
    cache = tmp_path / "timing.cache"
    chosen = options(tiny_model, timing_cache=cache)
    build_engine(tiny_model, tmp_path / "m.engine", chosen)
    kept = cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("engines.trt_timing_cache.write_bytes", lambda path, data: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            TimingCacheFile(cache).write(b"new times")

    assert cache.read_bytes() == kept
    assert not TimingCacheFile(cache).foreign
    assert not any("timing cache" in note for note in build_engine(tiny_model, tmp_path / "m.engine", chosen).notes)


def test_a_timing_cache_of_somebody_else_is_read_and_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    """TensorRT takes it, so that its times serve; whose it is, it stays."""
    cache = tmp_path / "timing.cache"
    build_engine(tiny_model, tmp_path / "m.engine", options(tiny_model, timing_cache=cache))
    shared = tmp_path / "shared.cache"
    shared.write_bytes(cache.read_bytes())
    built = build_engine(tiny_model, tmp_path / "m.engine", options(tiny_model, timing_cache=shared))

    assert built.notes[0].startswith("The timing cache shared.cache was not written by trt-int8: it is read, and left")
    assert not shared.with_name("shared.cache.json").exists()


def test_a_file_that_is_no_timing_cache_is_not_replaced(tiny_model: Path, tmp_path: Path) -> None:
    """Neither in place of the cache nor of its record; an empty file is nothing to lose."""
    strange = tmp_path / "precious.npz"
    strange.write_bytes(b"precious")
    with pytest.raises(FileAccessError, match=r"precious\.npz': TensorRT .* does not take it .* with --timing-cache"):
        build_engine(tiny_model, tmp_path / "m.engine", options(tiny_model, timing_cache=strange))
    (tmp_path / "config.json").write_text('{"sha256": []}')
    with pytest.raises(FileAccessError, match=r"'config\.json' beside it is a file of something else"):
        build_engine(tiny_model, tmp_path / "m.engine", options(tiny_model, timing_cache=tmp_path / "config"))
    assert (strange.read_bytes(), (tmp_path / "config.json").read_text()) == (b"precious", '{"sha256": []}')
    assert not (tmp_path / "m.engine").exists()

    (tmp_path / "empty").touch()
    build_engine(tiny_model, tmp_path / "m.engine", options(tiny_model, timing_cache=tmp_path / "empty"))
    assert (tmp_path / "empty").stat().st_size


def test_the_build_is_shown_and_can_be_stopped(tiny_model: Path) -> None:
    """TensorRT's steps pass through the progress display; what is raised in there stops the build."""
    seen: list[tuple[str, int | None, int]] = []

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        count = 0
        for item in items:
            count += 1
            yield item
        seen.append((description, total, count))

    path = tiny_model.with_name("m.engine")
    build_engine(tiny_model, path, options(tiny_model), track=track)
    assert [(description, total == count) for description, total, count in seen] == [("build fp32", True)]

    def interrupted(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        yield from list(items)[:1]
        raise KeyboardInterrupt

    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_model, path, options(tiny_model), track=interrupted)
    assert not path.exists()


@pytest.mark.parametrize("level", ["ampere_plus", "same_compute_capability"])
def test_compatible_plans_are_built_and_loaded(tiny_model: Path, level: Any) -> None:
    """Hardware and version compatibility reach TensorRT, and the sidecar."""
    path = tiny_model.with_name("compatible.engine")
    built = build_engine(tiny_model, path, options(tiny_model, hardware_compatibility=level, version_compatible=True))

    assert built.sidecar.version_compatible
    assert built.sidecar.options["hardware_compatibility"] == level
    with TensorRTRunner(path) as runner:
        assert runner.infer(BATCHES[0])["logits"].shape == (4, 16)


def test_a_plan_of_another_gpu_or_release_is_refused_before_it_is_loaded(engine: Path) -> None:
    """The sidecar knows better than TensorRT's log."""
    sidecar = read_sidecar(engine)
    assert sidecar is not None
    write_sidecar(engine, replace(sidecar, environment=replace(sidecar.environment, gpu="NVIDIA T4")))
    with pytest.raises(EngineLoadError, match="built for NVIDIA T4"), TensorRTRunner(engine):
        pass
    write_sidecar(engine, replace(sidecar, environment=replace(sidecar.environment, tensorrt="9.0.0.0")))
    with pytest.raises(EngineLoadError, match=r"built with TensorRT 9\.0\.0\.0"), TensorRTRunner(engine):
        pass


def test_a_trusted_plan_without_a_sidecar_runs(engine: Path) -> None:
    """What the sidecar would have told is read from the engine; the names of dynamic axes are lost."""
    sidecar_path(engine).unlink()
    with pytest.raises(EngineLoadError, match="--trust"):
        TensorRTRunner(engine)
    with TensorRTRunner(engine, trust=True) as runner:
        assert [str(spec) for spec in runner.inputs] == ["input: float32 (?, 3, 8, 8)"]
        assert runner.simulated
        assert runner.infer(BATCHES[0])["logits"].shape == (4, 16)


def test_a_trusted_file_that_is_no_plan_quotes_tensorrt(tmp_path: Path) -> None:
    """TensorRT refuses it, and its reason is in the message."""
    path = tmp_path / "no.engine"
    path.write_bytes(b"this is no plan" * 100)

    with pytest.raises(EngineLoadError, match=r"cannot load the engine .*Expected a plan of this release"):
        TensorRTRunner(path, trust=True)


def test_out_of_device_memory_says_how_much_was_asked(tiny_model: Path) -> None:
    """The bytes, what is free, and what to lower; a smaller batch then runs, of a size that ran before too."""
    inputs, _ = tensor_specs(load_header(tiny_model))
    path = tiny_model.with_name("m.engine")
    build_engine(tiny_model, path, BuildOptions(profiles=[batch_profile(inputs, 1, 1, 4096)]))
    script = (
        "import sys, numpy as np\n"
        "from engines.errors import InferenceError\n"
        "from engines.trt_runner import TensorRTRunner\n"
        "with TensorRTRunner(sys.argv[1]) as runner:\n"
        "    runner.infer({'input': np.zeros((4, 3, 8, 8), np.float32)})\n"
        "    try:\n"
        "        runner.infer({'input': np.zeros((4096, 3, 8, 8), np.float32)})\n"
        "    except InferenceError as caught:\n"
        "        print(caught)\n"
        "    print(runner.infer({'input': np.zeros((2, 3, 8, 8), np.float32)})['logits'].shape)\n"
    )
    environment = os.environ | {"TRTSIM_DEVICE_MEMORY_MB": "2"}
    command = [sys.executable, "-c", script, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    message, answer = result.stdout.splitlines()
    assert (
        f"m.engine failed on the GPU: Out of device memory on SIMULATED: {4096 * 192 * 4} bytes were asked" in message
    )
    assert "Lower the batch size" in message
    assert answer == "(2, 16)"


@pytest.mark.parametrize(
    ("failure", "error", "text"),
    [
        ("context", EngineLoadError, "could not make a context"),
        ("enqueue", InferenceError, "failed in TensorRT"),
        ("device", InferenceError, "failed on the GPU"),
    ],
)
def test_failures_at_run_time_are_errors_of_ours(engine: Path, failure: str, error: type, text: str) -> None:
    """Whatever TensorRT or the device refuse comes back with its reason, in one line."""
    script = (
        "import sys, numpy as np\n"
        "from engines.trt_runner import TensorRTRunner\n"
        "try:\n"
        "    with TensorRTRunner(sys.argv[1]) as runner:\n"
        "        runner.infer({'input': np.zeros((1, 3, 8, 8), np.float32)})\n"
        "except Exception as caught:\n"
        "    print(type(caught).__name__, caught)\n"
    )
    command = [sys.executable, "-c", script, str(engine)]
    environment = os.environ | {"TRTSIM_FAIL": failure}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(error.__name__)
    assert text in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.tensorrt(10)
def test_known_scales_build_an_implicit_engine(tiny_model: Path, run_model: Callable[..., Any]) -> None:
    """TensorRT 10 takes scales through a calibrator, without data, into an FP32 model; the answers change a little."""
    scales = calibrate(tiny_model, BATCHES, tensors="all").scales("minmax")
    path = tiny_model.with_name("implicit.engine")
    calibrator = scales_calibrator(trt, scales)
    built = build_engine(tiny_model, path, options(tiny_model, precision="int8"), calibrator=calibrator)
    expected = run_model(tiny_model, BATCHES[0])["logits"]

    assert calibrator.consulted
    assert built.sidecar.options["implicit"] is True
    with TensorRTRunner(path) as runner:
        answer = runner.infer(BATCHES[0])["logits"]
    difference = np.abs(answer - expected).max()
    assert 0 < difference < 0.1 * np.abs(expected).max()


@dataclass(frozen=True)
class Sample:
    """A batch as calibrators take it."""

    feeds: Mapping[str, Any]
    samples: int = 4


@pytest.mark.tensorrt(10)
@pytest.mark.parametrize("kind", ["entropy2", "minmax"])
def test_tensorrt_drives_a_calibrator_over_our_device_memory(
    tiny_model: Path, run_model: Callable[..., Any], kind: str
) -> None:
    """Each batch goes to the device once, at the shape of the profile's optimum; the engine answers nearly the same."""
    path = tiny_model.with_name("implicit.engine")
    with open_device() as device, UploadBuffers(device) as buffers:
        batches = [Sample(batch) for batch in BATCHES]
        calibrator = streaming_calibrator(trt, kind, batches, buffers=buffers, batch_size=4)
        chosen = options(tiny_model, precision="int8")
        built = build_engine(tiny_model, path, chosen, calibrator=calibrator, device=device)
    expected = run_model(tiny_model, BATCHES[0])["logits"]

    assert calibrator.batches_delivered == len(BATCHES)
    assert built.sidecar.options["implicit"] is True
    with TensorRTRunner(path) as runner:
        answer = runner.infer(BATCHES[0])["logits"]
    assert 0 < np.abs(answer - expected).max() < 0.3 * np.abs(expected).max()


@pytest.mark.tensorrt(10)
def test_an_error_in_the_calibration_data_stops_the_build(tiny_model: Path) -> None:
    """The exception of the user's loader is raised as it is, and no engine is written."""

    def batches() -> Iterator[Sample]:
        yield Sample(BATCHES[0])
        raise ZeroDivisionError("in the user's loader")

    path = tiny_model.with_name("implicit.engine")
    with open_device() as device, UploadBuffers(device) as buffers:
        calibrator = streaming_calibrator(trt, "entropy2", batches(), buffers=buffers, batch_size=4)
        with pytest.raises(ZeroDivisionError, match="user's loader"):
            build_engine(tiny_model, path, options(tiny_model, precision="int8"), calibrator=calibrator, device=device)
    assert not path.exists()


@pytest.mark.tensorrt(10)
def test_a_calibrator_needs_an_fp32_model(models: dict[str, Path], tmp_path: Path) -> None:
    """TensorRT would ignore it beside Q/DQ nodes."""
    calibrator = scales_calibrator(trt, {"input": 0.1})

    with pytest.raises(EngineBuildError, match="ignores calibrators"):
        build_engine(
            models["int8"], tmp_path / "m.engine", options(models["int8"], precision="int8"), calibrator=calibrator
        )


def test_the_layers_of_an_engine_are_listed_with_times(models: dict[str, Path], tmp_path: Path) -> None:
    """The real inspector and profiler calls, over a SIMULATED engine: every node is found, and has a time."""
    path = tmp_path / "m.int8.engine"
    build_engine(models["int8"], path, options(models["int8"], precision="int8"))
    table = layer_table(path.name, onnx.load(models["int8"]), inspect_engine(path, BATCHES[0], runs=2))

    assert [row.op_type for row in table.intended_int8] == ["Conv", "Gemm"]
    assert all(row.layer is not None and row.layer_ms is not None for row in table.rows)
    assert json.loads(json.dumps(table.to_json()))["engine"] == path.name


def test_the_log_goes_to_those_who_listen() -> None:
    """Lines reach the open listeners alone, and those kept aside no one else."""
    log = tensorrt_log(trt)
    with log.listen() as outer:
        log.logger.log(trt.ILogger.ERROR, " one \n two ")
        with log.aside() as kept:
            log.logger.log(trt.ILogger.WARNING, "aside")
        with log.listen() as inner:
            log.logger.log(trt.ILogger.WARNING, "both")
            log.logger.log(trt.ILogger.INFO, "too much")
    log.logger.log(trt.ILogger.ERROR, "late")

    assert outer.quote() == "one two"
    assert (outer.warnings, inner.texts, kept.texts) == (["both"], ["both"], ["aside"])
    assert tensorrt_log(trt) is log


def test_tensors_without_a_scale_are_one_warning() -> None:
    """TensorRT logs a line for each; hundreds of them would bury every other note."""
    log = tensorrt_log(trt)
    with log.listen() as lines:
        log.logger.log(trt.ILogger.WARNING, "first")
        for name in ("a:0", *"bcdefg", "a:0"):
            text = f"Missing scale and zero-point for tensor {name}, expect fall back to non-int8 implementation"
            log.logger.log(trt.ILogger.WARNING, text)
        log.logger.log(trt.ILogger.WARNING, "last")

    assert lines.warnings[:2] == ["first", "last"]
    assert len(lines.warnings) == 3
    assert "no scale for 7 tensors" in lines.warnings[2]
    assert lines.warnings[2].endswith("a:0, b, c, d, e and 2 more")


def test_plugins_are_registered_before_anything_is_parsed_or_loaded() -> None:
    """Once for the process, with its logger: the parser makes operators such as RoiAlign of them."""
    calls: list[tuple[Any, str]] = []
    module: Any = types.ModuleType("tensorrt")
    module.ILogger = trt.ILogger
    module.init_libnvinfer_plugins = lambda logger, namespace: calls.append((logger, namespace))
    log = tensorrt_log(module)

    assert tensorrt_log(module) is log
    assert calls == [(log.logger, "")]
    assert trt.init_libnvinfer_plugins(log.logger, "")


def test_each_failure_quotes_its_own_log(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner lives long; what TensorRT said of an earlier failure does not explain the next one."""
    with TensorRTRunner(engine) as runner:
        for reason in ("first", "second"):
            monkeypatch.setenv("TRTSIM_FAIL", "enqueue")
            tensorrt_log(trt).logger.log(trt.ILogger.ERROR, f"the {reason} trouble")
            with pytest.raises(InferenceError, match=f"failed in TensorRT: the {reason} trouble"):
                runner.infer(BATCHES[0])
            monkeypatch.delenv("TRTSIM_FAIL")
            assert runner.infer(BATCHES[0])["logits"].shape == (4, 16)


def test_a_runtime_that_does_not_start_quotes_tensorrt(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings raise a TypeError where TensorRT returns nothing; it becomes one line."""

    def refuse(logger: Any) -> None:
        logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Runtime", refuse)
    with pytest.raises(EngineLoadError, match=r"cannot start to load .*failure with error: 35"), TensorRTRunner(engine):
        raise AssertionError("it was entered")


def test_weights_beside_the_model_are_found(tiny_model: Path, run_model: Callable[..., Any]) -> None:
    """External data is read from the model's folder, and is part of the model's hash."""
    expected = run_model(tiny_model, BATCHES[0])["logits"]
    proto = onnx.load(tiny_model)
    external = tiny_model.with_name("external.onnx")
    onnx.save(proto, external, save_as_external_data=True, location="external.data", size_threshold=0)
    path = tiny_model.with_name("external.engine")
    first = build_engine(external, path, options(external))
    with TensorRTRunner(path) as runner:
        np.testing.assert_allclose(runner.infer(BATCHES[0])["logits"], expected, atol=1e-4)

    weights = tiny_model.with_name("external.data")
    weights.write_bytes(bytes(len(weights.read_bytes())))
    assert build_engine(external, path, options(external)).sidecar.model_sha256 != first.sidecar.model_sha256


def test_int8_beside_fp16_takes_its_types_from_fp16_scales(
    tmp_path: Path, graph_builder: Any, run_model: Callable[..., Any]
) -> None:
    """A Q/DQ model with FP16 scales is "int8+fp16", and neither of the two alone."""
    builder = graph_builder()
    builder.input("x", ("N", 3, 8, 8))
    scale, zero = builder.constant(np.float16(0.05)), builder.constant(np.int8(0))
    half = builder.node("Cast", ["x"], to=TensorProto.FLOAT16)
    codes = builder.node("QuantizeLinear", [half, scale, zero])
    weights = builder.constant(RNG.integers(-127, 128, (4, 3, 3, 3), np.int8))
    data, kernel = (builder.node("DequantizeLinear", [name, scale, zero]) for name in (codes, weights))
    answer = builder.node("Cast", [builder.node("Conv", [data, kernel])], "y", to=TensorProto.FLOAT)
    model = builder.save(
        tmp_path / "m.onnx", [helper.make_tensor_value_info(answer, TensorProto.FLOAT, ["N", 4, 6, 6])]
    )
    path = tmp_path / "m.engine"
    build_engine(model, path, options(model, precision="int8+fp16"))
    feeds = {"x": RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)}

    with TensorRTRunner(path) as runner:
        expected = run_model(model, feeds)["y"]
        np.testing.assert_allclose(runner.infer(feeds)["y"], expected, rtol=5e-3, atol=5e-3 * np.abs(expected).max())
    for precision in ("int8", "fp16"):
        with pytest.raises(EngineBuildError, match="it holds Q/DQ nodes and FP16 tensors"):
            build_engine(model, path, options(model, precision=precision))


@pytest.mark.tensorrt(10)
def test_hardware_without_int8_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Implicit INT8 on a GPU that has none is refused before the build."""
    monkeypatch.setenv("TRTSIM_FAIL", "no_int8")
    calibrator = scales_calibrator(trt, {"input": 0.1})

    with pytest.raises(EngineBuildError, match=r"SIMULATED .* has no INT8 hardware"):
        build_engine(
            tiny_model, tiny_model.with_name("m.engine"), options(tiny_model, precision="int8"), calibrator=calibrator
        )


@pytest.mark.tensorrt(11)
def test_calibrators_are_refused_where_there_are_none(tiny_model: Path) -> None:
    """TensorRT 11 has none; the line says what to do in place of them, and touches no removed name."""
    with pytest.raises(
        EngineBuildError, match=r"removed in TensorRT 11; expected 10 or older\. Run `trt-int8 quantize`"
    ):
        build_engine(
            tiny_model,
            tiny_model.with_name("m.engine"),
            options(tiny_model, precision="int8"),
            calibrator=ImplicitCalibrator(),
        )


def test_ctrl_c_within_the_log_stops_the_build(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT would swallow it there; the build ends with it, and no engine is written."""

    def interrupt(record: logging.LogRecord) -> bool:
        raise KeyboardInterrupt

    path = tiny_model.with_name("m.engine")
    logger = logging.getLogger("engines.trt_log")
    with caplog.at_level(logging.DEBUG, logger.name):
        monkeypatch.setattr(logger, "filters", [interrupt])
        with pytest.raises(KeyboardInterrupt):
            build_engine(tiny_model, path, options(tiny_model))
    assert not path.exists()
