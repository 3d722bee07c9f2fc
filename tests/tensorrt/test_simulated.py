"""Starts the tests of this folder over the simulated TensorRT 10 and 11, each in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def test_the_tests_of_this_folder_pass(tensorrt_sim: Any) -> None:
    """Every test that needs TensorRT passes over both versions, and there are some."""
    result = tensorrt_sim.run("-m", "pytest", "-p", "no:cacheprovider", "--no-header", "-q", Path(__file__).parent)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert re.search(r"[1-9][0-9]* passed", result.stdout)
    assert "skipped" not in result.stdout
