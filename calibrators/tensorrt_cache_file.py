"""A calibration cache on disk that is read back only for the model and the data that it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from calibrators.errors import CacheFormatError
from calibrators.files import read_bytes, write_bytes, write_text
from calibrators.tensorrt_cache import foreign_content

_HASH_DIGITS = 32
_RECORD_KEYS = {"batches", "sha256"}
"""What every fingerprint holds, whatever calibrator wrote it."""


@dataclass(frozen=True, slots=True)
class CacheOrigin:
    """What a calibration cache is made from; it is read back only for the same model, data and preprocessing.

    Attributes:
        model: hash of the model.
        data: hash or identity of the calibration data; None where it is not known before a pass, so that a cache made
            from them is never read back.
        preprocessing: the preprocessing of the data, as text.
        tool: version of trt-int8, for information.
    """

    model: str
    data: str | None
    preprocessing: str
    tool: str


def record_path(path: Path) -> Path:
    """Return where the fingerprint of a calibration cache lies: FILE.json beside FILE."""
    return path.with_name(f"{path.name}.json")


def check_replaceable(path: Path) -> None:
    """Check that writing a calibration cache, and its fingerprint, would replace nothing but a cache.

    Raises:
        CacheFormatError: there is a file of something else; says of what.
        FileAccessError: it cannot be read.
    """
    advice = "It would be lost. Name another file with --cache, or remove it if it is of no use any more."
    content = read_bytes(path, "the calibration cache") if path.exists() else b""
    found = foreign_content(content) if content else None
    if found is not None:
        raise CacheFormatError(
            f"Cannot keep scales in {str(path)!r}: it is {found}; expected a TensorRT calibration cache, or no file. "
            f"{advice}"
        )
    record = record_path(path)
    if not record.exists():
        return
    try:
        fingerprint = json.loads(read_bytes(record, "the fingerprint"))
    except ValueError:
        fingerprint = None
    if not isinstance(fingerprint, dict) or not fingerprint.keys() >= _RECORD_KEYS:
        raise CacheFormatError(
            f"Cannot keep scales in {str(path)!r}: {record.name!r} beside it is not the fingerprint of a calibration "
            f"cache, which is kept there. {advice}"
        )


class CacheFile:
    """A calibration cache on disk, and beside it a JSON file that says what it was made from.

    The JSON file also holds the cache's SHA-256, so that a pair of which only one was written is never believed.

    Args:
        path: of the cache; its fingerprint is `<path>.json`.
        origin: what the cache is made from; without it the cache is written, but never read back.
        settings: of the calibrator, which must be the same as well; JSON values.

    Raises:
        CacheFormatError: a file of something else lies where one of the two is to be written.
    """

    def __init__(self, path: Path, origin: CacheOrigin | None, settings: Mapping[str, object]) -> None:
        self.path = path
        self._origin = origin
        self._record = {**settings, **(asdict(origin) if origin else {})}
        self._record_path = record_path(path)
        check_replaceable(path)

    def read(self) -> tuple[bytes | None, str]:
        """Return the cache's content where it fits, and otherwise None and the reason, empty where there is none."""
        if not self.path.exists():
            return None, ""
        if self._origin is None:
            return None, "what it was made from is not known"
        if self._origin.data is None:
            return None, "the calibration data have no identity to recognise them by; name them with a data id"
        if not self._record_path.exists():
            return None, f"its fingerprint {self._record_path.name!r} is missing"
        try:
            found = json.loads(read_bytes(self._record_path, "the fingerprint"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            return None, f"its fingerprint {self._record_path.name!r} is damaged"
        differing = [key for key, value in self._record.items() if key != "tool" and found.get(key) != value]
        if differing:
            return None, "; ".join(
                f"{key} was {_short(found.get(key))}, is {_short(self._record[key])}" for key in differing
            )
        cache = read_bytes(self.path, "the calibration cache")
        if hashlib.sha256(cache).hexdigest() != found.get("sha256"):
            return None, "it was changed after it was written"
        return cache, ""

    def write(self, cache: bytes, batches: int) -> None:
        """Write the cache, then its fingerprint."""
        write_bytes(self.path, cache)
        record = {**self._record, "batches": batches, "sha256": hashlib.sha256(cache).hexdigest()}
        write_text(self._record_path, json.dumps(record, indent=2) + "\n")


def _short(value: object) -> str:
    """Return a value for a message; of a hash its start, which tells it from another one."""
    if isinstance(value, str) and len(value) >= _HASH_DIGITS and " " not in value:
        return repr(f"{value[:12]}...")
    return repr(value)
