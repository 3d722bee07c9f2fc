"""Polygraphy's own TensorRT runner reads what we build; the libraries beneath are SIMULATED."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.trt import EngineFromBytes, TrtRunner
from polygraphy.comparator import Comparator

from engines.profiles import ShapeRange
from engines.trt_builder import BuildOptions, build_engine

IMAGE = (3, 8, 8)


def test_polygraphy_runs_our_plan_and_finds_it_equal_to_the_model(tiny_model: Path) -> None:
    """TrtRunner loads the plan file as it is, and Comparator finds no difference beyond its tolerance."""
    plan = tiny_model.with_suffix(".engine")
    profile = {"input": ShapeRange((1, *IMAGE), (2, *IMAGE), (4, *IMAGE))}
    build_engine(tiny_model, plan, BuildOptions(profiles=[profile]))
    runners = [OnnxrtRunner(SessionFromOnnx(str(tiny_model))), TrtRunner(EngineFromBytes(BytesFromPath(str(plan))))]
    feeds = {"input": np.random.default_rng(0).normal(size=(2, *IMAGE)).astype(np.float32)}
    assert Comparator.compare_accuracy(Comparator.run(runners, data_loader=[feeds]))
