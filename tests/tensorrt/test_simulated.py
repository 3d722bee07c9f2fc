"""Starts the tests of this folder, and those for a GPU, over the simulated TensorRT 10 and 11, in own processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def run_tests(tensorrt_sim: Any, marks: str) -> None:
    arguments = ["-p", "no:cacheprovider", "--no-header", "-q", "-m", marks]
    here = Path(__file__).parent
    result = tensorrt_sim.run("-m", "pytest", *arguments, here, here.with_name("gpu"))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert re.search(r"[1-9][0-9]* passed", result.stdout)
    assert "skipped" not in result.stdout


def test_the_tests_of_this_folder_pass(tensorrt_sim: Any) -> None:
    """Every test that needs TensorRT or a GPU passes over both versions, and there are some."""
    run_tests(tensorrt_sim, "not pycuda")


def test_the_tests_that_need_pycuda_pass(tensorrt_sim: Any) -> None:
    """Those too, where pycuda could be compiled."""
    if tensorrt_sim.without_pycuda is not None:
        pytest.skip(tensorrt_sim.without_pycuda)
    run_tests(tensorrt_sim, "pycuda")
