"""The one way to run a model, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from calibrators.protocols import Array


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a model's input or output.

    Attributes:
        name: name in the graph.
        dtype: element type.
        shape: one entry per axis: a length, a symbol such as "batch" for a dynamic axis, or None for an unnamed one.
            The shape itself is None where the graph does not state a rank.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...] | None

    @property
    def fixed_batch(self) -> int | None:
        """Length of the first axis where the graph fixes it, else None; None for scalars as well."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None

    def __str__(self) -> str:
        """Give `name: float32 (batch, 3, 32, 32)`."""
        shape = "any shape"
        if self.shape is not None:
            axes = ", ".join("?" if axis is None else str(axis) for axis in self.shape)
            shape = f"({axes},)" if len(self.shape) == 1 else f"({axes})"
        return f"{self.name}: {self.dtype.name} {shape}"


class Runner(Protocol):
    """A model that can be run: `with runner: outputs = runner.infer(feeds)`.

    `infer` may only be called between `__enter__` and `__exit__`. A runner may be entered again after it was left.
    """

    @property
    def name(self) -> str:
        """The name in tables: the model file's name unless another was given."""
        ...

    @property
    def execution(self) -> str:
        """How the graph is carried out: "exact" (as written, no fusion) or "native" (as the runtime likes it best)."""
        ...

    @property
    def simulated(self) -> bool:
        """Whether the figures stand in for another machine's: a TensorRT placement that ONNX Runtime runs."""
        ...

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The model's inputs, in graph order. Available without entering."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The model's outputs, in graph order. Available without entering."""
        ...

    def __enter__(self) -> Self:
        """Make the session, allocate buffers."""
        ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release everything."""
        ...

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: input name to array; names, dtypes and shapes must fit `inputs`.

        Returns:
            Output name to array; the caller owns the arrays.

        Raises:
            InferenceError: an input is missing, unknown, or of another dtype or shape, or the runtime failed.
        """
        ...
