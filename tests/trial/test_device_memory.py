"""A trial starts on a device whose memory the trial before has given back."""

import pytest

from autotune.spec.outcome import FailureKind, Phase
from autotune.trial.device_memory import (
    CpuMemory,
    DeviceOccupiedError,
    MemoryPeaks,
    SeveralMemories,
    await_free_device,
)
from autotune.trial.failure import classify

GIB = 1024**3


class Driver:
    """Takes memory back a little at a time."""

    def __init__(self, *used_gib: float) -> None:
        self._used = list(used_gib)
        self.asked = 0

    def __call__(self) -> tuple[int, int]:
        self.asked += 1
        used = self._used.pop(0) if len(self._used) > 1 else self._used[0]
        return int((80 - used) * GIB), 80 * GIB


def test_memory_that_is_being_given_back_is_waited_for() -> None:
    driver = Driver(70, 40, 2)
    await_free_device(driver)
    assert driver.asked == 3


def test_a_device_that_others_use_is_not_the_configs_fault() -> None:
    with pytest.raises(DeviceOccupiedError, match=r"30\.0 GiB of the device's 80\.0 GiB") as caught:
        await_free_device(Driver(30), seconds=0)
    assert classify(caught.value, rank=0, phase=Phase.START, device="cuda").kind is FailureKind.WORKER_LOST


class Counted(CpuMemory):
    """Says what it is told to."""

    def __init__(self, used: int, retries: int) -> None:
        super().__init__(None)
        self._peaks = MemoryPeaks(
            allocated_bytes=used - 2,
            reserved_bytes=used - 1,
            device_used_bytes=used,
            device_bytes=100,
            allocator_retries=retries,
        )
        self.heard: list[str] = []

    def enter_phase(self, phase: Phase) -> None:
        self.heard.append(phase.value)

    def begin(self) -> None:
        self.heard.append("begin")

    def sample(self) -> None:
        self.heard.append("sample")

    def live_bytes(self) -> int:
        return self._peaks.allocated_bytes

    def peaks(self) -> MemoryPeaks:
        return self._peaks


def test_of_several_devices_the_fullest_counts_and_each_is_told() -> None:
    devices = [Counted(40, 3), Counted(70, 0)]
    with SeveralMemories(devices) as memory:
        memory.enter_phase(Phase.BUILD)
        memory.begin()
        memory.sample()
    peaks = memory.peaks()
    assert (peaks.device_used_bytes, peaks.allocated_bytes, peaks.allocator_retries) == (70, 68, 3)
    assert memory.live_bytes() == 38 + 68
    assert [device.heard for device in devices] == [["build", "begin", "sample"]] * 2
