"""Batches for several models: what any of them fixes is fixed, and a profile is checked before anything is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.runner import TensorSpec
from engines.sidecar import Environment, Sidecar, write_sidecar
from engines.trt_runner import TensorRTRunner
from trt_int8.errors import InferenceError, ModelError
from trt_int8.shared_inputs import check_profile, shared_inputs

Axes = tuple[int | str | None, ...]


def runner(fake_runner: Any, name: str, axes: Axes | None) -> Any:
    """A model of one input."""
    made = fake_runner(name)
    made.inputs = (TensorSpec("x", np.dtype(np.float32), axes),)
    return made


def engine(folder: Path, name: str, axes: Axes, *profiles: tuple[Any, Any, Any]) -> TensorRTRunner:
    """An engine that is never loaded: its sidecar says what it takes."""
    plan = folder / name
    plan.write_bytes(b"plan")
    spec = TensorSpec("x", np.dtype(np.float32), axes)
    sidecar = Sidecar(
        plan_bytes=4,
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
        environment=Environment("10.0.0.0", "GPU", "9.0", "13.0", None),
        precision="fp32",
        inputs=(spec,),
        outputs=(),
        profiles=tuple({"x": profile} for profile in profiles),
        model="m.onnx",
        model_sha256="",
        calibration=None,
        options={},
        build_seconds=1.0,
        warnings=(),
    )
    write_sidecar(plan, sidecar)
    return TensorRTRunner(plan)


def test_what_any_model_fixes_is_fixed(fake_runner: Any) -> None:
    """Names and types are the first model's; an axis takes the length that one of them gives it."""
    models = [runner(fake_runner, name, axes) for name, axes in (("a", ("N", None, 5)), ("b", (4, "T", 5)))]

    assert shared_inputs(models) == (TensorSpec("x", np.dtype(np.float32), (4, None, 5)),)
    assert shared_inputs(models[:1]) == models[0].inputs


@pytest.mark.parametrize("axes", [None, (4,), ()])
def test_other_ranks_are_left_to_the_check_of_feeds(fake_runner: Any, axes: Axes | None) -> None:
    """A model without that rank fixes nothing here; nor is there anything to fix without one."""
    models = [runner(fake_runner, "a", ("N", 5)), runner(fake_runner, "b", axes)]

    assert shared_inputs(models) == models[0].inputs
    assert shared_inputs([runner(fake_runner, "c", None), models[0]])[0].shape is None


def test_two_fixed_batches_are_refused_by_name(fake_runner: Any) -> None:
    """No batch fits both; the message names both models, and not one between them."""
    models = [runner(fake_runner, *item) for item in (("a", ("N", 5)), ("b", (4, 5)), ("c", (8, 5)))]

    with pytest.raises(ModelError, match=r"Cannot feed b and c the same data: axis 0 .* at 4 in the first and at 8"):
        shared_inputs(models)


def test_a_profile_of_one_length_fixes_the_axis(fake_runner: Any, tmp_path: Path) -> None:
    """An engine whose profiles hold batches of 4 alone takes no other; one with a range takes what it is given."""
    pinned = engine(tmp_path, "pinned.engine", ("N", "T"), ((4, 1), (4, 2), (4, 8)), ((4, 9), (4, 9), (4, 9)))
    ranged = engine(tmp_path, "ranged.engine", ("N", "T"), ((1, 3), (4, 3), (8, 3)))
    model = runner(fake_runner, "a", ("N", "T"))

    assert shared_inputs([model, pinned])[0].shape == (4, "T")
    assert shared_inputs([model, ranged])[0].shape == ("N", 3)
    assert shared_inputs([model, pinned, ranged])[0].shape == (4, 3)


def test_shapes_outside_of_every_profile_name_the_profiles(fake_runner: Any, tmp_path: Path) -> None:
    """Nothing is loaded for it: TensorRT is not installed here. ONNX models have no profiles."""
    found = engine(tmp_path, "m.engine", ("N", 3), ((1, 3), (1, 3), (2, 3)), ((4, 3), (6, 3), (8, 3)))

    for batch in (1, 2, 4, 8):
        check_profile(found, {"x": (batch, 3)})
    with pytest.raises(
        InferenceError,
        match=r"m\.engine: input 'x' has shape \(3, 3\); the engine was built for min \(1, 3\).* or min \(4, 3\), opt",
    ):
        check_profile(found, {"x": (3, 3)})
    check_profile(runner(fake_runner, "a", ("N", 3)), {"x": (9, 9)})
