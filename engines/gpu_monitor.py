"""Clocks, temperature, power and energy of the GPU, through NVML.

The GPU is found by its PCI bus id: NVML counts all GPUs of the machine, CUDA only those that CUDA_VISIBLE_DEVICES
shows, and in an order of its own. What a GPU does not tell (or not to this user, or not in a MIG slice) is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from engines.errors import DeviceError
from engines.optional import require


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What the GPU says of one moment.

    Attributes:
        clock_sm_mhz: clock of the multiprocessors.
        clock_memory_mhz: clock of the memory.
        temperature_c: of the chip, degrees Celsius.
    """

    clock_sm_mhz: int | None
    clock_memory_mhz: int | None
    temperature_c: int | None


class GpuMonitor:
    """Reads one GPU; `with GpuMonitor(bus_id) as monitor:`.

    Args:
        pci_bus_id: the GPU, see `engines.device.Device.pci_bus_id`.

    Raises:
        MissingDependencyError: nvidia-ml-py is not installed.
        DeviceError: NVML is not there, or does not know the GPU.
    """

    def __init__(self, pci_bus_id: str) -> None:
        self._nvml: Any = require("pynvml", "read the GPU's clocks, temperature and energy")
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise _unreadable(pci_bus_id, error) from error
        try:
            self._gpu = self._nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except self._nvml.NVMLError as error:
            self._nvml.nvmlShutdown()
            raise _unreadable(pci_bus_id, error) from error

    def __enter__(self) -> Self:
        """Return the monitor itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave NVML."""
        self._nvml.nvmlShutdown()

    def read(self) -> GpuReading:
        """Read clocks and temperature."""
        nvml = self._nvml
        return GpuReading(
            clock_sm_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            clock_memory_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        )

    def energy_mj(self) -> int | None:
        """Read the board's energy counter: millijoules since the driver was loaded; Volta and newer have one."""
        return self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def power_w(self) -> float | None:
        """Read the board's power in watts. From Ampere on, except GA100, the driver gives the mean of a second."""
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, query: Callable[..., Any], *arguments: Any) -> int | None:
        try:
            return int(query(self._gpu, *arguments))
        except self._nvml.NVMLError:
            return None


def _unreadable(pci_bus_id: str, reason: Exception) -> DeviceError:
    return DeviceError(
        f"Cannot read the clocks, temperature and energy of the GPU {pci_bus_id}: NVML says {str(reason)!r}. "
        "It comes with the NVIDIA driver; containers need the driver capability `utility`."
    )
