"""Polygraphy's own TensorRT runner reads what we build; the libraries beneath are SIMULATED."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.trt import EngineFromBytes, TrtRunner
from polygraphy.comparator import Comparator, RunResults

from engines.onnxrt import load_header, tensor_specs
from engines.profiles import ShapeRange
from engines.trt_builder import BuildOptions, build_engine
from engines.trt_runner import TensorRTRunner
from trt_int8.data import open_data

IMAGE = (3, 8, 8)


def test_polygraphy_runs_our_plan_and_finds_it_equal_to_the_model(tiny_model: Path) -> None:
    """TrtRunner loads the plan file as it is, and Comparator finds no difference beyond its tolerance."""
    plan = tiny_model.with_suffix(".engine")
    profile = {"input": ShapeRange((1, *IMAGE), (2, *IMAGE), (4, *IMAGE))}
    build_engine(tiny_model, plan, BuildOptions(profiles=[profile]))
    runners = [OnnxrtRunner(SessionFromOnnx(str(tiny_model))), TrtRunner(EngineFromBytes(BytesFromPath(str(plan))))]
    feeds = {"input": np.random.default_rng(0).normal(size=(2, *IMAGE)).astype(np.float32)}
    assert Comparator.compare_accuracy(Comparator.run(runners, data_loader=[feeds]))


def test_saved_inputs_and_outputs_are_exchanged(tiny_model: Path, tmp_path: Path) -> None:
    """What Polygraphy's TrtRunner saved of our plan is our data, and its outputs are those of our runner."""
    plan = tiny_model.with_suffix(".engine")
    build_engine(
        tiny_model, plan, BuildOptions(profiles=[{"input": ShapeRange((1, *IMAGE), (2, *IMAGE), (4, *IMAGE))}])
    )
    rng = np.random.default_rng(1)
    feeds = [{"input": rng.normal(size=(size, *IMAGE)).astype(np.float32)} for size in (2, 4, 1)]
    inputs, outputs = str(tmp_path / "inputs.json"), str(tmp_path / "outputs.json")
    runner = TrtRunner(EngineFromBytes(BytesFromPath(str(plan))), name="theirs")
    Comparator.run([runner], data_loader=feeds, save_inputs_path=inputs, save_outputs_path=outputs)

    source = open_data(inputs, tensor_specs(load_header(tiny_model))[0])
    with TensorRTRunner(plan) as ours:
        for batch, saved in zip(source, RunResults.load(outputs)["theirs"], strict=True):
            np.testing.assert_array_equal(ours.infer(batch.feeds)["logits"], saved["logits"])
