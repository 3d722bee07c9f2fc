"""trt_int8.build_checks: what is refused before a build, and what its files are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.profiles import ShapeRange
from engines.runner import TensorSpec
from trt_int8.build_checks import (
    check_calibrated_inputs,
    check_combination,
    engine_profile,
    engine_stem,
    given_ranges,
    needs_calibration,
)
from trt_int8.errors import CalibrationError, ConfigError, EngineBuildError, UsageError

FLOAT = np.dtype(np.float32)
IMAGE = TensorSpec("image", FLOAT, ("batch", 3, 8, 8))
TEXT = TensorSpec("text", FLOAT, ("batch", "length"))
FIXED = TensorSpec("fixed", FLOAT, (1, 4))
MODEL = Path("m.onnx")


@pytest.mark.parametrize(
    ("file", "stem"),
    [
        ("model.onnx", "model"),
        ("folder/resnet.v2.onnx", "resnet.v2"),
        ("model.int8.onnx", "model"),
        ("model.int8+fp16.onnx", "model"),
        ("model.fp32.engine.onnx", "model"),
        ("model.engine.onnx", "model"),
        ("model", "model"),
        ("int8.onnx", "int8"),
    ],
)
def test_engines_are_called_after_their_models(file: str, stem: str) -> None:
    """Without suffix, precision and what a kept model has in addition."""
    assert engine_stem(Path(file), None) == stem


def test_a_name_stands_in_the_place_of_the_models() -> None:
    """It is the start of a file's name, and no path."""
    assert engine_stem(MODEL, "mine.v1") == "mine.v1"
    for name in ("a/b", "", "/abs"):
        with pytest.raises(ConfigError, match="expected the start of a file name"):
            engine_stem(MODEL, name)


def test_three_shapes_and_three_batches_make_a_profile() -> None:
    """Plain shapes do as ranges do; batch serves the inputs that shapes does not name."""
    text = ShapeRange((1, 1), (2, 8), (4, 16))
    shapes = {"text": [(1, 1), (2, 8), (4, 16)]}
    ranges = given_ranges(shapes, (1, 2, 4), [IMAGE, TEXT, FIXED])

    assert ranges == {"text": text, "image": ShapeRange((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
    assert given_ranges({"text": text}, None, [TEXT]) == {"text": text}
    assert given_ranges(None, None, [IMAGE]) is given_ranges({}, None, [IMAGE]) is None


@pytest.mark.parametrize(
    ("shapes", "batch", "inputs", "error", "problem"),
    [
        (None, (1, 2), [IMAGE], ConfigError, "expected the smallest, optimal and largest"),
        (None, (2, 1, 3), [IMAGE], ConfigError, "ascending"),
        (None, (0, 1, 3), [IMAGE], ConfigError, "ascending"),
        (None, (1, 2, 3), [FIXED], ConfigError, r"no input has a dynamic batch: 'fixed': float32 \(1, 4\)"),
        ({"image": [(1, 3, 8, 8)] * 3}, (1, 2, 3), [IMAGE], ConfigError, "^The batch 1,2,3 would change nothing"),
        (
            {"images": [(1, 3, 8, 8)] * 3},
            (1, 2, 3),
            [IMAGE],
            ConfigError,
            "'images', which is no input; .* 'image': fl",
        ),
        (None, (1, 2, 3), [TEXT], EngineBuildError, "further dynamic axes"),
        ({"image": [(1,), (2,)]}, None, [IMAGE], ConfigError, "The shapes of 'image' are"),
    ],
)
def test_shapes_that_cannot_be_meant(
    shapes: Any, batch: Any, inputs: list[TensorSpec], error: type[Exception], problem: str
) -> None:
    """What was given and what was expected."""
    with pytest.raises(error, match=problem):
        given_ranges(shapes, batch, inputs)


def test_where_the_profile_comes_from() -> None:
    """What the user asks for, else what calibration saw, else nothing where nothing is dynamic."""
    asked = {"image": ShapeRange((1, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8))}
    seen = {"image": {(4, 3, 8, 8): 7}}

    assert engine_profile(MODEL, [IMAGE], asked, seen) == asked
    assert engine_profile(MODEL, [IMAGE], None, seen) == {"image": ShapeRange((1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8))}
    assert engine_profile(MODEL, [FIXED], None, None) is None
    with pytest.raises(ConfigError, match="nothing says which shapes"):
        engine_profile(MODEL, [IMAGE], None, None)
    with pytest.raises(ConfigError, match="earlier version, does not say which shapes"):
        engine_profile(MODEL, [IMAGE], None, {})
    with pytest.raises(EngineBuildError, match="does not keep the fixed length 3 of axis 1"):
        engine_profile(MODEL, [IMAGE], None, {"image": {(4, 1, 8, 8): 7}})


def combination(**options: Any) -> None:
    plain: dict[str, Any] = {
        "precision": "int8",
        "implicit": False,
        "typed": False,
        "calibration": False,
        "data": False,
    }
    plain |= {"of_data": {}, "of_scales": {}}
    check_combination(**(plain | options))


def test_options_that_go_together() -> None:
    """With or without a calibrator."""
    combination()
    every = {"--method": "mse", "--exclude": ["a"], "--residual": "float"}
    combination(calibration=True, of_scales=every, of_data={"--cache": None})
    combination(calibration=True, of_scales=every, precision="int8+fp16", percentile=True)
    combination(implicit=True, calibration=True, of_scales={"--method": "mse"})
    combination(implicit=True, data=True, of_data={"--cache": "c"}, of_scales={"--method": None}, percentile=True)
    combination(precision="fp32", of_scales={"--method": None, "--exclude": None, "--residual": None})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": True}, "add --implicit"),
        ({"of_data": {"--cache": "c"}}, "--cache says how .* Leave it out, or add --implicit and --data"),
        (
            {"implicit": True, "calibration": True, "of_data": {"--cache": "c", "--batch-size": 1}},
            "--cache and --batch-size say .* Leave them out, or give --data in place of --calibration",
        ),
        ({"implicit": True}, "neither was given"),
        ({"implicit": True, "calibration": True, "data": True}, "both were given"),
        ({"implicit": True, "data": True, "of_scales": {"--method": "mse"}}, "method of its own, --calibrator"),
        ({"typed": True, "of_scales": {"--method": "mse"}}, "holds its types and scales already"),
        (
            {"implicit": True, "calibration": True, "of_scales": {"--method": None, "--exclude": ["a"]}},
            "--exclude would change nothing: .* TensorRT chooses the layers",
        ),
        (
            {"implicit": True, "calibration": True, "of_scales": {"--method": "mse", "--residual": "float"}},
            "^--residual would change nothing: .* TensorRT chooses the layers",
        ),
        (
            {"precision": "fp16", "calibration": True, "of_scales": {"--method": "mse", "--residual": "float"}},
            "--method and --residual would change nothing: fp16 has no scales. Leave them out, or build as int8",
        ),
        ({"precision": "tf32", "of_scales": {"--exclude": ["a"]}}, "--exclude .* tf32 has no scales. Leave it out"),
        ({"calibration": True, "percentile": False}, "--percentile .* the method is not percentile. .* --method perc"),
        ({"implicit": True, "data": True, "percentile": False}, "the calibrator is not percentile. .* --calibrator p"),
    ],
)
def test_options_that_do_not(options: dict[str, Any], problem: str) -> None:
    """They are a usage error."""
    with pytest.raises(UsageError, match=problem):
        combination(**options)


@pytest.mark.parametrize(
    "seen",
    [
        {},
        {"image": {(4, 3, 8, 8): 7}, "more": {(1,): 7}},
        {"image": {(4, 3, 8, 8): 7}, "fixed": {(1, 4): 7}},
    ],
)
def test_a_calibration_that_saw_the_models_inputs(seen: Any) -> None:
    """Whatever else it saw; one of an earlier version did not write them down, and fixed inputs need no profile."""
    check_calibrated_inputs(MODEL, [IMAGE, FIXED, TensorSpec("any", FLOAT, ())], seen)


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ({"picture": {(4, 3, 8, 8): 7}}, "other inputs, 'picture' and no 'image'; the model has 'image': float32"),
        ({"image": {(4, 1, 8, 8): 7}}, r"'image' of shape \(4, 1, 8, 8\)"),
        ({"image": {(4, 3, 8, 8): 7, (4, 3, 8): 1}}, r"'image' of shape \(4, 3, 8\)"),
        ({"image": {(4, 3, 8, 8): 7}, "fixed": {(2, 4): 7}}, r"'fixed' of shape \(2, 4\)"),
    ],
)
def test_a_calibration_that_saw_other_inputs(seen: Any, problem: str) -> None:
    """It is of another model, and its shapes make no profile of this one."""
    with pytest.raises(CalibrationError, match=f"does not belong to 'm.onnx': the calibration saw .*{problem}"):
        check_calibrated_inputs(MODEL, [IMAGE, FIXED], seen)


def test_what_an_fp32_model_lacks() -> None:
    """The purpose and both commands."""
    assert "the scales of INT8" in str(needs_calibration(MODEL, "int8+fp16"))
    assert "FP16's range" in str(needs_calibration(MODEL, "fp16"))
    assert "`trt-int8 calibrate m.onnx --data DATA`" in str(needs_calibration(MODEL, "fp16"))
