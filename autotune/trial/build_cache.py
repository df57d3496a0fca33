"""Compiled extensions, without the stale locks of killed builds.

PyTorch guards the build of an extension with a file named `lock` next to it, and waits for that file to go away without
a time limit (`torch.utils.file_baton`). A trial that is killed while it compiles leaves the file, and every later trial
that loads the extension hangs. Nobody can tell a stale lock from a live one by looking at it. So the folder is
Autotune's own, every pool that uses it holds a shared lock on it, and who gets that lock exclusively knows that no
other pool is alive and every lock file is stale.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_USERS_FILE = "autotune-pools.lock"
VARIABLE = "TORCH_EXTENSIONS_DIR"


class BuildCache:
    """The folder that one pool's trials build extensions in.

    Args:
        folder: made if it does not exist.
        owned: only Autotune builds there. In a folder that the user named others may be building, so there only lock
            files that are younger than the killed gang are taken away.
    """

    def __init__(self, folder: Path, *, owned: bool = True) -> None:
        self.folder = folder
        self._owned = owned
        folder.mkdir(parents=True, exist_ok=True)
        self._users = os.open(folder / _USERS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.sweep()

    def sweep(self, since: float | None = None) -> list[Path]:
        """Remove stale lock files. The caller's pool must run no gang now.

        Args:
            since: the killed gang's start, in seconds of `time.time`; None when no gang was killed, as at the start.

        Returns:
            The files that were removed: none while another pool is alive, or where the file system has no locks.
        """
        removed: list[Path] = []
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            removed = [path for path in self.folder.glob("**/lock") if self._is_stale(path, since) and _remove(path)]
        # Back to a shared lock, also after a failed attempt, which gives up the lock that we had. It waits only for
        # another pool's sweep.
        with contextlib.suppress(OSError):
            fcntl.flock(self._users, fcntl.LOCK_SH)
        return removed

    def close(self) -> None:
        """Give the folder up."""
        if self._users >= 0:
            os.close(self._users)
            self._users = -1

    def _is_stale(self, path: Path, since: float | None) -> bool:
        if self._owned:
            return True
        try:
            return since is not None and path.stat().st_mtime >= since
        except FileNotFoundError:
            return False


def open_build_cache(environment: Mapping[str, str] = os.environ) -> BuildCache:
    """The user's folder if TORCH_EXTENSIONS_DIR names one, so that what is built there already is used; else our own.

    Our own has the versions of Python and PyTorch in its path, which PyTorch adds only where it chooses the folder.
    """
    named = environment.get(VARIABLE)
    if named:
        return BuildCache(Path(named), owned=False)
    cache = environment.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path.home() / ".cache"
    version = f"py{sys.version_info.major}{sys.version_info.minor}-torch{importlib.metadata.version('torch')}"
    try:
        return BuildCache(root / "autotune" / "torch_extensions" / version)
    except OSError:  # containers often run as a user without a home
        return BuildCache(Path(tempfile.gettempdir()) / f"autotune-{os.getuid()}" / "torch_extensions" / version)


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
