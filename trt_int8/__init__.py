"""trt-int8: PyTorch models to measured, explained INT8 and FP16 models."""

__version__ = "0.1.0"
