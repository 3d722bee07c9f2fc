"""The options of `trt-int8 build` that are more than a word or a number, and its result as lines."""

from __future__ import annotations

from collections.abc import Sequence

from engines.device import SIMULATED
from engines.profiles import ShapeRange
from engines.trt_builder import BuiltEngine
from trt_int8.errors import UsageError

_BOUNDS = 3


def parse_batch(text: str) -> tuple[int, int, int]:
    """Read `--batch 1,8,32`.

    Raises:
        UsageError: it is not three whole numbers above 0 in ascending order.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != _BOUNDS or sizes != sorted(sizes) or sizes[0] < 1:
        raise UsageError(
            f"--batch is {text!r}; expected the smallest, optimal and largest batch, ascending: --batch 1,8,32."
        )
    minimum, optimum, maximum = sizes
    return minimum, optimum, maximum


def parse_shapes(texts: Sequence[str], *, one_will_do: bool = False) -> dict[str, ShapeRange]:
    """Read `--shape image=1x3x224x224,8x3x224x224,32x3x224x224` for each input.

    Args:
        texts: the values of the option.
        one_will_do: whether a single shape may stand for all three.

    Raises:
        UsageError: one of them is not a name and three shapes, or a name comes twice.
    """
    ranges: dict[str, ShapeRange] = {}
    for text in texts:
        name, _, shapes = text.rpartition("=")
        try:
            bounds = [tuple(int(length) for length in shape.split("x")) for shape in shapes.split(",")]
        except ValueError:
            bounds = []
        if one_will_do and len(bounds) == 1:
            bounds *= _BOUNDS
        if not name or len(bounds) != _BOUNDS or name in ranges:
            raise UsageError(
                f"--shape is {text!r}{', an input that was named before' if name in ranges else ''}; expected an input "
                f"and its smallest, optimal and largest shape{', or one for all' if one_will_do else ''}: "
                "--shape image=1x3x224x224,8x3x224x224,32x3x224x224."
            )
        ranges[name] = ShapeRange(*bounds)
        if one_will_do and any(list(axis) != sorted(axis) for axis in zip(*bounds, strict=False)):
            raise UsageError(f"--shape is {text!r}; expected the three shapes in ascending order, axis by axis.")
    return ranges


def summary_lines(built: BuiltEngine, precision: str) -> list[str]:
    """Return what a user wants to know of a new engine, a line each."""
    sidecar = built.sidecar
    place = sidecar.environment
    lines = [
        f"{built.path}: {precision}, {sidecar.plan_bytes} bytes, built in {built.seconds:.1f} s",
        f"  TensorRT {place.tensorrt} on {place.gpu} (compute capability {place.compute_capability})",
    ]
    if place.gpu == SIMULATED:
        lines.append("  SIMULATED device: this is no GPU, and no figure of this engine is a GPU's")
    if sidecar.calibration is not None:
        origin = sidecar.calibration
        hashed = "" if origin.sha256 is None else f", sha256 {origin.sha256[:16]}"
        lines.append(f"  scales: {origin.method}{hashed}")
    for profile in sidecar.profiles:
        ranges = [f"{name} {ShapeRange(*shapes)}" for name, shapes in profile.items()]
        lines.append(f"  profile: {'; '.join(ranges)}")
    if not sidecar.profiles:
        lines.append(f"  shapes: {'; '.join(map(str, sidecar.inputs))}")
    lines.append(f"  given to TensorRT: {sidecar.model}")
    return [*lines, *(f"  note: {note}" for note in built.notes)]
