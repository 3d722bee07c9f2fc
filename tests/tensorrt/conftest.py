"""Tests in a process in which `import tensorrt` works, once for each version; `test_simulated.py` starts them.

A test that only one version can pass is marked `@pytest.mark.tensorrt(10)`. One that needs pycuda is marked
`@pytest.mark.pycuda`, and left out where pycuda is not installed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

VERSION = os.environ.get("TRTSIM_VERSION")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Inside, the starter is left out; outside, all but the starter."""
    if not collection_path.name.startswith("test_"):
        return None
    return True if (collection_path.name == "test_simulated.py") == bool(VERSION) else None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tensorrt(version): runs on this major version alone")
    # The bindings warn of each use of a calibrator, and go on with the exception pending where a warning is an error.
    config.addinivalue_line("filterwarnings", "ignore:.*Deprecated in TensorRT:DeprecationWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if (mark := item.get_closest_marker("tensorrt")) and str(mark.args[0]) != VERSION]
    if find_spec("pycuda") is None:
        others += [item for item in items if item.get_closest_marker("pycuda") and item not in others]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
