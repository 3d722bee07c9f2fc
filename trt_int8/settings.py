"""The base of every configuration section, and how its refusals are worded.

pydantic checks; what it finds is said in one line, with the dotted path, the value, and what was expected.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from trt_int8.errors import ConfigError

_LONGEST_VALUE = 60


def _number(value: object) -> object:
    """Read `1/255`, and `1e-3`, which YAML takes for text, as numbers; leave the rest to pydantic, but for booleans."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "a boolean is no number")
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]


class Section(BaseModel):
    """A part of a configuration: immutable, no unknown keys, a description for every field."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionType = TypeVar("SectionType", bound=Section)


def nested_section(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, be it one of them, an optional one, or a tuple of them; else None."""
    pending: list[Any] = [field.annotation]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        pending.extend(get_args(annotation))
    return None


def validated(section: type[SectionType], raw: Any, name: str) -> SectionType:
    """Make a section from plain data.

    Args:
        section: the class.
        raw: nested mappings and lists, as read from YAML.
        name: what is read, for the message: the file's name.

    Raises:
        ConfigError: one line with every problem.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"Cannot use {name}: {'; '.join(_problems(error, section, raw))}.") from error


def _problems(error: ValidationError, section: type[Section], raw: Any) -> list[str]:
    """Word each problem; where all members of a union refuse a value, that is one problem."""
    problems: list[str] = []
    wrong: dict[str, list[str]] = {}
    for details in error.errors():
        path = _dotted(details, raw)
        match details["type"]:
            case "extra_forbidden":
                problems.append(_unknown_key(path, details, section))
            case "missing":
                problems.append(f"{path} is missing")
            case "value_error":
                problems.append(f"{path}: {details['ctx']['error']}" if path else str(details["ctx"]["error"]))
            case _:
                value = textwrap.shorten(repr(details["input"]), _LONGEST_VALUE, placeholder="...")
                wrong.setdefault(f"{path or 'the content'} is {value}", []).append(_expected(details))
    return problems + [f"{what}, expected {' or '.join(expected)}" for what, expected in wrong.items()]


def _unknown_key(path: str, details: ErrorDetails, section: type[Section]) -> str:
    *parents, key = details["loc"]
    for part in parents:
        if isinstance(part, str) and part in section.model_fields:
            section = nested_section(section.model_fields[part]) or section
    close = difflib.get_close_matches(str(key), section.model_fields, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {path} ({hint}valid here: {', '.join(section.model_fields)})"


def _dotted(details: ErrorDetails, raw: Any) -> str:
    """Write the place as the user would: `model.inputs[0].shape`; tags that pydantic adds for unions are left out."""
    path = ""
    node = raw
    missing = details["loc"][-1:] if details["type"] == "missing" else ()
    for part in details["loc"]:
        if _holds(node, part):
            node = node[part]
        elif (part,) != missing:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _holds(node: Any, part: int | str) -> bool:
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)


_EXPECTED = {
    "bool": "true or false",
    "dict": "a mapping",
    "finite": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "model": "a mapping",
    "path": "a path",
    "string": "text",
    "tuple": "a list",
}
"""What was expected, by the first word of pydantic's error type."""


def _expected(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    match details["type"]:
        case "literal_error":
            return str(context["expected"])
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"more than {context['gt']}"
        case "less_than_equal":
            return f"at most {context['le']}"
    return _EXPECTED.get(details["type"].split("_")[0], details["msg"].removeprefix("Input should be "))
