"""What an entry of the zoo is: how it is built, and what is promised of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.builder import Builder, Value
from zoo.inputs import Input

Write = Callable[[Path], Sequence[Input]]
"""Writes a model and returns its inputs."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model of the zoo.

    Attributes:
        name: of the architecture.
        write: writes the model.
        tensorrt: number of weighted operators that the rules promise to quantize for TensorRT.
        cpu: the same for the target cpu.
        tensorrt_db: least SQNR of any float output on the target tensorrt, dB.
        cpu_db: the same on the target cpu.
        half: whether INT8 beside FP16 is tried as well.
    """

    name: str
    write: Write
    tensorrt: int
    cpu: int
    tensorrt_db: float
    cpu_db: float
    half: bool


@dataclass(frozen=True, slots=True)
class Promise:
    """What an architecture is declared with; see `Architecture`.

    Attributes:
        quantized: weighted operators that compute on INT8 for TensorRT, and for the target cpu.
        floors: least SQNR of any float output, dB, on the two targets.
        half: whether INT8 beside FP16 is tried as well.
    """

    quantized: tuple[int, int]
    floors: tuple[float, float]
    half: bool = False

    def of(self, name: str, write: Write) -> Architecture:
        """Return the architecture that this is promised of."""
        return Architecture(name, write, *self.quantized, *self.floors, self.half)


def drawn(
    promise: Promise, *, opset: int = 17, dimensions: int = 2
) -> Callable[[Callable[[Builder], Sequence[Value]]], Architecture]:
    """Declare a function that draws a graph and returns its outputs."""

    def declare(draw: Callable[[Builder], Sequence[Value]]) -> Architecture:
        def write(path: Path) -> Sequence[Input]:
            builder = Builder(seed=sum(map(ord, draw.__name__)), opset=opset, dimensions=dimensions)
            builder.save(path, draw(builder))
            return builder.inputs

        return promise.of(draw.__name__, write)

    return declare
