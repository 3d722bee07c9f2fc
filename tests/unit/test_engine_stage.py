"""The shapes that the engines of a run are built for."""

from __future__ import annotations

import numpy as np
import pytest

from calibrators.calibration import Calibration, Fingerprint
from engines.profiles import ShapeRange
from engines.runner import TensorSpec
from trt_int8.config import RunConfig
from trt_int8.engine_stage import check_timed_shapes, planned_shapes
from trt_int8.errors import ConfigError

SEEN = Calibration({}, Fingerprint("g", "w", ("d",), "", "t", 3, 12), {"x": {(4, 9): 3}, "state": {(2, 4, 5): 3}})


def config(**accuracy: int) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"source": "m.onnx"}, "data": {"calibration": "d.npz"}, "accuracy": accuracy}
    )


def test_all_axes_that_are_the_batch_make_room_for_the_evaluation() -> None:
    """Also the second one of a state; other axes stay as calibration saw them."""
    float32 = np.dtype(np.float32)
    inputs = [TensorSpec("x", float32, ("N", "T")), TensorSpec("state", float32, (2, "N", 5))]

    assert planned_shapes(config(batch_size=64), SEEN, inputs) == {
        "x": ShapeRange((1, 9), (4, 9), (64, 9)),
        "state": ShapeRange((2, 1, 5), (2, 4, 5), (2, 64, 5)),
    }
    smaller = planned_shapes(config(batch_size=2), SEEN, inputs)
    assert smaller is not None
    assert smaller["state"].maximum == (2, 4, 5)


def test_what_accuracy_is_judged_on_finds_room() -> None:
    """Longer and shorter sequences than calibration saw; kernels are chosen for what it saw."""
    inputs = [TensorSpec("x", np.dtype(np.float32), ("N", "T"))]
    judged = {"x": {(2, 3): 1, (8, 20): 1}}

    assert planned_shapes(config(), SEEN, inputs, judged) == {"x": ShapeRange((1, 3), (4, 9), (8, 20))}


def test_shapes_of_the_configuration_must_hold_what_is_judged() -> None:
    """Said before the first engine is built."""
    inputs = [TensorSpec("x", np.dtype(np.float32), ("N", "T"))]
    shapes = {"x": {"min": [1, 4], "opt": [4, 9], "max": [4, 16]}}
    told = RunConfig.model_validate(
        {"model": {"source": "m.onnx"}, "data": {"calibration": "d.npz"}, "build": {"shapes": shapes}}
    )

    assert planned_shapes(told, SEEN, inputs, {"x": {(4, 16): 1}}) == {"x": ShapeRange((1, 4), (4, 9), (4, 16))}
    with pytest.raises(ConfigError, match=r"'x' of shape \(4, 20\): build.shapes builds them for min \(1, 4\)"):
        planned_shapes(told, SEEN, inputs, {"x": {(4, 16): 1, (4, 20): 1}})


def test_fixed_shapes_cannot_be_timed_at_others() -> None:
    """Said before anything is run."""
    with pytest.raises(ConfigError, match=r"benchmark.shapes = None: all shapes .*\(x: float32 \(2, 3\)\)"):
        check_timed_shapes(config(), [TensorSpec("x", np.dtype(np.float32), (2, 3))])
