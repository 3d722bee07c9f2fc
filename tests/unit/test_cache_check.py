"""`trt-int8 cache check`: new data against the calibrated ranges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.calibration import Calibration
from trt_int8.cache_check import check_data
from trt_int8.calibration import calibrate
from trt_int8.errors import CalibrationError, DataError, GateMissedError


def images(seed: int, samples: int = 32) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return evenly distributed values in [0, 1), as those of images are after /255."""
    return np.random.default_rng(seed).random((samples, 3, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def calibration(module_tiny_model: Path) -> Calibration:
    """A calibration on values in [0, 1)."""
    return calibrate(module_tiny_model, {"input": images(0)})


def test_the_same_data(calibration: Calibration, module_tiny_model: Path):
    """The calibration's own data are fine, nothing lies beyond a maximum, and they are recognised."""
    result = check_data(calibration, {"input": images(0)}, module_tiny_model)

    assert result.verdict == "fine"
    assert {row.amax_ratio for row in result.tensors} == {1.0}
    assert {row.beyond_max for row in result.tensors} == {0.0}
    assert all(row.clipped == row.calibrated_clipped for row in result.tensors)
    assert result.notes == ("these are the data that were calibrated on",)


def test_other_samples_of_the_same_kind(calibration: Calibration, module_tiny_model: Path):
    """Other samples of the same distribution are fine."""
    result = check_data(calibration, {"input": images(1)}, module_tiny_model)

    assert result.verdict == "fine"
    assert result.line.startswith(f"fine: all {len(calibration.tensors)} tensors")
    assert result.notes == ()


def test_forgotten_255(calibration: Calibration, module_tiny_model: Path):
    """An input that is 255 times as large asks for the forgotten division."""
    result = check_data(calibration, {"input": 255 * images(1)}, module_tiny_model)

    assert result.verdict == "gross"
    assert result.line.startswith("grossly different input: 'input' is 25")
    assert "was /255 forgotten?" in result.line


@pytest.mark.parametrize(("scale", "hint"), [(1 / 255, "twice"), (20, "is it scaled as in calibration?"), (0, "0")])
def test_other_gross_inputs(scale: float, hint: str, calibration: Calibration, module_tiny_model: Path):
    """An input divided twice, one on another scale, and one that is always 0 are told apart."""
    result = check_data(calibration, {"input": np.float32(scale) * images(1)}, module_tiny_model)

    assert result.verdict == "gross"
    assert hint in result.line
    json.dumps(result.to_json(), allow_nan=False)


def test_drift(calibration: Calibration, module_tiny_model: Path):
    """Half as bright again is drift: the tensors that leave their range are named with their shares."""
    result = check_data(calibration, {"input": 1.5 * images(1)}, module_tiny_model, method="minmax")
    row = next(row for row in result.tensors if row.tensor == "input")
    beyond = float((1.5 * images(1) > images(0).max()).mean()) * 100

    assert result.verdict == "drift"
    assert "input clips 33" in result.line or "input clips 34" in result.line
    assert row.clipped == pytest.approx(beyond, abs=0.2)  # a bin is a thousandth wide
    assert row.beyond_max == row.clipped  # of min-max, the threshold is the maximum
    assert row.amax_ratio == pytest.approx(1.5, rel=0.01)
    assert result.tensors[0].clipped == max(row.clipped for row in result.tensors)


def test_within_the_range_and_unlike(calibration: Calibration, module_tiny_model: Path):
    """Values that stay within the range, yet spread over a fifth of it, are unlike those of the calibration."""
    result = check_data(calibration, {"input": 0.4 + 0.2 * images(1)}, module_tiny_model)

    assert result.verdict == "drift"
    assert result.line.startswith("drift: no tensor leaves its calibrated range, but input input has mean 0.5 and dev")


def test_one_outlier_is_no_gross_input(calibration: Calibration, module_tiny_model: Path):
    """A single value far out is drift, not another kind of input."""
    values = images(1)
    values[0, 0, 0, 0] = 200.0

    assert check_data(calibration, {"input": values}, module_tiny_model).verdict == "drift"


def test_limit_on_clipping(calibration: Calibration, module_tiny_model: Path):
    """The user's limit is a gate: missed where a tensor clips more, with its name and share."""
    result = check_data(calibration, {"input": 1.5 * images(1)}, module_tiny_model, method="minmax")

    result.require_clipped(None)
    result.require_clipped(90)
    with pytest.raises(GateMissedError, match=r"of \d+ tensors clip more than 1 % of their values, most of all"):
        result.require_clipped(1)


def test_the_method_is_judged_by(calibration: Calibration, module_tiny_model: Path):
    """A low percentile clips what it says, in calibration and now."""
    result = check_data(
        calibration, {"input": images(1)}, module_tiny_model, method="percentile", percentile=90, max_batches=16
    )
    row = next(row for row in result.tensors if row.tensor == "input")

    assert (result.method, result.batches) == ("percentile 90", 16)
    assert row.calibrated_clipped == pytest.approx(10, abs=0.2)
    assert row.clipped == pytest.approx(10, abs=1.5)


def test_ranges_tell_nothing_of_what_is_clipped(module_tiny_model: Path):
    """A calibration that keeps them alone is refused, with the way out."""
    ranges = calibrate(module_tiny_model, {"input": images(0)}, statistics="minmax")
    with pytest.raises(CalibrationError, match=r"of ranges alone: .* Calibrate again without --statistics minmax"):
        check_data(ranges, {"input": images(0)}, module_tiny_model, method="minmax")


def test_another_model(calibration: Calibration, graph_builder: Any, tmp_path: Path):
    """A calibration of another model is refused; force helps only where names are shared."""
    builder = graph_builder()
    builder.conv(builder.input("input", ("N", 3, 8, 8)), (3, 4), "logits")
    model = builder.save(tmp_path / "other.onnx", ["logits"])
    with pytest.raises(CalibrationError, match="does not belong to"):
        check_data(calibration, {"input": images(1)}, model)
    result = check_data(calibration, {"input": images(1)}, model, force=True)

    assert {row.tensor for row in result.tensors} == {"input", "logits"}
    renamed = graph_builder()
    renamed.conv(renamed.input("other", ("N", 3, 8, 8)), (3, 4), "answer")
    with pytest.raises(CalibrationError, match="none of its"):
        check_data(calibration, {"other": images(1)}, renamed.save(tmp_path / "renamed.onnx", ["answer"]), force=True)


def test_bad_data(calibration: Calibration, module_tiny_model: Path):
    """Data that do not fit the model are refused as everywhere."""
    with pytest.raises(DataError):
        check_data(calibration, {"input": np.ones((2, 3, 8), np.float32)}, module_tiny_model)
