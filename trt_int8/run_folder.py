"""A run's folder: its manifest, and stages that are done once.

`manifest.json` records the resolved configuration, versions, hardware, and for every finished stage what it was made
from (a key) and the SHA-256 of what it wrote. It is written anew after each stage, atomically, so that a run that is
interrupted can be resumed: a stage whose key and files are unchanged is not run again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from calibrators.files import sha256_of_file, write_text
from trt_int8 import __version__
from trt_int8.errors import ConfigError

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1

Result = TypeVar("Result")


class RunFolder:
    """The folder that a run writes to.

    Args:
        path: the folder; made where it is missing.
        title: what the run is called in its report.
        config: the resolved configuration, as plain JSON data.
        machine: `trt_int8.machine.describe_machine()`.
        backend: what runs the models, and why.
        files: names of the files that the run will write.
        resume: keep the stages that are done; otherwise every stage runs again and replaces its files.

    Raises:
        ConfigError: a file that would be replaced was not written by a run.
    """

    def __init__(
        self,
        path: Path,
        *,
        title: str,
        config: Mapping[str, Any],
        machine: Mapping[str, Any],
        backend: Mapping[str, str],
        files: Sequence[str],
        resume: bool,
    ) -> None:
        self.path = path
        self._resume = resume
        before = read_manifest(path) if (path / MANIFEST).is_file() else None
        strangers = [name for name in (MANIFEST, *files) if before is None and (path / name).exists()]
        if strangers:
            raise ConfigError(
                f"Cannot write a run to {str(path)!r}: {strangers[0]!r} is there already and no {MANIFEST} says "
                "that a run wrote it. Name another folder with --output."
            )
        # Another version may compute or write otherwise, so none of its stages is kept.
        same_tool = before is not None and before.get("tool") == __version__
        self._before: dict[str, Any] = before["stages"] if before is not None and same_tool else {}
        begun: dict[str, Any] = before.get("begun", {}) if before is not None and same_tool else {}
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "tool": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "title": title,
            "config": dict(config),
            "machine": dict(machine),
            "backend": dict(backend),
            "stages": {},
            "begun": begun,
            "files": {},
        }
        if path.is_dir():
            for part in chain(path.glob(".*.part*"), path.glob("*/.*.part*") if before is not None else ()):
                part.unlink()

    def file(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.path / name

    def stage(
        self,
        name: str,
        key: Mapping[str, Any] | None,
        files: Sequence[str],
        action: Callable[[], Result],
        restore: Callable[[], Result],
    ) -> Result:
        """Run a stage, or restore its result from the files of a run before.

        Args:
            name: the stage.
            key: everything that its result depends on, as plain JSON data; None where something of it cannot be told
                apart from another, so that the result is never kept.
            files: the files that it writes, relative to the folder.
            action: runs the stage.
            restore: reads the result back from the files.
        """
        digest = None if key is None else _digest(key)
        done: dict[str, Any] = self._before.get(name, {})
        same = digest is not None and done.get("key") == digest
        if self._resume and same and self._unchanged(done["files"], files):
            _log.info("%s: kept from the run before", name)
            result = restore()
            seconds = float(done["seconds"])
        else:
            start = time.monotonic()
            result = action()
            seconds = time.monotonic() - start
            for file in set(done.get("files", ())) - set(files):
                self.file(file).unlink(missing_ok=True)
        entries = {file: self._entry(file) for file in files if self.file(file).is_file()}
        self._manifest["begun"].pop(name, None)
        self._manifest["stages"][name] = {
            "key": digest,
            "seconds": round(seconds, 3),
            "files": {file: entry["sha256"] for file, entry in entries.items()},
        }
        self._manifest["files"].update(entries)
        self.write()
        return result

    def begin(self, name: str, key: Mapping[str, Any] | None) -> bool:
        """Note in the manifest that a stage which keeps its own state has begun.

        Args:
            name: the stage.
            key: see `stage`.

        Returns:
            Whether a run before was interrupted in the same stage with the same key, and this one is to go on from the
            state that it left.
        """
        digest = None if key is None else _digest(key)
        begun = self._manifest["begun"]
        interrupted = digest is not None and begun.get(name) == digest
        begun[name] = digest
        self.write()
        return self._resume and interrupted

    def drop(self, name: str) -> None:
        """Remove what a stage of an earlier run wrote, where this run does not have that stage."""
        for file in self._before.get(name, {}).get("files", ()):
            self.file(file).unlink(missing_ok=True)

    def write(self) -> None:
        """Write the manifest."""
        write_json(self.file(MANIFEST), self._manifest)

    def _unchanged(self, recorded: Mapping[str, str], files: Sequence[str]) -> bool:
        return set(recorded) >= set(files) and all(
            self.file(file).is_file() and sha256_of_file(self.file(file)) == digest for file, digest in recorded.items()
        )

    def _entry(self, name: str) -> dict[str, Any]:
        path = self.file(name)
        return {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        ConfigError: there is none, it is damaged, or a newer version wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} is not the folder of a run: {MANIFEST} cannot be read ({error})."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is damaged: {error}. Run again without --resume.") from error
    if not known:
        raise ConfigError(f"{str(path)!r} is not a manifest of format {FORMAT}. Name another folder with --output.")
    return dict(manifest)


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON data atomically; NaN and infinity, which JSON does not have, are a bug."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
