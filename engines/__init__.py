"""ONNX model and scales to something that runs: preparation, Q/DQ placement, FP16, ONNX Runtime, TensorRT.

Documentation and user code import from `trt_int8`; this package's name is internal.
"""
