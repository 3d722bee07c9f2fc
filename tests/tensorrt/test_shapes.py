"""Engines with two dynamic axes: built for the lengths that calibration saw, timed at all of them; SIMULATED."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from engines.profiles import ShapeRange
from trt_int8 import Calibration, benchmark, build_engine, calibrate
from trt_int8.cli import main
from trt_int8.errors import ConfigError

QUICK: dict[str, Any] = {"rounds": 5, "budget_s": 0.05}


def batch(samples: int, length: int) -> dict[str, Any]:
    ids = np.arange(samples * length).reshape(samples, length) % 9
    mask = np.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"ids": ids, "mask": mask}


@pytest.fixture(scope="module")
def model(graph_builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids, a table of 9 rows, a mask, one layer; batch and length are free."""
    graph = graph_builder()
    ids = graph.input("ids", ("batch", "length"), TensorProto.INT64)
    mask = graph.input("mask", ("batch", "length"), TensorProto.INT64)
    x = graph.node("Gather", [graph.normal((9, 32)), ids])
    weights = graph.node("Unsqueeze", [graph.node("Cast", [mask], to=1), graph.constant(np.array([2]))])
    graph.node("MatMul", [graph.node("Mul", [x, weights]), graph.normal((32, 16))], "y")
    return Path(graph.save(tmp_path_factory.mktemp("tokens") / "tokens.onnx", ["y"]))


@pytest.fixture(scope="module")
def calibration(model: Path) -> Calibration:
    return calibrate(model, [batch(4, 6), batch(2, 10), batch(4, 6), batch(3, 5)], padding_mask="mask")


@pytest.fixture(scope="module")
def engines(model: Path, calibration: Calibration) -> list[Path]:
    """FP32 and INT8."""
    folder = model.parent / "engines"
    precisions: tuple[Any, ...] = ("fp32", "int8")
    return [build_engine(model, folder, precision=name, calibration=calibration).path for name in precisions]


def test_every_shape_of_the_profile_is_timed(engines: list[Path]) -> None:
    """The profile of the calibration, from the sidecar; kernels for other shapes are no news here."""
    result = benchmark(engines, shapes="all", **QUICK).to_json()

    assert {part["shape"]: part["inputs"]["ids"] for part in result["shapes"]} == {
        "min": [1, 5],
        "opt": [4, 6],
        "max": [4, 10],
    }
    assert result["inputs"]["ids"] == [4, 6]
    for part in result["shapes"]:
        assert part["timed"] == "gpu compute"
        assert all(row["simulated"] and row["gpu"] for row in part["candidates"])
        assert not [line for line in part["warnings"] if "chosen for" in line]


@pytest.mark.tensorrt(11)
def test_engines_for_different_shapes_are_timed_where_they_meet(
    engines: list[Path], model: Path, tmp_path: Path
) -> None:
    """The larger of the least, the smaller of the largest, also beside an ONNX model; none, where there is none."""

    def built(name: str, *shapes: tuple[int, int]) -> Path:
        ranges = dict.fromkeys(("ids", "mask"), ShapeRange(*shapes))
        return build_engine(model, tmp_path, precision="fp32", name=name, shapes=ranges).path

    other = built("other", (2, 4), (2, 8), (2, 8))
    result = benchmark([model, engines[0], other], shapes="all", **QUICK).to_json()

    assert result["timed"] == "host"
    assert {part["shape"]: part["inputs"]["ids"] for part in result["shapes"]} == {
        "min": [2, 5],
        "opt": [2, 6],
        "max": [2, 8],
    }
    with pytest.raises(ConfigError, match="have none in common"):
        benchmark([engines[0], built("far", (1, 12), (1, 16), (1, 20))], shapes="opt", **QUICK)


@pytest.mark.tensorrt(10)
def test_a_run_builds_for_what_it_judges(model: Path, tmp_path: Path) -> None:
    """The evaluation data are shorter and longer than those of the calibration; all shapes are timed, too."""
    for folder, shapes in {"calibration": [(4, 6), (2, 8)], "evaluation": [(4, 3), (1, 12)]}.items():
        (tmp_path / folder).mkdir()
        for index, shape in enumerate(shapes):
            np.savez(tmp_path / folder / f"{index}.npz", **batch(*shape))
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{source: {model}}}
data: {{calibration: calibration, evaluation: evaluation, padding_mask: mask}}
quantize: {{methods: [minmax], method: minmax, targets: [tensorrt], fp16: false, int8_fp16: false}}
build: {{precisions: [fp32, int8]}}
benchmark: {{rounds: 5, budget_s: 0.1, warmup_s: 0.01, shapes: all}}
"""
    )
    assert main(["run", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out"), "--backend", "tensorrt"]) == 0
    timed = json.loads((tmp_path / "out/benchmark.json").read_text())
    judged = json.loads((tmp_path / "out/accuracy.json").read_text())

    assert timed["inputs"]["ids"] == [4, 3]
    assert {part["shape"]: part["inputs"]["ids"] for part in timed["shapes"]} == {
        "min": [1, 3],
        "opt": [4, 6],
        "max": [4, 12],
    }
    assert judged["candidates"][0]["samples"] == 5
    assert Calibration.load(tmp_path / "out/calibration.npz").settings["padding"] == "mask 'mask'"
