"""What a run is asked for and the graph alone can answer: told before the calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import ModelError
from trt_int8.config import RunConfig
from trt_int8.pipeline import Pipeline
from trt_int8.quantize_stage import quantize_all
from trt_int8.run_plan import MODEL, RunPlan

IMAGES = np.random.default_rng(4).normal(size=(4, 3, 8, 8)).astype(np.float32)


def config(model: Path, folder: Path, **quantize: Any) -> RunConfig:
    np.savez(folder / "data.npz", input=IMAGES)
    sections = {"model": {"source": str(model)}, "data": {"calibration": str(folder / "data.npz")}}
    return RunConfig.model_validate({**sections, "quantize": quantize})


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"include": ["no-such-node"]}, r"Cannot include 'no-such-node': it matches the whole name of none of the 2"),
        ({"exclude": ["no-such-node"]}, r"Cannot exclude 'no-such-node'"),
        ({"smooth": 0.5}, r"Cannot smooth .* no normalization"),
        (
            {"modes": ["static", "dynamic"], "exclude": ["fc"]},
            r"Cannot quantize .* dynamically: that serves MatMul, Gemm, LSTM",
        ),
    ],
)
def test_what_the_graph_refuses_is_told_before_the_calibration(
    quantize: Any, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The export is done, and nothing after it has begun."""
    stages: list[str] = []
    settings = config(tiny_model, tmp_path, **quantize)
    pipeline = Pipeline(settings, output=tmp_path / "out", backend="onnxruntime", announce=stages.append)
    with pytest.raises(ModelError, match=message):
        pipeline.run()
    assert stages == ["export"]
    assert not (tmp_path / "out" / "calibration.npz").exists()


def test_a_configuration_serves_models_that_have_no_use_for_all_of_it(tiny_model: Path, tmp_path: Path) -> None:
    """A percentile, residual float and affine activations go to the models that they are for; none is refused."""
    from trt_int8.calibration import calibrate

    wishes: Any = {
        "methods": ["entropy", "percentile", "auto"],
        "percentile": 99.9,
        "residual": "float",
        "activations": "affine",
        "modes": ["static", "dynamic", "weight-only"],
        "fp16": False,
    }
    settings = config(tiny_model, tmp_path, **wishes)
    variants = RunPlan(settings, "onnxruntime").variants
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / MODEL).write_bytes(tiny_model.read_bytes())
    for subfolder in ("methods", "modes"):
        (folder / subfolder).mkdir()
    held_back = str(tmp_path / "data.npz")
    made = quantize_all(settings, variants, calibrate(tiny_model, {"input": IMAGES}), folder, held_back=held_back)

    assert [model["name"] for model in made["models"]] == [variant.name for variant in variants]
    assert {model["method"] for model in made["models"]} == {"entropy", "percentile", "auto", "dynamic", "weight-only"}
