"""Which checks there are, in the order in which their remedies should be tried."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotune.doctor import cluster, gpus, machine, probe, services, software
from autotune.doctor.check import Check, Finding, perform
from autotune.trial.build_cache import VARIABLE

LIBRARIES_SECONDS = 300.0
NODES_SECONDS = 500.0
"""The sum of what `autotune.doctor.cluster` waits for, and a connection."""
RANKS_SECONDS = 400.0
"""Longer than the pool waits for its fork server (`autotune.trial.pool.READY_SECONDS`)."""


def diagnose(*, out: Path, store: str, address: str | None, quick: bool) -> Iterator[Check]:
    """Examine this machine, one check after the other; it takes about ten seconds.

    Args:
        out: where the results of a study would go.
        store: URL of the database.
        address: of a Ray cluster to connect to; None: none.
        quick: leave out the checks that import PyTorch and start processes.
    """

    # Asked once. What breaks here breaks the checks that need it, one by one, and no other.
    @functools.cache
    def driver() -> gpus.Driver | None:
        import pynvml

        return gpus.read_driver(pynvml)

    @functools.cache
    def libraries() -> dict[str, Any]:
        return probe.ask("libraries", device(), seconds=LIBRARIES_SECONDS)

    def device() -> str:
        found = driver()
        return "cuda" if found is not None and found.gpus else "cpu"

    slow: dict[str, Callable[[], Finding]] = {
        "torch": lambda: software.check_torch(libraries(), driver()),
        "deepspeed ops": lambda: software.check_ops(libraries(), driver()),
        "compilers": lambda: software.check_compilers(libraries(), driver()),
        "ranks": lambda: software.check_ranks(probe.ask("ranks", device(), seconds=RANKS_SECONDS)),
    }
    checks: dict[str, Callable[[], Finding]] = {
        "python": software.check_python,
        "packages": software.check_packages,
        "gpus": lambda: gpus.check_gpus(driver()),
        **({} if quick else slow),
        "build locks": lambda: machine.check_build_locks(machine.build_folders(), os.environ.get(VARIABLE)),
        "ray": lambda: services.check_ray(address, probe.ask),
        "ray's disk": lambda: machine.check_ray_folder(machine.ray_folder()),
        "store": lambda: services.check_store(store),
        "output": lambda: machine.check_output(out),
        "model cache": lambda: machine.check_model_folder(machine.model_folder()),
        "shared memory": machine.check_shared_memory,
        "host memory": machine.check_host_memory,
        "limits": machine.check_limits,
    }
    for name, examine in checks.items():
        yield perform(name, examine)


def diagnose_cluster(*, address: str, out: Path) -> Iterator[Check]:
    """Examine every node of a Ray cluster, and the network between them. GPUs are reserved for some seconds.

    Args:
        address: of the cluster, HOST:PORT or `auto`.
        out: absolute folder that the nodes should share.
    """
    argument = json.dumps([address, str(out)])
    yield from cluster.check_cluster(lambda: probe.ask("nodes", argument, seconds=NODES_SECONDS), str(out))
