"""Models that are still to be quantized, told from those that are quantized already."""

from __future__ import annotations

import os

from engines.errors import ModelError
from engines.onnxrt import PRECISION_KEY, TARGET_KEY, load_header
from trt_int8.quantize_result import MODE_KEY

_QUANTIZED = ("int8", "int8+fp16")


def check_float(model: str | os.PathLike[str], purpose: str) -> None:
    """Refuse a model that trt-int8 has quantized: what is left of its float layers is not the model.

    Args:
        model: the ONNX file.
        purpose: what it is wanted for, for the message: "calibrate".

    Raises:
        FileAccessError: the file is missing or unreadable.
        ModelError: it is no ONNX model, or its metadata say that it is quantized.
    """
    metadata = {entry.key: entry.value for entry in load_header(model).metadata_props}
    if metadata.get(PRECISION_KEY) not in _QUANTIZED:
        return
    raise ModelError(
        f"Cannot {purpose} {os.fspath(model)!r}: it is quantized already (mode {metadata.get(MODE_KEY, 'static')}, "
        f"target {metadata.get(TARGET_KEY, 'unknown')}). Give the FP32 model that it was made from."
    )
