"""Names for what is added to a graph, none of which it holds already."""

from __future__ import annotations

from collections.abc import Iterable


class FreeNames:
    """Gives names that nothing bears yet.

    Args:
        taken: the names of the graph's values, and of its nodes where such are named too.
    """

    def __init__(self, taken: Iterable[str | None]) -> None:
        self._taken = set(taken)

    def take(self, stem: str) -> str:
        """Return `stem`, or the first of stem_2, stem_3, ... that is free; it is taken from then on."""
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name
