"""Compiled loops: numba as this package uses it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def njit(function: Function) -> Function:
    """Compile `function` on its first call: without the GIL, IEEE division as in numpy, machine code kept on disk.

    numba keeps the code beside the module, or in the user's cache folder where the package is installed read-only.
    Where it can write to neither (a container with a read-only file system and no home), it refuses to cache at all;
    the function is then compiled anew in each process, which costs a second or two and changes no result.
    """
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError as error:
        logger.debug("%s will be compiled anew in each process: %s", function.__qualname__, error)
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)
