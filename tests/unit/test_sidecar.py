"""engines.sidecar: what is checked before a plan file is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.errors import FileAccessError
from engines.errors import EngineLoadError
from engines.placement_options import PlacementOptions
from engines.runner import TensorSpec
from engines.sidecar import (
    Environment,
    Provenance,
    Sidecar,
    build_command,
    check_environment,
    read_plan,
    read_sidecar,
    sha256_of_model,
    sidecar_path,
    write_sidecar,
)

PLAN = b"the content of a plan file"
HERE = Environment("10.16.1.11", "NVIDIA L4", "8.9", "13.0", "580.65.06", "Linux x86_64")


def sidecar(**changes: Any) -> Sidecar:
    fields: dict[str, Any] = {
        "plan_bytes": len(PLAN),
        "plan_sha256": hashlib.sha256(PLAN).hexdigest(),
        "environment": HERE,
        "precision": "int8",
        "inputs": (TensorSpec("x", np.dtype(np.float32), ("batch", 3, None)),),
        "outputs": (TensorSpec("y", np.dtype(np.int64), None),),
        "profiles": ({"x": ((1, 3, 8), (2, 3, 8), (4, 3, 16))},),
        "model": "model.int8.onnx",
        "model_sha256": "00",
        "calibration": Provenance("entropy", "11"),
        "options": {"workspace_bytes": None, "hardware_compatibility": "none", "version_compatible": False},
        "build_seconds": 1.5,
        "warnings": ("slow",),
    }
    return Sidecar(**(fields | changes))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.int8.engine"
    path.write_bytes(PLAN)
    write_sidecar(path, sidecar())
    return path


def test_lies_beside_its_plan_under_its_name(plan: Path) -> None:
    """The sidecar of NAME.engine is NAME.engine.json in the same folder."""
    assert sidecar_path(plan) == plan.parent / "model.int8.engine.json"
    assert sidecar_path(plan).is_file()


@pytest.mark.parametrize("calibration", [None, Provenance("percentile 99.99", None)])
def test_comes_back_as_it_was_written(plan: Path, calibration: Provenance | None) -> None:
    """Every field survives the file, with its types."""
    written = sidecar(calibration=calibration)
    write_sidecar(plan, written)

    assert read_sidecar(plan) == written


def test_a_covered_plan_is_read(plan: Path) -> None:
    """Content and sidecar are given where the SHA-256 fits."""
    assert read_plan(plan) == (PLAN, sidecar())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (PLAN[:-3], f"truncated: {len(PLAN) - 3} of {len(PLAN)} bytes"),
        (PLAN[:-1] + b"?", "changed after it was built"),
        (PLAN + b"?", "changed after it was built"),
        (b"", "the file is empty"),
    ],
)
def test_another_content_is_refused(plan: Path, content: bytes, problem: str) -> None:
    """One line says what is wrong with the file, and names it."""
    plan.write_bytes(content)

    with pytest.raises(EngineLoadError) as caught:
        read_plan(plan)
    assert problem in str(caught.value)
    assert str(plan) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_sidecar_it_is_refused(plan: Path) -> None:
    """A plan that nothing is known of is not loaded unless the user vouches for it."""
    sidecar_path(plan).unlink()

    with pytest.raises(EngineLoadError, match="--trust"):
        read_plan(plan)
    assert read_plan(plan, trust=True) == (PLAN, None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', "null", '{"format": 1, "environment": {}}'])
def test_a_file_that_is_no_sidecar_is_refused(plan: Path, text: str) -> None:
    """Whatever else lies under the name is named, and counts as no sidecar where the user vouches."""
    sidecar_path(plan).write_text(text)

    with pytest.raises(EngineLoadError, match=r"'model.int8.engine.json' beside it is not a sidecar"):
        read_plan(plan)
    assert read_plan(plan, trust=True) == (PLAN, None)


def test_a_sidecar_of_another_content_counts_as_none_where_the_user_vouches(plan: Path) -> None:
    """With trust the changed plan is read, and the sidecar that is about something else is not believed."""
    plan.write_bytes(b"changed")

    assert read_plan(plan, trust=True) == (b"changed", None)


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    """There is no engine where there is no file, whoever vouches for it."""
    with pytest.raises(FileAccessError, match=r"no file .*absent\.engine"):
        read_plan(tmp_path / "absent.engine", trust=True)


@pytest.mark.parametrize(
    ("built", "options", "problem"),
    [
        ({"tensorrt": "10.3.0.26"}, {}, "built with TensorRT 10.3.0.26, this is TensorRT 10.16.1.11"),
        ({"tensorrt": "11.4.0.106"}, {"version_compatible": True}, "runs with the same release and newer ones"),
        ({"tensorrt": "8.6.1.6"}, {"version_compatible": True}, "up to the next major one"),
        ({"gpu": "NVIDIA T4", "compute_capability": "7.5"}, {}, r"NVIDIA T4 .*7\.5.*, this is NVIDIA L4 .*8\.9"),
        ({"gpu": "NVIDIA RTX 4090"}, {}, "built for NVIDIA RTX 4090"),
        ({"compute_capability": "8.6"}, {"hardware_compatibility": "same_compute_capability"}, r"8\.6.*this is"),
        ({"system": "Windows AMD64"}, {}, "built on Windows AMD64, this is Linux x86_64"),
    ],
)
def test_another_environment_is_refused(built: dict[str, str], options: dict[str, Any], problem: str) -> None:
    """The line says for what the plan was built, what is here, and how to build it here."""
    other = sidecar(environment=dataclasses.replace(HERE, **built), options=sidecar().options | options)

    with pytest.raises(EngineLoadError, match=problem) as caught:
        check_environment("m.engine", other, HERE)
    assert str(caught.value).endswith(f" Build it here: {build_command('m.engine', other, HERE)}")


@pytest.mark.parametrize(
    ("built", "options"),
    [
        ({}, {}),
        ({"driver": None, "cuda": "12.6"}, {}),
        ({"tensorrt": "10.3.0.26"}, {"version_compatible": True}),
        ({"gpu": "NVIDIA A100", "compute_capability": "8.0"}, {"hardware_compatibility": "ampere_plus"}),
        ({"gpu": "NVIDIA RTX 4090"}, {"hardware_compatibility": "same_compute_capability"}),
    ],
)
def test_an_environment_that_fits_passes(built: dict[str, str], options: dict[str, Any]) -> None:
    """The same release and GPU fit, and what a compatible plan allows beyond them."""
    other = sidecar(environment=dataclasses.replace(HERE, **built), options=sidecar().options | options)

    check_environment("m.engine", other, HERE)


def test_the_command_that_builds_it_again(tmp_path: Path) -> None:
    """The model beside the plan, else its name; the profile; what the plan was compatible with; another folder."""
    plan = tmp_path / "of mine" / "m.engine"
    plan.parent.mkdir()
    other = sidecar(options={"hardware_compatibility": "ampere_plus", "version_compatible": True})
    rest = ["--precision", "int8", "--shape", "x=1x3x8,2x3x8,4x3x16"]
    rebuilt = ["--output", str(plan.parent / "rebuilt")]

    assert shlex.split(build_command(plan, sidecar(), HERE)) == [
        "trt-int8", "build", "model.int8.onnx", *rest, *rebuilt
    ]  # fmt: skip
    (plan.parent / "model.int8.onnx").touch()
    assert shlex.split(build_command(plan, other, HERE)) == [
        *("trt-int8", "build", str(plan.parent / "model.int8.onnx"), *rest),
        *("--hardware-compatibility", "ampere_plus", "--version-compatible", *rebuilt),
    ]
    assert shlex.split(build_command(plan, sidecar(profiles=()), HERE))[5:] == rebuilt


def test_the_command_where_the_typed_model_is_gone(tmp_path: Path) -> None:
    """From the FP32 model and its calibration: method, percentile and every option of the placement."""
    plan = tmp_path / "m.int8.engine"
    options = PlacementOptions("float", "int8", ["head.*"], ["n_1", "n_2"])
    origin = Provenance("percentile 99.9", "11", options)
    gone = sidecar(model="m.int8.engine.onnx", calibration=origin, profiles=())
    rebuilt = ["--output", str(tmp_path / "rebuilt")]

    assert shlex.split(build_command(plan, gone, HERE)) == [
        *("trt-int8", "build", "m.onnx", "--precision", "int8", "--calibration", "FILE"),
        *("--method", "percentile", "--percentile", "99.9", *options.words(), *rebuilt),
    ]
    foreign = sidecar(model="m.int8.engine.onnx", calibration=Provenance("as in the model", None), profiles=())
    assert shlex.split(build_command(plan, foreign, HERE))[5:] == ["--calibration", "FILE", *rebuilt]
    half = sidecar(model="m.fp16.engine.onnx", precision="fp16", calibration=None, profiles=())
    assert shlex.split(build_command(plan, half, HERE))[2:] == [
        *("m.onnx", "--precision", "fp16", "--calibration", "FILE", *rebuilt)
    ]
    full = sidecar(model="m.fp32.engine.onnx", precision="fp32", calibration=None, profiles=())
    assert shlex.split(build_command(plan, full, HERE))[2:] == ["m.onnx", "--precision", "fp32", *rebuilt]
    (tmp_path / "m.int8.engine.onnx").touch()
    assert shlex.split(build_command(plan, gone, HERE))[2:] == [
        *(str(tmp_path / "m.int8.engine.onnx"), "--precision", "int8", *rebuilt)
    ]


def test_the_options_of_the_placement_are_kept(plan: Path) -> None:
    """Read back as they were; a sidecar from before they were kept says that nothing tells."""
    options = PlacementOptions("float", "int8", ["a"], ["b"])
    kept = sidecar(calibration=Provenance("entropy", "11", options))
    write_sidecar(plan, kept)
    assert read_sidecar(plan) == kept

    earlier = json.loads(sidecar_path(plan).read_text())
    del earlier["calibration"]["placement"]
    sidecar_path(plan).write_text(json.dumps(earlier))
    assert read_sidecar(plan) == sidecar(calibration=Provenance("entropy", "11"))


@pytest.mark.parametrize(("release", "way"), [("10.3.0", "--implicit --data DATA"), ("11.4.0", "--calibration FILE")])
def test_scales_of_a_calibrator_are_asked_for_again(release: str, way: str) -> None:
    """The model beside such a plan is an FP32 model; from TensorRT 11 on there are no calibrators."""
    here = dataclasses.replace(HERE, tensorrt=release)

    assert f"--precision int8 {way} --shape" in build_command("m.engine", sidecar(options={"implicit": True}), here)


def test_a_plan_for_ampere_is_refused_on_turing() -> None:
    """Ampere's compatibility reaches newer GPUs, no older ones."""
    other = sidecar(options={"hardware_compatibility": "ampere_plus"})

    with pytest.raises(EngineLoadError, match=r"7\.5"):
        check_environment("m.engine", other, dataclasses.replace(HERE, gpu="NVIDIA T4", compute_capability="7.5"))


def test_the_models_hash_covers_its_external_data(tmp_path: Path) -> None:
    """A changed weight file changes the hash; a file alone has the hash that sha256sum gives."""
    model, weights = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    model.write_bytes(b"graph")
    weights.write_bytes(b"one")
    alone, first = sha256_of_model([model]), sha256_of_model([model, weights])
    weights.write_bytes(b"two")

    assert alone == hashlib.sha256(b"graph").hexdigest()
    assert len({alone, first, sha256_of_model([model, weights])}) == 3
    with pytest.raises(FileAccessError, match=r"absent\.data"):
        sha256_of_model([model, tmp_path / "absent.data"])


def test_the_file_is_json_that_people_can_read(plan: Path) -> None:
    """The names that the documentation gives are there."""
    data = json.loads(sidecar_path(plan).read_text())

    assert data["environment"]["gpu"] == "NVIDIA L4"
    assert data["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3, None]}]
    assert data["calibration"] == {"method": "entropy", "sha256": "11", "placement": None}
    assert data["profiles"] == [{"x": [[1, 3, 8], [2, 3, 8], [4, 3, 16]]}]
