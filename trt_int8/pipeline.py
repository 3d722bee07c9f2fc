"""The whole job, stage after stage; it holds no arithmetic.

PyTorch -> export -> model.onnx -> calibrate -> calibration.npz -> quantize -> INT8 models, one per method and target
                                                                -> FP16 model
                                                                -> TensorRT engines, where TensorRT runs the models
        -> benchmark, compare, sizes -> report.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from calibrators.calibration import Calibration
from calibrators.files import sha256_of_file
from calibrators.protocols import Track, untracked
from engines.onnxrt import OnnxRuntimeRunner
from engines.size import measure_sizes
from trt_int8 import accuracy as accuracy_stage
from trt_int8.backends import BackendChoice, choose_backend
from trt_int8.benchmarking import BENCHMARK_BATCHES, time_side_by_side
from trt_int8.calibrate_stage import calibrate_into
from trt_int8.calibration_job import CalibrationJob
from trt_int8.checkpoint import Checkpoint, checkpoint_beside
from trt_int8.config import RunConfig, load_config
from trt_int8.engine_stage import build_engines, check_shapes, check_timed_shapes, inspect_engines
from trt_int8.entry_points import source_file
from trt_int8.export_stage import export_configured
from trt_int8.machine import describe_machine
from trt_int8.quantize_stage import check_wishes, quantize_all, save_cache
from trt_int8.report import render_report
from trt_int8.run_data import RunData, Use
from trt_int8.run_folder import RunFolder, write_json
from trt_int8.run_plan import MODEL, RunPlan
from trt_int8.runners import AnyRunner, open_runner
from trt_int8.shaped_benchmark import timed_beside

CALIBRATION = "calibration.npz"
CACHE = "calibration.cache"
REPORT = "report.html"


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where everything lies.
        report: the HTML report.
    """

    folder: Path
    report: Path


class Pipeline:
    """Runs the stages of a configuration into one folder.

    Args:
        config: the configuration, or the YAML file that holds it.
        output: the folder; the configuration's own where None.
        backend: what runs the models: "onnxruntime", "tensorrt", or "auto": TensorRT where it and a GPU are found.
        resume: keep the stages of an earlier, interrupted run whose inputs and files are unchanged.
        track: shows the progress of a stage.
        announce: is told which stage begins.

    Attributes:
        backend: what runs the models, and why.
        plan: the models that are made and measured.

    Raises:
        TrtInt8Error: the configuration cannot be used, or the backend is not there.
    """

    def __init__(
        self,
        config: RunConfig | str | os.PathLike[str],
        *,
        output: str | os.PathLike[str] | None = None,
        backend: BackendChoice = "auto",
        resume: bool = False,
        track: Track = untracked,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else load_config(config)
        self.folder = Path(output or self.config.output or "runs/run")
        self._resume = resume
        self._track = track
        self._announce = announce or (lambda text: None)
        self._data = RunData(self.config)
        self.backend = choose_backend(backend)
        self.plan = RunPlan(self.config, self.backend.name)

    def run(self) -> RunResult:
        """Run every stage and write the report.

        Raises:
            TrtInt8Error: whatever a stage cannot do; the folder keeps the finished stages and can be resumed.
        """
        run = RunFolder(
            self.folder,
            title=self.folder.name,
            config=self.config.resolved(),
            machine=describe_machine(),
            backend={"name": self.backend.name, "reason": self.backend.reason},
            files=[CALIBRATION, CACHE, REPORT, *self.plan.onnx_files, *self.plan.engine_files],
            resume=self._resume,
        )
        model = self._export(run)
        self._check(run)
        calibration = self._calibrate(run, model)
        self._quantize(run, model, calibration)
        self._build(run, calibration)
        self._benchmark(run, calibration)
        self._compare(run)
        self._measure_sizes(run)
        self._announce("report")
        return RunResult(self.folder, render_report(self.folder, track=self._track))

    def _export(self, run: RunFolder) -> str:
        self._announce("export")
        config = self.config.model
        key = {
            "model": config.model_dump(mode="json"),
            "files": _file_hashes(config.source, source_file(config.source), config.checkpoint),
        }

        def export() -> None:
            data = self.config.data
            result = export_configured(
                config,
                run.file(MODEL),
                data=data.calibration,
                preprocessing=data.preprocessing_for(data.calibration),
                batch_size=data.batch_size,
                track=self._track,
            )
            write_json(run.file("export.json"), result.to_json())

        run.stage("export", key, [MODEL, "export.json"], export, lambda: None)
        return sha256_of_file(run.file(MODEL))

    def _calibrate(self, run: RunFolder, model: str) -> Calibration:
        self._announce("calibrate")
        data, config = self.config.data, self.config.calibrate
        key = self._data.identified(
            {
                "model": model,
                "data": data.model_dump(mode="json"),
                "calibrate": config.model_dump(mode="json", include={"tensors", "stop_when_stable", "backend"}),
            },
            "calibration",
        )

        def collect() -> Calibration:
            memory = config.max_memory_mib
            job = CalibrationJob(
                run.file(MODEL),
                data.calibration,
                tensors=config.tensors,
                batch_size=data.batch_size,
                max_batches=data.max_batches,
                preprocessing=data.preprocessing_for(data.calibration),
                threads=config.threads if config.backend in ("onnxruntime", "auto") else None,
                stop_when_stable=config.stop_when_stable,
                max_memory_bytes=None if memory is None else int(memory * 2**20),
                backend=config.backend,
                padding_mask=data.padding_mask,
                lengths=data.lengths,
            )
            output = run.file(CALIBRATION)
            interrupted = run.begin("calibrate", key)
            if not interrupted:
                Checkpoint(checkpoint_beside(output)).remove()  # of other data, or of another model
            made = calibrate_into(
                output,
                job,
                method=config.stop_when_stable or self.config.quantize.method,
                checkpoint_every=config.checkpoint_every,
                resume=interrupted,
                force=True,  # a file there that fits would have been kept by its key
                track=self._track,
            )
            for note in made.notes:
                self._announce(note)
            return made.calibration

        return run.stage(
            "calibrate",
            key,
            [CALIBRATION],
            collect,
            lambda: Calibration.load(run.file(CALIBRATION)),
        )

    def _quantize(self, run: RunFolder, model: str, calibration: Calibration) -> None:
        self._announce("quantize")
        config, data = self.config.quantize, self.config.data
        key = {
            "model": model,
            "calibration": sha256_of_file(run.file(CALIBRATION)),
            "quantize": config.model_dump(mode="json"),
            "models": [variant.name for variant in self.plan.variants],
            "data": data.model_dump(mode="json"),
        }

        def write() -> None:
            if config.smooth is not None and "auto" in config.methods and data.held_back is None:
                self._announce(
                    "auto judges on the calibration data, which smooth the model: data.held_back would name others"
                )
            made = quantize_all(
                self.config,
                self.plan.variants,
                calibration,
                run.path,
                held_back=self._data.held_back,
                track=self._track,
            )
            save_cache(calibration, config, run.file(CACHE))
            write_json(run.file("quantization.json"), made)

        files = [CACHE, "quantization.json", *self.plan.onnx_files[1:]]
        chosen_by: tuple[Use, ...] = ("held_back",) if "auto" in config.methods else ()
        run.stage("quantize", self._data.identified(key, *chosen_by), files, write, lambda: None)

    def _build(self, run: RunFolder, calibration: Calibration) -> None:
        if not self.plan.engines:
            run.drop("build")
            return
        self._announce("build")
        shapes = self._data.judged_shapes(OnnxRuntimeRunner(run.file(MODEL), name=MODEL).inputs)
        key = {
            "judged_shapes": {name: sorted(map(list, fed)) for name, fed in shapes.items()},
            "models": self._hashes(run, self.plan.onnx_files),
            "calibration": sha256_of_file(run.file(CALIBRATION)),
            "config": self.config.model_dump(mode="json", include={"build", "data", "accuracy"}),
            "environment": self._environment(),
        }

        def build() -> None:
            built = build_engines(
                self.config, self.plan.engines, calibration, run.path, judged_shapes=shapes, track=self._track
            )
            write_json(run.file("engines.json"), {"engines": built})
            write_json(run.file("layers.json"), {"engines": inspect_engines(self.plan.engines, run.path)})

        run.stage("build", key, ["engines.json", "layers.json", *self.plan.engine_files], build, lambda: None)

    def _benchmark(self, run: RunFolder, calibration: Calibration) -> None:
        self._announce("benchmark")
        config = self.config.benchmark

        def time() -> None:
            runners = self._runners(run, timed=True)
            source = self._data.open_evaluation(runners[0].inputs, batch_size=self.config.data.batch_size)
            feeds = [batch.feeds for batch in islice(source, BENCHMARK_BATCHES)]

            timed = partial(
                time_side_by_side,
                runners,
                rounds=config.rounds,
                budget_s=config.budget_s,
                warmup_s=config.warmup_s,
                track=self._track,
            )
            result = timed(feeds)
            if config.shapes is not None:
                seen = calibration.input_shapes
                result = timed_beside(result, timed, runners, config.shapes, sample=feeds[0], seen=seen)
            write_json(run.file("benchmark.json"), result.to_json())

        run.stage("benchmark", self._measured(run), ["benchmark.json"], time, lambda: None)

    def _compare(self, run: RunFolder) -> None:
        self._announce("compare")
        config = self.config.accuracy

        def judge() -> None:
            reference, *candidates = self._runners(run)
            source = self._data.open_evaluation(
                reference.inputs, batch_size=config.batch_size or self.config.data.batch_size
            )
            result = accuracy_stage.compare(
                reference,
                candidates,
                source,
                labels=self.config.data.labels,
                total=source.batches,
                save_to=self.folder,
                track=self._track,
            )
            write_json(run.file("accuracy.json"), result.to_json())

        run.stage("compare", self._measured(run), ["accuracy.json"], judge, lambda: None)

    def _measure_sizes(self, run: RunFolder) -> None:
        models = self.plan.measured

        def measure() -> None:
            sizes = measure_sizes([run.file(model.file) for model in models])
            rows = [
                {**size.to_json(), "name": model.name, "file": model.file}
                for size, model in zip(sizes, models, strict=True)
            ]
            write_json(run.file("sizes.json"), {"models": rows})

        run.stage("sizes", self._measured(run), ["sizes.json"], measure, lambda: None)

    def _runners(self, run: RunFolder, *, timed: bool = False) -> list[AnyRunner]:
        threads = self.config.benchmark.threads
        return [
            open_runner(run.file(model.file), name=model.name, threads=threads, cuda_graph=timed)
            for model in self.plan.measured
            if model.timed or not timed
        ]

    def _measured(self, run: RunFolder) -> dict[str, Any] | None:
        """Return the key of a measurement: the models, the data and how they are measured."""
        key = {
            "models": self._hashes(run, [model.file for model in self.plan.measured]),
            "config": self.config.resolved(),
            "environment": self._environment(),
        }
        return self._data.identified(key, "evaluation")

    def _hashes(self, run: RunFolder, files: Iterable[str]) -> dict[str, str]:
        return {file: sha256_of_file(run.file(file)) for file in files}

    def _environment(self) -> dict[str, Any]:
        """Return what engines, and the figures taken from them, are bound to beside the models."""
        machine = describe_machine()
        return (
            {"tensorrt": machine["versions"]["tensorrt"], "gpus": machine["cuda"]["gpus"]} if self.plan.engines else {}
        )

    def _check(self, run: RunFolder) -> None:
        model = OnnxRuntimeRunner(run.file(MODEL), name=MODEL)
        if self.plan.engines:
            check_shapes(self.config, model.inputs)
        if self.config.benchmark.shapes is not None:
            check_timed_shapes(self.config, model.inputs)
        unknown = self._data.check(model)
        check_wishes(self.config, self.plan.variants, run.file(MODEL))
        if self._resume and unknown:
            self._announce(
                f"what was made from {' and '.join(unknown)} is made again: data from code may have changed; "
                "data.data_id would name them"
            )


def _file_hashes(*specs: str | Path | None) -> dict[str, str]:
    """Hash those of `specs` that are files. Of a factory's code that is its module, not what that imports."""
    return {str(spec): sha256_of_file(spec) for spec in specs if spec is not None and Path(spec).is_file()}
