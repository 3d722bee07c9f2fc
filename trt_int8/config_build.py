"""The section `build` of a configuration: TensorRT engines."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from engines.profiles import ShapeRange
from engines.trt_options import HardwareCompatibility
from engines.trt_types import Precision
from trt_int8.settings import PositiveInt, Section


class ShapesConfig(Section):
    """The shapes of one input that an engine takes."""

    min: tuple[PositiveInt, ...] = Field(description="smallest shape")
    opt: tuple[PositiveInt, ...] = Field(description="the shape that kernels are chosen for")
    max: tuple[PositiveInt, ...] = Field(description="largest shape")


class BuildConfig(Section):
    """TensorRT engines, where TensorRT runs the models."""

    precisions: tuple[Precision, ...] = Field(
        default=("fp32", "tf32", "fp16", "int8", "int8+fp16"),
        description="engines to build; fp32 is what the others are compared with",
    )
    batch: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        default=None, description="smallest, optimal and largest batch; null takes the shapes that calibration saw"
    )
    shapes: dict[str, ShapesConfig] = Field(
        default={}, description="shapes of the inputs with further dynamic axes; {} takes those that calibration saw"
    )
    workspace_mib: PositiveInt | None = Field(
        default=None, description="device memory that a kernel may use for itself; null for all there is"
    )
    optimization_level: int | None = Field(
        default=None, strict=True, ge=0, le=5, description="how long TensorRT searches; null is its default, 3"
    )
    hardware_compatibility: HardwareCompatibility = Field(
        default="none", description="other GPUs that the engines must run on: none, or at a cost in speed some"
    )
    version_compatible: bool = Field(
        default=False, description="let newer TensorRT releases load the engines, at a cost in speed"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"precisions is {list(self.precisions)}, expected each only once")
        if "fp32" not in self.precisions:
            raise ValueError(f"precisions is {list(self.precisions)}, expected fp32 among them: the reference")
        if self.batch is not None and self.shapes:
            raise ValueError("batch and shapes are both given; expected one of them, shapes hold the batch too")
        if self.batch is not None and list(self.batch) != sorted(self.batch):
            raise ValueError(f"batch is {list(self.batch)}, expected it in ascending order: smallest, optimal, largest")
        return self

    @property
    def ranges(self) -> dict[str, ShapeRange] | None:
        """The shapes as the engine builder takes them; None where the configuration names none."""
        return {name: ShapeRange(shapes.min, shapes.opt, shapes.max) for name, shapes in self.shapes.items()} or None
