"""trt-int8: PyTorch models to measured, explained INT8 and FP16 models.

The public names are resolved when they are first used, so that `import trt_int8` costs nothing:

    from trt_int8 import export_onnx, calibrate, quantize, convert_fp16, build_engine, benchmark, compare
    from trt_int8 import Pipeline, Calibration
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Pipeline",
    "__version__",
    "benchmark",
    "build_engine",
    "calibrate",
    "compare",
    "convert_fp16",
    "export_onnx",
    "lint",
    "quantize",
]

if TYPE_CHECKING:
    from trt_int8.api import (
        Calibration,
        Pipeline,
        benchmark,
        build_engine,
        calibrate,
        compare,
        convert_fp16,
        export_onnx,
        lint,
        quantize,
    )


def __getattr__(name: str) -> Any:
    """Resolve a public name on first use."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'trt_int8' has no attribute {name!r}")
    from trt_int8 import siblings

    siblings.check()
    from trt_int8 import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
