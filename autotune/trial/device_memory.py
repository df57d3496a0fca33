"""Peaks of device memory: asked from CUDA's caching allocator, counted and limited on CPU."""

import resource
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import psutil
import torch

from autotune.modeling.memory_tracker import MemoryTracker
from autotune.spec.outcome import Phase

HARD_LIMIT_FACTOR = 4
"""RLIMIT_DATA lets a process grow by this multiple of its tensor limit. It is a net behind the tracker, for memory that
no tensor owns, and must not be reached before it: the C allocator keeps freed pages, which count here."""
HARD_LIMIT_BASE_BYTES = 1024**3
"""And by this much in any case: stacks of threads, buffers of the communication library."""
FOREIGN_RATIO = 0.1
FOREIGN_BYTES = 1024**3
"""What others may hold of a device when a trial starts, the larger of the two: a driver's context, a desktop. With
more, the trial would be told that it does not fit where it does."""
DRAIN_SECONDS = 20.0
"""The driver takes back a killed process's memory within seconds of its end."""


class DeviceOccupiedError(OSError):
    """Somebody else holds the device's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeaks:
    """Highest bytes since `begin`; the fields are those of `RankMeasurement`."""

    allocated_bytes: int
    reserved_bytes: int
    device_used_bytes: int
    device_bytes: int
    allocator_retries: int


class DeviceMemory(Protocol):
    """A context that is entered before the model is built."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def enter_phase(self, phase: Phase) -> None:
        """Told before each phase."""
        ...

    def begin(self) -> None:
        """The warm-up begins: forget the peaks of building."""
        ...

    def sample(self) -> None:
        """Called after each micro-step."""
        ...

    def live_bytes(self) -> int:
        """Of tensors, now."""
        ...

    def peaks(self) -> MemoryPeaks:
        """What was reached since `begin`; may be asked after the context has ended."""
        ...


class CpuMemory:
    """Live bytes of tensors, counted to the byte, with a limit that refuses as a GPU would.

    Args:
        limit_bytes: live tensor bytes that are allowed; None: as much as the host has.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit = limit_bytes
        self._tracker = MemoryTracker(limit_bytes=limit_bytes)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._limit is not None:
            soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
            bound = _data_segment_bytes() + HARD_LIMIT_FACTOR * self._limit + HARD_LIMIT_BASE_BYTES
            if hard != resource.RLIM_INFINITY:
                bound = min(bound, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
            self._stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))
        self._stack.enter_context(self._tracker)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that are older than the context."""
        for tensor in tensors:
            self._tracker.track(tensor)

    def enter_phase(self, phase: Phase) -> None:
        """See `DeviceMemory`."""
        self._tracker.phase = phase.value

    def begin(self) -> None:
        """See `DeviceMemory`."""
        self._tracker.reset_peak()

    def sample(self) -> None:
        """Nothing: the tracker sees every operator."""

    def live_bytes(self) -> int:
        """See `DeviceMemory`."""
        return self._tracker.live_bytes

    def peaks(self) -> MemoryPeaks:
        """See `DeviceMemory`. There is no caching allocator, so all three peaks are the same."""
        peak = self._tracker.peak_bytes
        return MemoryPeaks(
            allocated_bytes=peak,
            reserved_bytes=peak,
            device_used_bytes=peak,
            device_bytes=self._limit or psutil.virtual_memory().total,
            allocator_retries=0,
        )


class CudaMemory:
    """What PyTorch's caching allocator and the driver report. The limit is the device's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outside_bytes = 0
        self._retries_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def enter_phase(self, phase: Phase) -> None:
        """Nothing: the allocator keeps no sites."""

    def begin(self) -> None:
        """See `DeviceMemory`. What building left in the allocator's cache stays reserved, and so stays counted."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._retries_before = self._retries()

    def sample(self) -> None:
        """Note what others hold of the device: the driver's context, NCCL, kernels' own buffers, other processes."""
        free, total = torch.cuda.mem_get_info(self._device)
        self._outside_bytes = max(self._outside_bytes, total - free - torch.cuda.memory_reserved(self._device))

    def live_bytes(self) -> int:
        """See `DeviceMemory`."""
        return torch.cuda.memory_allocated(self._device)

    def peaks(self) -> MemoryPeaks:
        """See `DeviceMemory`. The device's use cannot be watched in between, so its peak is put together from parts."""
        reserved = torch.cuda.max_memory_reserved(self._device)
        return MemoryPeaks(
            allocated_bytes=torch.cuda.max_memory_allocated(self._device),
            reserved_bytes=reserved,
            device_used_bytes=reserved + self._outside_bytes,
            device_bytes=torch.cuda.mem_get_info(self._device)[1],
            allocator_retries=self._retries() - self._retries_before,
        )

    def _retries(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


class SeveralMemories:
    """Of a process with several devices: the peaks are those of the fullest, live bytes are of all.

    Args:
        memories: one of each device.
    """

    def __init__(self, memories: Sequence[DeviceMemory]) -> None:
        self._memories = memories
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for memory in self._memories:
            self._stack.enter_context(memory)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def enter_phase(self, phase: Phase) -> None:
        """See `DeviceMemory`."""
        for memory in self._memories:
            memory.enter_phase(phase)

    def begin(self) -> None:
        """See `DeviceMemory`."""
        for memory in self._memories:
            memory.begin()

    def sample(self) -> None:
        """See `DeviceMemory`."""
        for memory in self._memories:
            memory.sample()

    def live_bytes(self) -> int:
        """See `DeviceMemory`."""
        return sum(memory.live_bytes() for memory in self._memories)

    def peaks(self) -> MemoryPeaks:
        """See `DeviceMemory`; any device's retry of its allocator counts."""
        found = [memory.peaks() for memory in self._memories]
        fullest = max(found, key=lambda peaks: peaks.device_used_bytes)
        return replace(fullest, allocator_retries=max(peaks.allocator_retries for peaks in found))


def device_memory(device: torch.device, limit_bytes: int | None, *more: torch.device) -> DeviceMemory:
    """The memory of a rank's device, or of that and of `more`."""
    if more:
        return SeveralMemories([device_memory(each, limit_bytes) for each in (device, *more)])
    return CudaMemory(device) if device.type == "cuda" else CpuMemory(limit_bytes)


def await_free_device(memory: Callable[[], tuple[int, int]], seconds: float = DRAIN_SECONDS) -> None:
    """Wait until the driver has taken back what the trial before held.

    Args:
        memory: the device's free and total bytes, as `torch.cuda.mem_get_info` gives them.
        seconds: how long.

    Raises:
        DeviceOccupiedError: others still hold much of the device.
    """
    deadline = time.monotonic() + seconds
    while True:
        free, total = memory()
        if total - free <= max(FOREIGN_RATIO * total, FOREIGN_BYTES):
            return
        if time.monotonic() >= deadline:
            raise DeviceOccupiedError(
                f"other processes hold {(total - free) / 1024**3:.1f} GiB of the device's {total / 1024**3:.1f} GiB"
            )
        time.sleep(0.1)


def _data_segment_bytes() -> int:
    """VmData: what RLIMIT_DATA is compared with."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
