"""Polygraphy beside a comparison: the first batches in its format, its own verdict on them, and commands to repeat it.

A run's folder gets

    polygraphy/inputs.json             the first batches, as `--load-inputs` reads them
    polygraphy/NAME_outputs.json       what each model made of them, as `--load-outputs` reads them
    polygraphy/data_loader.py          load_data() for `--data-loader-script`: yields the same batches
    polygraphy/commands.sh             the commands that check the models against these files

The JSON is written by Polygraphy's own functions, so that its tools read it. Batches are recorded as they were fed,
rows that fill up a fixed batch included, because they are what the commands feed again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrators.files import atomic_path, write_text
from calibrators.protocols import Array, Batch
from engines.onnxrt import OnnxRuntimeRunner
from trt_int8.metrics import finite_or_none

if TYPE_CHECKING:
    from polygraphy.comparator import IterationResult, RunResults

FOLDER = "polygraphy"

MAX_BATCHES = 16
MAX_BYTES = 16 * 2**20
"""Bounds of a recording: inputs and all models' outputs together. The first batch is kept whatever its size."""

COSINE_THRESHOLD = 0.95
"""Least cosine between a candidate's and the reference's output of one batch. It equals about 10 dB of signal to noise:
coarse quantization stays above, a wrong scale or a broken layer does not."""

SNR_THRESHOLD_DB = 10.0
"""The same bound as a signal to noise ratio."""

REPRODUCTION_SNR_DB = 60.0
"""Least signal to noise ratio between two runs of one FP32 model: another processor or thread count rounds differently,
and stays far above."""

_DATA_LOADER = '''\
"""The batches of inputs.json, for Polygraphy's --data-loader-script."""

from pathlib import Path

from polygraphy.json import load_json


def load_data():
    """Yield one dict of arrays by input name per batch."""
    yield from load_json(str(Path(__file__).with_name("inputs.json")))
'''


@dataclass(frozen=True, slots=True)
class PolygraphyCheck:
    """Polygraphy's verdict on one candidate by one of its metrics.

    Attributes:
        name: the candidate.
        metric: "cosine_similarity" or "snr" (dB), as `polygraphy run --compare` names them.
        threshold: least value that passes.
        worst: output name to the smallest value of any recorded batch; None where it is no finite number (an infinite
            SNR between identical outputs, NaN).
        passed: whether every output of every recorded batch passed.
    """

    name: str
    metric: str
    threshold: float
    worst: dict[str, float | None]
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class Recording:
    """The first batches of a comparison and what each model made of them, within `MAX_BATCHES` and `MAX_BYTES`.

    Args:
        models: the models in the order of their results; the first is the reference.
    """

    def __init__(self, models: Sequence[OnnxRuntimeRunner]) -> None:
        self.models = tuple(models)
        self.names = file_stems([model.name for model in models])
        self._inputs: list[dict[str, Array]] = []
        self._outputs: list[list[IterationResult]] = [[] for _ in models]
        self._bytes = 0
        self._full = False

    @property
    def batches(self) -> int:
        """Number of batches recorded."""
        return len(self._inputs)

    def add(self, feeds: Batch, results: RunResults) -> None:
        """Record one batch, by copy, as long as there is room; once there is none, nothing more is taken.

        Args:
            feeds: the batch.
            results: one iteration per model, in the order of the models.
        """
        from polygraphy.comparator import IterationResult

        if self._full:
            return
        outputs = [dict(iterations[0].items()) for _, iterations in results]
        size = sum(value.nbytes for arrays in [feeds, *outputs] for value in arrays.values())
        if self._inputs and (len(self._inputs) == MAX_BATCHES or self._bytes + size > MAX_BYTES):
            self._full = True
            return
        self._bytes += size
        self._inputs.append(_copies(feeds))
        for kept, name, arrays, (_, iterations) in zip(self._outputs, self.names, outputs, results, strict=True):
            kept.append(IterationResult(_copies(arrays), runtime=iterations[0].runtime, runner_name=name))

    def check(self) -> tuple[PolygraphyCheck, ...]:
        """Have Polygraphy compare every candidate with the reference on the recorded batches."""
        from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, RunResults, SnrCompareFunc

        metrics = (
            ("cosine_similarity", COSINE_THRESHOLD, CosineSimilarityCompareFunc(COSINE_THRESHOLD)),
            ("snr", SNR_THRESHOLD_DB, SnrCompareFunc(SNR_THRESHOLD_DB)),
        )
        # Outputs that overflow end in NaN or infinity, and in a failed check; numpy need not say so as well.
        with quiet_polygraphy(), np.errstate(all="ignore"):
            results = Comparator.compare_accuracy(
                RunResults(list(zip(self.names, self._outputs, strict=True))),
                comparisons=[(0, index) for index in range(1, len(self.models))],
                compare_func=[compare for _, _, compare in metrics],
            )
        checks = []
        for model, name in zip(self.models[1:], self.names[1:], strict=True):
            for (metric, threshold, _), result in zip(metrics, results, strict=True):
                iterations = result[(self.names[0], name)]
                # An output of another shape has no metric, only False; so it counts as NaN here.
                worst = {
                    output: finite_or_none(
                        float(np.min([getattr(outputs[output], metric, np.nan) for outputs in iterations]))
                    )
                    for output in iterations[0]
                }
                passed = all(bool(match) for outputs in iterations for match in outputs.values())
                checks.append(PolygraphyCheck(model.name, metric, threshold, worst, passed))
        return tuple(checks)

    def write(self, run_folder: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the files into `run_folder`/polygraphy.

        Returns:
            The files written.

        Raises:
            FileAccessError: the folder cannot be written to.
        """
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json

        folder = Path(run_folder) / FOLDER
        contents: dict[Path, Any] = {folder / "inputs.json": self._inputs}
        for name, iterations in zip(self.names, self._outputs, strict=True):
            contents[folder / f"{name}_outputs.json"] = RunResults([(name, iterations)])
        with quiet_polygraphy():
            for path, content in contents.items():
                with atomic_path(path) as temporary:
                    save_json(content, str(temporary))
        write_text(folder / "data_loader.py", _DATA_LOADER)
        commands = folder / "commands.sh"
        write_text(commands, self._commands(Path(run_folder)))
        commands.chmod(commands.stat().st_mode | 0o111)
        return (*contents, folder / "data_loader.py", commands)

    def _commands(self, run_folder: Path) -> str:
        reference, *candidates = self.models
        from_file = ["--load-inputs", f"{FOLDER}/inputs.json"]
        from_script = ["--data-loader-script", f"{FOLDER}/data_loader.py"]
        saved = ["--load-outputs", f"{FOLDER}/{self.names[0]}_outputs.json"]
        same = [*saved, "--compare", "snr", "--snr-threshold", f"{REPRODUCTION_SNR_DB:g}"]
        close = [*saved, "--compare", "cosine_similarity", "--cosine-similarity-threshold", f"{COSINE_THRESHOLD:g}"]
        lines = [
            "#!/usr/bin/env bash",
            "# Polygraphy's checks of this run, on its first batches. Exit status 1: at least one of them failed.",
            'cd "$(dirname "$0")/.." || exit',
            "status=0",
            "",
            f"# {reference.name} still gives the outputs that were saved, fed from the file and from the script.",
            _command(reference, run_folder, [*from_file, *same]),
            _command(reference, run_folder, [*from_script, *same]),
        ]
        for candidate in candidates:
            lines += [
                "",
                f"# {candidate.name} stays close to {reference.name}.",
                _command(candidate, run_folder, [*from_file, *close]),
            ]
        return "\n".join([*lines, "", "exit $status", ""])


def file_stems(names: Sequence[str]) -> list[str]:
    """Turn model names into distinct names for files: no `.onnx`, no characters that a shell or a disk minds."""
    stems: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name.removesuffix(".onnx")).lstrip("-.") or "model"
        stem, number = plain, 2
        while stem in stems:
            stem, number = f"{plain}-{number}", number + 1
        stems.append(stem)
    return stems


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's logger silent meanwhile: what it finds comes back as values and exceptions."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


def _command(model: OnnxRuntimeRunner, run_folder: Path, options: Sequence[str]) -> str:
    path = os.path.relpath(model.path.resolve(), run_folder.resolve())
    how = ["--graph-optimization-level", "ORT_DISABLE_ALL"] if model.execution == "exact" else []
    return shlex.join(["polygraphy", "run", path, "--onnxrt", *how, *options]) + " || status=1"


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Copy into plain arrays: runners may use their buffers again, and Polygraphy's JSON knows no subclasses."""
    return {name: np.array(value) for name, value in arrays.items()}
