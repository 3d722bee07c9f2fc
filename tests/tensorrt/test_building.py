"""The build stage over the SIMULATED TensorRT: models and calibrations become engines, or one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt
from onnx import TensorProto, helper

from calibrators.errors import CalibrationError
from calibrators.tensorrt_cache import TensorRTCache
from engines.errors import EngineBuildError, EngineLoadError
from engines.placement_options import PlacementOptions
from engines.sidecar import Provenance, read_sidecar
from engines.trt_builder import BuiltEngine
from engines.trt_runner import TensorRTRunner
from engines.trt_types import held_types
from trt_int8 import Calibration, build_engine, calibrate, convert_fp16, quantize
from trt_int8.cli import main
from trt_int8.errors import ConfigError, DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(5)
SAMPLES = RNG.normal(size=(22, 3, 8, 8)).astype(np.float32)
FEEDS = {"input": SAMPLES[:4]}

only_10 = pytest.mark.tensorrt(10)
only_11 = pytest.mark.tensorrt(11)


@pytest.fixture
def calibration(tiny_model: Path) -> Calibration:
    """Of the tiny model: five batches of 4 samples, and one of 2."""
    return calibrate(tiny_model, {"input": SAMPLES}, batch_size=4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, input=SAMPLES)
    return path


def other_model(path: Path, like: Path) -> Path:
    """The same graph with other weights."""
    model = onnx.load(like)
    weights = model.graph.initializer[1]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) + 1, weights.name))
    onnx.save(model, path)
    return path


def answers(engine: Path, feeds: Any = FEEDS) -> np.ndarray[Any, Any]:
    with TensorRTRunner(engine) as runner:
        return runner.infer(feeds)["logits"]


# --- typed models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "int8", "int8+fp16"])
def test_an_fp32_model_and_its_calibration_give_every_precision(
    tiny_model: Path, calibration: Calibration, run_model: Callable[..., Any], tmp_path: Path, precision: Any
) -> None:
    """The model as TensorRT was given it is kept beside the engine, holds the types, and gives the same answers."""
    built = build_engine(tiny_model, tmp_path / "out", precision=precision, calibration=calibration)
    kept = tmp_path / "out" / f"tiny.{precision}.engine.onnx"

    assert built.path == tmp_path / "out" / f"tiny.{precision}.engine"
    assert built.sidecar.precision == precision
    assert built.sidecar.model == kept.name
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        built.path.name, f"{built.path.name}.json", kept.name
    ]  # fmt: skip
    assert held_types(onnx.load(kept)) == (precision.startswith("int8"), precision.endswith("fp16"))
    expected = run_model(kept, FEEDS)["logits"]
    np.testing.assert_allclose(answers(built.path), expected, atol=1e-4 if "16" not in precision else 5e-3)


def test_the_sidecar_says_where_the_scales_come_from(
    tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Method with its percentile and the calibration's hash for INT8; nothing for precisions without scales."""
    int8 = build_engine(
        tiny_model, tmp_path, precision="int8", calibration=calibration, method="percentile", percentile=99.9
    )
    half = build_engine(tiny_model, tmp_path, precision="fp16", calibration=calibration)

    assert int8.sidecar.calibration == Provenance("percentile 99.9", calibration.sha256, PlacementOptions())
    assert half.sidecar.calibration is None
    assert read_sidecar(int8.path) == int8.sidecar


def test_the_options_of_the_placement_reach_the_model(tmp_path: Path, graph_builder: Any) -> None:
    """The command gives TensorRT what `quantize` writes with the same options, and the sidecar names them."""
    graph = graph_builder()
    graph.conv(graph.conv(graph.input("input", ("N", 3, 8, 8)), (3, 16), "stem"), (16, 5), "few")
    graph.conv("few", (5, 3), "y")
    model = Path(graph.save(tmp_path / "m.onnx", ["y"]))
    calibration = calibrate(model, {"input": SAMPLES}, batch_size=4)
    calibration.save(tmp_path / "c.npz")
    wishes = PlacementOptions("float", "int8", ["n_few"], ["n_y"])
    words = [str(model), "--calibration", str(tmp_path / "c.npz"), *wishes.words()]

    assert main(["build", *words, "--output", str(tmp_path / "out"), "--no-timing-cache"]) == 0
    assert main(["quantize", *words, "--output", str(tmp_path / "q.onnx")]) == 0
    assert (tmp_path / "out" / "m.int8.engine.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()
    sidecar = read_sidecar(tmp_path / "out" / "m.int8.engine")
    assert sidecar is not None
    assert sidecar.calibration == Provenance("entropy", calibration.sha256, wishes)
    as_it_is = build_engine(tmp_path / "q.onnx", tmp_path / "again", calibration=calibration)
    assert as_it_is.sidecar.calibration == sidecar.calibration


def test_the_method_reaches_the_scales(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The Q/DQ nodes of the kept model hold the scales of the method that was asked for."""
    build_engine(tiny_model, tmp_path, calibration=calibration, method="minmax")
    kept = onnx.load(tmp_path / "tiny.int8.engine.onnx")
    scales = {item.name: onnx.numpy_helper.to_array(item) for item in kept.graph.initializer}

    assert scales["input_scale"] == np.float32(np.abs(SAMPLES).max() / 127)


def test_the_profile_is_what_the_calibration_saw(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Batches from 1 to the largest, chosen for the most frequent; --batch and --shape go first."""
    seen = build_engine(tiny_model, tmp_path, precision="fp32", calibration=calibration)
    asked = build_engine(tiny_model, tmp_path, precision="fp32", calibration=calibration, batch=(2, 3, 5))
    shaped = build_engine(
        tiny_model, tmp_path, precision="fp32", shapes={"input": [(1, 3, 8, 8), (1, 3, 8, 8), (9, 3, 8, 8)]}
    )

    def batches(built: BuiltEngine) -> list[int]:
        (profile,) = built.sidecar.profiles
        return [shape[0] for shape in profile["input"]]

    assert [batches(built) for built in (seen, asked, shaped)] == [[1, 4, 4], [2, 3, 5], [1, 1, 9]]


def test_a_calibration_is_read_from_its_file(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """A path does as well; it keeps the shapes."""
    calibration.save(tmp_path / "calibration.npz")
    built = build_engine(tiny_model, tmp_path, precision="fp16", calibration=tmp_path / "calibration.npz")

    assert built.sidecar.profiles[0]["input"][2] == (4, 3, 8, 8)


def test_models_that_hold_types_are_built_as_they_are(
    tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Nothing is written beside the engine, the sidecar names the model itself and what it says of its scales."""
    build_engine(tiny_model, tmp_path / "out", calibration=calibration)  # its kept model goes with it
    quantize(tiny_model, calibration, output=tmp_path / "tiny.int8.onnx", method="percentile", percentile=99.9)
    convert_fp16(tiny_model, calibration, output=tmp_path / "tiny.fp16.onnx")
    int8 = build_engine(tmp_path / "tiny.int8.onnx", tmp_path / "out", precision="int8", batch=(1, 2, 4))
    half = build_engine(tmp_path / "tiny.fp16.onnx", tmp_path / "out", precision="fp16", calibration=calibration)

    assert [int8.path.name, half.path.name] == ["tiny.int8.engine", "tiny.fp16.engine"]
    assert [int8.sidecar.model, half.sidecar.model] == ["tiny.int8.onnx", "tiny.fp16.onnx"]
    assert not list((tmp_path / "out").glob("*.onnx"))
    assert int8.sidecar.calibration == Provenance("percentile 99.9", calibration.sha256, PlacementOptions())
    assert half.sidecar.calibration is None


def test_the_kept_model_can_be_built_again(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """It gives an engine of the same name, and stays as it is."""
    for precision in ("fp32", "int8"):
        first = build_engine(tiny_model, tmp_path / "out", precision=precision, calibration=calibration)
        kept = tmp_path / "out" / first.sidecar.model
        content = kept.read_bytes()
        second = build_engine(kept, tmp_path / "out", precision=precision, batch=(1, 4, 4))

        assert second.path == first.path
        assert second.sidecar.model_sha256 == first.sidecar.model_sha256
        assert kept.read_bytes() == content


def test_a_name_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    """`name` stands in the place of the model's."""
    built = build_engine(tiny_model, tmp_path, precision="fp32", batch=(1, 1, 1), name="entropy")

    assert (built.path.name, built.sidecar.model) == ("entropy.fp32.engine", "entropy.fp32.engine.onnx")


def test_an_engine_that_is_replaced_is_named(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """One of another method, but not the same one built again, nor one of another precision or name."""

    def notes(**chosen: Any) -> list[str]:
        built = build_engine(tiny_model, tmp_path / "out", calibration=calibration, **chosen)
        return [note for note in built.notes if note.startswith("replaced")]

    plan = tmp_path / "out" / "tiny.int8.engine"
    for options in ({}, {}, {"precision": "fp16"}, {"name": "other", "method": "mse"}):
        assert notes(**options) == []
    assert notes(method="mse") == [f"replaced {plan} (TensorRT {trt.__version__}, entropy)"]
    sidecar = plan.with_name(f"{plan.name}.json")
    sidecar.write_text(sidecar.read_text().replace(f'"tensorrt": "{trt.__version__}"', '"tensorrt": "9.3.0.1"'))
    assert notes(method="mse") == [f"replaced {plan} (TensorRT 9.3.0.1, mse)"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_command_in_a_load_error_builds_what_can_be_loaded(
    tiny_model: Path, calibration: Calibration, run_model: Callable[..., Any], tmp_path: Path, precision: Any
) -> None:
    """Pasted as it stands; it builds from the model beside the engine, for the same shapes, in another folder."""
    built = build_engine(tiny_model, tmp_path / "of mine", precision=precision, calibration=calibration)
    sidecar = built.path.with_name(f"{built.path.name}.json")
    sidecar.write_text(sidecar.read_text().replace(f'"tensorrt": "{trt.__version__}"', '"tensorrt": "9.3.0.1"'))
    with pytest.raises(EngineLoadError, match=r"this is TensorRT") as caught:
        answers(built.path)
    words = shlex.split(str(caught.value).partition("Build it here: ")[2])

    assert words[0] == "trt-int8"
    assert main(words[1:]) == 0
    rebuilt = built.path.parent / "rebuilt" / built.path.name
    expected = run_model(built.path.parent / built.sidecar.model, FEEDS)["logits"]
    np.testing.assert_allclose(answers(rebuilt), expected, atol=5e-3)
    again = read_sidecar(rebuilt)
    assert again is not None
    assert again.profiles == built.sidecar.profiles


def test_a_static_model_needs_no_profile(tmp_path: Path, graph_builder: Any) -> None:
    """Without dynamic axes there is none, and nothing to ask for."""
    builder = graph_builder()
    model = builder.save(tmp_path / "m.onnx", [builder.conv(builder.input("x", (2, 3, 8, 8)), (3, 4), "y")])
    built = build_engine(model, tmp_path, precision="fp32")

    assert built.sidecar.profiles == ()


def test_nodes_that_stay_in_floating_point_are_noted(
    tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """The note counts them and says why."""
    built = build_engine(tiny_model, tmp_path, calibration=calibration, exclude=["fc"])

    assert any(re.match(r"1 of 2 weighted nodes stay in floating point: fc \(", note) for note in built.notes)


def test_nodes_without_a_bound_are_noted_with_what_gives_them_one(tmp_path: Path, graph_builder: Any) -> None:
    """FP16 keeps what nothing is known of in FP32; a calibration of all tensors knows it."""
    builder = graph_builder()
    conv = builder.conv(builder.input("x", ("batch", 3, 8, 8)), (3, 4), "c")
    model = builder.save(tmp_path / "m.onnx", [builder.node("Sigmoid", [builder.node("Exp", [conv], "e")], "y")])
    data = {"x": SAMPLES}

    def note(tensors: Any) -> list[str]:
        seen = calibrate(model, data, tensors=tensors)
        half = build_engine(model, tmp_path / tensors, precision="fp16", calibration=seen)
        return [note for note in half.notes if "in FP32" in note or "--tensors" in note]

    held, advice = note("quantized")
    assert "was not calibrated and has no bound" in held
    assert advice.endswith(". Calibrate with --tensors all to know the range of every tensor.")
    assert note("all") == []


def test_options_reach_the_builder(tiny_model: Path, tmp_path: Path) -> None:
    """They are in the sidecar, and the timing cache is read by the second build."""
    cache = tmp_path / "times" / "timing.cache"
    for _ in range(2):
        built = build_engine(
            tiny_model,
            tmp_path,
            precision="tf32",
            batch=(1, 2, 4),
            workspace_bytes=1 << 28,
            optimization_level=4,
            timing_cache=cache,
            hardware_compatibility="ampere_plus",
            version_compatible=True,
        )

    assert cache.is_file()
    assert built.sidecar.options == {
        "workspace_bytes": 1 << 28,
        "optimization_level": 4,
        "timing_cache": "timing.cache",
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "implicit": False,
    }


def test_a_failed_build_leaves_nothing(
    tiny_model: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No plan, no sidecar, no model, no folder; the error names the user's own file."""
    monkeypatch.setenv("TRTSIM_FAIL", "build")
    with pytest.raises(EngineBuildError, match=re.escape(repr(str(tiny_model)))):
        build_engine(tiny_model, tmp_path / "out", calibration=calibration)

    assert not (tmp_path / "out").exists()


def test_a_failed_build_leaves_an_earlier_engine_and_its_model_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both still belong together."""
    build_engine(tiny_model, tmp_path / "out", precision="fp32", batch=(1, 1, 1))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("TRTSIM_FAIL", "build")
    with pytest.raises(EngineBuildError):
        build_engine(other_model(tiny_model, tiny_model), tmp_path / "out", precision="fp32", batch=(1, 1, 1))

    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {},
            ConfigError,
            "as int8: it is an FP32 model, and the scales of INT8 need a calibration. Run `trt-int8 cal",
        ),
        ({"precision": "fp16"}, ConfigError, "guard that keeps values in FP16's range needs a calibration"),
        ({"precision": "int4"}, ConfigError, "precision is 'int4'; expected 'fp32' or"),
        (
            {"precision": "fp32"},
            ConfigError,
            r"input 'input': .* has a dynamic axis, and nothing says .* --batch MIN,OPT",
        ),
        ({"precision": "fp32", "batch": (4, 2, 8)}, ConfigError, "ascending"),
        (
            {"precision": "fp32", "shapes": {"x": [(1,)] * 3}},
            ConfigError,
            "'x', which is no input; the model's are 'input'",
        ),
        ({"precision": "fp32", "data": {"input": SAMPLES}}, UsageError, "add --implicit"),
        ({"precision": "fp32", "calibrator": "minmax"}, UsageError, "--calibrator says how TensorRT's own"),
        ({"precision": "fp32", "batch_size": 2, "cache": "c"}, UsageError, "--batch-size and --cache say how"),
        ({"implicit": True}, UsageError, "neither was given"),
        ({"implicit": True, "data": {"input": SAMPLES}, "method": "mse"}, UsageError, "--method would change nothing"),
        ({"precision": "fp32", "batch": (1, 1, 1), "residual": "float"}, UsageError, "fp32 has no scales"),
        (
            {"precision": "fp16", "batch": (1, 1, 1), "include": ["a"]},
            UsageError,
            "--include would .* fp16 has no scal",
        ),
        ({"attention": "none"}, ConfigError, "attention is 'none'"),
        ({"precision": "fp32", "batch": (1, 1, 1), "max_batches": 3}, UsageError, "--max-batches says how"),
        ({"precision": "fp32", "batch": (1, 1, 1), "short_batch": "pad"}, UsageError, "--short-batch says how"),
        ({"percentile": 99.0}, UsageError, "the method is not percentile"),
        ({"implicit": True, "data": {"input": SAMPLES}, "precision": "fp16"}, EngineBuildError, "not fp16"),
        ({"precision": "fp32", "batch": (1, 1, 1), "name": "a/b"}, ConfigError, "name is 'a/b'"),
        ({"precision": "fp32", "batch": (1, 1, 1), "optimization_level": 9}, EngineBuildError, "0 to 5"),
        ({"precision": "fp32", "batch": (1, 1, 1), "hardware_compatibility": "x"}, ConfigError, "'ampere_plus'"),
        ({"method": "percentile", "percentile": 0}, CalibrationError, "percentile"),
    ],
)
def test_options_that_make_no_sense(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], error: type, text: str
) -> None:
    """Refused before anything is written, with what was found and what to do."""
    with pytest.raises(error, match=text):
        build_engine(tiny_model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_data_and_a_calibration_are_one_too_many(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The scales come from one of them."""
    with pytest.raises(UsageError, match="both were given"):
        build_engine(tiny_model, tmp_path, implicit=True, calibration=calibration, data={"input": SAMPLES})


def test_a_calibration_without_shapes_says_so(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """One of an earlier version serves every purpose but the profile."""
    old = Calibration({name: calibration.histogram(name) for name in calibration.tensors}, calibration.fingerprint)
    with pytest.raises(ConfigError, match=r"the calibration's file, of an earlier version, does not say which shapes"):
        build_engine(tiny_model, tmp_path, calibration=old)

    assert build_engine(tiny_model, tmp_path, calibration=old, batch=(1, 1, 1)).path.exists()


def test_a_calibration_of_another_model_is_refused(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """For every precision, also where nothing but its shapes is asked for; force takes what fits."""
    other = other_model(tmp_path / "other.onnx", tiny_model)
    for precision in ("int8", "fp16", "fp32", "tf32"):
        with pytest.raises(CalibrationError, match=r"does not belong to .*: its weights differ.*--force"):
            build_engine(other, tmp_path / "out", precision=precision, calibration=calibration)
    assert not (tmp_path / "out").exists()
    for precision in ("fp32", "int8"):
        build_engine(other, tmp_path / "out", precision=precision, calibration=calibration, force=True)


def test_a_calibration_of_other_inputs_makes_no_profile(
    tiny_model: Path, calibration: Calibration, tmp_path: Path, graph_builder: Any
) -> None:
    """Said before a profile is made of it, for FP32 models and for those that hold their types."""
    quantize(tiny_model, calibration, output=tmp_path / "typed.onnx")
    for size, name in ((9, "input"), (8, "picture")):
        builder = graph_builder()
        node = builder.conv(builder.input(name, ("batch", 3, size, 8)), (3, 4), "y")
        other = builder.save(tmp_path / "other.onnx", [node])
        strange = calibrate(other, {name: np.ones((2, 3, size, 8), np.float32)})
        for model in (tiny_model, tmp_path / "typed.onnx"):
            with pytest.raises(CalibrationError, match=r"the calibration saw other inputs, .*'input': float32"):
                build_engine(model, tmp_path / "out", precision="int8", calibration=strange)
    assert not (tmp_path / "out").exists()


def test_a_model_for_the_cpu_or_of_other_types(tiny_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    """One line each says what the model holds."""
    quantize(tiny_model, calibration, output=tmp_path / "cpu.onnx", target="cpu")
    quantize(tiny_model, calibration, output=tmp_path / "int8.onnx")
    with pytest.raises(EngineBuildError, match="--target tensorrt"):
        build_engine(tmp_path / "cpu.onnx", tmp_path / "out", batch=(1, 1, 1))
    with pytest.raises(EngineBuildError, match="as fp32: it holds Q/DQ nodes"):
        build_engine(tmp_path / "int8.onnx", tmp_path / "out", precision="fp32", batch=(1, 1, 1))


def test_a_batch_for_a_model_that_fixes_it(tmp_path: Path, graph_builder: Any) -> None:
    """There is nothing to vary."""
    builder = graph_builder()
    model = builder.save(tmp_path / "m.onnx", [builder.conv(builder.input("x", (2, 3, 8, 8)), (3, 4), "y")])
    with pytest.raises(ConfigError, match=r"no input has a dynamic batch: 'x': float32 \(2, 3, 8, 8\)"):
        build_engine(model, tmp_path, precision="fp32", batch=(1, 2, 4))


def test_an_output_that_would_replace_an_input(tiny_model: Path, tmp_path: Path) -> None:
    """The model is never overwritten by what is made of it."""
    model = tmp_path / "m.fp32.engine"
    model.write_bytes(tiny_model.read_bytes())
    with pytest.raises(ConfigError, match="is read as well"):
        build_engine(model, tmp_path, precision="fp32", batch=(1, 1, 1), name="m")


# --- implicit: TensorRT's own calibrators ----------------------------------------------------------------------------


def implicit(model: Path, folder: Path, data: Any, **options: Any) -> BuiltEngine:
    return build_engine(model, folder / "out", **{"implicit": True, "data": data} | options)


def delivered(built: BuiltEngine) -> int:
    """How many batches `get_batch` delivered to TensorRT."""
    count = built.sidecar.options["calibration_batches"]
    assert isinstance(count, int)
    return count


@only_11
@pytest.mark.parametrize("calibrator", ["entropy2", "minmax", "percentile"])
def test_tensorrt_11_has_no_calibrators(tiny_model: Path, tmp_path: Path, calibrator: Any) -> None:
    """One line says so before a single batch is read."""

    def batches() -> Iterator[Any]:
        raise AssertionError("the data were read")
        yield

    with pytest.raises(EngineBuildError, match=r"removed in TensorRT 11; .*`trt-int8 quantize`"):
        implicit(tiny_model, tmp_path, batches(), calibrator=calibrator)
    assert not (tmp_path / "out").exists()


@only_10
@pytest.mark.parametrize("kind", ["entropy2", "minmax"])
def test_tensorrt_is_given_every_batch_and_keeps_the_scales(
    tiny_model: Path, run_model: Callable[..., Any], tmp_path: Path, data: Path, kind: Any
) -> None:
    """Five of six batches are full and delivered; the second build reads the cache and makes the same engine."""
    first = implicit(tiny_model, tmp_path, data, calibrator=kind, batch_size=4)
    second = implicit(tiny_model, tmp_path, data, calibrator=kind, batch_size=4)
    cache = tmp_path / "out" / f"tiny.{kind}.cache"
    expected = run_model(tiny_model, FEEDS)["logits"]

    assert (delivered(first), delivered(second)) == (5, 0)
    assert f"TensorRT's {kind} calibrator read 5 batches; its scales are kept in {cache}." in first.notes
    assert (
        "Batches with fewer than 4 samples were dropped: 1, with 2 samples. Keep them with --short-batch pad."
        in first.notes
    )
    assert f"The scales were read back from {cache}; no batch was calibrated on." in second.notes
    assert first.sidecar.calibration is not None
    assert first.sidecar.calibration.method == f"{kind} (TensorRT)"
    assert first.sidecar.calibration.sha256 == hashlib.sha256(cache.read_bytes()).hexdigest()
    assert second.sidecar.calibration == first.sidecar.calibration
    assert second.sidecar.plan_sha256 == first.sidecar.plan_sha256
    assert held_types(onnx.load(tmp_path / "out" / first.sidecar.model)) == (False, False)
    assert first.sidecar.profiles[0]["input"] == ((1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8))
    assert 0 < np.abs(answers(first.path) - expected).max() < 0.3 * np.abs(expected).max()


@only_10
@pytest.mark.parametrize(
    ("options", "count"),
    [({"batch_size": 4, "short_batch": "pad"}, 6), ({"batch_size": 4, "max_batches": 3}, 3), ({}, 22)],
)
def test_batches_are_cut_padded_and_limited_as_asked(
    tiny_model: Path, tmp_path: Path, data: Path, options: dict[str, Any], count: int
) -> None:
    """A short batch may be filled up; without a size each sample is a batch."""
    assert delivered(implicit(tiny_model, tmp_path, data, **options)) == count


@only_10
def test_batches_of_code_decide_on_their_size(tiny_model: Path, tmp_path: Path) -> None:
    """The first one declares it, for a function, a list and a generator, whose first batch is not lost."""
    stream = (SAMPLES[start : start + 5] for start in range(0, 20, 5))
    built = implicit(tiny_model, tmp_path, stream, calibrator="minmax")

    assert delivered(built) == 4
    assert built.sidecar.profiles[0]["input"][1] == (5, 3, 8, 8)
    cache = TensorRTCache.load(tmp_path / "out" / "tiny.minmax.cache")
    assert cache.scales["input"] == np.float32(np.abs(SAMPLES[:20]).max() / 127)


@only_10
def test_the_calibration_profile_is_not_the_engines(tiny_model: Path, tmp_path: Path, data: Path) -> None:
    """An engine for other batches is calibrated at the shape of the data all the same."""
    built = implicit(tiny_model, tmp_path, data, batch_size=4, batch=(1, 1, 2))

    assert delivered(built) == 5
    assert built.sidecar.profiles[0]["input"] == ((1, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8))


@only_10
@pytest.mark.parametrize("kind", ["entropy2", "percentile"])
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("model", r"model was '\w{12}\.\.\.', is '\w{12}\.\.\.'"),
        ("data", r"data was '\w{12}\.\.\.', is '\w{12}\.\.\.'"),
        ("calibrator", "calibrator was '(entropy2|percentile)', is 'minmax'"),
        ("batches", "total was 6, is 2"),
    ],
)
def test_a_cache_of_something_else_is_not_read(
    tiny_model: Path, tmp_path: Path, data: Path, kind: Any, changed: str, reason: str
) -> None:
    """TensorRT calibrates anew, and the notes say why; the cache is then of the new."""
    cache = tmp_path / "kept.cache"
    options: dict[str, Any] = {"calibrator": kind, "batch_size": 4, "cache": cache}
    implicit(tiny_model, tmp_path, data, **options)
    old = cache.read_bytes()
    match changed:
        case "model":
            other_model(tiny_model, tiny_model)
        case "data":
            np.savez(data, input=SAMPLES * 2)
        case "calibrator":
            options["calibrator"] = "minmax"
        case "batches":
            options["max_batches"] = 2
    built = implicit(tiny_model, tmp_path, data, **options)

    assert any(re.search(f"Calibrating anew, .*: .*{reason}", note) for note in built.notes), built.notes
    assert cache.read_bytes() != old
    again = implicit(tiny_model, tmp_path, data, **options)
    assert delivered(again) == 0
    assert not any("Calibrating anew" in note for note in again.notes)


@only_10
def test_data_of_code_need_an_identity_to_have_their_cache_read(tiny_model: Path, tmp_path: Path) -> None:
    """Without `data_id` the hint says so; with it the cache is read."""
    batches = [{"input": SAMPLES[:4]}, {"input": SAMPLES[4:8]}]
    implicit(tiny_model, tmp_path, batches)
    nameless = implicit(tiny_model, tmp_path, batches)
    named = implicit(tiny_model, tmp_path, batches, data_id="two batches")
    again = implicit(tiny_model, tmp_path, batches, data_id="two batches")

    assert any("have no identity" in note for note in nameless.notes)
    assert [delivered(built) for built in (nameless, named, again)] == [2, 2, 0]


@only_10
def test_the_percentile_calibrator_makes_a_pass_of_its_own_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scales are those of a calibration of all tensors, kept in a cache that the next build reads."""
    (tmp_path / "loader.py").write_text(
        "import numpy as np\n"
        "passes = []\n"
        "def batches():\n"
        "    passes.append(0)\n"
        "    samples = np.load(__file__.replace('loader.py', 'samples.npy'))\n"
        "    for start in range(0, 20, 4):\n"
        "        passes[-1] += 1\n"
        "        yield {'input': samples[start : start + 4]}\n"
    )
    np.save(tmp_path / "samples.npy", SAMPLES)
    monkeypatch.syspath_prepend(str(tmp_path))
    options: dict[str, Any] = {"calibrator": "percentile", "percentile": 99.5, "data_id": "samples", "batch": (1, 4, 4)}
    first = implicit(tiny_model, tmp_path, "loader:batches", **options)
    passes = list(sys.modules["loader"].passes)
    second = implicit(tiny_model, tmp_path, "loader:batches", **options)
    expected = calibrate(tiny_model, {"input": SAMPLES[:20]}, tensors="all").scales("percentile", percentile=99.5)
    cache = tmp_path / "out" / "tiny.percentile.cache"

    assert passes == [5]
    assert sys.modules["loader"].passes == [5]
    assert dict(TensorRTCache.load(cache).scales) == {name: np.float32(scale) for name, scale in expected.items()}
    assert (delivered(first), delivered(second)) == (0, 0)
    assert f"made a pass of its own over 5 batches; its scales are kept in {cache}." in first.notes[0]
    assert second.notes[0] == f"The scales were read back from {cache}; no pass over the data was made."
    assert first.sidecar.calibration is not None
    assert first.sidecar.calibration.method == "percentile 99.5"
    assert first.sidecar.plan_sha256 == second.sidecar.plan_sha256
    third = implicit(tiny_model, tmp_path, "loader:batches", **options | {"percentile": 99.9})
    assert "percentile was 99.5, is 99.9" in third.notes[0]


@only_10
def test_the_percentile_calibrator_must_read_twice_where_nothing_tells_the_shapes(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A generator is enough where they are given."""
    with pytest.raises(DataError, match="can be read only once"):
        implicit(tiny_model, tmp_path, (SAMPLES[:4] for _ in range(2)), calibrator="percentile")
    stream = (SAMPLES[:4] for _ in range(2))
    built = implicit(tiny_model, tmp_path, stream, calibrator="percentile", batch=(1, 4, 4))
    assert "over 2 batches" in built.notes[0]


@only_10
@pytest.mark.parametrize("calibrator", ["entropy2", "minmax", "percentile"])
@pytest.mark.parametrize("after", [0, 2])
def test_an_exception_of_the_loader_stops_the_build(
    tiny_model: Path, tmp_path: Path, calibrator: Any, after: int
) -> None:
    """It comes out as it was raised, and nothing is left behind."""

    class LoaderError(Exception):
        pass

    def batches() -> Iterator[Any]:
        for _ in range(after):
            yield {"input": SAMPLES[:4]}
        raise LoaderError("disk on fire")

    with pytest.raises(LoaderError, match="disk on fire"):
        implicit(tiny_model, tmp_path, batches(), calibrator=calibrator, batch=(1, 4, 4))
    assert not (tmp_path / "out").exists()


@only_10
def test_a_calibration_serves_tensorrt_10_without_data(tiny_model: Path, tmp_path: Path) -> None:
    """With all tensors nothing is missing; with those that Q/DQ takes, the others are counted and named."""
    every = calibrate(tiny_model, {"input": SAMPLES}, batch_size=4, tensors="all")
    some = calibrate(tiny_model, {"input": SAMPLES}, batch_size=4)
    shown: list[str] = []

    def track(items: Any, description: str, total: int | None = None) -> Any:
        shown.append(description)
        return items

    whole = build_engine(tiny_model, tmp_path, implicit=True, calibration=every, method="mse", track=track)
    part = build_engine(tiny_model, tmp_path, implicit=True, calibration=some, method="mse")
    missing = [name for name in every.tensors if name not in some.tensors]

    assert shown == ["build int8"]
    assert whole.notes == ()
    assert whole.sidecar.calibration == Provenance("mse", every.sha256)
    assert missing
    assert part.notes[0].startswith(
        f"{len(missing)} of {len(every.tensors)} activations have no scale, and what reads or writes them stays in "
        f"floating point: {', '.join(missing)}. Calibrate with --tensors all"
    )


@only_10
def test_implicit_int8_beside_fp16(tiny_model: Path, tmp_path: Path, data: Path) -> None:
    """TensorRT may take either for each layer; the model stays FP32."""
    built = implicit(tiny_model, tmp_path, data, batch_size=4, precision="int8+fp16")

    assert built.path.name == "tiny.int8+fp16.engine"
    assert delivered(built) == 5


@only_10
def test_a_model_with_a_fixed_batch_declares_it(tmp_path: Path, graph_builder: Any) -> None:
    """Data are cut to it, and there is no profile."""
    builder = graph_builder()
    model = builder.save(tmp_path / "m.onnx", [builder.conv(builder.input("x", (4, 3, 8, 8)), (3, 4), "y")])
    built = implicit(model, tmp_path, {"x": SAMPLES}, calibrator="minmax", short_batch="pad")

    assert delivered(built) == 6
    assert built.sidecar.profiles == ()


@only_10
def test_a_calibrator_needs_an_fp32_model(
    tiny_model: Path, calibration: Calibration, tmp_path: Path, data: Path
) -> None:
    """TensorRT would ignore it beside Q/DQ nodes."""
    quantize(tiny_model, calibration, output=tmp_path / "q.onnx")
    with pytest.raises(EngineBuildError, match="Give the FP32 model, or build without --implicit"):
        implicit(tmp_path / "q.onnx", tmp_path, data)


# --- the command line ------------------------------------------------------------------------------------------------


def command(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `trt-int8 build` in a process of its own."""
    environment = os.environ | variables
    line = [sys.executable, "-m", "trt_int8", "build", *map(str, words)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run `trt-int8 build` where it must be refused; return its line. No new file may be left, finished or not."""

    def run(*words: object, process: dict[str, str] | None = None) -> str:
        before = set(tmp_path.rglob("*"))
        words = (*words, "--output", tmp_path / "out")
        if process is None:
            capfd.readouterr()
            status = main(["build", *map(str, words)])
            captured = capfd.readouterr()
            out, err = captured.out, captured.err
        else:
            done = command(*words, **process)
            status, out, err = done.returncode, done.stdout, done.stderr
        lines = [line for line in err.splitlines() if not line.startswith("INFO:")]
        assert (status, out, len(lines)) == (1, "", 1), err
        assert lines[0].startswith("error: ")
        assert set(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def test_the_command_says_what_it_built(
    tiny_model: Path, calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Path, precision, GPU, origin of the scales, profile; and that it is SIMULATED. The timing cache lies beside."""
    calibration.save(tmp_path / "c.npz")
    words = [
        "build",
        tiny_model,
        "--calibration",
        tmp_path / "c.npz",
        "--method",
        "minmax",
        "--output",
        tmp_path / "out",
    ]
    assert main([str(word) for word in words]) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = tmp_path / "out" / "tiny.int8.engine"

    assert re.fullmatch(rf"{re.escape(str(plan))}: int8, {plan.stat().st_size} bytes, built in [\d.]+ s", lines[0])
    assert lines[1] == f"  TensorRT {trt.__version__} on SIMULATED (compute capability 9.0)"
    assert lines[2].startswith("  SIMULATED device: this is no GPU")
    assert lines[3] == f"  scales: minmax, sha256 {calibration.sha256[:16]}"
    assert lines[4] == "  profile: input min (1, 3, 8, 8), opt (4, 3, 8, 8), max (4, 3, 8, 8)"
    assert lines[5] == "  given to TensorRT: tiny.int8.engine.onnx"
    assert (tmp_path / "out" / "timing.cache").is_file()


def test_every_option_of_the_command_reaches_the_build(tiny_model: Path, tmp_path: Path) -> None:
    """As the sidecar tells."""
    words = [
        *("--precision", "tf32", "--shape", "input=1x3x8x8,2x3x8x8,6x3x8x8", "--workspace", "64", "--output", tmp_path),
        *("--optimization-level", "1", "--hardware-compatibility", "ampere_plus", "--version-compatible"),
        "--no-timing-cache",
    ]
    assert main(["build", str(tiny_model), *map(str, words)]) == 0
    sidecar = json.loads((tmp_path / "tiny.tf32.engine.json").read_text())

    assert sidecar["profiles"] == [{"input": [[1, 3, 8, 8], [2, 3, 8, 8], [6, 3, 8, 8]]}]
    assert sidecar["options"] == {
        "workspace_bytes": 64 * 2**20,
        "optimization_level": 1,
        "timing_cache": None,
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "implicit": False,
    }


@only_10
def test_the_command_drives_tensorrts_calibrators(
    tiny_model: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch size, limit, cache and padding are taken, and the batches are counted."""
    words = [
        *(tiny_model, "--implicit", "--data", data, "--calibrator", "minmax", "--batch-size", 8, "--max-batches", 3),
        *("--short-batch", "pad", "--cache", tmp_path / "my.cache", "--output", tmp_path / "out"),
    ]
    assert main(["build", *map(str, words)]) == 0
    out = capsys.readouterr().out

    assert f"note: TensorRT's minmax calibrator read 3 batches; its scales are kept in {tmp_path / 'my.cache'}." in out
    assert "scales: minmax (TensorRT), sha256 " in out


@only_10
def test_the_scales_of_named_data_are_read_back(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--data-id` gives data that come from code an identity."""
    (tmp_path / "named_loader.py").write_text(
        "import numpy as np\ndef batches():\n    yield {'input': np.ones((4, 3, 8, 8), np.float32)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [
        tiny_model,
        "--implicit",
        "--data",
        "named_loader:batches",
        "--data-id",
        "ones",
        "--output",
        tmp_path / "o",
    ]
    for found in ("calibrator read 1 batches", "no batch was calibrated on"):
        assert main(["build", *map(str, words)]) == 0
        assert found in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--batch", "1,8"],
        ["--batch", "8,4,1"],
        ["--precision", "fp32", "--batch", "1,2,4", "--method", "mse"],
        ["--precision", "fp16", "--exclude", "fc"],
        ["--percentile", "99"],
        ["--shape", "input=1x3x8x8"],
        ["--data", "d.npz", "--precision", "fp32"],
        ["--calibrator", "minmax", "--precision", "fp32"],
        ["--timing-cache", "t", "--no-timing-cache"],
        ["--precision", "int4"],
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(tiny_model: Path, tmp_path: Path, words: list[str]) -> None:
    """Exit status 2."""
    assert main(["build", str(tiny_model), "--output", str(tmp_path / "out"), *words]) == 2
    assert not (tmp_path / "out").exists()


@only_10
def test_no_file_of_the_users_is_replaced_by_a_cache(
    refused: Any, tiny_model: Path, calibration: Calibration, tmp_path: Path, data: Path
) -> None:
    """Refused before the data are read, each with the option that named the file."""
    calibration.save(tmp_path / "calibration.npz")
    (tmp_path / "kept.json").write_text("{}")
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words, option in (
        (("--cache", tmp_path / "calibration.npz"), "--cache"),
        (("--cache", tmp_path / "kept"), "--cache"),
        (("--timing-cache", tmp_path / "calibration.npz"), "--timing-cache"),
        (("--timing-cache", tmp_path / "kept"), "--timing-cache"),
        (("--cache", tmp_path / "same", "--timing-cache", tmp_path / "same"), "--timing-cache"),
        (("--cache", data), "--cache"),
        (("--timing-cache", tmp_path), "--timing-cache"),
    ):
        line = refused(tiny_model, "--implicit", "--data", data, "--calibrator", "percentile", *words)
        assert f" with {option}" in line
        assert "--output" not in line
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_a_name_on_the_command_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is what the engine's files are called by."""
    words = [tiny_model, "--precision", "fp32", "--batch", "1,2,4", "--name", "mine", "--output", tmp_path / "out"]
    assert main(["build", *map(str, words)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out' / 'mine.fp32.engine'}: fp32, ")


def test_a_folder_is_no_model(refused: Any, tmp_path: Path) -> None:
    """It is there, and is not what is expected."""
    line = refused(tmp_path, "--precision", "fp32")
    assert line == f"error: Cannot read the model: {str(tmp_path)!r} is a folder; expected an ONNX file."


def test_without_a_gpu(refused: Any, tiny_model: Path) -> None:
    """The CUDA driver's library is missing."""
    libraries = os.environ["LD_LIBRARY_PATH"].split(os.pathsep)[1:]
    line = refused(
        *(tiny_model, "--precision", "fp32", "--batch", "1,2,4"),
        process={"LD_LIBRARY_PATH": os.pathsep.join(libraries)},
    )
    assert "Cannot open an NVIDIA GPU" in line or "cannot be loaded" in line
    assert "trt-int8 doctor" in line


def test_without_tensorrt(refused: Any, tiny_model: Path) -> None:
    """The extra to install is named."""
    line = refused(tiny_model, "--precision", "fp32", "--batch", "1,2,4", process={"PYTHONPATH": ""})

    assert "the package 'tensorrt' is not installed. Install it with `pip install 'trt-int8[tensorrt11]'`" in line


def test_a_driver_that_is_too_old(refused: Any, tiny_model: Path) -> None:
    """What it serves, what is needed, and which driver has it."""
    line = refused(*(tiny_model, "--precision", "fp32", "--batch", "1,2,4"), process={"TRTSIM_CUDA_VERSION": "12080"})
    assert "serves CUDA 12.8 at most; tensorrt-cu13 needs CUDA 13.0. Install driver 580 or newer" in line


def test_an_operator_that_tensorrt_does_not_take(refused: Any, tmp_path: Path, graph_builder: Any) -> None:
    """The node is named, and the user's file, not the one that was made of it."""
    builder = graph_builder()
    builder.input("x", (1, 4))
    builder.node("Det", [builder.node("Reshape", ["x", builder.constant(np.array([2, 2]))])], "y")
    model = builder.save(tmp_path / "det.onnx", [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])])
    line = refused(model, "--precision", "fp32")

    assert "node 'n_y' (Det)" in line
    assert repr(str(model)) in line


def test_a_dynamic_input_without_a_profile(refused: Any, tiny_model: Path) -> None:
    """What to give."""
    assert "Give --batch MIN,OPT,MAX, or --shape" in refused(tiny_model, "--precision", "fp32")


@only_10
def test_calibration_data_of_the_wrong_shape(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Both shapes are named."""
    np.savez(tmp_path / "wrong.npz", input=np.zeros((4, 3, 9, 8), np.float32))
    line = refused(tiny_model, "--implicit", "--data", tmp_path / "wrong.npz")

    assert "(4, 3, 9, 8)" in line or "(1, 3, 9, 8)" in line
    assert "float32 (batch, 3, 8, 8)" in line


@only_10
def test_missing_calibration_data(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The path is named."""
    assert "no.npz" in refused(tiny_model, "--implicit", "--data", tmp_path / "no.npz")


def test_a_missing_calibration(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The path is named."""
    assert "no.npz" in refused(tiny_model, "--calibration", tmp_path / "no.npz")


@only_10
def test_out_of_device_memory(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    """How much was asked, how much is free, what to lower."""
    np.savez(tmp_path / "d.npz", input=np.zeros((2048, 3, 8, 8), np.float32))
    words = (tiny_model, "--implicit", "--data", tmp_path / "d.npz", "--batch-size", 2048)
    line = refused(*words, process={"TRTSIM_DEVICE_MEMORY_MB": "1"})

    assert f"{2048 * 192 * 4} bytes were asked for, {2**20} of {2**20} are free. Lower the batch size" in line


@pytest.mark.parametrize(
    "way", ["explicit", pytest.param("implicit", marks=only_10), pytest.param("pass", marks=only_10)]
)
def test_hardware_without_int8(
    refused: Any, tiny_model: Path, calibration: Calibration, tmp_path: Path, data: Path,
    monkeypatch: pytest.MonkeyPatch, way: str,
) -> None:  # fmt: skip
    """Refused, for a Q/DQ model, for a calibrator, and before the percentile calibrator's pass."""
    monkeypatch.setenv("TRTSIM_FAIL", "no_int8")
    calibration.save(tmp_path / "c.npz")
    words = {
        "explicit": ("--calibration", tmp_path / "c.npz"),
        "implicit": ("--implicit", "--data", data),
        "pass": ("--implicit", "--data", data, "--calibrator", "percentile"),
    }[way]
    line = refused(tiny_model, *words)

    assert "INT8 hardware" in line or "Int8 support" in line
    assert "Build it as fp16 or fp32" in line


@only_11
def test_implicit_on_tensorrt_11(refused: Any, tiny_model: Path, data: Path) -> None:
    """What to do in place of it."""
    assert "Run `trt-int8 quantize`" in refused(tiny_model, "--implicit", "--data", data)


def test_an_output_that_is_a_file(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Said before anything else is done."""
    (tmp_path / "out").write_text("")
    assert "is not a folder" in refused(tiny_model, "--precision", "fp32", "--batch", "1,2,4")


def test_a_file_that_is_no_model(refused: Any, tmp_path: Path) -> None:
    """It is said to be none."""
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    assert "is not an ONNX model" in refused(tmp_path / "m.onnx", "--precision", "fp32")


# --- the example -----------------------------------------------------------------------------------------------------


def test_the_example_does_what_the_command_does(
    tiny_model: Path, tmp_path: Path, run_model: Callable[..., Any], data: Path
) -> None:
    """Three engines, the same as those of `trt-int8 calibrate` and `build`, that answer as their models do."""
    script = [sys.executable, ROOT / "examples" / "build_engines.py", tiny_model, data, tmp_path / "example"]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SIMULATED") == 3
    assert (tmp_path / "example" / "timing.cache").is_file()
    calibration = tmp_path / "c.npz"
    assert (
        main(["calibrate", str(tiny_model), "--data", str(data), "--batch-size", "32", "--output", str(calibration)])
        == 0
    )
    for precision in ("fp32", "fp16", "int8"):
        words = [tiny_model, "--precision", precision, "--calibration", calibration, "--output", tmp_path / "command"]
        assert main(["build", *map(str, words)]) == 0
        name = f"tiny.{precision}.engine"
        assert (tmp_path / "example" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
        expected = run_model(tmp_path / "example" / f"{name}.onnx", FEEDS)["logits"]
        np.testing.assert_allclose(answers(tmp_path / "example" / name), expected, atol=5e-3)


def test_the_example_says_how_it_is_called() -> None:
    """One line, where arguments are missing."""
    script = [sys.executable, str(ROOT / "examples" / "build_engines.py"), "model.onnx"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"usage: python {script[1]} MODEL.onnx DATA FOLDER\n"


def test_force_is_about_a_calibration(tiny_model: Path, tmp_path: Path) -> None:
    """Without one it would change nothing."""
    with pytest.raises(UsageError, match="--force would change nothing: it is about a calibration"):
        build_engine(tiny_model, tmp_path / "out", precision="fp32", batch=(1, 4, 4), force=True)


@only_10
def test_files_need_no_identity(tiny_model: Path, tmp_path: Path, data: Path) -> None:
    """Their content tells them from others, so a name for them is refused."""
    with pytest.raises(UsageError, match="--data-id would change nothing: files are known by their content"):
        implicit(tiny_model, tmp_path, data, data_id="samples")
