"""The commented configuration that `trt-int8 init` writes, made from the fields of `trt_int8.config`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml

from trt_int8.config import RunConfig
from trt_int8.settings import Section, nested_section

DataKind = Literal["images", "arrays"]

_HEADER = """\
# Configuration of `trt-int8 run`. Relative paths start at the folder of this file.
# A key that is left out has the value given here, unless that is marked as an example.
"""

_MODEL = {
    "source": "my_package.models:my_model",
    "inputs": [{"name": "image", "shape": [1, 3, 224, 224]}],
}
_EXAMPLES: dict[DataKind, dict[str, Any]] = {
    "images": {
        "model": _MODEL,
        "data": {
            "calibration": "data/train",
            "evaluation": "data/validation",
            "labels": "label",
            "preprocessing": {
                "resize": 256,
                "crop": 224,
                "scale": "1/255",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
        },
    },
    "arrays": {
        "model": _MODEL,
        "data": {"calibration": "data/calibration.npz", "evaluation": "data/evaluation.npz", "labels": "label"},
    },
}
"""Values for keys without a default, and for those whose default says too little."""

_WIDTH = 110


def template(kind: DataKind = "images") -> str:
    """Return a commented configuration with every key.

    Args:
        kind: whether the examples are folders of images or `.npz` files.
    """
    return _HEADER + "\n".join(_section(RunConfig, _EXAMPLES[kind])) + "\n"


def _section(section: type[Section], examples: Mapping[str, Any]) -> Iterator[str]:
    filled = section.model_validate(examples)
    for name, field in section.model_fields.items():
        if section is RunConfig:
            yield ""
        nested, value = nested_section(field), getattr(filled, name)
        note = "" if nested or value == field.default else " (example)"
        yield from textwrap.wrap(f"{field.description}{note}", _WIDTH, initial_indent="# ", subsequent_indent="#   ")
        if nested is None or not value:
            yield _entry(name, examples.get(name, value))
        elif isinstance(value, Section):
            yield f"{name}:"
            yield from _indented(_section(nested, examples.get(name, {})), first="  ")
        else:
            yield f"{name}:"
            for item in examples[name]:
                yield from _indented(_section(nested, item), first="  - ")


def _indented(lines: Iterator[str], first: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield (" " * len(first) if number else first) + line


def _entry(name: str, value: Any) -> str:
    """Write one key; lists and mappings stay on its line."""
    plain = list(value) if isinstance(value, tuple) else value
    flow = None if isinstance(plain, list | dict) else False
    return yaml.safe_dump({name: plain}, default_flow_style=flow, width=_WIDTH).strip()
