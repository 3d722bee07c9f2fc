"""Activations to histograms to scales.

Numerics, and TensorRT's calibrators with their cache file. This package knows arrays and tensor names; it knows no
graphs and no runtimes. Documentation and user code import from `trt_int8`; this package's name is internal.
"""
