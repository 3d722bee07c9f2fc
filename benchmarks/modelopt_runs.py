"""Starts ModelOpt in a process of its own, with an interpreter that has it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HOW_TO_INSTALL = (
    "ModelOpt cannot be imported there. Put it beside the project, not into its environment, where it would want other "
    "versions of onnx and ONNX Runtime: `python -m venv ../modelopt && ../modelopt/bin/pip install "
    "'nvidia-modelopt[onnx]'`, then pass `--modelopt-python ../modelopt/bin/python`; or `pip install --no-deps "
    "--target DIR nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 'pulp<4' regex tqdm onnx-graphsurgeon "
    "nvidia-ml-py lief` and PYTHONPATH=DIR."
)

Batch = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """A file to quantize.

    Attributes:
        model: the file.
        batches: what it is calibrated on.
        output: the file to write.
    """

    model: Path
    batches: Sequence[Batch]
    output: Path


@dataclass(frozen=True, slots=True)
class Quantized:
    """What became of the jobs.

    Attributes:
        version: of ModelOpt.
        faults: for each output what went wrong, or None.
    """

    version: str
    faults: Mapping[Path, str | None]


def is_there(python: str) -> bool:
    """Tell whether an interpreter can import ModelOpt's part for ONNX."""
    try:
        found = subprocess.run([python, "-c", "import modelopt.onnx.quantization"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return found.returncode == 0


def quantize_all(python: str, jobs: Iterable[Job], folder: Path) -> Quantized:
    """Quantize files with ModelOpt.

    Args:
        python: an interpreter that has ModelOpt.
        jobs: the files.
        folder: for the batches.

    Raises:
        RuntimeError: ModelOpt's process ended without an answer.
    """
    asked = []
    for number, job in enumerate(jobs):
        files = []
        for index, batch in enumerate(job.batches):
            file = folder / f"batch-{number}-{index}.npz"
            np.savez(file, **batch)
            files.append(str(file))
        asked.append({"model": str(job.model), "batches": files, "output": str(job.output)})
    request = folder / "jobs.json"
    request.write_text(json.dumps(asked))
    command = [python, str(Path(__file__).with_name("modelopt_quantize.py")), str(request)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"ModelOpt ended with {found.returncode}: {found.stderr[-2000:]}")
    answer = json.loads(found.stdout.splitlines()[-1])
    return Quantized(answer["version"], {Path(output): fault for output, fault in answer["faults"].items()})
