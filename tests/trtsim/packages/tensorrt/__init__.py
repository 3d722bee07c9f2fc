"""NVIDIA's bindings under the name `tensorrt`, as its own package gives it; beneath are SIMULATED libraries."""

from tensorrt_bindings import *  # noqa: F403
from tensorrt_bindings import __version__ as __version__
