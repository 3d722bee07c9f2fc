"""The whole job, stage after stage; it holds no arithmetic.

PyTorch -> export -> model.onnx -> calibrate -> calibration.npz -> quantize -> INT8 models, one per method and target
                                                                -> FP16 model
        -> benchmark, compare, sizes -> report.html
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrators.calibration import Calibration
from calibrators.files import sha256_of_file
from calibrators.protocols import Track, untracked
from engines.onnxrt import OnnxRuntimeRunner
from engines.placement import Target
from engines.size import measure_sizes
from trt_int8 import accuracy as accuracy_stage
from trt_int8.benchmarking import BENCHMARK_BATCHES, time_side_by_side
from trt_int8.caches import tensorrt_cache
from trt_int8.calibration import calibrate
from trt_int8.config import Method, RunConfig, load_config
from trt_int8.entry_points import source_file
from trt_int8.export_stage import export_configured
from trt_int8.machine import describe_machine
from trt_int8.quantization import QuantizeResult, convert_fp16, quantize
from trt_int8.report import render_report
from trt_int8.run_data import RunData, Use
from trt_int8.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from trt_int8.auto import AutoChoice

MODEL = "model.onnx"
CALIBRATION = "calibration.npz"
CACHE = "calibration.cache"
CACHE_VERSION = "10.16.1"
"""TensorRT version in the cache's header; `trt-int8 cache export --tensorrt` writes it for another one."""

FP16 = "model.fp16.onnx"
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


@dataclass(frozen=True, slots=True)
class Variant:
    """One INT8 model of a run: a method and a target."""

    method: Method
    target: Target
    file: str

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"INT8 {self.method}, {self.target}"


class Pipeline:
    """Runs the stages of a configuration into one folder.

    Args:
        config: the configuration, or the YAML file that holds it.
        output: the folder; the configuration's own where None.
        resume: keep the stages of an earlier, interrupted run whose inputs and files are unchanged.
        track: shows the progress of a stage.
        announce: is told which stage begins.
    """

    def __init__(
        self,
        config: RunConfig | str | os.PathLike[str],
        *,
        output: str | os.PathLike[str] | None = None,
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
            files=[MODEL, CALIBRATION, CACHE, REPORT, *(variant.file for variant in self.variants)],
            resume=self._resume,
        )
        model = self._export(run)
        self._check_data(run)
        calibration = self._calibrate(run, model)
        self._quantize(run, model, calibration)
        self._benchmark(run)
        self._compare(run)
        self._measure_sizes(run)
        self._announce("report")
        return RunResult(self.folder, render_report(self.folder, track=self._track))

    @property
    def variants(self) -> list[Variant]:
        """The INT8 models of the run; the delivered method's lie at the top of the folder."""
        config = self.config.quantize
        variants = []
        for method in config.methods:
            for target in config.targets:
                suffix = "" if target == "tensorrt" else f".{target}"
                file = f"model.int8{suffix}.onnx" if method == config.method else f"methods/{method}{suffix}.onnx"
                variants.append(Variant(method, target, file))
        return variants

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
        key = {
            "model": model,
            "data": data.model_dump(mode="json"),
            "calibrate": config.model_dump(mode="json"),
        }

        def collect() -> Calibration:
            calibration = calibrate(
                run.file(MODEL),
                data.calibration,
                tensors=config.tensors,
                batch_size=data.batch_size,
                max_batches=data.max_batches,
                preprocessing=data.preprocessing_for(data.calibration),
                data_id=data.data_id,
                threads=self.config.benchmark.threads,
                track=self._track,
            )
            calibration.save(run.file(CALIBRATION))
            return calibration

        return run.stage(
            "calibrate",
            self._data.identified(key, "calibration"),
            [CALIBRATION],
            collect,
            lambda: Calibration.load(run.file(CALIBRATION)),
        )

    def _quantize(self, run: RunFolder, model: str, calibration: Calibration) -> None:
        self._announce("quantize")
        config, data = self.config.quantize, self.config.data
        files = [CACHE, "quantization.json", *(variant.file for variant in self.variants)] + [FP16] * config.fp16
        key = {
            "model": model,
            "calibration": sha256_of_file(run.file(CALIBRATION)),
            "quantize": config.model_dump(mode="json"),
            "data": data.model_dump(mode="json"),
        }

        def write() -> None:
            results: list[QuantizeResult] = []
            auto: AutoChoice | None = None
            for variant in self._track(self.variants, "quantize", len(self.variants)):
                result = quantize(
                    run.file(MODEL),
                    calibration,
                    output=run.file(variant.file),
                    method=variant.method,
                    percentile=config.percentile,
                    target=variant.target,
                    residual=config.residual,
                    exclude=config.exclude,
                    data=self._data.held_back if variant.method == "auto" else None,
                    preprocessing=data.preprocessing_for(self._data.held_back),
                    auto=auto,
                    track=self._track,
                )
                auto = result.auto or auto
                results.append(result)
            tensorrt_cache(
                calibration, method=config.method, percentile=config.percentile, tensorrt_version=CACHE_VERSION
            ).save(run.file(CACHE))
            half = convert_fp16(run.file(MODEL), calibration, output=run.file(FP16)) if config.fp16 else None
            write_json(
                run.file("quantization.json"),
                {
                    "models": [
                        {**result.to_json(), "file": variant.file}
                        for variant, result in zip(self.variants, results, strict=True)
                    ],
                    "fp16": None if half is None else half.to_json(),
                },
            )

        chosen_by: tuple[Use, ...] = ("held_back",) if "auto" in config.methods else ()
        run.stage("quantize", self._data.identified(key, *chosen_by), files, write, lambda: None)

    def _benchmark(self, run: RunFolder) -> None:
        self._announce("benchmark")
        config = self.config.benchmark
        delivered = [
            variant
            for variant in self.variants
            if variant.target == "cpu" and variant.method == self.config.quantize.method
        ]

        def time() -> None:
            runners = [
                OnnxRuntimeRunner(run.file(file), name=name, threads=config.threads)
                for name, file in [("FP32", MODEL), *self._fp16(), *((item.name, item.file) for item in delivered)]
            ]
            source = self._data.open_evaluation(runners[0].inputs, batch_size=self.config.data.batch_size)
            result = time_side_by_side(
                runners,
                [batch.feeds for batch in islice(source, BENCHMARK_BATCHES)],
                rounds=config.rounds,
                budget_s=config.budget_s,
                warmup_s=config.warmup_s,
                track=self._track,
            )
            write_json(run.file("benchmark.json"), result.to_json())

        run.stage("benchmark", self._measured(run), ["benchmark.json"], time, lambda: None)

    def _compare(self, run: RunFolder) -> None:
        self._announce("compare")
        config = self.config.accuracy

        def judge() -> None:
            threads = self.config.benchmark.threads
            reference = OnnxRuntimeRunner(run.file(MODEL), name="FP32", threads=threads)
            candidates = [
                OnnxRuntimeRunner(run.file(file), name=name, threads=threads)
                for name, file in [*self._fp16(), *((item.name, item.file) for item in self.variants)]
            ]
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
        files = [MODEL, *(file for _, file in self._fp16()), *(item.file for item in self.variants)]
        names = ["FP32", *(name for name, _ in self._fp16()), *(item.name for item in self.variants)]

        def measure() -> None:
            sizes = measure_sizes([run.file(file) for file in files])
            models = [
                {**size.to_json(), "name": name, "file": file}
                for size, name, file in zip(sizes, names, files, strict=True)
            ]
            write_json(run.file("sizes.json"), {"models": models})

        run.stage("sizes", self._measured(run), ["sizes.json"], measure, lambda: None)

    def _fp16(self) -> list[tuple[str, str]]:
        return [("FP16", FP16)] if self.config.quantize.fp16 else []

    def _measured(self, run: RunFolder) -> dict[str, Any] | None:
        """Return the key of a measurement: the models, the data and how they are measured."""
        files = [MODEL, *(file for _, file in self._fp16()), *(variant.file for variant in self.variants)]
        key = {
            "models": {file: sha256_of_file(run.file(file)) for file in files},
            "config": self.config.resolved(),
        }
        return self._data.identified(key, "evaluation")

    def _check_data(self, run: RunFolder) -> None:
        unknown = self._data.check(OnnxRuntimeRunner(run.file(MODEL), name=MODEL))
        if self._resume and unknown:
            self._announce(
                f"what was made from {' and '.join(unknown)} is made again: data from code may have changed; "
                "data.data_id would name them"
            )


def _file_hashes(*specs: str | Path | None) -> dict[str, str]:
    """Hash those of `specs` that are files. Of a factory's code that is its module, not what that imports."""
    return {str(spec): sha256_of_file(spec) for spec in specs if spec is not None and Path(spec).is_file()}
