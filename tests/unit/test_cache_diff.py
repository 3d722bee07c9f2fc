"""`trt-int8 cache diff`: how far scales lie apart."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from calibrators.calibration import Calibration
from calibrators.tensorrt_cache import TensorRTCache
from trt_int8.cache_diff import diff_caches
from trt_int8.caches import export_cache
from trt_int8.calibration import calibrate
from trt_int8.errors import CacheFormatError, CalibrationError, FileAccessError


def cache(path: Path, **scales: float) -> Path:
    """Write a TensorRT cache."""
    TensorRTCache(8601, "EntropyCalibration2", scales).save(path)
    return path


@pytest.fixture
def calibration(tiny_model: Path, tmp_path: Path) -> Path:
    """A calibration file."""
    values = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    calibrate(tiny_model, {"input": values}).save(tmp_path / "c.npz")
    return tmp_path / "c.npz"


def test_ranked_by_factor(tmp_path: Path):
    """Half and double are equally far and come before 10 % more; tensors in only one file are listed apart."""
    first = cache(tmp_path / "a", small=1.0, up=0.5, down=0.5, equal=2.0, gone=1.0)
    second = cache(tmp_path / "b", small=1.1, up=1.25, down=0.25, equal=2.0, new=1.0)
    result = diff_caches(first, second)

    assert [row.tensor for row in result.moved] == ["up", "down", "small", "equal"]
    assert [(row.factor, row.percent) for row in result.moved[:2]] == [(2.5, 150.0), (0.5, -50.0)]
    assert result.moved[2].percent == pytest.approx(10, abs=1e-4)
    assert (result.only_first, result.only_second) == (("gone",), ("new",))
    assert "4 tensors in both, 1 of them equal" in result.lines(10)
    assert {"only in A: gone", "only in B: new"} <= set(result.lines(10))


def test_table_shows_the_farthest(tmp_path: Path):
    """The table holds no more rows than asked for, and says of how many; both the change and the factor are shown."""
    result = diff_caches(cache(tmp_path / "a", p=1.0, q=1.0, r=1.0), cache(tmp_path / "b", p=2.0, q=1.5, r=1.0))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table(1))
    shown = console.export_text()

    assert "1 of 2 scales that differ" in shown
    assert all(text in shown for text in ("+100.0", "2x", "p "))
    assert "q " not in shown


def test_unusable_scales_are_not_compared(tmp_path: Path):
    """Zero and non-finite scales are named and not ranked, and JSON stays strict."""
    first = cache(tmp_path / "a", zero=0.0, nan=1.0, fine=1.0)
    second = cache(tmp_path / "b", zero=1.0, nan=math.nan, fine=1.0)
    result = diff_caches(first, second)

    assert result.unusable == ("zero", "nan")
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["unusable"] == ["zero", "nan"]


def test_calibration_against_its_own_cache(calibration: Path, tmp_path: Path):
    """A calibration and the cache that was exported from it agree by the same method, and differ by another."""
    export_cache(calibration, tmp_path / "k.cache", method="mse")

    assert all(row.factor == 1 for row in diff_caches(calibration, tmp_path / "k.cache", method="mse").moved)
    assert any(row.factor != 1 for row in diff_caches(calibration, tmp_path / "k.cache", method="minmax").moved)


def test_the_percentile_counts(calibration: Path):
    """The percentile reaches the scales, and the line that says what they are."""
    result = diff_caches(calibration, calibration, method="percentile", percentile=99.0)
    expected = Calibration.load(calibration).scales("percentile", percentile=99.0)

    assert {row.tensor: row.first for row in result.moved} == expected
    assert result.first == "c.npz (calibration, percentile 99)"


def test_bad_files(calibration: Path, tmp_path: Path):
    """A missing file, another tool's and an unknown method are refused."""
    (tmp_path / "table").write_bytes(b"data 2.64\n")
    with pytest.raises(FileAccessError, match="there is no file"):
        diff_caches(calibration, tmp_path / "no")
    with pytest.raises(CacheFormatError, match="ONNX Runtime's calibration table"):
        diff_caches(calibration, tmp_path / "table")
    with pytest.raises(CalibrationError, match="no calibration method 'best'"):
        diff_caches(calibration, calibration, method="best")


def test_files_of_two_models(tmp_path: Path):
    """Without a tensor in common there is nothing to compare; both are named with what they hold."""
    first = cache(tmp_path / "a", x=1.0, y=2.0, z=3.0, w=4.0)
    second = cache(tmp_path / "b", other=1.0)
    text = r"no tensor in common\. The first holds 4 tensors \(x, y, z, \.\.\.\); the second 1 tensors \(other\)\."
    with pytest.raises(CalibrationError, match=text):
        diff_caches(first, second)
