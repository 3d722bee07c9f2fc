"""engines.gpu_monitor over a stand-in for nvidia-ml-py."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from engines.errors import DeviceError, MissingDependencyError
from engines.gpu_monitor import GpuMonitor, GpuReading

BUS_ID = "0000:51:00.0"


def test_reads_the_gpu_of_that_bus_id(fake_nvml: Any, fake_gpu: Any) -> None:
    """Clocks, temperature, power and energy in their units; NVML is left at the end."""
    with GpuMonitor(BUS_ID) as monitor:
        fake_gpu.now = 120_000_000
        assert monitor.read() == GpuReading(1500, 2600, 40)
        assert monitor.power_w() == 100.0
        assert monitor.energy_mj() == 10_000
        assert fake_nvml.opened == 1
    assert fake_nvml.opened == 0


def test_what_a_gpu_does_not_tell_is_none(fake_nvml: Any) -> None:
    """Each figure fails for itself."""
    fake_nvml.missing = {"nvmlDeviceGetClockInfo", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    with GpuMonitor(BUS_ID) as monitor:
        assert monitor.read() == GpuReading(None, None, 40)
        assert monitor.energy_mj() is None
        assert monitor.power_w() is None


def test_an_unknown_gpu_leaves_nvml_again(fake_nvml: Any) -> None:
    """The bus id and NVML's own words are in the message."""
    with pytest.raises(DeviceError, match=r"GPU 0000:99:00\.0: NVML says 'Not Found'"):
        GpuMonitor("0000:99:00.0")
    assert fake_nvml.opened == 0


def test_without_nvml_the_reason_is_named(fake_nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of the driver, and the package that reads it, are missing in their own ways."""
    fake_nvml.missing = {"nvmlInit"}
    with pytest.raises(DeviceError, match="comes with the NVIDIA driver"):
        GpuMonitor(BUS_ID)

    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingDependencyError, match=r"Cannot read the GPU's clocks.*'trt-int8\[tensorrt11\]'"):
        GpuMonitor(BUS_ID)
