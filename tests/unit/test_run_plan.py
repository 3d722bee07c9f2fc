"""Which models a run makes and measures."""

from __future__ import annotations

from typing import Any

import pytest

from trt_int8.config import RunConfig
from trt_int8.run_plan import RunPlan

METHODS = ["minmax", "entropy", "mse"]


def config(**sections: Any) -> RunConfig:
    quantize = {"methods": METHODS, **sections.pop("quantize", {})}
    data = {"calibration": "data.npz"}
    return RunConfig.model_validate({"model": {"source": "m.onnx"}, "data": data, "quantize": quantize, **sections})


def test_onnxruntime_measures_the_onnx_models() -> None:
    """Each method on both targets, and the delivered one with an FP16 rest; only what runs as it is here is timed."""
    plan = RunPlan(config(), "onnxruntime")

    assert [model.name for model in plan.measured] == [
        "FP32",
        "FP16",
        *(f"INT8 {method}, {target}" for method in METHODS for target in ("tensorrt", "cpu")),
        "INT8+FP16 entropy, tensorrt",
    ]
    assert [model.name for model in plan.measured if model.timed] == ["FP32", "FP16", "INT8 entropy, cpu"]
    assert plan.engines == ()
    assert plan.engine_files == []


def test_the_delivered_method_lies_at_the_top() -> None:
    """Its files have no method in their names, those of the others lie in methods/."""
    files = {variant.name: variant.file for variant in RunPlan(config(), "onnxruntime").variants}

    assert files["INT8 entropy, tensorrt"] == "model.int8.onnx"
    assert files["INT8 entropy, cpu"] == "model.int8.cpu.onnx"
    assert files["INT8 mse, tensorrt"] == "methods/mse.onnx"
    assert files["INT8 mse, cpu"] == "methods/mse.cpu.onnx"
    assert files["INT8+FP16 entropy, tensorrt"] == "model.int8+fp16.onnx"


def test_tensorrt_measures_an_engine_for_every_precision_and_method() -> None:
    """FP32 comes first; the CPU's placement is not made."""
    plan = RunPlan(config(), "tensorrt")

    assert {engine.name: engine.file for engine in plan.engines} == {
        "FP32": "model.fp32.engine",
        "TF32": "model.tf32.engine",
        "FP16": "model.fp16.engine",
        "INT8 minmax, tensorrt": "methods/minmax.int8.engine",
        "INT8 entropy, tensorrt": "model.int8.engine",
        "INT8 mse, tensorrt": "methods/mse.int8.engine",
        "INT8+FP16 entropy, tensorrt": "model.int8+fp16.engine",
    }
    assert [model.file for model in plan.measured] == [engine.file for engine in plan.engines]
    assert all(model.timed for model in plan.measured)
    assert not any("cpu" in file for file in plan.onnx_files)
    assert plan.engine_files[:2] == ["model.fp32.engine", "model.fp32.engine.json"]


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"build": {"precisions": ["fp32", "int8"]}, "quantize": {"methods": ["entropy"]}}, ["FP32", "INT8 entropy"]),
        ({"quantize": {"fp16": False, "methods": ["entropy"]}}, ["FP32", "TF32", "INT8 entropy", "INT8+FP16 entropy"]),
        ({"quantize": {"int8_fp16": False, "methods": ["entropy"]}}, ["FP32", "TF32", "FP16", "INT8 entropy"]),
        ({"quantize": {"targets": ["cpu"]}}, ["FP32", "TF32", "FP16"]),
    ],
)
def test_engines_are_those_that_are_wanted_and_have_a_model(sections: dict[str, Any], names: list[str]) -> None:
    """Precisions of the configuration, as far as the models are made."""
    plan = RunPlan(config(**sections), "tensorrt")

    assert [engine.name.removesuffix(", tensorrt") for engine in plan.engines] == names


def test_other_modes_stand_beside_the_static_models() -> None:
    """ONNX Runtime runs and times them on the CPU; TensorRT builds the weight-only one, and has no dynamic kernels."""
    modes = {"modes": ["static", "dynamic", "weight-only"]}
    here, there = (RunPlan(config(quantize=modes), backend) for backend in ("onnxruntime", "tensorrt"))

    assert [(item.name, item.file) for item in here.variants[-2:]] == [
        ("INT8 dynamic, cpu", "modes/dynamic.onnx"),
        ("INT8 weight-only, cpu", "modes/weight-only.onnx"),
    ]
    assert [model.timed for model in here.measured[-2:]] == [True, True]
    assert there.engines[-1].name == "INT8 weight-only, tensorrt"
    assert there.engines[-1].file == "modes/weight-only.int8.engine"
    assert not any("dynamic" in engine.name for engine in there.engines)
