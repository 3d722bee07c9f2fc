"""`trt-int8 cache merge`: calibrations on several data sets become one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrators.calibration import Calibration, Fingerprint
from calibrators.counter import MagnitudeCounter
from trt_int8.cache_merge import merge_calibrations
from trt_int8.calibration import calibrate
from trt_int8.errors import CacheFormatError, CalibrationError, ConfigError, UsageError

PRINT = Fingerprint("g" * 64, "w" * 64, ("d1",), "", "0.1.0", batches=1, samples=4)


def calibration(values: dict[str, Any], **fingerprint: Any) -> Calibration:
    """Count values of some tensors."""
    histograms = {}
    for name, array in values.items():
        counter = MagnitudeCounter()
        counter.update(np.asarray(array, np.float32))
        histograms[name] = counter.histogram()
    return Calibration(histograms, replace(PRINT, **fingerprint))


def saved(path: Path, **content: Any) -> Path:
    """Write a calibration of one tensor; other arguments change its fingerprint."""
    tensors = content.pop("tensors", {"x": [1.0, -2.0]})
    calibration(tensors, **content).save(path)
    return path


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 11), min_size=1, max_size=3, unique=True))
def test_merged_scales_are_those_of_all_data(cuts: list[int], module_tiny_model: Path, tmp_path_factory: Any):
    """However the data are split, the merged calibration has the histograms and scales of one pass over all of it."""
    folder = tmp_path_factory.mktemp("merge")
    data = np.random.default_rng(3).normal(size=(12, 3, 8, 8)).astype(np.float32)
    parts = np.split(data, sorted(cuts))
    files = []
    for number, part in enumerate(parts):
        calibrate(module_tiny_model, {"input": part}).save(folder / f"{number}.npz")
        files.append(folder / f"{number}.npz")
    whole = calibrate(module_tiny_model, {"input": data})
    merge_calibrations(files, output=folder / "all.npz")
    merged = Calibration.load(folder / "all.npz")

    for method in ("minmax", "entropy", "percentile", "mse"):
        assert merged.scales(method) == whole.scales(method)
    assert (merged.fingerprint.samples, merged.fingerprint.batches) == (12, 12)
    for name in whole.tensors:
        assert np.array_equal(merged.histogram(name).counts, whole.histogram(name).counts)


def test_hand_made(tmp_path: Path):
    """Two values and three make five, the larger maximum stays."""
    one = saved(tmp_path / "1.npz", tensors={"x": [1.0, -2.0]})
    two = saved(tmp_path / "2.npz", tensors={"x": [0.0, 3.0, 0.5]}, data=("d2",), samples=6)
    result = merge_calibrations([one, two], output=tmp_path / "both.npz")
    merged = Calibration.load(tmp_path / "both.npz")

    assert (merged.histogram("x").count, merged.range("x")) == (5, (-2.0, 3.0))
    assert merged.fingerprint.data == ("d1", "d2")
    assert result.lines() == [f"{tmp_path / 'both.npz'}: 1 tensors, 2 batches, 10 samples of 2 calibrations"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"graph": "h" * 64}, r"graph \(gggggggggggg\.\.\. and hhhhhhhhhhhh\.\.\.\)"),
        ({"weights": "v" * 64}, r"weights \(wwwwwwwwwwww\.\.\. and vvvvvvvvvvvv\.\.\.\)"),
        ({"preprocessing": "resize 224"}, r"preprocessing \(none and resize 224\)"),
        ({"tensors": {"x": [1.0], "y": [1.0]}}, r"tensors \(only the second holds y\)"),
        ({"tensors": {"z": [1.0]}}, r"tensors \(only the first holds x\); tensors \(only the second holds z\)"),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], what: str, tmp_path: Path):
    """Another model, preprocessing or tensor set is refused with what differs; nothing is written."""
    one = saved(tmp_path / "1.npz")
    two = saved(tmp_path / "2.npz", **{"data": ("d2",), **change})
    with pytest.raises(CalibrationError, match=rf"1\.npz' and '.*2\.npz': they differ in {what}"):
        merge_calibrations([one, two], output=tmp_path / "both.npz")
    assert not (tmp_path / "both.npz").exists()


def test_parts_of_another_release(tmp_path: Path):
    """They are refused unless forced; a corrected release counts no other way."""
    one = saved(tmp_path / "1.npz")
    corrected = saved(tmp_path / "2.npz", data=("d2",), tool="0.1.7")
    later = saved(tmp_path / "3.npz", data=("d3",), tool="0.2.0")
    both = merge_calibrations([one, corrected], output=tmp_path / "both.npz")
    with pytest.raises(CalibrationError, match=r"made by trt-int8 0\.1\.0, 0\.1\.7 and 0\.2\.0.*--force"):
        merge_calibrations([tmp_path / "both.npz", later], output=tmp_path / "all.npz")
    assert not (tmp_path / "all.npz").exists()
    all_three = merge_calibrations([tmp_path / "both.npz", later], output=tmp_path / "all.npz", force=True)

    assert both.calibration.fingerprint.tool == "0.1.0, 0.1.7"
    assert all_three.calibration.fingerprint.tool == "0.1.0, 0.1.7, 0.2.0"


def test_the_same_data_twice(tmp_path: Path):
    """Equal hashes of the data are refused, since samples would count twice, in parts of merged files too."""
    one = saved(tmp_path / "1.npz", data=("d1", "d2"))
    two = saved(tmp_path / "2.npz", data=("d2",))
    with pytest.raises(CalibrationError, match=r"made from the same data .*would count twice.*--force"):
        merge_calibrations([one, two], output=tmp_path / "both.npz")
    result = merge_calibrations([one, two], output=tmp_path / "both.npz", force=True)

    assert Calibration.load(tmp_path / "both.npz").histogram("x").count == 4
    assert "count twice" in result.notes[0]


def test_the_same_file_twice(tmp_path: Path):
    """A file that is named twice is the same data twice."""
    one = saved(tmp_path / "1.npz")
    with pytest.raises(CalibrationError, match="made from the same data"):
        merge_calibrations([one, one], output=tmp_path / "both.npz")


def test_the_same_samples_in_other_batches(tiny_model: Path, tmp_path: Path):
    """Hashes differ where batches or their order do, sums do not; other samples have other sums."""
    data = np.random.default_rng(3).normal(size=(6, 3, 8, 8)).astype(np.float32)
    for name, fed, size in (("one", data, 1), ("two", data[::-1], 2), ("other", data + 1, 1)):
        calibrate(tiny_model, {"input": fed}, batch_size=size).save(tmp_path / f"{name}.npz")
    with pytest.raises(CalibrationError, match=r"made from the same 6 samples, cut or ordered otherwise, .*--force"):
        merge_calibrations([tmp_path / "one.npz", tmp_path / "two.npz"], output=tmp_path / "both.npz")
    forced = merge_calibrations([tmp_path / "one.npz", tmp_path / "two.npz"], output=tmp_path / "both.npz", force=True)
    apart = merge_calibrations([tmp_path / "one.npz", tmp_path / "other.npz"], output=tmp_path / "both.npz")

    assert "count twice" in forced.notes[0]
    assert apart.notes == ()


def test_inputs_that_never_vary_tell_nothing_apart(tiny_model: Path, tmp_path: Path):
    """Zeros in batches of 1 and of 2 may be the same samples or others."""
    zeros = np.zeros((2, 3, 8, 8), np.float32)
    for size in (1, 2):
        calibrate(tiny_model, {"input": zeros}, batch_size=size).save(tmp_path / f"{size}.npz")

    merged = merge_calibrations([tmp_path / "1.npz", tmp_path / "2.npz"], output=tmp_path / "both.npz")
    assert merged.calibration.fingerprint.samples == 4


def test_data_without_a_hash(tmp_path: Path):
    """Whether data without a hash are the same is not known: they are merged, and that is said."""
    one = saved(tmp_path / "1.npz", data=("",))
    two = saved(tmp_path / "2.npz", data=("",))
    result = merge_calibrations([one, two], output=tmp_path / "both.npz")

    assert "not known" in result.notes[0]


def test_force_does_not_mix_models(tmp_path: Path):
    """Force is for data that count twice, not for another model."""
    one = saved(tmp_path / "1.npz")
    two = saved(tmp_path / "2.npz", graph="h" * 64)
    with pytest.raises(CalibrationError, match="differ in graph"):
        merge_calibrations([one, two], output=tmp_path / "both.npz", force=True)


def test_bad_files(tmp_path: Path):
    """One file, a file that is none of ours, and an output among the parts are refused."""
    one = saved(tmp_path / "1.npz")
    (tmp_path / "k.cache").write_text("TRT-8601-EntropyCalibration2\nx: 3c010a14\n")
    with pytest.raises(UsageError, match="two or more"):
        merge_calibrations([one], output=tmp_path / "both.npz")
    with pytest.raises(CacheFormatError, match=r"k\.cache"):
        merge_calibrations([one, tmp_path / "k.cache"], output=tmp_path / "both.npz")
    with pytest.raises(ConfigError, match="it is read as well"):
        merge_calibrations([one, saved(tmp_path / "2.npz", data=("d2",))], output=one)
