"""The Python API takes what a user would write, and names what it cannot use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trt_int8 import Calibration, Pipeline, benchmark, calibrate, compare, quantize
from trt_int8.errors import ConfigError, FileAccessError, UsageError

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

    with pytest.raises(ConfigError, match="tensors is 'some'; expected 'quantized' or 'tensorrt' or 'cpu' or 'all'"):
        calibrate(tiny_model, BATCHES, tensors=wrong)
    with pytest.raises(ConfigError, match="execution is 'some'; expected 'exact' or 'native'"):
        benchmark([tiny_model], execution=wrong)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"transfers": True},
            "--transfers does nothing here: only for TensorRT engines, and all models are ONNX files",
        ),
        ({"transfers": False}, "--no-transfers does"),
        ({"cuda_graph": False, "trust": True}, "--no-cuda-graph and --trust do nothing here"),
    ],
)
def test_options_for_engines_are_refused_for_onnx_files(
    options: dict[str, Any], expected: str, tiny_model: Path
) -> None:
    """They would do nothing."""
    with pytest.raises(UsageError, match=expected):
        benchmark([tiny_model], rounds=5, budget_s=0.05, **options)


def test_options_for_onnx_files_are_refused_for_engines(tmp_path: Path, tiny_model: Path) -> None:
    """Before the engines are read, which are not there; of compare, --execution is about the candidates alone."""
    engines = [tmp_path / "a.engine", tmp_path / "b.engine"]
    with pytest.raises(UsageError, match="--execution and --threads do nothing here: only for ONNX files, and all"):
        benchmark(engines, execution="exact", threads=2)
    with pytest.raises(UsageError, match="--execution does nothing here"):
        compare(tiny_model, engines, BATCHES, execution="exact")
    with pytest.raises(UsageError, match="--trust does nothing here"):
        compare(tiny_model, tiny_model, BATCHES, trust=True)


def test_a_batch_size_that_a_model_overrides_is_noted(tmp_path: Path, graph_builder: Any) -> None:
    """With random numbers; of data, opening them tells. The same size is no news."""
    builder = graph_builder()
    builder.input("x", (2, 3))
    model = builder.save(tmp_path / "fixed.onnx", [builder.node("Relu", ["x"])])

    result = benchmark(model, batch_size=5, rounds=5, budget_s=0.05)
    assert result.batch_size == 2
    assert result.notes == ("the models fix their batch: timed with 2 samples, not the 5 of --batch-size",)
    assert benchmark(model, batch_size=2, rounds=5, budget_s=0.05).notes == ()


def test_where_a_comparison_is_saved_is_looked_at_first(tmp_path: Path, tiny_model: Path) -> None:
    """Neither models nor data are read: there are none."""
    missing = tmp_path / "missing.onnx"
    with pytest.raises(FileAccessError, match=r"tiny\.onnx' is not a folder\. Choose another place with --save"):
        compare(missing, missing, "missing.npz", save_to=tiny_model)
    recorded = tmp_path / "polygraphy" / "inputs.json"
    recorded.parent.mkdir()
    recorded.write_text("[]")
    with pytest.raises(ConfigError, match=r"inputs\.json': it is read as well"):
        compare(missing, missing, recorded, save_to=tmp_path)


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
