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
from trt_int8.errors import CalibrationError, UsageError


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
    assert f"{scales['input']:.5g}" in shown
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


@pytest.mark.parametrize("version", ["11.1.0", "11.4", "11"])
def test_no_cache_for_tensorrt_11(version: str, calibration: Path, tmp_path: Path):
    """TensorRT 11 reads no cache, however it is named; the message says what to use."""
    with pytest.raises(CalibrationError, match="Q/DQ"):
        export_cache(calibration, tmp_path / "k.cache", tensorrt_version=version)
    assert not (tmp_path / "k.cache").exists()


def test_clipped_share_is_shown(calibration: Path):
    """Beside the scale of each method stands the share of values that it clips; min-max clips none and has none."""
    table, lines = show_table(calibration, 90.0)
    loaded = Calibration.load(calibration)
    values = np.abs(np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32))
    clipped = 100 * float((values > loaded.amax("percentile", percentile=90.0)["input"]).mean())
    shown = next(line for line in text_of(table).splitlines() if line.strip().startswith("input "))

    assert f"{clipped:.1f}" in shown or f"{clipped:.3f}" in shown
    assert text_of(table).count("clip %") == 3
    assert f"graph {loaded.fingerprint.graph[:16]}, weights {loaded.fingerprint.weights[:16]}" in lines
    assert f"data {loaded.fingerprint.data[0][:16]}" in lines
    assert "preprocessing none" in lines


def test_long_names_stay_whole(tmp_path: Path):
    """On a narrow terminal a name folds and is not cut off, as two names may differ in their ends alone."""
    path = tmp_path / "k.cache"
    name = "/backbone/stage1/block/conv/Conv_output_0_" + "x" * 60
    TensorRTCache(8601, "EntropyCalibration2", {name: 0.5}).save(path)
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(show_table(path, 99.99)[0])

    assert name in "".join(line.split()[0] for line in console.export_text().splitlines() if line.strip())


def test_a_cache_tells_its_version(tmp_path: Path):
    """The release, the algorithm, a fingerprint and the number of TensorRT's own tensors are said."""
    path = tmp_path / "k.cache"
    TensorRTCache(
        101601, "MinMaxCalibration", {"a": 0.5, "(Unnamed Layer* 3) [Constant]_output": 1.0, "ONNXTRT_x_output": 1.0}
    ).save(path)
    _, lines = show_table(path, 99.99)

    assert lines[0].startswith("3 scales, 2 of tensors that TensorRT named itself; TensorRT 10.16.1 (version 101601)")
    assert "MinMaxCalibration" in lines[0]


@pytest.mark.parametrize(
    ("release", "header"),
    [("7.2.3", "TRT-7203-"), ("8.6.1", "TRT-8601-"), ("9.3.0", "TRT-9300-"), ("10.16.1.11", "TRT-101601-")],
)
def test_header_of_each_version(calibration: Path, tmp_path: Path, release: str, header: str):
    """Each version has its own form of header."""
    export_cache(calibration, tmp_path / "k.cache", tensorrt_version=release)

    assert (tmp_path / "k.cache").read_text().startswith(header + "EntropyCalibration2\ninput: ")


def test_cache_for_another_version(tmp_path: Path):
    """A cache is written anew for another version: its scales and algorithm stay, to the bit."""
    old = TensorRTCache(8601, "MinMaxCalibration", {"a:0": 0.1, "b": 1e-30})
    old.save(tmp_path / "old")
    line = export_cache(tmp_path / "old", tmp_path / "new", tensorrt_version="10.3.0")
    new = TensorRTCache.load(tmp_path / "new")

    assert (new.version, new.algorithm, dict(new.scales)) == (100300, "MinMaxCalibration", dict(old.scales))
    assert "MinMaxCalibration of TensorRT 8.6.1, for TensorRT 10.3.0" in line
    with pytest.raises(UsageError, match="--method mse"):
        export_cache(tmp_path / "old", tmp_path / "new", method="mse")


@pytest.mark.parametrize(
    ("scale", "what"), [(0.0, "zero"), (-1.0, "negative"), (float("inf"), "not finite"), (float("nan"), "not finite")]
)
def test_unusable_scales_are_not_exported(tmp_path: Path, scale: float, what: str):
    """Zero, negative and non-finite scales are refused with their tensors; nothing is written."""
    TensorRTCache(8601, "EntropyCalibration2", {"a": 0.1, "bad one": scale}).save(tmp_path / "old")
    with pytest.raises(CalibrationError, match=f"1 scales cannot be used: bad one is {what}"):
        export_cache(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("release", ["ten", "8", "8.6", "8.6.x"])
def test_versions_without_three_numbers(calibration: Path, tmp_path: Path, release: str):
    """A version that does not make a header is refused with what is expected."""
    with pytest.raises(CalibrationError, match=r"expected one like '10\.16\.1'"):
        export_cache(calibration, tmp_path / "k.cache", tensorrt_version=release)
