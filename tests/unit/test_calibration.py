"""Calibrations: scales by every method, merging, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrators import calibration as calibration_module
from calibrators.calibration import METHODS, SEARCHES, Calibration, Fingerprint
from calibrators.counter import histogram_of
from calibrators.entropy import entropy_amax
from calibrators.errors import CacheFormatError, CalibrationError, FileAccessError
from calibrators.input_statistics import statistics_of
from calibrators.mse import mse_amax
from calibrators.percentile import percentile_amax

FINGERPRINT = Fingerprint(
    graph="g1", weights="w1", data=("d1",), preprocessing="none", tool="0.1.0", batches=4, samples=32
)


def make_calibration(seed: int = 0, **changes: Any) -> Calibration:
    rng = np.random.default_rng(seed)
    histograms = {
        "z/conv:0": histogram_of(rng.normal(0, 2, 5000)),
        "relu": histogram_of(np.maximum(rng.laplace(size=5000), 0)),
        "dead": histogram_of(np.zeros(10)),
    }
    return Calibration(histograms, dataclasses.replace(FINGERPRINT, **changes))


def assert_equal(a: Calibration, b: Calibration) -> None:
    assert a.tensors == b.tensors
    assert a.fingerprint == b.fingerprint
    for name in a.tensors:
        for field in ("bins", "counts", "minimum", "maximum", "zeros", "nonfinite"):
            np.testing.assert_array_equal(getattr(a.histogram(name), field), getattr(b.histogram(name), field))


def test_each_method_is_the_search_of_its_name() -> None:
    """Thresholds are those of the functions that hold the algorithms."""
    calibration = make_calibration()
    histogram = calibration.histogram("relu")

    assert calibration.amax("minmax")["relu"] == histogram.amax
    assert calibration.amax("entropy")["relu"] == entropy_amax(histogram)
    assert calibration.amax("mse")["relu"] == mse_amax(histogram)
    assert calibration.amax("percentile", percentile=97)["relu"] == percentile_amax(histogram, 97)


def test_defaults() -> None:
    """Entropy, and percentile 99.99."""
    calibration = make_calibration()

    assert calibration.amax() == calibration.amax("entropy")
    assert calibration.amax("percentile") == calibration.amax("percentile", percentile=99.99)


def test_auto_without_data_is_mse() -> None:
    """A calibration on its own cannot run the model, so that it answers with the least expected error."""
    calibration = make_calibration()

    assert calibration.amax("auto") == calibration.amax("mse")


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_amax_over_127(method: str) -> None:
    """In float32, in the order of the tensors; a tensor that is always zero gets 1."""
    calibration = make_calibration()
    amax = calibration.amax(method)

    scales = calibration.scales(method)

    assert list(scales) == ["z/conv:0", "relu", "dead"]
    assert scales["relu"] == np.float32(amax["relu"] / 127)
    assert (amax["dead"], scales["dead"]) == (0.0, 1.0)


def test_scales_of_all_methods_are_those_of_each() -> None:
    """Searched together, and kept: the same as when asked for one by one."""
    calibration, alone = make_calibration(), make_calibration()

    assert calibration.all_scales() == {method: alone.scales(method) for method in SEARCHES}
    assert calibration.all_scales() == calibration.all_scales()


FORKED = """
import os
import numpy as np
from calibrators.calibration import Calibration, Fingerprint
from calibrators.counter import histogram_of

def scales():
    random = np.random.default_rng(0)
    histograms = {f"x{k}": histogram_of(random.standard_normal(500)) for k in range(40)}
    return Calibration(histograms, Fingerprint("", "", ("",), "", "", 1, 1)).all_scales()

found = scales()
child = os.fork()
if child == 0:
    os._exit(0 if scales() == found else 1)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_searches_too() -> None:
    """It has none of the threads that searched before; what waits for them would never end."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split() == ["0"]


def test_tensors_that_are_always_zero_are_named() -> None:
    """The report lists them."""
    assert make_calibration().always_zero == ("dead",)


def test_range_is_signed_and_exact() -> None:
    """Smallest and largest value as they were."""
    calibration = Calibration({"x": histogram_of(np.array([-1.1, 2.3]))}, FINGERPRINT)

    assert calibration.range("x") == (np.float32(-1.1), np.float32(2.3))


def test_thresholds_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking again searches nothing, and changing an answer does not change the next."""
    searched = []

    def search(histogram: object) -> float:
        searched.append(histogram)
        return 1.0

    monkeypatch.setattr(calibration_module, "entropy_amax", search)
    calibration = make_calibration()

    first = calibration.amax("entropy")
    first["relu"] = -1.0

    assert calibration.amax("entropy")["relu"] == 1.0
    assert len(searched) == 3


def test_percentiles_are_kept_apart() -> None:
    """Each percentile has its own answer."""
    calibration = make_calibration()

    assert calibration.amax("percentile", percentile=50)["relu"] < calibration.amax("percentile", percentile=99)["relu"]


def test_repr_says_how_much_it_holds() -> None:
    """Tensors and samples, not arrays."""
    assert repr(make_calibration()) == "Calibration(3 tensors, 32 samples)"


def test_unknown_method_names_the_valid_ones() -> None:
    """A misspelt method is refused with the list."""
    with pytest.raises(CalibrationError, match="'entropie'; expected one of minmax, entropy, percentile, mse, auto"):
        make_calibration().amax("entropie")


def test_impossible_percentile_is_refused() -> None:
    """Before any tensor is looked at."""
    with pytest.raises(CalibrationError, match="percentile 0"):
        make_calibration().scales("percentile", percentile=0)


def test_unknown_tensor_names_near_ones() -> None:
    """A misspelt tensor is refused with the names like it."""
    with pytest.raises(CalibrationError, match=r"'rleu'.*'relu'"):
        make_calibration().histogram("rleu")
    with pytest.raises(CalibrationError, match=r"'rleu'.*'relu'"):
        make_calibration().range("rleu")


def test_non_finite_histograms_are_refused() -> None:
    """A calibration never holds activations that overflowed."""
    with pytest.raises(CalibrationError, match="'x': 1 of its values"):
        Calibration({"x": histogram_of(np.array([np.nan, 1.0]))}, FINGERPRINT)


def test_histograms_cannot_be_exchanged() -> None:
    """The mapping that a calibration was made of may change afterwards; the calibration does not."""
    histograms = {"x": histogram_of(np.array([1.0]))}
    calibration = Calibration(histograms, FINGERPRINT)

    histograms["x"] = histogram_of(np.array([2.0]))

    assert calibration.amax("minmax") == {"x": 1.0}
    with pytest.raises(AttributeError):
        calibration.fingerprint = FINGERPRINT  # type: ignore[misc]


def test_merging_adds_data_and_keeps_parts_apart() -> None:
    """Batches and samples add up, each part's data is named, and the parts stay as they were."""
    a = make_calibration(0)
    b = make_calibration(1, data=("d2", "d3"), batches=1, samples=7, tool="0.2.0")
    before = a.amax("minmax")

    merged = a.merge(b)

    assert merged.fingerprint == dataclasses.replace(
        FINGERPRINT, data=("d1", "d2", "d3"), batches=5, samples=39, tool="0.1.0, 0.2.0"
    )
    assert merged.histogram("relu").count == 10_000
    assert merged.amax("minmax")["relu"] == max(a.amax("minmax")["relu"], b.amax("minmax")["relu"])
    assert a.amax("minmax") == before


@pytest.mark.parametrize("field", ["graph", "weights", "preprocessing"])
def test_merging_across_models_is_refused(field: str) -> None:
    """What differs is named, with both values."""
    with pytest.raises(CalibrationError, match=rf"differ in {field} '.*' and 'other'"):
        make_calibration().merge(make_calibration(**{field: "other"}))


def test_merging_different_tensors_is_refused() -> None:
    """A tensor that only one side has is named."""
    other = Calibration({"relu": make_calibration().histogram("relu")}, FINGERPRINT)

    with pytest.raises(CalibrationError, match="2 tensors are in only one, such as 'dead'"):
        make_calibration().merge(other)


SHAPES = {"x": {(4, 3): 2, (1, 3): 1}, "ids": {(4,): 3}}


def with_shapes(shapes: Any = SHAPES) -> Calibration:
    plain = make_calibration()
    return Calibration({name: plain.histogram(name) for name in plain.tensors}, FINGERPRINT, shapes)


def test_the_shapes_that_were_fed_are_kept(tmp_path: Path) -> None:
    """They survive the file and pickling, and cannot be changed from outside; the hash does not depend on them."""
    calibration = with_shapes()
    calibration.save(tmp_path / "c.npz")

    for restored in (Calibration.load(tmp_path / "c.npz"), pickle.loads(pickle.dumps(calibration))):
        assert restored.input_shapes == SHAPES
        assert restored.sha256 == calibration.sha256 == make_calibration().sha256
    with pytest.raises(TypeError):
        calibration.input_shapes["x"][9, 9] = 1  # type: ignore[index]
    assert make_calibration().input_shapes == {}


def test_merging_adds_the_batches_of_each_shape() -> None:
    """Shapes that only one side saw go along, and neither side changes."""
    one, other = with_shapes(), with_shapes({"x": {(4, 3): 5, (2, 3): 1}})

    assert one.merge(other).input_shapes == {"x": {(4, 3): 7, (1, 3): 1, (2, 3): 1}, "ids": {(4,): 3}}
    assert other.merge(one).input_shapes == one.merge(other).input_shapes
    assert one.input_shapes == SHAPES


def test_the_order_in_which_shapes_came_does_not_change_the_file(tmp_path: Path) -> None:
    """Equal calibrations are equal files."""
    with_shapes({"x": {(4, 3): 2, (1, 3): 1}}).save(tmp_path / "a.npz")
    with_shapes({"x": {(1, 3): 1, (4, 3): 2}}).save(tmp_path / "b.npz")

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_file_that_does_not_tell_the_shapes_is_read(tmp_path: Path) -> None:
    """Its mapping is empty; everything else is there."""
    path = tmp_path / "c.npz"
    with_shapes().save(path)
    with np.load(path) as arrays:
        text = json.loads(arrays["header"].tobytes())
    del text["input_shapes"]
    loaded = Calibration.load(rewritten(path, header=header(**text)))

    assert loaded.input_shapes == {}
    assert_equal(loaded, with_shapes())


SETTINGS = {"threads": 2, "stop_when_stable": None, "onnxruntime": "1.2"}


def told(seed: int = 0, **changes: Any) -> Calibration:
    """A calibration with everything that a pass can keep."""
    plain = make_calibration(seed, **changes)
    history = {
        method: {name: ((1, scale), (3, scale * 2)) for name, scale in plain.scales(method).items()}
        for method in ("minmax", "entropy")
    }
    values = np.random.default_rng(seed).normal(size=(4, 3, 5, 5)).astype(np.float32)
    return Calibration(
        {name: plain.histogram(name) for name in plain.tensors},
        plain.fingerprint,
        {"x": {(2, 3, 5, 5): seed + 1}},
        input_statistics={"x": statistics_of(values), "gain": statistics_of(np.float32(0.1 + seed).reshape(()))},
        convergence=history,
        settings=SETTINGS,
    )


def test_everything_a_pass_keeps_survives_the_file(tmp_path: Path) -> None:
    """Statistics of inputs, convergence and settings come back exactly, also from a pickle; the hash ignores them."""
    calibration = told()
    calibration.save(tmp_path / "c.npz")

    for restored in (Calibration.load(tmp_path / "c.npz"), pickle.loads(pickle.dumps(calibration))):
        assert restored.input_statistics == calibration.input_statistics
        assert restored.convergence == calibration.convergence
        assert restored.settings == SETTINGS
        assert restored.sha256 == make_calibration().sha256
        restored.save(tmp_path / "again.npz")
        assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


def test_a_file_without_what_later_versions_keep_is_read(tmp_path: Path) -> None:
    """Its mappings are empty; everything else is there."""
    path = tmp_path / "c.npz"
    told().save(path)
    with np.load(path) as arrays:
        text = json.loads(arrays["header"].tobytes())
    for key in ("input_statistics", "convergence", "settings"):
        del text[key]
    loaded = Calibration.load(rewritten(path, header=header(**text)))

    assert (loaded.input_statistics, loaded.convergence, loaded.settings) == ({}, {}, {})
    assert_equal(loaded, told())
    assert loaded.merge(told(1)).input_statistics == told(1).input_statistics


def test_annotations_leave_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another history, other settings; thresholds that were found are not searched again."""
    calibration = told()
    scales = calibration.scales("entropy")
    monkeypatch.setattr(calibration_module, "entropy_amax", None)
    changed = calibration.annotated(settings={"threads": 1})

    assert (changed.settings, changed.convergence) == ({"threads": 1}, calibration.convergence)
    assert calibration.annotated(convergence={}).convergence == {}
    assert changed.scales("entropy") == scales
    assert calibration.settings == SETTINGS
    assert_equal(changed, calibration)


@given(st.permutations(range(4)), st.integers(1, 3))
def test_merge_laws(order: list[int], cut: int) -> None:
    """Parts merge to the same in any order and in any grouping; only the list of the data follows the order."""
    parts = [told(seed, data=(f"d{seed}",)) for seed in order]
    left = functools.reduce(Calibration.merge, parts)
    grouped = functools.reduce(Calibration.merge, parts[:cut]).merge(functools.reduce(Calibration.merge, parts[cut:]))
    straight = functools.reduce(Calibration.merge, [told(seed, data=(f"d{seed}",)) for seed in range(4)])

    for merged in (grouped, straight):
        assert merged.input_statistics == left.input_statistics
        assert merged.input_shapes == left.input_shapes
        assert merged.scales("minmax") == left.scales("minmax")
        for name in left.tensors:
            assert merged.histogram(name).counts.tolist() == left.histogram(name).counts.tolist()
    assert grouped.fingerprint == left.fingerprint
    assert sorted(straight.fingerprint.data) == sorted(left.fingerprint.data)


def test_merging_drops_what_only_one_pass_has() -> None:
    """Data without an order have no history, and two passes may have been told different things."""
    merged = told(0).merge(told(1))

    assert (merged.convergence, merged.settings) == ({}, {})
    assert merged.input_statistics["gain"].overall.count == 2


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    """Every histogram, the order of the tensors and the fingerprint come back."""
    calibration = make_calibration(data=("d1", "ü"))

    calibration.save(tmp_path / "new" / "calibration.npz")

    loaded = Calibration.load(tmp_path / "new" / "calibration.npz")
    assert_equal(loaded, calibration)
    assert loaded.scales() == calibration.scales()


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    """It survives the file, and other counts, tensors or data give another."""
    calibration = make_calibration()
    calibration.save(tmp_path / "c.npz")

    assert Calibration.load(tmp_path / "c.npz").sha256 == calibration.sha256
    others = [make_calibration(seed=1), make_calibration(data=("d2",)), calibration.merge(calibration)]
    assert len({calibration.sha256, *(other.sha256 for other in others)}) == 4


def test_calibration_without_tensors_is_kept_too(tmp_path: Path) -> None:
    """An empty one is a file like any other."""
    Calibration({}, FINGERPRINT).save(tmp_path / "empty.npz")

    assert Calibration.load(tmp_path / "empty.npz").tensors == ()


def test_equal_calibrations_are_equal_files(tmp_path: Path) -> None:
    """A file can be known by its hash: the time of writing is not in it."""
    make_calibration().save(tmp_path / "a.npz")
    make_calibration().save(tmp_path / "b.npz")

    content = (tmp_path / "a.npz").read_bytes()
    assert content == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_numpy_reads_the_file_without_pickle(tmp_path: Path) -> None:
    """Other tools can look at it: plain arrays and a JSON header."""
    make_calibration().save(tmp_path / "calibration.npz")

    with np.load(tmp_path / "calibration.npz", allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        assert arrays["bins"].size == arrays["counts"].size == arrays["offsets"][-1]
    assert header["format"] == "trt-int8 calibration"
    assert header["tensors"] == ["z/conv:0", "relu", "dead"]
    assert header["fingerprint"]["samples"] == 32


def test_a_calibration_can_be_sent_to_another_process() -> None:
    """Pickled and restored, it is the same."""
    calibration = make_calibration()

    assert_equal(pickle.loads(pickle.dumps(calibration)), calibration)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """What cannot be read at all is a matter of file access."""
    with pytest.raises(FileAccessError, match=r"no file .*nothing\.npz"):
        Calibration.load(tmp_path / "nothing.npz")
    with pytest.raises(FileAccessError, match="directory"):
        Calibration.load(tmp_path)


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def header(**values: object) -> np.ndarray:
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"TRT-101601-EntropyCalibration2\nx: 3c010a14\n",
        b"PK\x03\x04 and then nothing of the kind",
        npz(),
        npz(x=np.ones(3), y=np.arange(3)),
        npz(header=np.array([{"format": "trt-int8 calibration"}], dtype=object)),
        npz(header=np.array([1.0])),
        npz(header=header(format="something else", version=1)),
        npz(header=np.frombuffer(b"[1, 2]", dtype=np.uint8)),
        npz(header=np.frombuffer(b"\xff\xfe{", dtype=np.uint8)),
        npz(header=header(format="trt-int8 calibration", version=1)),
        npz(header=header(format="trt-int8 calibration", version=1, tensors=7)),
        npz(header=header(format="trt-int8 calibration", version=1, tensors=["x"]), offsets=np.array([0, 5])),
        npz(header=header(format="trt-int8 calibration", version=1, tensors=["x"]), offsets=np.array([0, -5])),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """Text, archives, arrays of other tools and pickles: one line that names the file and what was expected."""
    path = tmp_path / "other.npz"
    path.write_bytes(content)

    with pytest.raises(
        CacheFormatError, match=r"other\.npz.*expected a \.npz file that `trt-int8 calibrate`"
    ) as caught:
        Calibration.load(path)

    assert "\n" not in str(caught.value)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    """The message names both versions."""
    path = tmp_path / "future.npz"
    path.write_bytes(npz(header=header(format="trt-int8 calibration", version=3, layout="other")))

    with pytest.raises(CacheFormatError, match="format version 3 and this version of trt-int8 reads versions 1 and 2"):
        Calibration.load(path)


def rewritten(path: Path, **changes: np.ndarray) -> Path:
    with np.load(path) as arrays:
        path.write_bytes(npz(**{**arrays, **changes}))
    return path


def test_sizes_are_not_believed(tmp_path: Path) -> None:
    """Neither an array that claims eight terabytes, nor an entry that unpacks to far more than it could need."""
    path = tmp_path / "calibration.npz"
    make_calibration().save(path)
    for name, claimed, held in (("zeros", 1 << 40, 64), ("minimum", 1 << 22, 1 << 24)):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (claimed,)})
        other = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in whole.namelist():
                content = stream.getvalue() + bytes(held) if entry == f"{name}.npy" else whole.read(entry)
                archive.writestr(entry, content)

        with pytest.raises(CacheFormatError, match=rf"{name}\.npz': its array '{name}' (is int64|takes 16777)"):
            Calibration.load(other)


def test_contradictions_inside_are_refused(tmp_path: Path) -> None:
    """A file that is whole but tells impossible things: counts, extremes, a tensor twice, no fingerprint."""
    path = tmp_path / "calibration.npz"
    make_calibration().save(path)
    with np.load(path) as arrays:
        good = dict(arrays)
    text = json.loads(good["header"].tobytes())
    changes: list[dict[str, np.ndarray]] = [
        {"counts": -good["counts"]},
        {"counts": good["counts"].astype(np.float64)},
        {"bins": good["bins"][::-1]},
        {"maximum": good["maximum"] * 4},
        {"minimum": good["minimum"] * np.float32(np.nan)},
        {"zeros": good["zeros"] + 1},
        {"zeros": good["zeros"][:1]},
        {"header": header(**{**text, "tensors": ["relu", "relu", "dead"]})},
        {"header": header(**{**text, "tensors": ["relu", "dead"]})},
        {"header": header(**{**text, "fingerprint": {}})},
        {"header": header(**{**text, "fingerprint": "g1"})},
        {"header": header(**{**text, "fingerprint": {**text["fingerprint"], "samples": "many"}})},
        {"header": header(**{**text, "fingerprint": {**text["fingerprint"], "batches": -5}})},
        {"header": header(**{**text, "fingerprint": {**text["fingerprint"], "samples": 0}})},
        {"header": header(**{**text, "input_shapes": ["x"]})},
        {"header": header(**{**text, "input_shapes": {"x": [[4, 3], 2]}})},
        {"header": header(**{**text, "input_shapes": {"x": [[["four"], 2]]}})},
        {"header": header(**{**text, "input_statistics": {"x": []}})},
        {"header": header(**{**text, "input_statistics": {"x": [[1, 2]]}})},
        {"header": header(**{**text, "input_statistics": [1]})},
        {"header": header(**{**text, "convergence": {"batches": [1], "scales": {"mse": [[1.0]]}}})},
        {"header": header(**{**text, "convergence": {"batches": "1"}})},
        {"header": header(**{**text, "settings": 5})},
        {"nonfinite": good["nonfinite"] + 1},
    ]
    for change in changes:
        make_calibration().save(path)
        with pytest.raises(CacheFormatError, match=r"calibration\.npz"):
            Calibration.load(rewritten(path, **change))


def test_damaged_files_are_refused_or_unharmed(tmp_path: Path) -> None:
    """Cut off anywhere, or with any byte inverted, a file is refused in one line, or its content is still the same."""
    path = tmp_path / "calibration.npz"
    original = Calibration(
        {"x": histogram_of(np.arange(-3.0, 20.0)), "y": histogram_of(np.ones(2))},
        FINGERPRINT,
    )
    original.save(path)
    content = path.read_bytes()
    damaged = [content[:size] for size in range(0, len(content), 11)]
    for position in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        damaged.append(bytes(flipped))

    def load(data: bytes) -> Calibration | str:
        path.write_bytes(data)
        try:
            return Calibration.load(path)
        except CacheFormatError as error:
            return str(error)

    outcomes = [load(data) for data in damaged]

    messages = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(messages) > len(damaged) / 2
    assert not any("\n" in message for message in messages)
    for outcome in outcomes:
        if isinstance(outcome, Calibration):
            assert_equal(outcome, original)
