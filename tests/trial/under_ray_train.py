"""Runs trials of the engine that fails on demand, one after the other, under Ray Train; prints what came of them.

python under_ray_train.py FOLDER FAULT@RANK ...
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from autotune.search.authentication import authenticate

authenticate(None)

import ray  # noqa: E402 the authentication mode is read at import

from autotune.spec.cluster import ClusterSpec, find_gpu  # noqa: E402
from autotune.trial.train_run import run_trial  # noqa: E402
from tests.trial.gangs import FAULTY, a_request  # noqa: E402


def ranks_left() -> list[str]:
    """Processes of this Ray that still run a rank or something that a rank started."""
    family = psutil.Process().children(recursive=True)
    return [name for name in (_name(process) for process in family) if "RayTrainWorker" in name or "sleep" in name]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main(folder: Path, cores: int, trials: list[str]) -> None:
    cluster = ClusterSpec(nodes=1, gpus_per_node=2, gpu=find_gpu("cpu"), memory_bytes=1 << 30)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    found: list[dict[str, Any]] = []
    for trial in trials:
        request = a_request(trial)
        if trial.startswith("sleep"):
            request = dataclasses.replace(request, stall_seconds=3.0)
        if trial.startswith("slow"):
            request = dataclasses.replace(request, stall_seconds=2.0, timeout_seconds=1.5)
        started = time.monotonic()
        outcome = run_trial(request, cluster, study="faults", log_dir=str(folder / "logs"), engine=FAULTY)
        found.append(outcome.to_dict() | {"seconds": time.monotonic() - started, "left": ranks_left()})
        sys.stderr.write(f"{trial}: {found[-1]}\n")
    ray.shutdown()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
