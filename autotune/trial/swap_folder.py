"""A gang's own folder on the fast disk of a node, for what DeepSpeed swaps there: removed with the gang.

Whoever uses a folder holds a shared lock on it for as long as its process lives. A folder that nobody holds was left by
processes that were killed together with those who would have removed it; the next one to come removes it.
"""

import contextlib
import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

from autotune.errors import UsageError
from autotune.spec.nvme import stored_bytes
from autotune.spec.request import TrialRequest
from autotune.units import format_bytes

_PREFIX = "autotune-swap-"


class SwapFolder:
    """A gang's folder, made and held.

    Args:
        root: a folder of the disk, which the user has named.
        gang: names the gang among all on this node.
        needed_bytes: what the gang will write, at most.

    Raises:
        UsageError: there is no such folder that can be written, or too little space for what the gang will write.
    """

    def __init__(self, root: Path, gang: str, needed_bytes: int) -> None:
        if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
            raise UsageError(
                f"nvme.path: {root} is no folder on {os.uname().nodename} that can be written; make it there"
            )
        sweep(root)
        free = shutil.disk_usage(root).free
        if free < needed_bytes:
            raise UsageError(
                f"nvme.path: {root} on {os.uname().nodename} has {format_bytes(free)} free, and the trial may write"
                f" {format_bytes(needed_bytes)}; make room or name another disk"
            )
        self.path = root / f"{_PREFIX}{gang}"
        self._lock = _hold(self.path)

    def close(self) -> None:
        """Remove it, whoever else holds it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def lend(request: TrialRequest, gang: str, ranks: int) -> tuple[TrialRequest, SwapFolder | None]:
    """The request as this node's ranks get it, with a folder of their own where they swap.

    Args:
        request: the trial.
        gang: names the gang among all on this node.
        ranks: of the trial on this node.

    Raises:
        UsageError: see `SwapFolder`.
    """
    if not request.config.swaps or request.nvme_path is None:
        return request, None
    folder = SwapFolder(Path(request.nvme_path), gang, stored_bytes(request.config, request.model, ranks))
    return replace(request, nvme_path=str(folder.path)), folder


def sweep(root: Path) -> list[Path]:
    """Remove the folders that nobody holds any more; they are returned."""
    removed = []
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is held, or another user's, or gone
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
            finally:
                os.close(lock)
    return removed


def _hold(folder: Path) -> int:
    """Make the folder, unless another rank has, and lock it; the descriptor holds the lock."""
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # swept away before it was held
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:
                return lock
            os.close(lock)
