"""The report of a run whose models TensorRT ran: made from result files written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trt_int8.report import render_report
from trt_int8.report_models import model_rows

NAMES = {
    "FP32": ("fp32", 2.0, 1.0),
    "TF32": ("tf32", 1.5, 1.33),
    "FP16": ("fp16", 1.0, 2.0),
    "INT8 entropy, tensorrt": ("int8", 0.8, 2.5),
    "INT8+FP16 entropy, tensorrt": ("int8+fp16", 0.5, 4.0),
}


def _engine(name: str, precision: str, gpu: str) -> dict[str, Any]:
    return {
        "name": name,
        "file": f"model.{precision}.engine",
        "precision": precision,
        "environment": {
            "tensorrt": "10.16.1.11",
            "gpu": gpu,
            "compute_capability": "8.9",
            "cuda": "13.0",
            "driver": "580.65",
        },
        "calibration": {"method": "entropy", "sha256": "ab"} if "int8" in precision else None,
        "profiles": [{"image": [[1, 3, 6, 6], [8, 3, 6, 6], [32, 3, 6, 6]]}],
        "plan_bytes": 1_000_000,
        "build_seconds": 12.5,
        "notes": ["a reformat was needed"] if precision == "int8" else [],
    }


def _run(folder: Path, gpu: str) -> Path:
    simulated = gpu == "SIMULATED"

    def timing(name: str, median: float, speedup: float) -> dict[str, Any]:
        tail = {"p90_ms": median, "p95_ms": median, "p99_ms": median, "samples_per_s": 1000 / median}
        interval = {"speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
        gpu = {"latency_ms": median + 0.125, "energy_mj_per_inference": 12.34, "cuda_graph": True}
        row = {"name": name, "median_ms": median, **tail, **interval, "simulated": simulated, "execution": "native"}
        return {**row, "gpu": gpu}

    def scores(name: str) -> dict[str, Any]:
        figures = {"samples": 1000, "top1": 90.0, "top5": 99.0, "agreement": 99.0, "sqnr_db": 30.0, "cosine": 0.999}
        return {"name": name, **figures, "max_abs": 0.1, "simulated": simulated, "execution": "native"}

    row = {
        "node": "conv<1>",
        "op_type": "Conv",
        "intended": "int8",
        "layer": "conv + relu",
        "precision": "fp16",
        "layer_ms": 0.01,
    }
    layer = {"name": "Reformatting CopyNode", "reformat": True, "time_ms": 0.002}
    table = {"engine": "INT8 entropy, tensorrt", "summary": "0 of 1 intended layers run INT8; 1 reformat layer"}
    contents: dict[str, Any] = {
        "engines.json": {"engines": [_engine(name, precision, gpu) for name, (precision, _, _) in NAMES.items()]},
        "layers.json": {"engines": [{**table, "rows": [row], "layers": [layer]}]},
        "quantization.json": {
            "models": [
                {"file": "model.int8.onnx", "method": "entropy", "target": "tensorrt", "precision": "int8"},
                {"file": "model.int8+fp16.onnx", "method": "entropy", "target": "tensorrt", "precision": "int8+fp16"},
            ],
            "fp16": {"file": "model.fp16.onnx", "held": [], "nodes": 3},
        },
        "benchmark.json": {
            "rounds": 20,
            "reference": "FP32",
            "batch_size": 8,
            "warnings": [],
            "candidates": [timing(name, median, speedup) for name, (_, median, speedup) in NAMES.items()],
        },
        "accuracy.json": {
            "reference": "FP32",
            "reference_scores": scores("FP32"),
            "candidates": [scores(name) for name in NAMES if name != "FP32"],
        },
        "sizes.json": {
            "models": [
                {"name": name, "file": f"model.{precision}.engine", "file_bytes": 4, "weight_bytes": {}, "ratio": 1.0}
                for name, (precision, _, _) in NAMES.items()
            ]
        },
        "manifest.json": {
            "format": 1,
            "tool": "0.1.0",
            "created": "2026-01-05T10:12:13+00:00",
            "title": "engines",
            "config": {"data": {"evaluation": "e.npz"}, "quantize": {"method": "entropy"}},
            "machine": {"cpu": {"model": "Some CPU"}, "cuda": {"gpus": [{"name": gpu}]}},
            "stages": {},
            "files": {},
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _text(folder: Path) -> str:
    page = render_report(folder).read_text()
    return " ".join(re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_engines_have_the_names_of_their_models(tmp_path: Path) -> None:
    """Each engine joins the row of the model that it was built from, in the order of their precisions."""
    folder = _run(tmp_path, "NVIDIA L4")
    files = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("quantization", "benchmark", "accuracy", "sizes", "engines")
    }
    rows = model_rows(files["quantization"], files["benchmark"], files["accuracy"], files["sizes"], files["engines"])

    assert [(row.name, row.precision, row.file) for row in rows] == [
        (name, precision, f"model.{precision}.engine") for name, (precision, _, _) in NAMES.items()
    ]
    assert [row.method for row in rows] == ["", "", "", "entropy", "entropy"]


def test_the_verdict_is_about_the_fastest_engine_of_the_delivered_method(tmp_path: Path) -> None:
    """On a GPU the sentence says so, and nothing is called simulated."""
    text = _text(_run(tmp_path, "NVIDIA L4"))

    assert "INT8+FP16 (entropy) runs 4.00x as fast as FP32 on this GPU (95 % interval 3.90 to 4.10)" in text
    assert "TensorRT engines, run on NVIDIA L4" in text
    assert "TensorRT 10.16.1.11 on NVIDIA L4 (compute capability 8.9), CUDA 13.0, driver 580.65." in text
    assert "1x3x6x6, 8x3x6x6, 32x3x6x6" in text
    assert "INT8 entropy, tensorrt: 0 of 1 intended layers run INT8; 1 reformat layer" in text
    assert "0.625" in text  # the fastest with its transfers
    assert "12.3" in text
    assert "a reformat was needed" in text
    assert "imulated" not in text
    assert "SIMULATED" not in text


def test_a_simulated_gpu_is_named_and_its_times_are_not_shown_as_speed_ups(tmp_path: Path) -> None:
    """What stands in for a GPU in tests gives no verdict on speed."""
    text = _text(_run(tmp_path, "SIMULATED"))

    assert "TensorRT and the GPU are SIMULATED" in text
    assert "as fast as FP32" not in text
    assert "Speed on this" not in text
    assert "smaller than" not in text
    assert "have no size that means anything" in text
