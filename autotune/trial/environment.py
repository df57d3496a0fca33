"""What a measurement was taken with. Results are comparable, and reused, only where this is equal.

No host name, no address, no path: measurements are exported.
"""

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

from autotune.spec.request import DeviceType

_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "ray", "numpy")


def environment(device: DeviceType) -> dict[str, str]:
    """Versions and device name; what is not there has no key."""
    found = {"python": platform.python_version(), "device": _cpu_model()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found |= _cuda()
    return found


def _cuda() -> dict[str, str]:
    import torch  # the driver of a study asks for a CPU's, and would wait a second for it

    found = {"device": torch.cuda.get_device_name()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["hip"] = torch.version.hip
    nccl: Any = torch.cuda.nccl  # has no annotations
    found["nccl"] = ".".join(str(part) for part in nccl.version())
    driver = _driver_version()
    if driver:
        found["driver"] = driver
    return found


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module, which containers see too."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module\D*?\s(\d+\.[\d.]+)", text)
    return match[1] if match else None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()
