"""How large a model is, and what its weights are stored as."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from calibrators.errors import FileAccessError
from engines.onnxrt import load_header
from engines.sidecar import is_engine


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Size of one model.

    Attributes:
        name: file name.
        file_bytes: size of the file and of its external data.
        weight_bytes: bytes of initializers by data type, largest first; empty for a TensorRT plan, which does not tell.
        ratio: how many times smaller the file is than the reference; 1 for the reference itself.
    """

    name: str
    file_bytes: int
    weight_bytes: dict[str, int]
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def measure_sizes(models: list[str | os.PathLike[str]]) -> tuple[ModelSize, ...]:
    """Measure ONNX files and TensorRT plans; the first one is the reference of the ratios.

    Raises:
        FileAccessError: a file, or its external data, is missing.
        ModelError: a file is not an ONNX model.
    """
    measured: list[ModelSize] = []
    for model in models:
        path = Path(model)
        if is_engine(path):
            total, weights = _plan_bytes(path), {}
        else:
            header = load_header(path)
            total = path.stat().st_size + sum(_external_bytes(path, name) for name in external_files(header))
            weights = _weight_bytes(header)
        reference = measured[0].file_bytes if measured else total
        measured.append(ModelSize(path.name, total, weights, reference / total))
    return tuple(measured)


def external_files(model: onnx.ModelProto) -> list[str]:
    """Name the external data files that a model refers to, each once, relative to the model's folder."""
    names = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return sorted(names)


def _plan_bytes(plan: Path) -> int:
    try:
        return plan.stat().st_size
    except OSError as error:
        raise FileAccessError(f"Cannot measure the engine {str(plan)!r}: {error.strerror}.") from error


def _external_bytes(model: Path, name: str) -> int:
    try:
        return (model.parent / name).stat().st_size
    except OSError as error:
        raise FileAccessError(
            f"Cannot measure the model {str(model)!r}: its external data {name!r} cannot be read: {error.strerror}. "
            "Put that file beside the model; the two belong together."
        ) from error


def _weight_bytes(model: onnx.ModelProto) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype = ir.DataType(tensor.data_type)
        count = 1
        for length in tensor.dims:
            count *= length
        sizes[dtype.name] += int(count * dtype.itemsize)
    return dict(sizes.most_common())
