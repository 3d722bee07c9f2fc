"""What a user says about where Q/DQ goes, over what the rules of a placement decide by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engines.errors import ModelError

Residual = Literal["int8", "float"]
Attention = Literal["float", "int8"]


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """The wishes of a user; the same ones for every way to an INT8 model.

    Attributes:
        residual: "int8" quantizes the skip input of residual Adds, as TensorRT's Conv + Add fusion wants it; "float"
            leaves it alone, which is more exact and slower. The CPU target, whose Adds compute on INT8, has no choice.
        attention: "int8" quantizes both operands of attention products as well, where the rules allow it; Softmax and
            masks stay float. On the CPU target they always do.
        exclude: regular expressions; a node whose whole name one of them matches stays float.
        include: the same for nodes that are quantized against a rule about speed or accuracy. What cannot be quantized
            stays float, and so does what `exclude` matches too.

    Raises:
        ModelError: `exclude` or `include` is one string in place of a list of them.
    """

    residual: Residual = "int8"
    attention: Attention = "float"
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, expressions in (("exclude", self.exclude), ("include", self.include)):
            if isinstance(expressions, str):
                raise ModelError(
                    f"{name} is the string {expressions!r}, whose characters would each be an expression; expected a "
                    f"list of regular expressions: [{expressions!r}]."
                )
            object.__setattr__(self, name, tuple(expressions))

    def words(self) -> list[str]:
        """Return the options of the command line that say the same; none for what is the default."""
        words = [] if self.residual == "int8" else ["--residual", self.residual]
        words += [] if self.attention == "float" else ["--attention", self.attention]
        for option, expressions in (("--exclude", self.exclude), ("--include", self.include)):
            words += [word for expression in expressions for word in (option, expression)]
        return words

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, which the constructor takes."""
        return {**asdict(self), "exclude": list(self.exclude), "include": list(self.include)}
