"""Compilation with and without a place to cache machine code."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numba
import pytest

from calibrators import compiled
from calibrators.compiled import njit


def test_runs_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba finds no folder to write to, the function is compiled without a cache and gives the same result."""

    def njit_on_a_read_only_disk(*, cache: bool = False, **options: Any) -> Callable[..., Any]:
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available")
        return numba.njit(**options)  # type: ignore[no-any-return]

    monkeypatch.setattr(compiled, "numba", SimpleNamespace(njit=njit_on_a_read_only_disk))

    @njit
    def double(x: int) -> int:
        return 2 * x

    assert double(21) == 42
    assert double.signatures  # type: ignore[attr-defined]


def test_divides_as_numpy_does() -> None:
    """A division by zero gives infinity, not an exception."""

    @njit
    def divide(a: float, b: float) -> float:
        return a / b

    assert divide(1.0, 0.0) == float("inf")
