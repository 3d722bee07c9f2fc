"""Which models a run makes, and which of them it measures: that depends on the configuration and on what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.placement import Target
from engines.trt_types import Precision
from trt_int8.backends import BackendName
from trt_int8.config import Method, RunConfig
from trt_int8.quantize_result import Mode

MODEL = "model.onnx"
FP16 = "model.fp16.onnx"


@dataclass(frozen=True, slots=True)
class Variant:
    """One INT8 model of a run.

    Attributes:
        method: calibration method; the mode static alone has use for it.
        target: whose kernels it is for.
        precision: of its other layers: "int8" leaves them in FP32.
        file: name of its file.
        mode: when its activations are quantized.
    """

    method: Method
    target: Target
    precision: Literal["int8", "int8+fp16"]
    file: str
    mode: Mode = "static"

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.precision.upper()} {self.method if self.mode == 'static' else self.mode}, {self.target}"


@dataclass(frozen=True, slots=True)
class PlannedEngine:
    """One TensorRT engine of a run.

    Attributes:
        name: the name in tables; that of the ONNX model that it is built from, where there is one.
        precision: what it computes in.
        source: file of the ONNX model.
        folder: where its files lie, relative to the run's folder.
        stem: what they are called before ".PRECISION.engine".
    """

    name: str
    precision: Precision
    source: str
    folder: str
    stem: str

    @property
    def file(self) -> str:
        """The plan file, relative to the run's folder."""
        path = f"{self.stem}.{self.precision}.engine"
        return f"{self.folder}/{path}" if self.folder else path


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """One model that a run measures.

    Attributes:
        name: the name in tables.
        file: its file.
        timed: whether it is timed too: INT8 models of one target differ in nothing but the values of their scales, so
            ONNX Runtime times the delivered one alone, and a placement for TensorRT is not timed by ONNX Runtime.
    """

    name: str
    file: str
    timed: bool


class RunPlan:
    """The models of a run.

    Args:
        config: the configuration.
        backend: what runs the models.

    Attributes:
        variants: the INT8 models; the delivered method's lie at the top of the folder.
        engines: the TensorRT engines, the FP32 one first; none where ONNX Runtime runs the models.
        measured: what is measured, the reference first.
    """

    def __init__(self, config: RunConfig, backend: BackendName) -> None:
        self._config = config
        self.variants = _variants(config, backend)
        self.engines = _engines(config, self.variants) if backend == "tensorrt" else ()
        self.measured = self._measured()

    @property
    def onnx_files(self) -> list[str]:
        """The ONNX models, the FP32 one first."""
        half = [FP16] if self._config.quantize.fp16 else []
        return [MODEL, *half, *(variant.file for variant in self.variants)]

    @property
    def engine_files(self) -> list[str]:
        """The plan files, their sidecars, and the FP32 model as TensorRT was given it; others are given as they are."""
        files = []
        for engine in self.engines:
            files += [engine.file, f"{engine.file}.json"]
            if engine.source == MODEL:
                files.append(f"{engine.file}.onnx")
        return files

    def _measured(self) -> tuple[MeasuredModel, ...]:
        if self.engines:
            return tuple(MeasuredModel(engine.name, engine.file, timed=True) for engine in self.engines)
        config = self._config.quantize
        half = [MeasuredModel("FP16", FP16, timed=True)] if config.fp16 else []
        return (
            MeasuredModel("FP32", MODEL, timed=True),
            *half,
            *(
                MeasuredModel(item.name, item.file, timed=item.target == "cpu" and item.method == config.method)
                for item in self.variants
            ),
        )


def _variants(config: RunConfig, backend: BackendName) -> tuple[Variant, ...]:
    quantize = config.quantize
    variants: list[Variant] = []
    for method in quantize.methods:
        for target in quantize.targets:
            if backend == "tensorrt" and target != "tensorrt":
                continue
            suffix = "" if target == "tensorrt" else f".{target}"
            file = f"model.int8{suffix}.onnx" if method == quantize.method else f"methods/{method}{suffix}.onnx"
            variants.append(Variant(method, target, "int8", file))
    if quantize.int8_fp16 and "tensorrt" in quantize.targets:
        variants.append(Variant(quantize.method, "tensorrt", "int8+fp16", "model.int8+fp16.onnx"))
    if "dynamic" in quantize.modes and backend != "tensorrt":  # its kernels are ONNX Runtime's alone
        variants.append(Variant(quantize.method, "cpu", "int8", "modes/dynamic.onnx", "dynamic"))
    if "weight-only" in quantize.modes:
        runs_on: Target = "tensorrt" if backend == "tensorrt" else "cpu"
        variants.append(Variant(quantize.method, runs_on, "int8", "modes/weight-only.onnx", "weight-only"))
    return tuple(variants)


def _engines(config: RunConfig, variants: tuple[Variant, ...]) -> tuple[PlannedEngine, ...]:
    precisions = config.build.precisions
    engines = [PlannedEngine("FP32", "fp32", MODEL, "", "model")]
    if "tf32" in precisions:
        engines.append(PlannedEngine("TF32", "tf32", MODEL, "", "model"))
    if "fp16" in precisions and config.quantize.fp16:
        engines.append(PlannedEngine("FP16", "fp16", FP16, "", "model"))
    for variant in variants:
        if variant.precision not in precisions:
            continue
        folder, stem = ("", "model") if variant.method == config.quantize.method else ("methods", variant.method)
        if variant.mode != "static":
            folder, stem = "modes", variant.mode
        engines.append(PlannedEngine(variant.name, variant.precision, variant.file, folder, stem))
    return tuple(engines)
