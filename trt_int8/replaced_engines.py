"""What a new engine replaced: files are named after model and precision alone, which many engines may share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.errors import EngineLoadError
from engines.sidecar import Sidecar, read_sidecar
from trt_int8.errors import FileAccessError


@dataclass(frozen=True, slots=True)
class EarlierEngine:
    """An engine that lay where a new one goes.

    Attributes:
        plan: the file.
        sidecar: what was known of it; None where nothing was.
    """

    plan: Path
    sidecar: Sidecar | None


def earlier_engine(plan: Path) -> EarlierEngine | None:
    """Return what lies at a place now; None where there is no engine."""
    if not plan.is_file():
        return None
    try:
        return EarlierEngine(plan, read_sidecar(plan))
    except (EngineLoadError, FileAccessError):
        return EarlierEngine(plan, None)


def replacement_note(earlier: EarlierEngine | None, built: Sidecar) -> str | None:
    """Say which engine was replaced; None where it came from the same model, scales, TensorRT and GPU.

    Args:
        earlier: what lay there.
        built: what was built.
    """
    if earlier is None:
        return None
    before = earlier.sidecar
    if before is None:
        return f"replaced {earlier.plan} (an engine without a sidecar)"
    old, new = before.environment, built.environment
    changed = [
        text
        for text, differs in (
            (old.gpu, (old.gpu, old.compute_capability) != (new.gpu, new.compute_capability)),
            ("another calibration", _sha256(before) != _sha256(built) and _method(before) == _method(built)),
            ("another model", before.model_sha256 != built.model_sha256 and before.calibration == built.calibration),
        )
        if differs
    ]
    if not changed and old.tensorrt == new.tensorrt and _method(before) == _method(built):
        return None
    return f"replaced {earlier.plan} ({', '.join([f'TensorRT {old.tensorrt}', *_method(before), *changed])})"


def _method(sidecar: Sidecar) -> list[str]:
    return [] if sidecar.calibration is None else [sidecar.calibration.method]


def _sha256(sidecar: Sidecar) -> str | None:
    return None if sidecar.calibration is None else sidecar.calibration.sha256
