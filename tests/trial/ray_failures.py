"""Runs a study on Ray while processes of it are killed, and prints what was stored and left as one JSON object.

Each of its two trials, one an engine, first loses its pool, then the process that drives it, and runs at last.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from autotune.search.authentication import authenticate

authenticate(None)

import ray  # noqa: E402 the authentication mode is read at import

from autotune.search.runner import run_study  # noqa: E402
from autotune.search.samplers import SamplerName  # noqa: E402
from autotune.space.space import load_space  # noqa: E402
from autotune.spec.outcome import Failure, Outcome  # noqa: E402
from autotune.store.store import open_store  # noqa: E402
from autotune.study import Attempt, Study  # noqa: E402
from autotune.trial.trainable import node_pool  # noqa: E402
from tests.trial.gangs import FAULTY, SHARED_MEMORY, command  # noqa: E402

DRIVER = "ResourceTrainable"  # what `tune.with_resources` makes of `TrialTrainable`
VICTIMS = {1: "NodePool", 2: DRIVER, 4: "NodePool", 5: DRIVER}
"""By the attempt's id: the actor class whose process is killed."""
TRIALS = {1: 1, 2: 1, 4: 2, 5: 2}
FAULTS = {f"{trial:04d}-{attempt}": "sleep.backward@1" for attempt, trial in TRIALS.items()}


class Killer:
    """Kills a process of every attempt that shall fail, once one of its ranks sleeps."""

    def __init__(self, log_dir: Path) -> None:
        self.attempts: list[dict[str, object]] = []
        self._log_dir = log_dir
        self._killed_at = 0.0

    def started(self, attempt: Attempt) -> None:
        victim = VICTIMS.get(attempt.id)
        self.attempts.append({"id": attempt.id, "trial": attempt.trial, "engine": attempt.config.engine})
        if victim is not None:
            log = self._log_dir / f"{attempt.trial:04d}-{attempt.id}" / "rank1.log"
            threading.Thread(target=self._kill, args=(victim, log, self.attempts[-1])).start()

    def finished(self, attempt: Attempt, outcome: Outcome) -> None:
        entry = next(entry for entry in self.attempts if entry["id"] == attempt.id)
        entry["outcome"] = outcome.kind if isinstance(outcome, Failure) else "measurement"
        entry["message"] = outcome.message if isinstance(outcome, Failure) else ""
        entry["log_path"] = outcome.log_path
        entry["seconds"] = round(time.monotonic() - self._killed_at, 1)

    def _kill(self, victim: str, log: Path, entry: dict[str, object]) -> None:
        wait(lambda: log.exists() and "asleep" in log.read_text())
        [actor] = [process for process in session() if command(process).startswith(f"ray::{victim}")]
        gang = ranks()
        entry["ranks"] = len(gang)
        actor.kill()
        self._killed_at = time.monotonic()
        wait(lambda: not any(is_alive(process) for process in gang))
        entry["gang_gone_seconds"] = round(time.monotonic() - self._killed_at, 1)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def session() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def ranks() -> list[psutil.Process]:
    """Processes that a fork server has forked: their command line is its own."""
    servers = {process.pid for process in session() if "multiprocessing.forkserver" in command(process)}
    return [process for process in session() if process.pid in servers and process.ppid() in servers]


def census() -> dict[str, object]:
    """What a trial could leave on this machine, Ray's own processes and ports aside."""
    ours = [process for process in session() if "multiprocessing.forkserver" in command(process)]
    ports = [
        connection.laddr.port
        for process in [*ours, *(p for p in session() if command(p).startswith("ray::NodePool"))]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    return {
        "ranks": [process.pid for process in ranks()],
        "fork_servers": len(ours) - len(ranks()),
        "ports": len(ports),
        "shared_memory": sorted(path.name for path in SHARED_MEMORY.glob("nccl-*")),
    }


def main(space_path: Path, folder: Path) -> None:
    os.environ["FAULTS"] = json.dumps(FAULTS)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    space = load_space(space_path)
    log_dir = folder / "logs"
    killer = Killer(log_dir)
    try:
        pool = node_pool(ray.get_runtime_context().get_node_id(), "cpu", str(log_dir), FAULTY)
        ray.get(pool.ready.remote())
        before = census()
        with open_store(f"sqlite:///{folder}/study.db", create=True) as store:
            study = Study.open(space, store)
            study.observers.append(killer)
            run_study(study, SamplerName.RANDOM, log_dir)
        wait(lambda: census() == before)
        report = {"attempts": killer.attempts, "before": before, "after": census()}
        sys.stdout.write(json.dumps(report) + "\n")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
