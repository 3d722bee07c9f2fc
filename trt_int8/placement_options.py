"""A user's wishes about the placement of Q/DQ: checked, and kept in the model that was made by them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from engines.errors import ModelError
from engines.placement_options import Attention, PlacementOptions, Residual
from trt_int8.choices import check_choice

PLACEMENT_KEY = "trt_int8.placement"
"""Metadata key of quantized models: the `PlacementOptions` that they were made with."""

_log = logging.getLogger(__name__)


def placement_options(
    residual: Residual, attention: Attention, exclude: Sequence[str], include: Sequence[str]
) -> PlacementOptions:
    """Take the options of a public function together.

    Raises:
        ConfigError: `residual` or `attention` is none of its words.
        ModelError: `exclude` or `include` is a string in place of a list.
    """
    check_choice("residual", residual, Residual)
    check_choice("attention", attention, Attention)
    return PlacementOptions(residual, attention, exclude, include)


def placement_entry(options: PlacementOptions) -> dict[str, str]:
    """Return the entry of a model's metadata that says with which options it was made."""
    return {PLACEMENT_KEY: json.dumps(options.to_json())}


def placement_of(metadata: Mapping[str, str]) -> PlacementOptions | None:
    """Return the options that a model was made with; None where it does not tell, or not so that it can be read."""
    text = metadata.get(PLACEMENT_KEY)
    if text is None:
        return None
    try:
        return PlacementOptions(**json.loads(text))
    except (TypeError, ValueError, ModelError) as error:
        _log.warning("The metadata %s cannot be read (%s): how Q/DQ was placed is not known", PLACEMENT_KEY, error)
        return None
