"""`trt-int8 cache`: showing calibrations and writing TensorRT's format."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from calibrators.calibration import Calibration
from calibrators.tensorrt_cache import TensorRTCache
from trt_int8.caches import export_cache, show_table
from trt_int8.calibration import calibrate
from trt_int8.errors import CalibrationError


def text_of(table: Table) -> str:
    """Render a table without a terminal."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.fixture
def calibration(tiny_model: Path, tmp_path: Path) -> Path:
    """A calibration file."""
    values = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    path = tmp_path / "calibration.npz"
    calibrate(tiny_model, {"input": values}).save(path)
    return path


def test_calibration_is_shown(calibration: Path):
    """Every tensor has its range, its share of zeros and a scale per method."""
    table, lines = show_table(calibration, 99.9)
    shown = text_of(table)
    scales = Calibration.load(calibration).scales("minmax")

    assert all(name in shown for name in scales)
    assert f"{scales['input']:.6g}" in shown
    assert "8 batches, 8 samples" in lines[0]


def test_cache_is_shown_with_what_is_unusable(tmp_path: Path):
    """A TensorRT cache with zero, negative and non-finite scales is shown, and they are pointed out."""
    path = tmp_path / "k.cache"
    TensorRTCache(8601, "EntropyCalibration2", {"a:0": 0.5, "b": 0.0, "c": float("nan"), "d": -1.0}).save(path)
    table, lines = show_table(path, 99.99)

    assert "63.5" in text_of(table)
    assert lines[1:] == [
        "unusable: the scale of b is zero (0)",
        "unusable: the scale of c is not finite (nan)",
        "unusable: the scale of d is negative (-1)",
    ]


@pytest.mark.parametrize(
    ("method", "algorithm"),
    [
        ("entropy", "EntropyCalibration2"),
        ("mse", "EntropyCalibration2"),
        ("percentile", "EntropyCalibration2"),
        ("minmax", "MinMaxCalibration"),
    ],
)
def test_export(calibration: Path, tmp_path: Path, method: str, algorithm: str):
    """The file holds the method's scales, under the algorithm of the calibrator that will read it."""
    export_cache(calibration, tmp_path / "k.cache", method=method, tensorrt_version="10.3.0")
    cache = TensorRTCache.load(tmp_path / "k.cache")

    assert (cache.version, cache.algorithm) == (100300, algorithm)
    assert dict(cache.scales) == Calibration.load(calibration).scales(method)


def test_no_cache_for_tensorrt_11(calibration: Path, tmp_path: Path):
    """TensorRT 11 reads no cache; the message says what to use."""
    with pytest.raises(CalibrationError, match="Q/DQ"):
        export_cache(calibration, tmp_path / "k.cache", tensorrt_version="11.1.0")
    assert not (tmp_path / "k.cache").exists()
