"""One node of a cluster, as it sees itself; `examine` runs there, in a process of Ray's."""

import importlib.metadata
import platform
import secrets
import socket
from pathlib import Path
from typing import Any

from autotune.doctor import gpus, machine
from autotune.doctor.check import perform

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "accelerate")


def examine(out: str, token: str) -> dict[str, Any]:
    """What a node says of itself, as plain JSON data. It leaves a file of that token in `out`, see `seen`.

    Args:
        out: folder that all nodes should share.
        token: of this examination.
    """
    import pynvml

    driver = gpus.read_driver(pynvml)
    checks = {
        "gpus": lambda: gpus.check_gpus(driver),
        "shared memory": machine.check_shared_memory,
        "host memory": machine.check_host_memory,
        "limits": machine.check_limits,
        "ray's disk": lambda: machine.check_ray_folder(machine.ray_folder()),
    }
    return {
        "host": socket.gethostname(),
        "versions": _versions() | ({"NVIDIA driver": driver.version} if driver is not None else {}),
        "gpus": [gpu.name for gpu in driver.gpus] if driver is not None else [],
        "total_bytes": driver.gpus[0].total_bytes if driver is not None and driver.gpus else 0,
        "checks": [perform(name, check).to_dict() for name, check in checks.items()],
        "storage": _leave(Path(out), token),
    }


def seen(out: str, token: str) -> int:
    """How many nodes' files of that token are in `out`, as this node sees it."""
    try:
        return len(list(Path(out).glob(f".autotune-doctor-{token}-*")))
    except OSError:
        return 0


def clean(out: str, token: str) -> None:
    """Remove them."""
    for path in Path(out).glob(f".autotune-doctor-{token}-*"):
        path.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _leave(out: Path, token: str) -> str | None:
    """Leave a file that other nodes can look for; returns why that failed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / f".autotune-doctor-{token}-{secrets.token_hex(4)}").open("xb") as file:
            file.write(b"may be deleted\n")
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
