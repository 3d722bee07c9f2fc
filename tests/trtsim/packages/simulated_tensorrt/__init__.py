"""SIMULATED: stands for libnvinfer beneath NVIDIA's Python bindings, on the CPU. See the README above."""
