"""How an engine is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engines.errors import EngineBuildError
from engines.profiles import Profile
from engines.trt_types import Precision

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        precision: what the model is typed for. "tf32" is "fp32" with TensorRT free to round the inputs of convolutions
            and matrix products to 10 bits of mantissa; every other precision has that switched off.
        profiles: ranges of shapes; at least one where the model has dynamic axes.
        workspace_bytes: most device memory that a kernel may use for itself; None leaves TensorRT's default, all of it.
        optimization_level: 0 to 5, how long TensorRT searches; None leaves its default, 3.
        timing_cache: file that keeps measured kernel times between builds; made where it is missing, with FILE.json
            beside it, which tells later builds that it is theirs. Of use on the same kind of GPU and the same release
            alone, and made anew where it does not fit.
        hardware_compatibility: GPUs that the plan must run on beside this one; costs speed.
        version_compatible: whether newer TensorRT releases must be able to load the plan; costs speed.

    Raises:
        EngineBuildError: one of them makes no sense.
    """

    precision: Precision = "fp32"
    profiles: Sequence[Profile] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise EngineBuildError(
                f"There is no precision {self.precision!r}; expected one of {', '.join(get_args(Precision))}."
            )
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise EngineBuildError(f"The workspace limit is {self.workspace_bytes} bytes; expected at least 1.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineBuildError(f"The optimization level is {self.optimization_level}; expected 0 to 5.")

    def to_json(self) -> dict[str, Any]:
        """Return the options that stand for themselves; precision and profiles have places of their own."""
        return {
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "timing_cache": None if self.timing_cache is None else self.timing_cache.name,
            "hardware_compatibility": self.hardware_compatibility,
            "version_compatible": self.version_compatible,
        }
