"""What an engine is made of: which layers really run in INT8, how long each takes, and how two engines differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from calibrators.protocols import Array
from engines.device import open_device
from engines.onnxrt import check_feeds, load_header
from engines.optional import require
from engines.sidecar import ENGINE_SUFFIXES, Environment, Sidecar, is_engine, sha256_of_model
from engines.size import external_files
from engines.trt_inspector import LayerDifference, LayerTable, compare_tables, layer_table
from engines.trt_layers import EngineLayer
from engines.trt_profile import inspect_engine
from engines.trt_runner import TensorRTRunner
from trt_int8.data import DataSpec, open_data
from trt_int8.errors import ConfigError, FileAccessError, ModelError
from trt_int8.idle_options import refuse_unread_preprocessing
from trt_int8.random_data import random_feeds
from trt_int8.runners import titles
from trt_int8.shared_inputs import check_profile, shared_inputs

if TYPE_CHECKING:
    from trt_int8.images import Preprocessing

DEFAULT_RUNS = 20

MIN_OVERLAP = 0.5
"""A model that shares fewer of its nodes with the engine is another one, see `LayerTable.overlap`."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """One engine's layers, and those of another one beside them.

    Attributes:
        table: the layers, and what became of each node of the model.
        model: file name of the model that the engine was built from; None where it was not found.
        environment: TensorRT and the GPU that the layers were shown and timed by.
        simulated: whether the GPU was only simulated: then nothing here tells what a GPU runs.
        runs: number of runs that the times are means of; 0 where nothing was timed.
        shapes: input name to the shape that the layers are shown for.
        notes: what a reader should know, one line each.
        against: the other engine; None without.
        differences: time of each group of layers in this engine, the second, less that in the other, the first; the
            largest first.
    """

    table: LayerTable
    model: str | None
    environment: Environment
    simulated: bool
    runs: int
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    against: LayerTable | None
    differences: tuple[LayerDifference, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: `LayerTable.to_json` and more keys."""
        return {
            **self._layers(self.table),
            "model": self.model,
            "device": self.environment.gpu,
            "tensorrt": self.environment.tensorrt,
            "simulated": self.simulated,
            "runs": self.runs,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "notes": list(self.notes),
            "against": None if self.against is None else self._layers(self.against),
            "differences": [difference.to_json() for difference in self.differences],
        }

    def _layers(self, table: LayerTable) -> dict[str, Any]:
        data = table.to_json()
        if not self.simulated:
            return data
        said = f"SIMULATED, no statement about a GPU: {table.summary}"
        return data | {"summary": said, "int8_share": None, "unknown_share": None}


def inspect(
    engine: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    against: str | os.PathLike[str] | None = None,
    data: DataSpec | None = None,
    batch_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    runs: int = DEFAULT_RUNS,
    trust: bool = False,
) -> Inspection:
    """List an engine's layers beside the nodes of its model, and time them one by one.

    Args:
        engine: the plan file.
        model: the ONNX file that it was built from, where that does not lie beside it.
        against: another engine of the same network, shown and timed with the same inputs.
        data: their first batch is fed; random numbers where None, in the shapes that the kernels were chosen for.
        batch_size: samples in that batch; where the data are cut here 1 by default, else as the kernels were chosen.
        preprocessing: how images become arrays, for image folders.
        runs: number of timed runs; 0 times nothing.
        trust: load engines that no sidecar covers.

    Raises:
        UsageError: a preprocessing without data.
        ConfigError: a file is no engine by its name, or neither of two engines has a model to join them by.
        FileAccessError: a file is missing.
        ModelError: the model is no ONNX model, or that of another engine.
        EngineLoadError: an engine cannot be loaded here.
        EngineError: an engine tells only the names of its layers.
        DataError: the data do not fit.
        InferenceError: the inputs lie outside of the shapes that an engine was built for.
    """
    refuse_unread_preprocessing(preprocessing, data)
    plans = [engine] if against is None else [engine, against]
    for plan in plans:
        if not is_engine(plan):
            raise ConfigError(
                f"Cannot inspect {os.fspath(plan)!r}: by its name it is no TensorRT engine; expected "
                f"{', '.join(ENGINE_SUFFIXES)}. Build one with `trt-int8 build`."
            )
    runners = [TensorRTRunner(plan, name=name, trust=trust) for plan, name in zip(plans, titles(plans), strict=True)]
    models = [_find_model(runner, model if runner is runners[0] else None) for runner in runners]
    _check_joinable(runners, models)
    feeds = _feeds(runners, data, batch_size, preprocessing)
    for runner in runners:
        check_feeds(runner.name, runner.inputs, feeds)
        check_profile(runner, {name: value.shape for name, value in feeds.items()})
    trt = require("tensorrt", "inspect an engine")
    with open_device() as device:
        environment, simulated = Environment.of(trt, device), device.simulated
    layers = [inspect_engine(runner.path, feeds, runs=runs, trust=trust) for runner in runners]
    models = list(map(_fitting, runners, layers, models))
    _check_joinable(runners, models)
    headers = [found.header for found in models]
    tables = list(map(_table, runners, layers, headers))
    differences: tuple[LayerDifference, ...] = ()
    if against is not None:
        # Where one of the models is missing, the other's nodes have the same names.
        either = next(header for header in headers if header is not None)
        first, second = map(_table, runners, layers, [header or either for header in headers])
        differences = compare_tables(second, first)
    return Inspection(
        table=tables[0],
        model=models[0].name,
        environment=environment,
        simulated=simulated,
        runs=runs,
        shapes={name: value.shape for name, value in feeds.items()},
        notes=tuple(note for found in models for note in found.notes),
        against=None if against is None else tables[1],
        differences=differences,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """The model of an engine, without its weights; None where it was not found.

    `sure` where its hash is the one in the sidecar; `given` where the user named it.
    """

    header: onnx.ModelProto | None
    name: str | None
    notes: tuple[str, ...] = ()
    sure: bool = False
    given: bool = False


def _check_joinable(runners: Sequence[TensorRTRunner], models: Sequence[_Model]) -> None:
    if len(runners) > 1 and all(found.header is None for found in models):
        raise ConfigError(
            f"Cannot put {runners[0].name} beside {runners[1].name}: neither model was found, and their layers are "
            "joined by the model's nodes. Name the first one's with --model."
        )


def _find_model(runner: TensorRTRunner, given: str | os.PathLike[str] | None) -> _Model:
    """Find the model that an engine was built from: the one given, else the one that its sidecar names.

    A sidecar has the model's file name and hash, and no folder: the file is looked for beside the engine, in the folder
    above, and in the current one.
    """
    sidecar = runner.sidecar
    name = f"{runner.path.name}.onnx" if sidecar is None else sidecar.model
    path = runner.path.with_name(name) if given is None else Path(given)
    if sidecar is None:
        if given is None and not path.is_file():
            return _missing(runner, f"{name} is not beside it")
        note = f"{runner.name} has no sidecar that covers it: whether {path.name} is its model is not known."
        return _Model(load_header(path), path.name, (note,), given=given is not None)
    if given is not None:
        header = load_header(path)
        if _is_model_of(sidecar, path, header):
            return _Model(header, path.name, sure=True, given=True)
        note = (
            f"{path.name} is not the model that {runner.name} was built from, or was changed since: its SHA-256 is not "
            "the one in the sidecar. Nodes and precisions may not fit."
        )
        return _Model(header, path.name, (note,), given=True)
    for folder in (runner.path.parent, runner.path.absolute().parent.parent, Path()):
        found = _read_if_model_of(sidecar, folder / name)
        if found is not None:
            return _Model(found, name, sure=True)
    if path.is_file():
        return _missing(runner, f"{name} beside it was changed since: its SHA-256 is not the one in the sidecar")
    return _missing(runner, f"{name} is not beside it, nor in the folder above or the current one")


def _missing(runner: TensorRTRunner, why: str) -> _Model:
    note = f"The model that {runner.name} was built from was not found ({why}): its layers alone are shown."
    return _Model(None, None, (f"{note} Name the model with --model.",))


def _is_model_of(sidecar: Sidecar, path: Path, header: onnx.ModelProto) -> bool:
    return sha256_of_model([path, *(path.parent / name for name in external_files(header))]) == sidecar.model_sha256


def _read_if_model_of(sidecar: Sidecar, path: Path) -> onnx.ModelProto | None:
    try:
        header = load_header(path)
        return header if _is_model_of(sidecar, path, header) else None
    except (FileAccessError, ModelError):  # then it is not the one that was built from
        return None


def _fitting(runner: TensorRTRunner, layers: tuple[EngineLayer, ...], model: _Model) -> _Model:
    """Leave a model out that is not the engine's, as its nodes show.

    Raises:
        ModelError: the user named it.
    """
    if model.sure or model.header is None:
        return model
    overlap = _table(runner, layers, model.header).overlap
    if overlap >= MIN_OVERLAP:
        return model
    if model.given:
        expected = (
            "" if runner.sidecar is None else f"; expected {runner.sidecar.model}, whose SHA-256 is in its sidecar"
        )
        raise ModelError(
            f"Cannot show {runner.name} beside {model.name}: it was built from another model, as only {overlap:.0%} of "
            f"the nodes have the same names{expected}. Name that one, or leave --model out to see the layers alone."
        )
    return _missing(runner, f"{model.name} is another one, as only {overlap:.0%} of the nodes have the same names")


def _feeds(
    runners: Sequence[TensorRTRunner],
    data: DataSpec | None,
    batch_size: int | None,
    preprocessing: Preprocessing | None,
) -> dict[str, Array]:
    inputs = shared_inputs(runners)
    if data is not None:
        source = open_data(data, inputs, batch_size=batch_size, max_batches=1, preprocessing=preprocessing)
        return next(iter(source)).feeds
    profiles = runners[0].profiles
    optima = {name: optimum for name, (_, optimum, _) in profiles[0].items()} if profiles else {}
    return random_feeds(inputs, batch_size, built_for=optima)


def _table(runner: TensorRTRunner, layers: tuple[EngineLayer, ...], model: onnx.ModelProto | None) -> LayerTable:
    if model is None:
        return LayerTable(runner.name, (), layers)
    implicit = runner.sidecar is not None and bool(runner.sidecar.options.get("implicit"))
    return layer_table(runner.name, model, layers, implicit=implicit)
