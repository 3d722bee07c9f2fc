"""Polygraphy's command lines for the models of a comparison: in ONNX Runtime, and in TensorRT 10 and 11 alike.

TensorRT takes its types from the model (`--strongly-typed`), because the flags that choose a precision are gone in
TensorRT 11. Polygraphy leaves TF32 off unless asked.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.onnxrt import TARGET_KEY, OnnxRuntimeRunner
from engines.profiles import Shape, ShapeRange, dynamic_inputs, seen_range
from engines.runner import Runner
from engines.trt_runner import TensorRTRunner

COSINE_THRESHOLD = 0.95
"""Least cosine between a candidate's and the reference's output of one batch. It equals about 10 dB of signal to noise:
coarse quantization stays above, a wrong scale or a broken layer does not."""

REPRODUCTION_SNR_DB = 60.0
"""Least signal to noise ratio between two runs of the reference: another processor or thread count rounds differently,
and stays far above."""

_CHECK = """\
# What follows needs TensorRT, a GPU and the CUDA runtime library, in the Python that Polygraphy runs in.
python="$(dirname "$(command -v polygraphy)")/python"
[ -x "$python" ] || python=python3
check='import tensorrt; from polygraphy import cuda; tensorrt.Builder(tensorrt.Logger()); cuda.wrapper()'
if "$python" -c "$check" > /dev/null 2>&1; then"""


def commands_script(
    models: Sequence[Runner],
    shapes: Sequence[Mapping[str, Shape]],
    *,
    folder: Path,
    inputs: str,
    loader: str,
    reference_outputs: str,
) -> str:
    """Write the shell script that has Polygraphy check models against saved inputs and outputs.

    Its exit status is 1 where a check failed. What needs TensorRT is left out where there is none, and the script says
    so. A model that comes from no file has no commands.

    Args:
        models: the reference, then the candidates.
        shapes: shape of each input, for every batch of the saved inputs.
        folder: what the paths in the script are relative to; the script lies in a folder of it.
        inputs: file of the saved inputs, relative to `folder`.
        loader: script that loads them, likewise.
        reference_outputs: file of the reference's outputs, likewise.
    """
    from_file = ["--load-inputs", inputs]
    from_script = ["--data-loader-script", loader]
    saved = ["--load-outputs", reference_outputs]
    same = [*saved, "--compare", "snr", "--snr-threshold", f"{REPRODUCTION_SNR_DB:g}"]
    close = [*saved, "--compare", "cosine_similarity", "--cosine-similarity-threshold", f"{COSINE_THRESHOLD:g}"]
    everywhere: list[str] = []
    with_tensorrt: list[str] = []
    ways = [way for model in models for way in _ways(model, folder, shapes)]
    for index, way in enumerate(ways):
        lines = with_tensorrt if way.tensorrt else everywhere
        if index == 0:
            does = "still gives the outputs that were saved, fed from the file and from the script"
            checks = [[*from_file, *same], [*from_script, *same]]
        else:
            does, checks = f"stays close to {ways[0].title}", [[*from_file, *close]]
        lines += ["", f"# {way.title} {does}."]
        if way.run is None:
            lines.append("echo " + shlex.quote(f"{way.title} is left out: no profile of it holds all the batches."))
        else:
            lines += [_command([*way.run, *check]) for check in checks]
    if with_tensorrt:
        left_out = ", ".join(way.title for way in ways if way.tensorrt)
        note = f"Left out, because TensorRT, a GPU or the CUDA runtime library is not there: {left_out}."
        with_tensorrt = ["", _CHECK, *with_tensorrt, "", "else", f"echo {shlex.quote(note)}", "fi"]
    head = (
        "#!/usr/bin/env bash",
        "# Polygraphy's checks of this run, on its first batches. Exit status 1: at least one of them failed.",
        'cd "$(dirname "$0")/.." || exit',
        "status=0",
    )
    return "\n".join([*head, *everywhere, *with_tensorrt, "", "exit $status", ""])


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to run a model.

    Attributes:
        title: the model, and what runs it where that is not its own runtime.
        run: arguments of `polygraphy run`; None where Polygraphy cannot run it on all the batches.
        tensorrt: whether it needs TensorRT.
    """

    title: str
    run: list[str] | None
    tensorrt: bool


def _ways(model: Runner, folder: Path, shapes: Sequence[Mapping[str, Shape]]) -> list[_Way]:
    title = " ".join(model.name.split())  # one line, as it goes into comments
    if isinstance(model, TensorRTRunner):
        return [_Way(title, _engine(model, folder, shapes), tensorrt=True)]
    if not isinstance(model, OnnxRuntimeRunner):
        return []
    ways = [_Way(title, _in_onnxruntime(model, folder), tensorrt=False)]
    if model.metadata.get(TARGET_KEY) == "tensorrt":
        ways.append(_Way(f"{title} built by TensorRT", _in_tensorrt(model, folder, shapes), tensorrt=True))
    return ways


def _in_onnxruntime(model: OnnxRuntimeRunner, folder: Path) -> list[str]:
    how = ["--graph-optimization-level", "ORT_DISABLE_ALL"] if model.execution == "exact" else []
    return [_relative(model.path, folder), "--onnxrt", *how]


def _in_tensorrt(model: OnnxRuntimeRunner, folder: Path, shapes: Sequence[Mapping[str, Shape]]) -> list[str]:
    """Build a model with a profile of the saved inputs' shapes."""
    options = ["--trt", "--strongly-typed"]
    ranges = {
        spec.name: seen_range(Counter(batch[spec.name] for batch in shapes)) for spec in dynamic_inputs(model.inputs)
    }
    bounds = (("min", "minimum"), ("opt", "optimum"), ("max", "maximum"))
    for option, bound in bounds if ranges else ():
        options.append(f"--trt-{option}-shapes")
        options += [f"{name}:{_shape(getattr(found, bound))}" for name, found in ranges.items()]
    return [_relative(model.path, folder), *options]


def _engine(model: TensorRTRunner, folder: Path, shapes: Sequence[Mapping[str, Shape]]) -> list[str] | None:
    """Load an engine; None where no one of its profiles holds all the saved inputs."""
    run = [_relative(model.path, folder), "--model-type", "engine", "--trt"]
    fitting = [
        index
        for index, profile in enumerate(model.profiles)
        if all(batch[name] in ShapeRange(*bounds) for batch in shapes for name, bounds in profile.items())
    ]
    if model.profiles and not fitting:
        return None
    return [*run, "--optimization-profile", str(fitting[0])] if len(model.profiles) > 1 else run


def _shape(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["polygraphy", "run", *arguments]) + " || status=1"
