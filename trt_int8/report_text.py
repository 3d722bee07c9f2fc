"""Numbers and names as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

ABSENT = "\N{EN DASH}"
"""What stands for a figure that a run does not hold."""

_MINUS = "\N{MINUS SIGN}"


def fixed(value: Any, digits: int) -> str:
    """Write a number with fixed decimals, a dash for anything else."""
    return f"{value:,.{digits}f}".replace("-", _MINUS) if isinstance(value, int | float) else ABSENT


def significant(value: Any, digits: int = 4) -> str:
    """Write a number with so many significant digits, a dash for anything else."""
    if not isinstance(value, int | float):
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:#.{digits}g}".rstrip(".").replace("-", _MINUS)


def percent(share: float) -> str:
    """Write a share of 0 to 1 in per cent, small ones with two significant digits; 0 and 100 are exact."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    digits = 1 if share >= 0.01 else 1 - math.floor(math.log10(100 * share))
    return f"{min(100 * share, 99.9):.{digits}f} %"


def breakable(name: str) -> Markup:
    """Escape a name and let its lines break behind each slash."""
    return Markup(str(escape(name)).replace("/", "/<wbr>"))


def moment(stamp: Any) -> str:
    """Write an ISO time stamp for reading: `2026-01-05 10:12 UTC`; as it is where it is none."""
    try:
        time = datetime.fromisoformat(str(stamp))
    except ValueError:
        return str(stamp)
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def describe_tensor(spec: Any) -> str:
    """Write an input or output of `export.json`: `image: float32 (batch, 3, 32, 32)`."""
    if not isinstance(spec, Mapping):
        return str(spec)
    shape = spec.get("shape")
    axes = "any shape" if shape is None else f"({', '.join('?' if axis is None else str(axis) for axis in shape)})"
    return f"{spec.get('name')}: {spec.get('dtype')} {axes}"


def format_bytes(count: Any) -> str:
    """Write a number of bytes with a decimal unit, a dash for anything but a number."""
    if not isinstance(count, int | float):
        return ABSENT
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"
