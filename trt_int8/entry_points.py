"""Objects of the user's own code, named as `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trt_int8.errors import ConfigError, FileAccessError


def split_entry_point(spec: str) -> tuple[str, str] | None:
    """Split `package.module:name` or `path/to/file.py:name` at its colon.

    Returns:
        What is left and right of the colon, or None where `spec` has not that form (a plain path, say).
    """
    module, colon, name = spec.rpartition(":")
    if not colon or not all(part.isidentifier() for part in name.split(".")):
        return None
    if module.endswith(".py") or all(part.isidentifier() for part in module.split(".")):
        return module, name
    return None


def import_entry_point(spec: str, what: str) -> Any:
    """Import the object that `spec` names; the current directory is importable.

    What the user's code raises while it is imported passes through unchanged, with its traceback: it is that code's
    to explain.

    Args:
        spec: `package.module:name` or `path/to/file.py:name`; the name may be dotted.
        what: what the object is to the user, for messages: "the calibration data", "the model".

    Raises:
        ConfigError: there is no such module, or it has no such name.
        FileAccessError: there is no such file.
    """
    parts = split_entry_point(spec)
    if parts is None:
        raise ConfigError(f"Cannot import {what}: {spec!r} is neither package.module:name nor path/to/file.py:name.")
    location, name = parts
    module = import_file(Path(location), what) if location.endswith(".py") else _import_module(location, what)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [entry for entry in vars(found) if not entry.startswith("_")]
            close = difflib.get_close_matches(part, public, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it defines {', '.join(public) or 'nothing public'}."
            raise ConfigError(f"Cannot import {what}: {location!r} has no {part!r}; {hint}")
        found = getattr(found, part)
    return found


def source_file(spec: str) -> Path | None:
    """Find the file that an entry point's object is defined in, without running it.

    Returns:
        The module's file, or None where `spec` is no entry point, or there is no such module or no file of it.
    """
    parts = split_entry_point(spec)
    if parts is None:
        return None
    if parts[0].endswith(".py"):
        file: Path | None = Path(parts[0])
    else:
        _make_importable(Path.cwd())
        try:
            module = importlib.util.find_spec(parts[0])
        except ModuleNotFoundError:
            return None
        file = Path(module.origin) if module is not None and module.origin is not None else None
    return file if file is not None and file.is_file() else None


def import_file(file: Path, what: str) -> ModuleType:
    """Run a Python file, a path that ends with `.py`, as a module; modules beside it are importable, as for a script.

    Raises:
        FileAccessError: there is no such file.
    """
    if not file.is_file():
        raise FileAccessError(f"Cannot read {what}: there is no file {str(file)!r}.")
    path = file.resolve()
    # The name is made from the path, so that two files called data.py do not take each other's place in sys.modules.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # only a suffix that Python does not know gives none
    assert spec.loader is not None
    _make_importable(path.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, what: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that exists and misses one of its own imports is the user's code failing: not ours to rewrite.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"Cannot import {what}: there is no module {error.name!r}, neither installed nor in the current folder "
            f"{str(Path.cwd())!r}. Run from the folder that holds it, or install it."
        ) from error


def _make_importable(folder: Path) -> None:
    """Put `folder` first on the import path and leave it there: user code may import lazily while it is iterated."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
