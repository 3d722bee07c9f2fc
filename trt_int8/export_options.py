"""The options of `trt-int8 export`, turned into the same configuration that a file would give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trt_int8.config import ModelConfig
from trt_int8.errors import ConfigError
from trt_int8.settings import validated


def model_config(
    source: str,
    *,
    inputs: Sequence[str],
    dynamic: Sequence[str],
    arguments: Sequence[str],
    checkpoint: Path | None,
    checkpoint_key: str | None,
    opset: int,
) -> ModelConfig:
    """Make the configuration of a model from command-line options.

    Args:
        source: entry point, .pt2 or .onnx file.
        inputs: "name:1x3x224x224" or "name:1x128:int64" each, in the order of forward().
        dynamic: "name:2=height" each; axis 0 is free with the name "batch" unless it is named here.
        arguments: "key=value" each, the value in YAML.
        checkpoint: file with weights.
        checkpoint_key: where they lie in it.
        opset: ONNX opset.

    Raises:
        ConfigError: an option cannot be read, or does not go with the kind of model.
    """
    raw: dict[str, Any] = {"source": source}
    parsed = [_input(text) for text in inputs]
    for text in dynamic:
        name, axis, symbol = _dynamic(text)
        known = {item["name"]: item for item in parsed}
        if name not in known:
            raise ConfigError(f"Cannot use --dynamic {text!r}: there is no --input {name!r}; inputs: {list(known)}.")
        known[name].setdefault("dynamic", {0: "batch"})[axis] = symbol
    if parsed:
        raw["inputs"] = parsed
    if arguments:
        raw["arguments"] = dict(_argument(text) for text in arguments)
    if checkpoint is not None:
        raw["checkpoint"] = checkpoint
    if checkpoint_key is not None:
        raw["checkpoint_key"] = checkpoint_key
    raw["opset"] = opset
    return validated(ModelConfig, raw, f"the options for {source!r}")


def _input(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    shape, _, dtype = rest.partition(":")
    axes = [axis for axis in shape.split("x") if axis]
    if not name or not all(axis.isdecimal() for axis in axes) or (rest and not shape):
        raise ConfigError(f"Cannot use --input {text!r}: expected NAME:SHAPE[:DTYPE], such as image:1x3x224x224.")
    parsed: dict[str, Any] = {"name": name, "shape": [int(axis) for axis in axes]}
    if dtype:
        parsed["dtype"] = dtype
    return parsed


def _dynamic(text: str) -> tuple[str, int, str]:
    name, _, rest = text.partition(":")
    axis, _, symbol = rest.partition("=")
    if not name or not axis.isdecimal() or not symbol:
        raise ConfigError(f"Cannot use --dynamic {text!r}: expected NAME:AXIS=SYMBOL, such as image:2=height.")
    return name, int(axis), symbol


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"Cannot use --arg {text!r}: expected KEY=VALUE.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"Cannot use --arg {text!r}: {value!r} is not YAML.") from error
