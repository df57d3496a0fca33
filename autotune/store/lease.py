"""`Lease`: one driver a study. Two would measure the same configs twice and disturb each other's timings.

The lease is a row in the store that its holder renews. It ends with the holder's `with` block, with the holder's
process as far as this machine can see it, or when it was not renewed for a while.
"""

import hashlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import psutil

from autotune.errors import StoreError, StudyBusyError

if TYPE_CHECKING:
    from autotune.store.store import SqlStore

RENEW_SECONDS = 10.0
EXPIRES_AFTER = timedelta(seconds=60)
"""Six renewals: a database that restarts, or a driver that is starved for a while, does not lose its study."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """A process that drives a study."""

    machine: str
    """Equal for processes that can see each other's ids, and for no others."""
    host: str
    """For people."""
    process: int
    process_started_at: float
    """Seconds since the epoch: process ids are used again."""

    @classmethod
    def this(cls) -> Self:
        """The running process."""
        return cls(
            machine=_machine(),
            host=socket.gethostname(),
            process=os.getpid(),
            process_started_at=psutil.Process().create_time(),
        )

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended. False for one that cannot be seen from here."""
        if self.machine != _machine():
            return False
        try:
            # The start is computed from the boot time, which an adjusted clock moves by a little.
            return abs(psutil.Process(self.process).create_time() - self.process_started_at) > 1
        except psutil.NoSuchProcess:
            return True


class Lease:
    """Holds a study for this process while the context is open.

    Args:
        store: where the study is, or will be.
        study: its name.
        on_lost: called once, in another thread, when another driver has taken the study over, which it may after this
            process was silent for `EXPIRES_AFTER`. The study must then be left alone.
    """

    def __init__(self, store: "SqlStore", study: str, on_lost: Callable[[], None]) -> None:
        self.lost = False
        self._store, self._study, self._on_lost = store, study, on_lost
        self._driver = Driver.this()
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="autotune-lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            StudyBusyError: another driver has it.
        """
        holder, silent = self._store.take_lease(self._study, self._driver)
        if holder != self._driver:
            raise StudyBusyError(
                f"study {self._study!r} in {self._store.shown_url} is run by process {holder.process} on {holder.host},"
                f" heard of {silent.total_seconds():.0f} s ago; wait for it or stop it (a driver that is silent for"
                f" {EXPIRES_AFTER.total_seconds():.0f} s loses its study)"
            )
        self._renewal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lease back. Where the store cannot be reached any more, it expires."""
        self._ended.set()
        self._renewal.join()
        try:
            self._store.release_lease(self._study, self._driver)
        except StoreError:
            if error is None:
                raise

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.lost = not self._store.renew_lease(self._study, self._driver)
            except StoreError:
                continue  # the database may come back; if it does not, the study's own next step says so
            if self.lost:
                self._on_lost()
                return


def _machine() -> str:
    """The boot of the kernel and the namespace of process ids, as sixteen hex digits."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 # no file: a handle of the kernel's
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]
