"""What trials need of the machine: disks, shared memory, host memory, limits, and no stale build locks."""

import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from autotune.doctor.check import Finding, fail, ok, warn
from autotune.trial.build_cache import VARIABLE
from autotune.units import GIB, MIB, format_bytes, format_seconds

OUTPUT_BYTES = 500 * MIB
"""Logs and best files of a study take a few MiB; checkpoints of the confirmation more."""
RAY_FREE_SHARE = 0.05
"""Ray stops writing to a disk that is fuller than 95 % (its local_fs_capacity_threshold)."""
_SOCKET_BYTES = 107
"""The longest path of a Unix socket."""
_SESSION_SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
STALE_SECONDS = 600.0
"""Building the slowest of DeepSpeed's ops takes minutes."""
OPEN_FILES = 8192
"""Below it Ray warns (ray/_private/worker.py)."""
RANK_BYTES = GIB
"""About what one rank of the smallest model holds in host memory: libraries, buffers, a CUDA context's share."""


def check_output(folder: Path, needed_bytes: int = OUTPUT_BYTES) -> Finding:
    """Results can be written. The folder need not exist, and is not made."""
    nearest = _nearest(folder)
    found = f"{folder.absolute()}: {format_bytes(_free(nearest))} free"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return fail(f"{folder.absolute()}: {nearest} cannot be written", "name a writable folder with --out")
    if _free(nearest) < needed_bytes:
        return fail(found, f"free {format_bytes(needed_bytes)}, or name another disk with --out")
    return ok(found)


def ray_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Ray keeps its sessions (ray/_common/utils.py)."""
    return Path(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp") / "ray"


def check_ray_folder(folder: Path) -> Finding:
    """Ray can start a session there."""
    nearest = _nearest(folder)
    total, free = _total(nearest), _free(nearest)
    found = f"{folder}: {format_bytes(free)} of {format_bytes(total)} free"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return fail(f"{folder}: {nearest} cannot be written", "set RAY_TMPDIR to a writable folder")
    if len(os.fsencode(f"{folder}{_SESSION_SOCKET}")) > _SOCKET_BYTES:
        return fail(f"{folder}: too long a path for Ray's sockets", "set RAY_TMPDIR to a short path")
    if free < RAY_FREE_SHARE * total:
        return warn(
            f"{found}: Ray stops writing above 95 %", "free some of it, or set RAY_TMPDIR to a short path elsewhere"
        )
    return ok(found)


def model_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Hugging Face libraries keep models."""
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def check_model_folder(folder: Path) -> Finding:
    """Room for pretrained weights; a study on random weights needs none."""
    free = _free(_nearest(folder))
    found = f"{folder}: {format_bytes(free)} free"
    if free < GIB:
        return warn(found, "free some of it, or set HF_HOME to another disk, before a model is downloaded")
    return ok(found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """NCCL, data loaders and Ray's object store share memory between processes."""
    if not folder.is_dir():
        return fail(f"{folder} is missing", "mount a tmpfs there")
    free = _free(folder)
    found = f"{folder}: {format_bytes(free)} free"
    if free < GIB:
        return warn(found, "give the container more (--shm-size=16g, or a memory volume in Kubernetes), or empty it")
    return ok(found)


def check_host_memory(hierarchy: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Ranks fit in host memory: the machine's, or what a container may use of it."""
    memory = psutil.virtual_memory()
    available, total, whose = memory.available, memory.total, "host"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # the other version's file; `max`
            allowed = int((hierarchy / limit).read_text())
            if allowed < total:
                total, whose = allowed, "container"
                available = min(available, allowed - int((hierarchy / used).read_text()))
    found = f"{format_bytes(available)} of the {whose}'s {format_bytes(total)} available"
    if available < RANK_BYTES:
        return fail(found, "end what else runs here; a rank needs a GiB and more")
    if available < 4 * RANK_BYTES:
        return warn(found, "run few ranks at a time; offload needs far more")
    return ok(found)


def check_limits(infiniband: Path = Path("/sys/class/infiniband")) -> Finding:
    """Open files and locked memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = f"open files {_limit(files)}, locked memory {'unlimited' if locked < 0 else format_bytes(locked)}"
    if 0 <= files < OPEN_FILES:
        return warn(found, f"raise the limit of open files to {OPEN_FILES} or more (ulimit -n, LimitNOFILE, --ulimit)")
    if locked >= 0 and infiniband.is_dir() and any(infiniband.iterdir()):
        return warn(f"{found}; InfiniBand locks memory", "raise it (ulimit -l unlimited, --ulimit memlock=-1)")
    return ok(found)


def build_folders(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where PyTorch and Autotune build extensions."""
    named = environment.get(VARIABLE)
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = [root / "torch_extensions" for root in (cache / "autotune", _temporary_cache())]
    return [*([Path(named)] if named else []), cache / "torch_extensions", *own]


def check_build_locks(folders: Sequence[Path], named: str | None = None) -> Finding:
    """No killed build has left a lock, on which PyTorch would wait without a limit (`autotune.trial.build_cache`).

    Args:
        folders: where extensions are built.
        named: the one that the user has chosen for trials too. Their own folder is swept before they run.
    """
    locks = {path.resolve() for folder in folders for path in folder.glob("**/lock")}
    now = time.time()
    stale = {}
    held = _open_files() if locks else set()
    for path in locks:
        with contextlib.suppress(FileNotFoundError):
            age = now - path.stat().st_mtime
            if age > STALE_SECONDS and path not in held:
                stale[path] = age
    if stale:
        oldest = max(stale, key=lambda path: stale[path])
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        hangs = named is not None and any(path.is_relative_to(Path(named).resolve()) for path in stale)
        return (fail if hangs else warn)(
            f"a stale build lock, {format_seconds(stale[oldest])} old: {oldest}{more}; what loads the extension hangs",
            f"make sure that no other machine builds there, then rm {' '.join(str(path) for path in sorted(stale))}",
        )
    return ok(f"{len(locks)} builds under way" if locks else "no build lock")


def _open_files() -> set[Path]:
    """Files that living processes have open, as far as we may look: a build keeps its lock open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found.add(link.readlink())
    return found


def _temporary_cache() -> Path:
    return Path(tempfile.gettempdir()) / f"autotune-{os.getuid()}"


def _nearest(folder: Path) -> Path:
    """The folder, or what exists of the way to it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _free(folder: Path) -> int:
    return psutil.disk_usage(str(folder)).free


def _total(folder: Path) -> int:
    return psutil.disk_usage(str(folder)).total


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)
