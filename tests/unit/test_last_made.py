"""A model is prepared once for all stages of a run, and anew as soon as anything of it has changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines import graph
from engines.graph import prepare
from engines.last_made import LastMade, digest_of
from trt_int8 import calibrate, quantize


@pytest.fixture
def prepared_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really prepared, in order; at first none is known."""
    graph._last.forget()
    done: list[Path] = []
    whole = graph._prepared

    def noted(file: Path) -> Any:
        done.append(file)
        return whole(file)

    monkeypatch.setattr(graph, "_prepared", noted)
    return done


def test_a_model_is_prepared_once(tiny_model: Path, tmp_path: Path, prepared_files: list[Path]) -> None:
    """Calibrating and quantizing for two targets take the same one, under another name too, which messages give."""
    calibration = calibrate(tiny_model, {"input": np.ones((4, 3, 8, 8), np.float32)})
    for target in ("tensorrt", "cpu"):
        quantize(tiny_model, calibration, output=tmp_path / f"{target}.onnx", target=target)
    copy = tmp_path / "copy.onnx"
    shutil.copy(tiny_model, copy)

    assert prepare(copy).path == copy
    assert prepare(copy).proto is prepare(tiny_model).proto
    assert prepared_files == [tiny_model]


def test_a_changed_file_is_prepared_anew(tiny_model: Path, prepared_files: list[Path]) -> None:
    """Other weights under the same name."""
    before = prepare(tiny_model).weights_hash
    model = onnx.load(tiny_model)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))
    onnx.save(model, tiny_model)

    assert prepare(tiny_model).weights_hash != before
    assert prepared_files == [tiny_model, tiny_model]


def test_changed_external_data_are_read_anew(tiny_model: Path, tmp_path: Path, prepared_files: list[Path]) -> None:
    """The model's own file is the same, the weights beside it are not; nor are those in another folder."""
    folder = tmp_path / "one"
    folder.mkdir()
    file = folder / "m.onnx"
    onnx.save(onnx.load(tiny_model), file, save_as_external_data=True, location="m.data", size_threshold=0)
    before = prepare(file).weights_hash
    assert prepare(file).weights_hash == before
    data = folder / "m.data"
    data.write_bytes((2 * np.frombuffer(data.read_bytes(), np.float32)).tobytes())
    os.utime(data, ns=(0, 0))
    after = prepare(file).weights_hash
    shutil.copytree(folder, tmp_path / "two")
    prepare(tmp_path / "two" / "m.onnx")

    assert after != before
    assert prepared_files == [file, file, tmp_path / "two" / "m.onnx"]


def test_what_is_taken_out_may_be_edited(tiny_model: Path, tmp_path: Path) -> None:
    """What is written into a copy, such as the inputs of a calibration, is in no other one."""
    prepared = prepare(tiny_model)
    onnx.helper.set_model_props(prepared.editable(), {"key": "value"})
    prepared.ir().graph[0].name = "renamed"
    again = prepare(tiny_model)

    assert not again.proto.metadata_props
    assert again.proto.graph.node[0].name != "renamed"
    assert again.graph_hash == prepared.graph_hash


def test_only_the_last_one_is_kept(tmp_path: Path) -> None:
    """What was made of a file goes when another is made, or when nothing is to be kept."""
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(file.name)
    made: LastMade[str] = LastMade()
    for file in files:
        made.keep(file, digest_of(file), [], f"of {file.name}")

    assert made.find(files[0], digest_of(files[0])) is None
    assert made.find(files[1], digest_of(files[1])) == "of b"
    made.forget()
    assert made.find(files[1], digest_of(files[1])) is None
    assert digest_of(tmp_path / "none") == ""
