"""What quantization does to the architectures of tests/zoo, or to any other ONNX files: a Markdown table.

    python benchmarks/zoo_table.py [--residual] [--only REGEX]      the zoo
    python benchmarks/zoo_table.py [--residual] [--data DATA] PATH ...    ONNX files

For each model: how many of its weighted operators compute on INT8 on either target, how many Q/DQ pairs stand on
activations, the least SQNR of an output against FP32 in dB, by how much the targets differ (as a multiple of what two
independent errors of that size would make), and what the linter found beside notes. With --residual: SQNR and pairs for
TensorRT with the skip inputs of residual Adds in INT8 and in float, for the models that have such skips. A skip that
another layer reads as INT8 anyway needs no pair of its own.

The zoo's weights are random: the figures compare placements, and say nothing about trained models. Files without data
are fed with smooth random fields, so that theirs say whether a model goes through, not how exact it is in use.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from engines.onnxrt import load_header, tensor_specs
from engines.runner import TensorSpec
from trt_int8.data import open_data
from trt_int8.errors import DataError, TrtInt8Error

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo.architecture import Architecture
from zoo.classifiers import CLASSIFIERS
from zoo.exported import EXPORTED
from zoo.harness import Quantized, Subject, disagreement
from zoo.inputs import BATCH, Input, Kind, calibration_batches, held_back_batches
from zoo.light import LIGHT
from zoo.predictors import PREDICTORS
from zoo.unusual import UNUSUAL

IDS = 64
"""Ids are below this number: every vocabulary is larger."""

MOST_BATCHES = 24
"""Of data, for calibration and judgement together; a quarter is held back."""

LENGTH = 32
"""Axes beside the batch that a file leaves open."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="ONNX files; the zoo where there are none")
    parser.add_argument("--data", help="what the files are fed with: any form of DATA that trt-int8 takes")
    parser.add_argument("--residual", action="store_true", help="compare --residual int8 with float")
    parser.add_argument("--only", default="", help="of the zoo, only the names that this expression finds")
    options = parser.parse_args()
    head, row = (RESIDUAL_HEAD, residual_row) if options.residual else (HEAD, full_row)
    print(f"| {' | '.join(head)} |")
    print(f"|{'|'.join(['---', *['---:'] * (len(head) - 1)])}|")
    with tempfile.TemporaryDirectory() as folder:
        for name, open_subject in subjects(options.paths, options.data, options.only, Path(folder)):
            try:
                cells = row(open_subject())
            except TrtInt8Error as error:
                cells = [str(error)]
            if cells:
                print(f"| {' | '.join([name, *cells])} |", flush=True)


def subjects(
    paths: Sequence[Path], data: str | None, only: str, folder: Path
) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Return the models by name; each is made when it is called for."""
    for path in paths:
        yield path.stem, partial(subject_of_file, path, data, folder)
    if paths:
        return
    for architecture in (*CLASSIFIERS, *PREDICTORS, *UNUSUAL, *EXPORTED, *LIGHT):
        if re.search(only, architecture.name):
            path = folder / f"{architecture.name}.onnx"
            yield architecture.name, partial(_subject_of_zoo, architecture, path, folder)


def subject_of_file(path: Path, data: str | None, folder: Path) -> Subject:
    """Open a file, with data of its own or with fields of the shapes that it wants."""
    specs, _ = tensor_specs(load_header(path))
    if data is None:
        return _subject(path, inputs_of(specs), folder)
    found = [batch.feeds for batch in open_data(data, specs, batch_size=BATCH, max_batches=MOST_BATCHES)]
    return Subject(path, found[: -len(found) // 4], found[-len(found) // 4 :], folder)


def inputs_of(specs: Sequence[TensorSpec]) -> list[Input]:
    """Return what a file is fed with: fields, or small whole numbers where it wants integers."""
    batch = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)), None)
    inputs = []
    for spec in specs:
        sizes = [size if isinstance(size, int) else BATCH if size == batch else LENGTH for size in spec.shape or ()]
        if not sizes:
            raise DataError(f"Input {spec.name!r} is a scalar, or of no known rank: give data with --data.")
        kind: Kind = "ids" if np.dtype(spec.dtype).kind in "iu" else "field" if len(sizes) > 2 else "normal"
        inputs.append(Input(spec.name, tuple(sizes[1:]), kind, limit=IDS, batch=sizes[0]))
    return inputs


HEAD = (
    "model", "weighted", "INT8 tensorrt", "INT8 cpu", "pairs tensorrt", "pairs cpu", "SQNR tensorrt", "SQNR cpu",
    "targets differ", "linter",
)  # fmt: skip


def full_row(subject: Subject) -> list[str]:
    """Return the cells of one model."""
    tensorrt, cpu = subject.quantized("tensorrt"), subject.quantized("cpu")
    findings = [*tensorrt.findings, *cpu.findings]
    for finding in findings:
        print(f"{subject.model.stem}: {finding}", file=sys.stderr)
    weighted = max(len(found.result.placement.decisions) for found in (tensorrt, cpu))
    difference = max(disagreement(subject.reference, tensorrt.outputs, cpu.outputs).values())
    return [
        str(weighted), str(tensorrt.quantized), str(cpu.quantized), str(tensorrt.pairs), str(cpu.pairs),
        f"{tensorrt.worst_db:.1f}", f"{cpu.worst_db:.1f}", f"{difference:.2f}", str(len(findings) or "clean"),
    ]  # fmt: skip


RESIDUAL_HEAD = ("model", "skips", "SQNR int8", "SQNR float", "pairs int8", "pairs float")


def residual_row(subject: Subject) -> list[str]:
    """Return the cells of one model, none where it has no residual Add."""
    taken, left = subject.quantized("tensorrt"), subject.quantized("tensorrt", residual="float")
    skips = _edges(taken) - _edges(left)
    if skips == 0:
        return []
    return [str(skips), f"{taken.worst_db:.1f}", f"{left.worst_db:.1f}", str(taken.pairs), str(left.pairs)]


def _edges(found: Quantized) -> int:
    """Count the edges that read quantized values; a skip may share the pair of another reader."""
    return sum(len(point.uses or ()) for point in found.result.placement.activations)


def _subject_of_zoo(architecture: Architecture, path: Path, folder: Path) -> Subject:
    return _subject(path, architecture.write(path), folder)


def _subject(path: Path, inputs: Sequence[Input], folder: Path) -> Subject:
    return Subject(path, calibration_batches(inputs), held_back_batches(inputs), folder)


if __name__ == "__main__":
    main()
