"""A calibration cache on disk that is read back only for the model and the data that it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from calibrators.files import read_bytes, write_bytes, write_text

_HASH_DIGITS = 32


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


class CacheFile:
    """A calibration cache on disk, and beside it a JSON file that says what it was made from.

    The JSON file also holds the cache's SHA-256, so that a pair of which only one was written is never believed.

    Args:
        path: of the cache; its fingerprint is `<path>.json`.
        origin: what the cache is made from; without it the cache is written, but never read back.
        settings: of the calibrator, which must be the same as well; JSON values.
    """

    def __init__(self, path: Path, origin: CacheOrigin | None, settings: Mapping[str, object]) -> None:
        self.path = path
        self._origin = origin
        self._record = {**settings, **(asdict(origin) if origin else {})}
        self._record_path = path.with_name(f"{path.name}.json")

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
