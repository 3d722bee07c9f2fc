"""engines.optional: packages outside the base installation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from engines.errors import MissingDependencyError
from engines.optional import EXTRAS, require


def test_gives_the_module() -> None:
    """A module that is there is imported."""
    assert require("math", "count") is math


@pytest.mark.parametrize("module", ["tensorrt", "pycuda.driver", "cuda.bindings.driver", "pynvml", "ray"])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """The message says what cannot be done and what to install."""
    package = module.partition(".")[0]
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    with pytest.raises(MissingDependencyError, match="Cannot build: ") as caught:
        require(module, "build")
    assert f"'trt-int8[{EXTRAS[package].split()[0]}]'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10: cannot open"),
        ("raise OSError('libcuda.so.1 is missing')", "libcuda.so.1 is missing"),
        ("import some_module_that_it_needs", "some_module_that_it_needs"),
    ],
)
def test_a_package_that_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, reason: str
) -> None:
    """Installed and unusable is not the same as missing."""
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(MissingDependencyError, match="is installed but cannot be loaded") as caught:
        require("tensorrt", "build")
    assert reason in str(caught.value)
