"""The Python API takes what a user would write, and names what it cannot use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trt_int8 import Calibration, Pipeline, benchmark, calibrate, compare, quantize
from trt_int8.errors import ConfigError

BATCHES = [{"input": np.random.default_rng(2).normal(size=(4, 3, 8, 8)).astype(np.float32)}]


@pytest.fixture
def calibration(tiny_model: Path) -> Calibration:
    """A calibration of the tiny model."""
    return calibrate(tiny_model, BATCHES)


def test_single_model_needs_no_list(tiny_model: Path) -> None:
    """One file is taken for a list of one, as text and as a path."""
    timed = benchmark(str(tiny_model), rounds=5, budget_s=0.05)
    compared = compare(tiny_model, tiny_model, BATCHES).to_json()

    assert [row["name"] for row in timed.to_json()["candidates"]] == ["tiny.onnx"]
    assert compared["candidates"][0]["max_abs"] == 0


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"target": "gpu"}, "target is 'gpu'; expected 'tensorrt' or 'cpu'"),
        ({"residual": "half"}, "residual is 'half'; expected 'int8' or 'float'"),
        ({"precision": "fp16"}, r"precision is 'fp16'; expected 'int8' or 'int8\+fp16'"),
        ({"precision": "int8+fp16", "target": "cpu"}, r"Cannot write int8\+fp16 for the target cpu: .*tensorrt"),
    ],
)
def test_unknown_word_for_quantize(
    option: dict[str, Any], expected: str, tiny_model: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """A word that is no choice is refused, not taken for the default; nothing is written."""
    with pytest.raises(ConfigError, match=expected):
        quantize(tiny_model, calibration, output=tmp_path / "q.onnx", **option)
    assert not (tmp_path / "q.onnx").exists()


def test_unknown_words_elsewhere(tiny_model: Path) -> None:
    """So are those of the other stages."""
    wrong: Any = "some"

    with pytest.raises(ConfigError, match="tensors is 'some'; expected 'quantized' or 'all'"):
        calibrate(tiny_model, BATCHES, tensors=wrong)
    with pytest.raises(ConfigError, match="execution is 'some'; expected 'exact' or 'native'"):
        benchmark([tiny_model], execution=wrong)


def test_pipeline_reads_its_configuration(tiny_model: Path, tmp_path: Path) -> None:
    """A pipeline takes the file that `trt-int8 run` takes, with paths that start at its folder."""
    np.savez(tmp_path / "data.npz", **BATCHES[0])
    (tmp_path / "mine.yaml").write_text(
        "model: {source: tiny.onnx}\ndata: {calibration: data.npz}\n"
        "quantize: {methods: [mse], method: mse, targets: [cpu], fp16: false}\n"
        "benchmark: {rounds: 5, budget_s: 0.05, warmup_s: 0.01}\n"
    )
    result = Pipeline(str(tmp_path / "mine.yaml"), output=str(tmp_path / "out"), backend="onnxruntime").run()

    assert result.folder == tmp_path / "out"
    assert result.report.is_file()
