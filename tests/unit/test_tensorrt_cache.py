"""TensorRT's calibration cache, read and written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calibrators.errors import CacheFormatError, CalibrationError, FileAccessError
from calibrators.tensorrt_cache import (
    ENTROPY_2,
    MINMAX,
    TensorRTCache,
    header_version,
    release_of,
    why_unusable,
)

SAMPLE = (
    b"TRT-101601-EntropyCalibration2\n"
    b"input_1:0: 3c010a14\n"
    b"(Unnamed Layer* 64) [Shuffle]_output: 0\n"
    b"/model.0/conv/Conv_output_0: 4000890a\n"
)

names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1),
    st.text("a: \t/", min_size=1, max_size=6),
    st.sampled_from(["x: 3c010a14", ": ", ":", " ", "a\u2028b", "Ünï/çode", "x\x0c", "\ufeffx", "\x85"]),
)
float32s = st.floats(width=32).filter(lambda x: not math.isnan(x))


def test_sample_by_hand() -> None:
    """Names with colons, blanks and brackets; a scale of zero; known bits."""
    cache = TensorRTCache.from_bytes(SAMPLE)

    assert (cache.version, cache.algorithm) == (101601, ENTROPY_2)
    assert dict(cache.scales) == {
        "input_1:0": float(np.float32(2048.5 / 2048 / 127)),
        "(Unnamed Layer* 64) [Shuffle]_output": 0.0,
        "/model.0/conv/Conv_output_0": float(np.float32(255 * 2048.5 / 2048 / 127)),
    }
    assert cache.to_bytes() == SAMPLE


def test_scale_is_rounded_to_float32() -> None:
    """1/127 has the bits 3c010204; small numbers lose their leading zeros."""
    cache = TensorRTCache(8601, MINMAX, {"x": 1 / 127, "tiny": 1e-45})

    assert cache.scales["x"] == np.float32(1 / 127)
    assert cache.to_bytes() == b"TRT-8601-MinMaxCalibration\nx: 3c010204\ntiny: 1\n"


@given(st.integers(0, 10**7), st.sampled_from([ENTROPY_2, MINMAX, "Custom_1"]), st.dictionaries(names, float32s))
@example(101601, ENTROPY_2, {"a: b": 0.0, "a": -0.0, "b:": math.inf})
def test_written_and_read_it_is_the_same(version: int, algorithm: str, scales: dict[str, float]) -> None:
    """Any name and any float32, in order."""
    cache = TensorRTCache(version, algorithm, scales)

    read = TensorRTCache.from_bytes(cache.to_bytes())

    assert read == cache
    assert list(read.scales.items()) == list(scales.items())


@given(
    st.integers(1, 10**7),
    st.lists(
        st.tuples(names, st.integers(0, 0x7F800000) | st.integers(0x80000000, 0xFF800000)), unique_by=lambda x: x[0]
    ),
)
def test_read_and_written_it_is_the_same(version: int, entries: list[tuple[str, int]]) -> None:
    """Every pattern of bits but NaN, written as TensorRT does, comes back byte by byte."""
    lines = [f"TRT-{version}-EntropyCalibration2", *(f"{name}: {bits:x}" for name, bits in entries)]
    content = "".join(f"{line}\n" for line in lines).encode()

    assert TensorRTCache.from_bytes(content).to_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        SAMPLE.replace(b"\n", b"\r\n"),
        SAMPLE.rstrip(b"\n"),
        SAMPLE + b"\n\n",
        SAMPLE.replace(b"3c010a14", b"3C010A14"),
        SAMPLE.replace(b": 0\n", b": 00000000\n"),
    ],
    ids=["CR LF", "no last line end", "blank lines at the end", "upper case", "zero padded"],
)
def test_other_spellings_are_read(content: bytes) -> None:
    """What editors and other writers make of a cache is read as the same cache."""
    assert TensorRTCache.from_bytes(content) == TensorRTCache.from_bytes(SAMPLE)


def test_unusable_scales_are_named() -> None:
    """Zero, negative, infinite and NaN are readable, and reported."""
    cache = TensorRTCache.from_bytes(
        b"TRT-8400-MinMaxCalibration\nzero: 0\nminus zero: 80000000\ngood: 3c010a14\nnegative: bf800000\n"
        b"infinite: 7f800000\nnan: 7fc00000\nsmall: 1\n"
    )

    assert cache.unusable == ("zero", "minus zero", "negative", "infinite", "nan")


@pytest.mark.parametrize(
    ("release", "number"),
    [("5.1.5", 5105), ("7.2.3", 7203), ("8.6.1", 8601), ("9.3.0", 9300), ("10.3.0", 100300), ("10.16.1", 101601)],
)
def test_release_of_a_header(release: str, number: int) -> None:
    """A header's number is the release and the release its number, before TensorRT 10 and since."""
    assert header_version(release) == number
    assert release_of(number) == release


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(1e-40, ""), (0.0, "zero"), (-0.0, "zero"), (-1.0, "negative"), (float("inf"), "not finite"),
     (float("-inf"), "not finite"), (float("nan"), "not finite")],
)  # fmt: skip
def test_why_a_scale_is_unusable(scale: float, reason: str) -> None:
    """What is wrong with a scale is said; nothing where it is above zero and finite."""
    assert why_unusable(scale) == reason


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"\n\n", "an empty file"),
        (b"data 2.640000104904175\nresnet_fwd 2.2047784328460693\n", "ONNX Runtime's calibration table"),
        (b"data -1e-05\n", "ONNX Runtime's calibration table"),
        (b'{"data": [-2.1, 2.6]}', "ONNX Runtime's calibration.json"),
        (b'{"CLS": "TensorsData", "data": {}}', "ONNX Runtime's calibration.json"),
        (b'{"activation_encodings": {}, "version": "0.6.1"}', "AIMET's quantization encodings"),
        (b'{"quantization": {"quant_algo": "INT8"}}', "JSON of another quantization tool, perhaps ModelOpt"),
        (b"[1, 2]", "JSON, perhaps another tool's calibration"),
        (b'{"data": [-2.1', "damaged JSON"),
        (b"conv1_param_0 12.3 4.56 7\nconv1 33.1\n", "ncnn's calibration table"),
        (b"# histogram number: 2048\n# op_name    threshold    min    max\nx 1 0 1\n", "a calibration table of Sophgo"),
        (b"PK\x03\x04" + b"\0" * 26 + b"archive/data.pkl", "a PyTorch checkpoint"),
        (b"\x80\x04\x95\x05\x00", "a Python pickle"),
        (b"ftrt\x00\x00\x01\x02", "a TensorRT engine"),
        (b"\x0c\x00\x00\x00\x00\x00\x06\x00\x08\x00", "a binary file"),
        (b"PK\x03\x04\x14\x00", "a .npz archive"),
        (b"TRT-8400-MinMaxCalibration\n\xe4: 3c010a14\n", "text that is not UTF-8"),
        (b"TRT-8.6.1-EntropyCalibration2\nx: 3c010a14\n", "a file that starts with b'TRT-8.6.1-"),
        (b"x: 3c010a14\n", "a file that starts with b'x: 3c010a14'"),
    ],
)
def test_other_files_are_refused_by_kind(content: bytes, kind: str) -> None:
    """The kind of file is named, and what a cache starts with."""
    with pytest.raises(
        CacheFormatError, match=r"expected a first line like 'TRT-101601-EntropyCalibration2'"
    ) as caught:
        TensorRTCache.from_bytes(content)

    assert f"found {kind}" in str(caught.value)


@pytest.mark.parametrize(
    "line", ["x", "x 3c010a14", "x:3c010a14", "x: ", "x: 3c010a141", "x: 0x3c01", "x: 3c 01", "x: -1", ": 3c010a14", ""]
)
def test_damaged_lines_are_refused_by_number(line: str) -> None:
    """Header is line 1, so that the bad one here is line 3."""
    with pytest.raises(CacheFormatError, match=r"damaged: line 3 is"):
        TensorRTCache.from_bytes(f"TRT-8400-MinMaxCalibration\na: 0\n{line}\nb: 1\n".encode())


def test_two_scales_for_one_tensor_are_refused() -> None:
    """Nothing says which of them holds."""
    with pytest.raises(CacheFormatError, match="line 3 gives tensor 'a' a second scale"):
        TensorRTCache.from_bytes(b"TRT-8400-MinMaxCalibration\na: 1\na: 2\n")


@pytest.mark.parametrize("name", ["", "a\nb", "a\rb", "\ud800"])
def test_names_that_cannot_be_written_are_refused(name: str) -> None:
    """A line break would make two lines of one; surrogates have no encoding."""
    with pytest.raises(CalibrationError, match="into a calibration cache"):
        TensorRTCache(101601, ENTROPY_2, {name: 1.0})


@pytest.mark.parametrize(("version", "algorithm"), [(-1, ENTROPY_2), (101601, ""), (101601, "a b"), (101601, "a\nb")])
def test_headers_that_cannot_be_written_are_refused(version: int, algorithm: str) -> None:
    """What could not be read back is not written."""
    with pytest.raises(CalibrationError, match="Cannot make a calibration cache"):
        TensorRTCache(version, algorithm, {})


def test_scales_cannot_be_changed() -> None:
    """Neither in the cache nor through the mapping that it was made of."""
    scales = {"x": 1.0}
    cache = TensorRTCache(101601, ENTROPY_2, scales)

    scales["x"] = 2.0

    assert cache.scales["x"] == 1.0
    with pytest.raises(TypeError):
        cache.scales["x"] = 3.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("10.16.1", 101601),
        ("10.16.1.11", 101601),
        ("10.3.0", 100300),
        ("8.6.1", 8601),
        ("7.2.3", 7203),
        ("8.4.0", 8400),
    ],
)
def test_version_numbers(version: str, number: int) -> None:
    """Two digits for the minor version from TensorRT 10 on, one before."""
    assert header_version(version) == number


@pytest.mark.parametrize("version", ["", "10", "10.16", "ten", "10.16.1rc1", "v10.16.1", "10.16.x"])
def test_versions_that_are_none_are_refused(version: str) -> None:
    """The message quotes what was given."""
    with pytest.raises(CalibrationError, match=f"version '{version}'"):
        header_version(version)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A file holds exactly the bytes; what cannot be read is named by its path."""
    path = tmp_path / "calibration.cache"
    cache = TensorRTCache.from_bytes(SAMPLE)

    cache.save(path)

    assert path.read_bytes() == SAMPLE
    assert TensorRTCache.load(path) == cache
    path.write_bytes(b"{}")
    with pytest.raises(CacheFormatError, match=r"calibration\.cache.*JSON"):
        TensorRTCache.load(path)
    with pytest.raises(FileAccessError, match="no file"):
        TensorRTCache.load(tmp_path / "nothing.cache")
