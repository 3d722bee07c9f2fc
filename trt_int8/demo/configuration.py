"""The demo's run: the files that `prepare_demo` writes, in a configuration like any other."""

from __future__ import annotations

from pathlib import Path

from calibrators.protocols import Track, untracked
from trt_int8.config import AccuracyConfig, DataConfig, InputConfig, ModelConfig, QuantizeConfig, RunConfig
from trt_int8.demo.digits import prepare_demo

ACCURACY_BATCH = 32
"""Scans that are judged at once; how many does not change an answer."""


def demo_config(folder: Path, *, track: Track = untracked) -> RunConfig:
    """Train the network or load it, write the data, and return the configuration of the run.

    Calibration takes 1000 single scans that the network was trained on, `auto` chooses by the other training scans, and
    accuracy is judged on scans that neither has seen.

    Args:
        folder: the run's folder.
        track: shows the progress of training.
    """
    files = prepare_demo(folder, track=track)
    return RunConfig(
        model=ModelConfig(
            source="trt_int8.demo.model:digits_resnet",
            checkpoint=files.checkpoint,
            inputs=(InputConfig(name="image", shape=(1, 1, 32, 32)),),
        ),
        data=DataConfig(
            calibration=str(files.calibration_data),
            evaluation=str(files.evaluation_data),
            held_back=str(files.choosing_data),
            labels="label",
        ),
        quantize=QuantizeConfig(method="auto"),
        accuracy=AccuracyConfig(batch_size=ACCURACY_BATCH),
        output=folder,
    )
