"""What a killed gang may leave behind, and the process whose end ends a gang.

A gang is killed as the process groups that its ranks lead. What a rank started stays in its group, except what asked
for a session of its own, as torchrun's workers do. They keep the environment that they were started with, so each
rank's environment names its gang.

Shared memory outlives processes that have no time to unlink it (NCCL's segments, Python's). Which segments are a
gang's is seen while its ranks live. What only a rank that died by itself had mapped is not found.
"""

import contextlib
import os
import signal
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")
_CLOCK_SECONDS = 1.0
"""How far the kernel's file times may lag behind the clock."""
GANG_VARIABLE = "AUTOTUNE_GANG"
"""Set in every rank, and so in whatever it starts, but not seen in /proc for the rank itself, which is forked."""


def kill_strays(gang: str) -> list[int]:
    """Send SIGKILL to every living process that a rank of the gang has started; their pids."""
    mark = f"{GANG_VARIABLE}={gang}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended, or it is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
                os.kill(found[-1], signal.SIGKILL)
    return found


def mapped_shared_memory(pid: int | None, since: float) -> set[Path]:
    """Named POSIX shared memory that a living process has mapped and that is not older than its gang.

    Args:
        pid: the process; if it has ended, nothing is found.
        since: the gang's start, in seconds of `time.time`. Weights that a user has staged there are older.
    """
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            path = Path(line[line.index("/") :] if "/" in line else "/")
            if path.parent == _SHARED_MEMORY:  # "NAME (deleted)" does not exist
                with contextlib.suppress(OSError):
                    found |= {path} if path.stat().st_ctime >= since - _CLOCK_SECONDS else set()
    return found


class Owner:
    """The process that a trial is run for. The GPUs are lent to it: when it ends, they go to the next trial."""

    def __init__(self, pid: int) -> None:
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def is_gone(self) -> bool:
        """Whether it has ended. Its pid being in use again does not deceive."""
        try:
            return (
                self._process is None
                or not self._process.is_running()
                or self._process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True
