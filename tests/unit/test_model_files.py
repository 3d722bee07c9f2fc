"""Results do not replace a file of the models that they are about."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.runner import TensorSpec
from engines.sidecar import Environment, Sidecar, write_sidecar
from trt_int8.cli import main
from trt_int8.errors import ConfigError, FileAccessError
from trt_int8.model_files import check_result_file, files_of


@pytest.fixture
def external(tiny_model: Path) -> Path:
    """The tiny model with its weights in a file of their own."""
    path = tiny_model.with_name("external.onnx")
    onnx.save(onnx.load(tiny_model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


@pytest.fixture
def engine(external: Path) -> Path:
    """No plan at all, with a sidecar that says that it was built from the external model."""
    spec = TensorSpec("x", np.dtype(np.float32), (1, 3))
    plan = external.with_name("m.engine")
    plan.write_bytes(b"plan")
    here = Environment("10.16", "GPU", "9.0", "13.0", None)
    digest = hashlib.sha256(b"plan").hexdigest()
    sidecar = Sidecar(4, digest, here, "fp32", (spec,), (spec,), (), external.name, "0", None, {}, 1.0, ())
    write_sidecar(plan, sidecar)
    return plan


def test_all_files_of_a_model_are_listed(external: Path, engine: Path) -> None:
    """External data of an ONNX file; sidecar, kept model and the model that was built from, of an engine."""
    assert [path.name for path in files_of(external)] == ["external.onnx", "weights.bin"]
    assert sorted(path.name for path in files_of(engine)) == [
        "external.onnx", "m.engine", "m.engine.json", "m.engine.onnx", "weights.bin",
    ]  # fmt: skip


def test_a_damaged_sidecar_is_for_its_reader_to_tell(engine: Path) -> None:
    """The files that are there by their names are listed all the same."""
    engine.with_name("m.engine.json").write_text("{}")
    assert [path.name for path in files_of(engine)] == ["m.engine", "m.engine.json", "m.engine.onnx"]
    assert [path.name for path in files_of(engine.with_name("missing.onnx"))] == ["missing.onnx"]


@pytest.mark.parametrize("name", ["m.engine", "m.engine.json", "external.onnx", "weights.bin"])
@pytest.mark.parametrize("command", [["bench"], ["compare", "--data", "d.npz"], ["inspect"]])
def test_no_command_replaces_a_file_that_it_reads(
    command: list[str], name: str, engine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error names the option, and the file is as before."""
    file = engine.with_name(name)
    before = file.read_bytes()
    models = [str(engine)] * (2 if command[0] == "compare" else 1)

    assert main([*command, *models, "--json", str(file)]) == 1
    assert "it is read as well, and would be lost. Name another file with --json." in capfd.readouterr().err
    assert file.read_bytes() == before


def test_the_place_of_a_sidecar_is_kept_free(engine: Path) -> None:
    """That of an engine without one, which --trust loads, and that of one which is not read."""
    engine.with_name("m.engine.json").unlink()
    for models in ([engine], []):
        with pytest.raises(ConfigError, match=r"where the sidecar of 'm\.engine' belongs"):
            check_result_file(engine.with_name("m.engine.json"), *models)
    check_result_file(engine.with_name("other.engine.json"), engine)


def test_other_files_may_be_written(engine: Path, tmp_path: Path) -> None:
    """Data that are no files are passed over; folders are refused with the right option."""
    check_result_file(tmp_path / "new.json", engine, None, "package.data:batches")
    with pytest.raises(FileAccessError, match=r"it is a folder\. Name a file in it with --json"):
        check_result_file(tmp_path, engine)
