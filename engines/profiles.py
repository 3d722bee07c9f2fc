"""Optimization profiles: the range of shapes that an engine with dynamic axes is built for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import EngineBuildError
from engines.runner import TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The shapes of one input.

    Attributes:
        minimum: smallest shape.
        optimum: the shape that kernels are chosen for.
        maximum: largest shape.
    """

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __contains__(self, shape: Sequence[int]) -> bool:
        """Tell whether every axis of `shape` is within the range."""
        return len(shape) == len(self.minimum) and all(
            low <= length <= high for low, length, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    def __str__(self) -> str:
        """Give `min (1, 3, 32, 32), opt (8, 3, 32, 32), max (32, 3, 32, 32)`."""
        return f"min {self.minimum}, opt {self.optimum}, max {self.maximum}"


Profile = Mapping[str, ShapeRange]
"""Input name to its range, for every input with a dynamic axis."""


def batch_profile(inputs: Sequence[TensorSpec], minimum: int, optimum: int, maximum: int) -> dict[str, ShapeRange]:
    """Make the profile of a model whose inputs are dynamic in their batch axis alone.

    Raises:
        EngineBuildError: an input has another dynamic axis, whose range the batch size does not tell.
    """
    profile: dict[str, ShapeRange] = {}
    for spec in dynamic_inputs(inputs):
        shape = spec.shape
        rest = tuple(axis for axis in (shape or ())[1:] if isinstance(axis, int))
        if shape is None or len(rest) != len(shape) - 1:
            raise EngineBuildError(
                f"Cannot make a profile from batch sizes: input {spec} has further dynamic axes. "
                "Give the smallest, the optimal and the largest shape of it."
            )
        profile[spec.name] = ShapeRange((minimum, *rest), (optimum, *rest), (maximum, *rest))
    return profile


def seen_profile(shapes: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, ShapeRange]:
    """Make a profile of the shapes seen in a stream of batches.

    Args:
        shapes: for each batch, input name to shape; all batches name the same inputs with the same rank.

    Returns:
        Per axis the smallest and the largest length, and as optimum the shape seen most often.

    Raises:
        EngineBuildError: there was no batch.
    """
    seen: dict[str, Counter[Shape]] = {}
    for batch in shapes:
        for name, shape in batch.items():
            seen.setdefault(name, Counter())[tuple(shape)] += 1
    if not seen:
        raise EngineBuildError("Cannot make a profile from the data: it held no batch. Give shapes, or other data.")
    return {
        name: ShapeRange(
            tuple(map(min, zip(*counts, strict=True))),
            counts.most_common(1)[0][0],
            tuple(map(max, zip(*counts, strict=True))),
        )
        for name, counts in seen.items()
    }


def dynamic_inputs(inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the inputs with an axis whose length is known only at run time."""
    return [spec for spec in inputs if spec.shape is None or any(not isinstance(axis, int) for axis in spec.shape)]


def check_profiles(model: str, inputs: Sequence[TensorSpec], profiles: Sequence[Profile]) -> None:
    """Check that profiles fit a model's inputs.

    Raises:
        EngineBuildError: a dynamic input has no range, a range names no input, has another rank, other fixed lengths,
            or is not in order.
    """
    known = {spec.name: spec for spec in inputs}
    for spec in dynamic_inputs(inputs):
        if not profiles or any(spec.name not in profile for profile in profiles):
            raise EngineBuildError(
                f"Cannot build {model}: input {spec} has a dynamic axis and no optimization profile. "
                "Give its smallest, optimal and largest shape."
            )
    for profile in profiles:
        for name, shapes in profile.items():
            if name not in known:
                raise EngineBuildError(
                    f"Cannot build {model}: the profile names {name!r}, which is no input. "
                    f"Its inputs are {'; '.join(map(str, inputs))}."
                )
            problem = _misfit(known[name], shapes)
            if problem is not None:
                raise EngineBuildError(f"Cannot build {model}: the profile of input {known[name]} {problem}: {shapes}.")


def _misfit(spec: TensorSpec, shapes: ShapeRange) -> str | None:
    bounds = (shapes.minimum, shapes.optimum, shapes.maximum)
    ranks = {len(shape) for shape in bounds}
    rank = len(spec.shape) if spec.shape is not None else len(shapes.minimum)
    if ranks != {rank}:
        return "has another number of axes"
    for axis, lengths in enumerate(zip(*bounds, strict=True)):
        low, best, high = lengths
        if low < 0 or not low <= best <= high:
            return f"is not in ascending order in axis {axis}"
        fixed = spec.shape[axis] if spec.shape is not None else None
        if isinstance(fixed, int) and set(lengths) != {fixed}:
            return f"does not keep the fixed length {fixed} of axis {axis}"
    return None
