"""Quantizes ONNX files with ModelOpt; `benchmarks/modelopt_placement.py` and `int8_cpu.py` start it on its own.

    python benchmarks/modelopt_quantize.py JOBS.json

ModelOpt pins other versions of onnx and ONNX Runtime than this project, so it is asked for in a process of its own, by
an interpreter of its own if need be. JOBS.json is a list of {"model", "batches", "output"}: the file to quantize, a
`.npz` for each calibration batch, and the file to write. INT8 with its defaults, but the calibration "max", FP32 for
what stays float, on the CPU, and its simplification off: graphs come prepared. Prints a JSON object: its version, and
for each output what went wrong, or null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import modelopt
import numpy as np
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization.calibrate import CalibrationDataReader


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Hands the batches out as often as ModelOpt asks for them.

    Args:
        files: a `.npz` for each batch.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._left = iter(files)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or None at the end."""
        return next((_read(file) for file in self._left), None)

    def get_first(self) -> dict[str, Any]:
        """Return the first batch without taking it."""
        return _read(self._files[0])

    def rewind(self) -> None:
        """Begin again."""
        self._left = iter(self._files)


def _read(file: str) -> dict[str, Any]:
    with np.load(file) as arrays:
        return dict(arrays)


def _faults(jobs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str | None]]:
    for job in jobs:
        try:
            quantize(
                job["model"], quantize_mode="int8", calibration_data_reader=Batches(job["batches"]),
                calibration_method="max", calibration_eps=["cpu"], high_precision_dtype="fp32",
                output_path=job["output"], log_level="WARNING",
            )  # fmt: skip
        except Exception as error:  # ModelOpt lets through whatever its parts raise
            yield job["output"], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            yield job["output"], None


if __name__ == "__main__":
    answers = dict(_faults(json.loads(Path(sys.argv[1]).read_text())))
    print(json.dumps({"version": modelopt.__version__, "faults": answers}))
