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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrators.files import atomic_path, write_text
from calibrators.protocols import Array, Batch
from engines.runner import Runner
from trt_int8.metrics import finite_or_none
from trt_int8.polygraphy_commands import COSINE_THRESHOLD, commands_script

if TYPE_CHECKING:
    from polygraphy.comparator import IterationResult, RunResults

FOLDER = "polygraphy"

MAX_BATCHES = 16
MAX_BYTES = 16 * 2**20
"""Bounds of a recording: inputs and all models' outputs together. The first batch is kept whatever its size."""

SNR_THRESHOLD_DB = 10.0
"""The bound of `COSINE_THRESHOLD` as a signal to noise ratio."""

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

    def __init__(self, models: Sequence[Runner]) -> None:
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
        script = commands_script(
            self.models,
            [{name: value.shape for name, value in feeds.items()} for feeds in self._inputs],
            folder=Path(run_folder),
            inputs=f"{FOLDER}/inputs.json",
            loader=f"{FOLDER}/data_loader.py",
            reference_outputs=f"{FOLDER}/{self.names[0]}_outputs.json",
        )
        write_text(commands, script)
        commands.chmod(commands.stat().st_mode | 0o111)
        return (*contents, folder / "data_loader.py", commands)


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


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Copy into plain arrays: runners may use their buffers again, and Polygraphy's JSON knows no subclasses."""
    return {name: np.array(value) for name, value in arrays.items()}
