"""Optimization profiles: the range of shapes that an engine with dynamic axes is built for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engines.errors import EngineBuildError, InferenceError
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


def quoted(spec: TensorSpec) -> str:
    """Describe an input for a message, its name in quotes: `'image': float32 (batch, 3, 32, 32)`."""
    return f"{spec.name!r}{str(spec).removeprefix(spec.name)}"


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
                f"Cannot make a profile from batch sizes: input {quoted(spec)} has further dynamic axes. "
                "Give the smallest, the optimal and the largest shape of it."
            )
        profile[spec.name] = ShapeRange((minimum, *rest), (optimum, *rest), (maximum, *rest))
    return profile


def seen_range(shapes: Mapping[Shape, int]) -> ShapeRange:
    """Make the range of shapes of one rank, each with the number of times that it was seen.

    Returns:
        Per axis the smallest and the largest length, and as optimum the shape seen most often; of several the largest.
    """
    return ShapeRange(
        tuple(map(min, zip(*shapes, strict=True))),
        max(shapes, key=lambda shape: (shapes[shape], math.prod(shape), shape)),
        tuple(map(max, zip(*shapes, strict=True))),
    )


def seen_profile(inputs: Sequence[TensorSpec], seen: Mapping[str, Mapping[Shape, int]]) -> dict[str, ShapeRange]:
    """Make the profile of a model with dynamic axes from the shapes that it was fed.

    Its batches may shrink to one sample, whatever sizes were seen: serving wants single samples, and kernels are chosen
    for the optimum alone. All axes that the model names like the batch go along, such as the second one of a state.

    Args:
        inputs: the model's inputs.
        seen: input name to the shapes that were fed, each with its number of batches.

    Raises:
        EngineBuildError: the shapes of a dynamic input are not among them, or are of several ranks.
    """
    profile: dict[str, ShapeRange] = {}
    for spec in dynamic_inputs(inputs):
        shapes = seen.get(spec.name, {})
        if len({len(shape) for shape in shapes}) != 1:
            found = (
                f"shapes of other numbers of axes ({', '.join(map(str, shapes))})" if shapes else "none of its shapes"
            )
            raise EngineBuildError(
                f"Cannot make a profile from the data: they hold {found} for input {quoted(spec)}. "
                "Give its smallest, optimal and largest shape."
            )
        bounds = seen_range(shapes)
        batch = batch_axes(spec, inputs)
        smallest = tuple(1 if axis in batch else length for axis, length in enumerate(bounds.minimum))
        profile[spec.name] = replace(bounds, minimum=smallest)
    return profile


def batch_axes(spec: TensorSpec, inputs: Sequence[TensorSpec]) -> set[int]:
    """Return which axes of an input are the batch.

    The batch is the first axis of the first input that has axes. Of every input the axes that share its symbol are the
    batch as well, and a first axis without a name.
    """
    if spec.shape is None:
        return {0}
    symbol = next((other.shape[0] for other in inputs if other.shape), None)
    named = {axis for axis, length in enumerate(spec.shape) if isinstance(symbol, str) and length == symbol}
    return named | ({0} if spec.shape[:1] == (None,) else set())


def free_axes(spec: TensorSpec) -> list[int]:
    """Return which axes of an input have a length that is known only at run time; none where it states no rank."""
    return [axis for axis, length in enumerate(spec.shape or ()) if not isinstance(length, int)]


def dynamic_inputs(inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the inputs with an axis whose length is known only at run time."""
    return [spec for spec in inputs if spec.shape is None or free_axes(spec)]


def check_profiles(model: str, inputs: Sequence[TensorSpec], profiles: Sequence[Profile]) -> None:
    """Check that profiles fit a model's inputs.

    Raises:
        EngineBuildError: a dynamic input has no range, a range names no input, has another rank, other fixed lengths,
            or is not in order.
    """
    known = {spec.name: spec for spec in inputs}
    for profile in profiles:
        for name in profile:
            if name not in known:
                raise EngineBuildError(
                    f"Cannot build {model}: the profile names {name!r}, which is no input. "
                    f"Its inputs are {'; '.join(map(quoted, inputs))}."
                )
    for spec in dynamic_inputs(inputs):
        if not profiles or any(spec.name not in profile for profile in profiles):
            raise EngineBuildError(
                f"Cannot build {model}: input {quoted(spec)} has a dynamic axis and no optimization profile. "
                "Give its smallest, optimal and largest shape."
            )
    for profile in profiles:
        for name, shapes in profile.items():
            problem = _misfit(known[name], shapes)
            if problem is not None:
                raise EngineBuildError(
                    f"Cannot build {model}: the profile of input {quoted(known[name])} {problem}: {shapes}."
                )


def choose_profile(
    engine: str, profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]], *, preferred: int = 0
) -> int:
    """Choose the profile that inputs of some shapes run in.

    Args:
        engine: its name, for the message.
        profiles: at least one.
        shapes: shape of each input.
        preferred: index of the profile that is taken where several fit.

    Returns:
        The index of the first that holds all the shapes, unless the preferred one does.

    Raises:
        InferenceError: none holds them; names the smallest, the optimal and the largest shape of each.
    """
    order = sorted(range(len(profiles)), key=lambda index: index != preferred)
    for index in order:
        if all(shapes[name] in bounds for name, bounds in profiles[index].items()):
            return index
    name = next(name for name, bounds in profiles[0].items() if shapes[name] not in bounds)
    ranges = " or ".join(str(profile[name]) for profile in profiles)
    raise InferenceError(
        f"{engine}: input {name!r} has shape {tuple(shapes[name])}; the engine was built for {ranges}. "
        "Feed a shape within, or build the engine with a wider profile."
    )


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
