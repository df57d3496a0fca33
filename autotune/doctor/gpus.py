"""NVIDIA GPUs and who uses them, asked of the driver (NVML), which starts no CUDA."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autotune.doctor.check import Finding, fail, ok, warn
from autotune.units import format_bytes

_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"
_IDLE_SHARE = 0.05
"""Of the memory of a GPU that nobody uses: the driver's own share is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What NVML says of one GPU."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    used_bytes: int
    users: tuple[tuple[int, int | None], ...]
    """(pid, bytes) of each process; in a container those of others cannot be seen, nor can bytes under WDDM."""
    prohibited: bool
    """Its compute mode lets nobody use it."""
    mig: bool
    uncorrected_errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The NVIDIA driver and its GPUs."""

    version: str
    cuda: tuple[int, int]
    """The newest CUDA that it runs."""
    gpus: tuple[Gpu, ...]


def read_driver(nvml: Any) -> Driver | None:
    """Ask NVML, which is the module `pynvml`; None where there is no driver."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        gpus = tuple(_read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        version = str(nvml.nvmlSystemGetDriverVersion())
        return Driver(version=version, cuda=(cuda // 1000, cuda % 1000 // 10), gpus=gpus)
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    users, mode, mig, errors = [], nvml.NVML_COMPUTEMODE_DEFAULT, False, 0
    with contextlib.suppress(nvml.NVMLError):  # none of these is told everywhere
        users = [(p.pid, p.usedGpuMemory) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    with contextlib.suppress(nvml.NVMLError):
        mode = nvml.nvmlDeviceGetComputeMode(handle)
    with contextlib.suppress(nvml.NVMLError):
        mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    with contextlib.suppress(nvml.NVMLError):
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    return Gpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        users=tuple(users),
        prohibited=mode == nvml.NVML_COMPUTEMODE_PROHIBITED,
        mig=mig,
        uncorrected_errors=int(errors),
    )


def check_gpus(driver: Driver | None, pci: Path = Path("/sys/bus/pci/devices")) -> Finding:
    """GPUs are there, whole, healthy, and nobody else's."""
    if driver is None or not driver.gpus:
        cards = _nvidia_cards(pci)
        if cards:
            return fail(
                f"{cards} NVIDIA GPU{'s' if cards > 1 else ''} on the bus, but no driver answers",
                "install the NVIDIA driver; in a container, start it with the GPUs (--gpus all)",
            )
        return ok("no NVIDIA GPU; studies on `gpu: cpu` run here, others need --address")
    names = sorted({gpu.name for gpu in driver.gpus})
    found = f"{len(driver.gpus)} x {', '.join(names)}, driver {driver.version}"
    for broken, words, remedy in (
        ([g for g in driver.gpus if g.prohibited], "compute mode prohibited", "sudo nvidia-smi --compute-mode=DEFAULT"),
        (
            [g for g in driver.gpus if g.uncorrected_errors],
            "uncorrected ECC errors since the last reset",
            "reset or replace it (nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv)",
        ),
    ):
        if broken:
            return fail(f"{found}; {words} on {_indices(broken)}", remedy)
    busy = [words for gpu in driver.gpus if (words := _use(gpu))]
    if busy:
        return warn(
            f"{found}; in use: {'; '.join(busy)}",
            "wait for those processes or end them, or leave their GPUs out with CUDA_VISIBLE_DEVICES",
        )
    sliced = [gpu for gpu in driver.gpus if gpu.mig]
    if sliced:
        return warn(f"{found}; MIG is on for {_indices(sliced)}", "measure on whole GPUs: sudo nvidia-smi -mig 0")
    if len(names) > 1:
        return warn(f"{found}; they differ", "keep a study to equal GPUs with CUDA_VISIBLE_DEVICES")
    return ok(found)


def _nvidia_cards(pci: Path) -> int:
    cards = 0
    for device in pci.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / file).read_text().strip() for file in ("vendor", "class"))
            cards += vendor == _NVIDIA and kind.startswith(_DISPLAY_CLASS)
    return cards


def _use(gpu: Gpu) -> str:
    if gpu.users:
        return f"GPU {gpu.index} by {', '.join(_user(pid, size) for pid, size in gpu.users)}"
    if gpu.used_bytes > _IDLE_SHARE * gpu.total_bytes:
        return f"GPU {gpu.index} by what cannot be seen from here, with {format_bytes(gpu.used_bytes)}"
    return ""


def _user(pid: int, size: int | None) -> str:
    name = "a process"
    with contextlib.suppress(psutil.Error):
        name = psutil.Process(pid).name()
    return f"{name} (pid {pid}{f', {format_bytes(size)}' if size else ''})"


def _indices(gpus: list[Gpu]) -> str:
    return f"GPU {', '.join(str(gpu.index) for gpu in gpus)}"
