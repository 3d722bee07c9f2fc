"""Batches for several models at once: the shapes that all of them take, and what an engine was not built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engines.profiles import ShapeRange, choose_profile
from engines.runner import Runner, TensorSpec
from engines.trt_runner import TensorRTRunner
from trt_int8.errors import ModelError

Axis = int | str | None


def shared_inputs(models: Sequence[Runner]) -> tuple[TensorSpec, ...]:
    """Describe batches that fit every one of some models: an axis that any of them fixes is fixed.

    An engine fixes an axis too where all its optimization profiles hold one length alone.

    Args:
        models: they need not be entered. The first names the inputs and their types; an input that another one does not
            have is left as it is.

    Raises:
        ModelError: two of the models fix an axis at different lengths.
    """
    return tuple(_shared(spec, models) for spec in models[0].inputs)


def check_profile(model: Runner, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a model takes these shapes, where it is an engine that was built for a range of them.

    Args:
        model: it need not be entered.
        shapes: one for each input.

    Raises:
        InferenceError: they are outside of every optimization profile; names its smallest, optimal and largest shape.
    """
    if isinstance(model, TensorRTRunner) and model.profiles:
        choose_profile(model.name, _ranges(model), shapes)


def _ranges(model: TensorRTRunner) -> list[dict[str, ShapeRange]]:
    return [{name: ShapeRange(*bounds) for name, bounds in profile.items()} for profile in model.profiles]


def _shared(spec: TensorSpec, models: Sequence[Runner]) -> TensorSpec:
    if spec.shape is None:
        return spec
    axes, fixed_by = list(spec.shape), [models[0]] * len(spec.shape)
    for model in models:
        for axis, length in enumerate(_axes(model, spec.name, len(axes))):
            if not isinstance(length, int):
                continue
            if isinstance(axes[axis], int) and axes[axis] != length:
                raise ModelError(
                    f"Cannot feed {fixed_by[axis].name} and {model.name} the same data: axis {axis} of the input "
                    f"{spec.name!r} is fixed at {axes[axis]} in the first and at {length} in the second. Build or "
                    "export them for the same shapes."
                )
            if axes[axis] != length:
                axes[axis], fixed_by[axis] = length, model
    return replace(spec, shape=tuple(axes))


def _axes(model: Runner, name: str, rank: int) -> Sequence[Axis]:
    """Return the axes of a model's input, those that an engine's profiles fix included; none where it has no such."""
    shape = next((spec.shape for spec in model.inputs if spec.name == name), None)
    if shape is None or len(shape) != rank:
        return ()
    axes = list(shape)
    if isinstance(model, TensorRTRunner):
        bounds = [profile[name] for profile in _ranges(model) if name in profile]
        for axis in range(rank) if bounds else ():
            lengths = {bound[axis] for item in bounds for bound in (item.minimum, item.maximum)}
            if len(lengths) == 1:
                axes[axis] = lengths.pop()
    return axes
