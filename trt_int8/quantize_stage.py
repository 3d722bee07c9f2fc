"""The quantize stage of a run: every INT8 model, the FP16 model, and TensorRT's calibration cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibrators.calibration import Calibration
from calibrators.protocols import Track, untracked
from engines.dynamic import place_dynamically
from engines.graph import prepare
from engines.node_rules import weighted_nodes
from engines.placement_options import PlacementOptions
from trt_int8.auto import AutoChoice
from trt_int8.caches import tensorrt_cache
from trt_int8.config import QuantizeConfig, RunConfig
from trt_int8.quantization import convert_fp16, quantize
from trt_int8.quantize_result import QuantizeResult
from trt_int8.run_plan import FP16, MODEL, Variant
from trt_int8.smoothing import Smoothed, check_smoothable, smooth_model

CACHE_VERSION = "10.16.1"
"""TensorRT version in the cache's header; `trt-int8 cache export --tensorrt` writes it for another one."""


def quantize_all(
    config: RunConfig,
    variants: Sequence[Variant],
    calibration: Calibration,
    folder: Path,
    *,
    held_back: str,
    track: Track = untracked,
) -> dict[str, Any]:
    """Write every INT8 model of a run, and its FP16 model where the configuration wants one.

    Args:
        config: the configuration.
        variants: the INT8 models.
        calibration: where their scales come from.
        folder: the run's folder, which holds the FP32 model.
        held_back: the data that `auto` chooses by.
        track: shows the progress.

    Returns:
        The content of `quantization.json`.

    Raises:
        TrtInt8Error: see `trt_int8.quantization.quantize`.
    """
    options = config.quantize
    results: list[QuantizeResult] = []
    auto: AutoChoice | None = None
    smoothed: Smoothed | None = None
    if options.smooth is not None:
        smoothed = smooth_model(
            prepare(folder / MODEL),
            calibration,
            config.data.calibration,
            options.smooth,
            preprocessing=config.data.preprocessing_for(config.data.calibration),
            batch_size=config.data.batch_size,
            threads=config.calibrate.threads,
            track=track,
        )
    for variant in track(variants, "quantize", len(variants)):
        by: dict[str, Any] = {}  # each model gets those of the options that it has a use for
        if variant.mode == "static":
            by = {"calibration": calibration, "method": variant.method, "smoothed": smoothed}
            if variant.method in ("percentile", "auto"):
                by["percentile"] = options.percentile
            if variant.method == "auto":
                by |= {"data": held_back, "preprocessing": config.data.preprocessing_for(held_back), "auto": auto}
            if variant.target == "cpu":
                by["activations"] = options.activations
            else:
                by |= {"residual": options.residual, "attention": options.attention}
        result = quantize(
            folder / MODEL,
            output=folder / variant.file,
            mode=variant.mode,
            target=variant.target,
            precision=variant.precision,
            weights=options.weights,
            exclude=options.exclude,
            include=options.include,
            track=track,
            **by,
        )
        auto = result.auto or auto
        results.append(result)
    half = convert_fp16(folder / MODEL, calibration, output=folder / FP16) if options.fp16 else None
    return {
        "models": [
            {**result.to_json(), "name": variant.name, "file": variant.file}
            for variant, result in zip(variants, results, strict=True)
        ],
        "smoothed": [] if smoothed is None else list(smoothed.tensors),
        "fp16": None if half is None else half.to_json(),
    }


def check_wishes(config: RunConfig, variants: Sequence[Variant], model: Path) -> None:
    """Check what the graph alone tells of a configuration's wishes, before the calibration.

    Args:
        config: the configuration.
        variants: the INT8 models.
        model: the FP32 model.

    Raises:
        ModelError: an expression of `exclude` or `include` matches nothing, nothing in the model can be smoothed, or
            nothing quantized dynamically.
    """
    options = config.quantize
    dynamic = any(variant.mode == "dynamic" for variant in variants)
    if not (options.exclude or options.include or dynamic or options.smooth is not None):
        return
    prepared = prepare(model)
    wishes = PlacementOptions(exclude=options.exclude, include=options.include)
    weighted_nodes(prepared.ir(), wishes)
    if options.smooth is not None:
        check_smoothable(prepared)
    if dynamic:
        place_dynamically(prepared, wishes)


def save_cache(calibration: Calibration, config: QuantizeConfig, file: Path) -> None:
    """Write the delivered method's scales as TensorRT's calibration cache."""
    cache = tensorrt_cache(
        calibration, method=config.method, percentile=config.percentile, tensorrt_version=CACHE_VERSION
    )
    cache.save(file)
