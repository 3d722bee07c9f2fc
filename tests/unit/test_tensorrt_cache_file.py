"""calibrators.tensorrt_cache_file: what a calibration cache may replace."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrators.errors import CacheFormatError
from calibrators.tensorrt_cache_file import CacheFile, CacheOrigin, check_replaceable, record_path

CACHE = b"TRT-101601-EntropyCalibration2\nx: 3c010a14\n"
ORIGIN = CacheOrigin("model-1", "data-1", "resize", "0.1.0")


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize("content", [None, b"", CACHE, CACHE.replace(b"\n", b"\r\n"), CACHE[:40]])
def test_a_cache_replaces_a_cache(tmp_path: Path, content: bytes | None) -> None:
    """Whoever wrote it, and also where it is damaged below its first line; so does it an empty file."""
    path = tmp_path / "c"
    if content is not None:
        path.write_bytes(content)
    check_replaceable(path)
    CacheFile(path, ORIGIN, {"calibrator": "minmax"}).write(CACHE, 3)
    check_replaceable(path)

    assert CacheFile(path, ORIGIN, {"calibrator": "minmax"}).read() == (CACHE, "")
    assert json.loads(record_path(path).read_text())["batches"] == 3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (archive(), r"a \.npz archive"),
        (b"notes of mine\n", "a file that starts with"),
        (b"{}", "JSON"),
        (b"\x08\x0a\x12\x00onnx", "a binary file"),
    ],
)
def test_a_cache_replaces_nothing_else(tmp_path: Path, content: bytes, found: str) -> None:
    """The file is named with what it holds, and the option; it stays as it is."""
    path = tmp_path / "calibration.npz"
    path.write_bytes(content)
    for attempt in (check_replaceable, lambda path: CacheFile(path, ORIGIN, {})):
        with pytest.raises(CacheFormatError, match=rf"calibration\.npz': it is {found}.* with --cache"):
            attempt(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sha256": "00"}', "plain"])
@pytest.mark.parametrize("cache", [None, CACHE])
def test_a_fingerprint_replaces_nothing_else(tmp_path: Path, content: str, cache: Any) -> None:
    """A file of the user's that happens to be called so is not lost."""
    path = tmp_path / "config"
    record_path(path).write_text(content)
    if cache is not None:
        path.write_bytes(cache)
    with pytest.raises(CacheFormatError, match=r"'config\.json' beside it is not the fingerprint.* with --cache"):
        check_replaceable(path)
    assert record_path(path).read_text() == content
