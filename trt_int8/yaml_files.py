"""YAML files of the user, and single keys set from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from calibrators.files import read_bytes
from trt_int8.errors import ConfigError


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        file: the file.
        what: what it is to the user, for messages: "the configuration".

    Raises:
        ConfigError: it is not YAML (the line is named), or it holds no keys.
        FileAccessError: it cannot be read.
    """
    content = read_bytes(file, what)
    try:
        raw = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"Cannot read {what} {str(file)!r}: it is not YAML: {_reason(error)}.") from error
    if not isinstance(raw, dict):
        found = "it is empty" if raw is None else f"it holds a {type(raw).__name__}"
        raise ConfigError(
            f"Cannot use {what} {str(file)!r}: {found}; expected keys and values. `trt-int8 init` writes an example."
        )
    return raw


def set_key(raw: dict[str, Any], assignment: str) -> None:
    """Carry out `section.key=value`, the value in YAML; sections that are missing or null are made.

    Raises:
        ConfigError: the assignment has not that form, or goes through a value that has no keys.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"Cannot use --set {assignment!r}: expected section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Cannot use --set {assignment!r}: its value is not YAML: {_reason(error)}.") from error
    *sections, last = (part.strip() for part in key.split("."))
    node: Any = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"Cannot use --set {assignment!r}: {section!r} holds {node!r}, which has no keys.")
    node[last] = value


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]
