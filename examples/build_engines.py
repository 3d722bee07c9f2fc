"""Build FP32, FP16 and INT8 engines of a model: what `trt-int8 calibrate` and `trt-int8 build` do, in Python.

python examples/build_engines.py model.onnx calibration_data.npz engines
"""

import sys
from pathlib import Path

from trt_int8 import build_engine, calibrate

if len(sys.argv) != 4:
    sys.exit(f"usage: python {sys.argv[0]} MODEL.onnx DATA FOLDER")
model, data, folder = sys.argv[1:]
# One pass over the data serves every precision: INT8 takes its scales from it, FP16 the nodes that must stay FP32, and
# all of them the shapes: a batch of 1 up to that of the calibration.
calibration = calibrate(model, data, batch_size=32)
# Kernels that were timed for one engine are not timed again for the next.
times = Path(folder) / "timing.cache"
for precision in ("fp32", "fp16", "int8"):
    engine = build_engine(model, folder, precision=precision, calibration=calibration, timing_cache=times)
    print(f"{engine.path}: {engine.sidecar.plan_bytes} bytes, {engine.sidecar.environment.gpu}")
