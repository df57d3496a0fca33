"""`GpuWatch`: clocks, temperature and throttle reasons of a rank's GPU, asked of the driver (NVML)."""

from typing import Any, Protocol

import torch

from autotune.spec.outcome import GpuHealth

THROTTLE_REASONS = {
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Bits of `nvmlDeviceGetCurrentClocksEventReasons` (NVML reference, "NvmlClocksEventReasons"), but 0x1: idleness."""


class Watch(Protocol):
    """What is asked of a device while whole steps run."""

    def sample(self) -> None:
        """Ask now."""
        ...

    def health(self) -> GpuHealth | None:
        """What was seen so far; None where nothing is to be seen."""
        ...


class NoWatch:
    """Of a device that has no NVML."""

    def sample(self) -> None:
        """Nothing."""

    def health(self) -> None:
        """Nothing."""


class GpuWatch:
    """Asks NVML.

    Args:
        nvml: the module `pynvml`, initialised.
        handle: of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._clocks: list[int] = []
        self._temperatures: list[int] = []
        self._reasons = 0

    def sample(self) -> None:
        """See `Watch`. A question that the driver does not answer ends the sample, not the trial."""
        nvml, handle = self._nvml, self._handle
        try:
            self._reasons |= nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            self._temperatures.append(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            self._clocks.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        except nvml.NVMLError:
            return

    def health(self) -> GpuHealth | None:
        """See `Watch`."""
        if not self._clocks:
            return None
        return GpuHealth(
            lowest_clock_mhz=min(self._clocks),
            highest_clock_mhz=max(self._clocks),
            hottest_celsius=max(self._temperatures),
            throttle_reasons=tuple(name for bit, name in THROTTLE_REASONS.items() if self._reasons & bit),
        )


def watch_gpu(device: torch.device) -> Watch:
    """The watch of a rank's device. CUDA numbers devices by what is visible, NVML by the bus; the UUID is the same."""
    if device.type != "cuda":
        return NoWatch()
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return GpuWatch(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except Exception:  # no package, no permission, a ROCm build, a MIG slice: health is a note, never a failure
        return NoWatch()
