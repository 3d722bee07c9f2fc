"""trt_int8.replaced_engines: which engine a new one replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engines.sidecar import Environment, Provenance, Sidecar, sidecar_path, write_sidecar
from trt_int8.replaced_engines import EarlierEngine, earlier_engine, replacement_note

HERE = Environment("11.4.0.106", "NVIDIA L4", "8.9", "13.0", None, "Linux x86_64")
PLAN = Path("engines/m.int8.engine")


def sidecar(**changes: Any) -> Sidecar:
    fields: dict[str, Any] = {
        "plan_bytes": 1,
        "plan_sha256": "00",
        "environment": HERE,
        "precision": "int8",
        "inputs": (),
        "outputs": (),
        "profiles": (),
        "model": "m.onnx",
        "model_sha256": "aa",
        "calibration": Provenance("entropy", "11"),
        "options": {},
        "build_seconds": 1.0,
        "warnings": (),
    }
    return Sidecar(**(fields | changes))


@pytest.mark.parametrize(
    ("before", "what"),
    [
        ({"environment": dataclasses.replace(HERE, tensorrt="10.16.1.11")}, "TensorRT 10.16.1.11, entropy"),
        ({"environment": dataclasses.replace(HERE, gpu="NVIDIA T4")}, "TensorRT 11.4.0.106, entropy, NVIDIA T4"),
        ({"calibration": Provenance("entropy2 (TensorRT)", "22")}, "TensorRT 11.4.0.106, entropy2 (TensorRT)"),
        ({"calibration": Provenance("entropy", "22")}, "TensorRT 11.4.0.106, entropy, another calibration"),
        ({"calibration": None}, "TensorRT 11.4.0.106"),
        ({"model_sha256": "bb"}, "TensorRT 11.4.0.106, entropy, another model"),
    ],
)
def test_another_engine_is_named(before: dict[str, Any], what: str) -> None:
    """With the release and the method that it had, and what else differs."""
    note = replacement_note(EarlierEngine(PLAN, sidecar(**before)), sidecar())

    assert note == f"replaced {PLAN} ({what})"


def test_the_same_engine_is_none() -> None:
    """Built again, with other options or another driver, it is still of the same model, scales, release and GPU."""
    before = sidecar(options={"optimization_level": 1}, environment=dataclasses.replace(HERE, driver="580.1"))

    assert replacement_note(EarlierEngine(PLAN, before), sidecar()) is None
    assert replacement_note(None, sidecar()) is None


def test_what_lies_there(tmp_path: Path) -> None:
    """Nothing, an engine that nothing is known of, or one with its sidecar."""
    plan = tmp_path / "m.int8.engine"
    assert earlier_engine(plan) is None
    plan.write_bytes(b"plan")
    assert earlier_engine(plan) == EarlierEngine(plan, None)
    assert replacement_note(earlier_engine(plan), sidecar()) == f"replaced {plan} (an engine without a sidecar)"
    sidecar_path(plan).write_text("{}")
    assert earlier_engine(plan) == EarlierEngine(plan, None)
    write_sidecar(plan, sidecar())
    assert earlier_engine(plan) == EarlierEngine(plan, sidecar())
