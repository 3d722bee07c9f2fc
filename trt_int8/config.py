"""The configuration of `trt-int8 run`: YAML in, one checked and immutable `RunConfig` out.

Every default and every explanation stands here once: the template that `trt-int8 init` writes and the JSON schema
(`RunConfig.model_json_schema()`) are made from the fields.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from engines.runner import TensorSpec
from trt_int8.config_build import BuildConfig
from trt_int8.entry_points import split_entry_point
from trt_int8.errors import ConfigError
from trt_int8.images import Preprocessing, is_image_folder
from trt_int8.settings import Number, PositiveInt, Section, validated
from trt_int8.yaml_files import read_mapping, set_key

Method = Literal["minmax", "entropy", "percentile", "mse", "auto"]
Search = Literal["minmax", "entropy", "percentile", "mse"]
"""The methods that find a scale from a histogram alone."""

DType = Literal["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"]
Axis = Annotated[int, Field(ge=0)]


class InputConfig(Section):
    """One input of a PyTorch model."""

    name: str = Field(description="name of the input in the ONNX model; the order is that of forward()'s arguments")
    shape: tuple[PositiveInt, ...] = Field(description="shape of an example, batch axis included; [] for a scalar")
    dtype: DType = Field(default="float32", description="type of the elements")
    dynamic: dict[Axis, str] = Field(
        default={0: "batch"}, description="axes whose length is free, with a name each; {} fixes the shape"
    )

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        for axis in self.free_axes:
            if axis >= len(self.shape):
                raise ValueError(f"dynamic names axis {axis}, and shape {list(self.shape)} has {len(self.shape)} axes")
        return self

    @property
    def free_axes(self) -> dict[int, str]:
        """The dynamic axes; a scalar has none, whatever the default says."""
        return self.dynamic if self.shape else {}

    def spec(self) -> TensorSpec:
        """Return the input as the exported model will declare it."""
        shape = tuple(self.free_axes.get(axis, length) for axis, length in enumerate(self.shape))
        return TensorSpec(self.name, np.dtype(self.dtype), shape)


class ModelConfig(Section):
    """Where the model comes from."""

    source: str = Field(
        description="package.module:factory or file.py:factory (called with arguments, returns a torch.nn.Module), "
        "a .pt2 program, or an .onnx file"
    )
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the factory")
    checkpoint: Path | None = Field(
        default=None, description="weights to load: .safetensors, or what torch.load(weights_only=True) reads"
    )
    checkpoint_key: str | None = Field(
        default=None, description="key under which the checkpoint holds the weights; null finds them where it can"
    )
    strip_prefix: str = Field(
        default="", description="take the weights whose names start with this, and cut it off; not needed for module."
    )
    inputs: tuple[InputConfig, ...] = Field(default=(), description="the inputs; needed with a factory, and only there")
    opset: int = Field(default=20, strict=True, ge=19, description="ONNX opset of the export")

    @property
    def kind(self) -> Literal["factory", "pt2", "onnx"]:
        """What `source` names."""
        if split_entry_point(self.source) is not None:
            return "factory"
        return "onnx" if self.source.lower().endswith(".onnx") else "pt2"

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.kind == "pt2" and not self.source.lower().endswith(".pt2"):
            raise ValueError(
                f"source is {self.source!r}, expected package.module:factory, file.py:factory, or a .pt2 or .onnx file"
            )
        if self.kind == "factory":
            if not self.inputs:
                raise ValueError("inputs is missing: a factory's model does not say what it takes")
            if self.checkpoint is None and (self.checkpoint_key or self.strip_prefix):
                raise ValueError("checkpoint is missing, and checkpoint_key or strip_prefix is given")
            return self
        for name, field in type(self).model_fields.items():
            exported = self.kind == "pt2" and name == "opset"
            if name != "source" and not exported and getattr(self, name) != field.default:
                raise ValueError(f"{name} cannot be set for {self.source!r}, which holds that itself")
        return self


class DataConfig(Section):
    """What the model is calibrated and judged on."""

    calibration: str = Field(
        description="calibration data: .npz, a folder of batches (.npz, .npy) or of images, package.module:callable, "
        "or Polygraphy's inputs (.json, .py)"
    )
    evaluation: str | None = Field(
        default=None, description="data to judge accuracy on; null takes the calibration data, which flatters"
    )
    held_back: str | None = Field(
        default=None,
        description="data that method auto chooses by; null takes the calibration data, never the evaluation's; name "
        "others with quantize.smooth, which fits the model to the calibration data",
    )
    labels: str | None = Field(
        default=None, description="name of the array with the labels; null compares with the FP32 outputs only"
    )
    preprocessing: Preprocessing | None = Field(default=None, description="how image files become model input")
    data_id: str | None = Field(
        default=None, description="identity of data that come from code, so that their calibration can be reused"
    )
    batch_size: PositiveInt | None = Field(
        default=None, description="samples per batch, 1 where null; must be null for data that come in batches"
    )
    max_batches: PositiveInt | None = Field(
        default=1000, description="calibrate on no more batches than this; null for all"
    )

    padding_mask: str | None = Field(
        default=None,
        description="mask (samples, positions) of the calibration data, an input or beside them: what is 0 is left out "
        "of the statistics",
    )
    lengths: str | None = Field(
        default=None, description="the same, told by the number of real positions of each sample, which come first"
    )

    @model_validator(mode="after")
    def _check_padding(self) -> Self:
        if self.padding_mask is not None and self.lengths is not None:
            raise ValueError("padding_mask and lengths are both given, expected one of them")
        return self

    def preprocessing_for(self, data: str) -> Preprocessing | None:
        """Return the preprocessing where `data` is a folder of images, else None."""
        return self.preprocessing if is_image_folder(data) else None


class CalibrateConfig(Section):
    """The calibration pass."""

    tensors: Literal["quantized", "tensorrt", "cpu", "all"] = Field(
        default="quantized",
        description="quantized: what either target may take scales from; tensorrt or cpu: what one does by default, "
        "which costs less; all: what TensorRT's implicit quantization needs",
    )
    backend: Literal["auto", "onnxruntime", "cuda", "tensorrt"] = Field(
        default="onnxruntime",
        description="what runs the model: onnxruntime on the processor; cuda (ONNX Runtime's provider) or tensorrt (an "
        "FP32 engine) on the GPU, which counts as well; auto takes a GPU where there is one",
    )
    threads: PositiveInt | None = Field(
        default=None,
        description="batches run at a time, each by one thread, in smoothing too; null takes one per core, 8 at most",
    )
    max_memory_mib: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="for activations; what takes more is split over several passes; null takes one pass"
    )
    stop_when_stable: Search | None = Field(
        default=None, description="end once the scales of this method (minmax, entropy, percentile, mse) have settled"
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None, description="batches after which the state is kept for --resume; null keeps it once a minute"
    )


class QuantizeConfig(Section):
    """Scales and where they go."""

    methods: tuple[Method, ...] = Field(
        default=("minmax", "entropy", "percentile", "mse", "auto"),
        min_length=1,
        description="calibration methods that are compared",
    )
    method: Method = Field(default="entropy", description="the method of the model that is delivered, one of methods")
    percentile: Number = Field(default=99.99, gt=0, le=100, description="per cent of |x| that method percentile keeps")
    residual: Literal["int8", "float"] = Field(
        default="int8",
        description="skip connections in int8, as TensorRT fuses them, or in float: slower, more accurate; float for "
        "target tensorrt alone",
    )
    attention: Literal["float", "int8"] = Field(
        default="float", description="products of queries, keys and values; int8 for target tensorrt alone"
    )
    smooth: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the difficulty of normalized activations that goes into the weights behind them "
        "(SmoothQuant's alpha, 0.5 to 0.8 for transformers); null leaves the model as it is",
    )
    exclude: tuple[str, ...] = Field(default=(), description="regular expressions: nodes that stay in float")
    include: tuple[str, ...] = Field(
        default=(), description="regular expressions: nodes in int8 even against a rule about speed or accuracy"
    )
    modes: tuple[Literal["static", "dynamic", "weight-only"], ...] = Field(
        default=("static",),
        description="static: scales from the calibration; more INT8 models to compare with: dynamic (scales found at "
        "every run, on ONNX Runtime alone), weight-only (INT8 weights, float arithmetic)",
    )
    weights: Literal["per-channel", "per-tensor"] = Field(
        default="per-channel", description="one scale for each output channel of a weight, or one for all of it"
    )
    activations: Literal["symmetric", "affine"] = Field(
        default="symmetric", description="codes of activations for target cpu; TensorRT's are symmetric"
    )
    targets: tuple[Literal["tensorrt", "cpu"], ...] = Field(
        default=("tensorrt", "cpu"), min_length=1, description="where the INT8 models run: a file for each"
    )
    fp16: bool = Field(default=True, description="make an FP16 model as well")
    int8_fp16: bool = Field(
        default=True, description="for target tensorrt make an INT8 model as well whose other layers are FP16"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, chosen in (("methods", self.methods), ("targets", self.targets), ("modes", self.modes)):
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} is {list(chosen)}, expected each only once")
        if self.method not in self.methods:
            raise ValueError(f"method is {self.method!r}, expected one of methods: {', '.join(self.methods)}")
        if "static" not in self.modes:
            raise ValueError(
                f"modes is {list(self.modes)}, expected static among them: the others are compared with it"
            )
        if self.activations == "affine" and "cpu" not in self.targets:
            raise ValueError("activations is 'affine', expected cpu among targets: TensorRT's codes are symmetric")
        if self.attention == "int8" and "tensorrt" not in self.targets:
            raise ValueError("attention is 'int8', expected tensorrt among targets: it stays float on the CPU")
        if self.residual == "float" and "tensorrt" not in self.targets:
            raise ValueError("residual is 'float', expected tensorrt among targets: it is in int8 on the CPU")
        for name, patterns in (("exclude", self.exclude), ("include", self.include)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name} holds {pattern!r}, which is no regular expression: {error}") from error
        return self


class BenchmarkConfig(Section):
    """Timing."""

    rounds: int = Field(default=20, strict=True, ge=5, description="how often each model takes its turn")
    budget_s: Number = Field(default=10.0, gt=0, description="seconds for all rounds together")
    warmup_s: Number = Field(default=0.2, gt=0, description="seconds of untimed inference before, for each model")
    threads: PositiveInt | None = Field(
        default=None,
        description="threads inside an operator while models are timed and judged; null is ONNX Runtime's default, one "
        "per physical core",
    )
    shapes: Literal["min", "opt", "max", "all"] | None = Field(
        default=None,
        description="of models with dynamic axes: times the smallest, usual or largest shapes that engines were built "
        "for, or calibration saw, beside those of the data; null times the data's alone",
    )


class AccuracyConfig(Section):
    """Judging the models."""

    batch_size: PositiveInt | None = Field(
        default=None, description="samples per batch of the evaluation data; null is as data.batch_size"
    )
    max_samples: PositiveInt | None = Field(
        default=None, description="judge on no more samples than this; null for all"
    )


class RunConfig(Section):
    """Everything that `trt-int8 run` does."""

    model: ModelConfig = Field(description="where the model comes from")
    data: DataConfig = Field(description="what it is calibrated and judged on")
    calibrate: CalibrateConfig = Field(default=CalibrateConfig(), description="the calibration pass")
    quantize: QuantizeConfig = Field(default=QuantizeConfig(), description="scales and where they go")
    build: BuildConfig = Field(default=BuildConfig(), description="TensorRT engines, where TensorRT runs the models")
    benchmark: BenchmarkConfig = Field(default=BenchmarkConfig(), description="timing")
    accuracy: AccuracyConfig = Field(default=AccuracyConfig(), description="judging the models")
    output: Path | None = Field(default=None, description="folder of the results; null is runs/NAME for NAME.yaml")

    @model_validator(mode="after")
    def _check_tensors(self) -> Self:
        tensors, quantize = self.calibrate.tensors, self.quantize
        if tensors not in ("tensorrt", "cpu"):
            return self
        others = [target for target in quantize.targets if target != tensors]
        if others:
            raise ValueError(
                f"calibrate.tensors is {tensors!r} and quantize.targets holds {others[0]!r}, which takes scales from "
                "others: expected quantized, or targets: [" + tensors + "]"
            )
        told = {
            "residual": quantize.residual != "int8",
            "attention": quantize.attention != "float",
            "include": bool(quantize.include),
        }
        asked = [name for name, given in told.items() if given]
        if asked:
            raise ValueError(
                f"calibrate.tensors is {tensors!r}, which serves the default options, and quantize.{asked[0]} is not "
                "the default one: expected quantized"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_sections(cls, value: Any) -> Any:
        """Take a section whose keys are all commented out, which YAML reads as null, for one that is not there."""
        if isinstance(value, Mapping):
            return {key: section for key, section in value.items() if section is not None}
        return value

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration, defaults included, as plain JSON data for the manifest."""
        return self.model_dump(mode="json")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a configuration file, and that the files it names are there.

    Relative paths in the file start at the file's folder, those in overrides at the current one.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each, the value in YAML.

    Raises:
        ConfigError: no YAML, an unknown key, a value of another type, a contradiction, or a missing file; one line.
        FileAccessError: the configuration itself cannot be read.
    """
    file = Path(path)
    raw = read_mapping(file, "the configuration")
    _rebase(raw, file.parent)
    for override in overrides:
        set_key(raw, override)
    config = validated(RunConfig, raw, repr(str(file)))
    if config.output is None:
        config = config.model_copy(update={"output": Path("runs", file.stem)})
    check_files(config, repr(str(file)))
    return config


def load_preprocessing(path: str | os.PathLike[str]) -> Preprocessing:
    """Read a YAML file with the keys of `data.preprocessing`.

    Raises:
        ConfigError: no YAML, an unknown key, or a value of another type.
        FileAccessError: the file cannot be read.
    """
    return validated(Preprocessing, read_mapping(Path(path), "the preprocessing"), repr(os.fspath(path)))


def check_files(config: RunConfig, name: str) -> None:
    """Check that what a configuration names is there, before anything slow is done.

    Raises:
        ConfigError: a file is missing, or a folder of images comes without preprocessing.
    """
    problems = [f"{key}: there is no {file!r}" for key, file in _named_files(config) if not Path(file).exists()]
    data = config.data
    if data.preprocessing is None:
        problems += [
            f"data.preprocessing is missing: {spec!r} is a folder of images"
            for spec in (data.calibration, data.evaluation, data.held_back)
            if spec is not None and is_image_folder(spec)
        ]
    if problems:
        raise ConfigError(
            f"Cannot use {name}: {'; '.join(problems)}. Relative paths start at the folder of the configuration."
        )


def _named_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    specs = {
        "model.source": config.model.source,
        "model.checkpoint": config.model.checkpoint,
        "data.calibration": config.data.calibration,
        "data.evaluation": config.data.evaluation,
        "data.held_back": config.data.held_back,
    }
    for key, spec in specs.items():
        if spec is None:
            continue
        parts = split_entry_point(str(spec))
        if parts is None:
            yield key, str(spec)
        elif parts[0].endswith(".py"):
            yield key, parts[0]


_PATH_KEYS = (
    ("model", "source"),
    ("model", "checkpoint"),
    ("data", "calibration"),
    ("data", "evaluation"),
    ("data", "held_back"),
    ("output",),
)


def _rebase(raw: dict[str, Any], folder: Path) -> None:
    """Make the relative paths in a configuration start at `folder`."""
    for *sections, key in _PATH_KEYS:
        node: Any = raw
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        value = node.get(key) if isinstance(node, dict) else None
        if isinstance(value, str) and _is_path(value):
            node[key] = os.path.normpath(folder / Path(value).expanduser())


def _is_path(value: str) -> bool:
    parts = split_entry_point(value)
    return parts is None or parts[0].endswith(".py")
