"""Calibration files of other tools, told apart by their first bytes, so that a message can name what was found.

Nothing is taken from them: they hold ranges, scales of another kind, or zero points, and none of them says what
TensorRT's cache says.
"""

from __future__ import annotations

import json
import re

_NUMBER = r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?"
_PARSED_BYTES = 64 * 2**20
"""JSON beyond this is not parsed for its kind alone."""


def kind_of(data: bytes) -> str:
    """Say what a file is that is not a TensorRT calibration cache.

    Args:
        data: its content.

    Returns:
        A noun phrase, for "found ...".
    """
    start = data.lstrip()[:4096]
    if not start:
        return "an empty file"
    if data.startswith(b"PK\x03\x04"):
        if b"data.pkl" in data[:4096]:
            return "a PyTorch checkpoint, perhaps the state of a ModelOpt quantization"
        return "a .npz archive, perhaps trt-int8's own calibration"
    if data[:4] in (b"ptrt", b"ftrt"):
        return "a TensorRT engine"
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, perhaps a PyTorch or ModelOpt checkpoint"
    if b"\0" in data:
        return "a binary file, perhaps ONNX Runtime's calibration.flatbuffers"
    if start[:1] in (b"{", b"["):
        return _json_kind(data)
    try:
        text = start.decode(errors="ignore")
        data.decode()
    except UnicodeDecodeError:
        return "text that is not UTF-8"
    if re.match(rf"\S+_param_0(?: {_NUMBER})+\s", text):
        return "ncnn's calibration table, which holds 127 / amax, and scales of weights too"
    if re.match(rf"\S+ {_NUMBER}\s", text):
        return "ONNX Runtime's calibration table, which holds ranges and not scales"
    if re.search(r"^#\s*op_name\s+threshold\s+min\s+max", text, re.MULTILINE):
        return "a calibration table of Sophgo's compiler"
    return f"a file that starts with {start.splitlines()[0][:40]!r}"


def _json_kind(data: bytes) -> str:
    try:
        content = json.loads(data) if len(data) <= _PARSED_BYTES else None
    except (ValueError, RecursionError):
        return "damaged JSON"
    if isinstance(content, dict) and content:
        first = next(iter(content.values()))
        if "CLS" in content or (isinstance(first, list) and len(first) == 2):
            return "ONNX Runtime's calibration.json, which holds ranges and not scales"
        if "activation_encodings" in content:
            return "AIMET's quantization encodings"
        if any("quantiz" in str(key) or "modelopt" in str(key) for key in content):
            return "JSON of another quantization tool, perhaps ModelOpt"
    return "JSON, perhaps another tool's calibration"
