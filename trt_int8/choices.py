"""Values of a few fixed words, checked where Python code hands them in; the command line checks its own."""

from __future__ import annotations

from typing import Any, get_args

from trt_int8.errors import ConfigError


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that a value is one of a `Literal`'s.

    Args:
        name: the parameter, for the message.
        value: what was given.
        choices: the `Literal` type.

    Raises:
        ConfigError: it is none of them.
    """
    if value not in get_args(choices):
        expected = " or ".join(repr(choice) for choice in get_args(choices))
        raise ConfigError(f"{name} is {value!r}; expected {expected}.")
