"""trt_int8.build_checks: what is refused before a build, and what its files are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.profiles import ShapeRange
from engines.runner import TensorSpec
from trt_int8.build_checks import check_combination, engine_profile, engine_stem, given_ranges, needs_calibration
from trt_int8.errors import ConfigError, EngineBuildError, UsageError

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
        (None, (1, 2, 3), [FIXED], ConfigError, r"no input has a dynamic batch: fixed: float32 \(1, 4\)"),
        ({"image": [(1, 3, 8, 8)] * 3}, (1, 2, 3), [IMAGE], ConfigError, "no input has a dynamic batch"),
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
    plain = {"implicit": False, "typed": False, "calibration": False, "data": False}
    plain |= {"of_data": {}, "of_calibration": {}}
    check_combination(**(plain | options))


def test_options_that_go_together() -> None:
    """With or without a calibrator."""
    combination()
    combination(calibration=True, of_calibration={"method": "mse"}, of_data={"cache": None})
    combination(implicit=True, calibration=True, of_calibration={"method": "mse"})
    combination(implicit=True, data=True, of_data={"cache": "c"}, of_calibration={"method": None})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": True}, "add --implicit"),
        ({"of_data": {"cache": "c"}}, "cache says how"),
        (
            {"implicit": True, "calibration": True, "of_data": {"cache": "c", "batch size": 1}},
            "cache and batch size say",
        ),
        ({"implicit": True}, "neither was given"),
        ({"implicit": True, "calibration": True, "data": True}, "both were given"),
        ({"implicit": True, "data": True, "of_calibration": {"method": "mse"}}, "method of its own, --calibrator"),
        ({"typed": True, "of_calibration": {"method": "mse"}}, "holds its types and scales already"),
        (
            {"implicit": True, "calibration": True, "of_calibration": {"method": None, "exclude": ["a"]}},
            "TensorRT chooses the layers",
        ),
    ],
)
def test_options_that_do_not(options: dict[str, Any], problem: str) -> None:
    """They are a usage error."""
    with pytest.raises(UsageError, match=problem):
        combination(**options)


def test_what_an_fp32_model_lacks() -> None:
    """The purpose and both commands."""
    assert "the scales of INT8" in str(needs_calibration(MODEL, "int8+fp16"))
    assert "range of FP16" in str(needs_calibration(MODEL, "fp16"))
    assert "`trt-int8 calibrate m.onnx --data DATA`" in str(needs_calibration(MODEL, "fp16"))
