"""A trial under Ray Tune over several nodes, and whose failure counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Phase
from autotune.trial.trainable import lost, placement, verdict
from tests.samples import space_text

SCRIPT = Path(__file__).with_name("two_nodes.py")


def failed(kind: FailureKind, message: str) -> Failure:
    return Failure(kind=kind, phase=Phase.BACKWARD, message=message)


def test_the_node_that_knows_why_is_believed() -> None:
    gone = failed(FailureKind.CRASH, "RuntimeError: Connection closed by peer [10.0.0.2]:1234")
    memory = failed(FailureKind.OUT_OF_MEMORY, "tried to allocate 512 bytes")
    stopped = failed(FailureKind.INTERRUPTED, "cancelled")
    assert verdict([gone, memory]) is memory
    assert verdict([gone, memory, stopped]) is memory
    assert verdict([memory, gone]) is memory
    assert verdict([gone, stopped]) is gone
    assert verdict([stopped]) is stopped


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed"), FailureKind.HOST_OUT_OF_MEMORY, "Task was killed"),
        (ray.exceptions.ActorDiedError(), FailureKind.WORKER_LOST, "died unexpectedly"),
        (ray.exceptions.ActorUnavailableError("Socket closed", None), FailureKind.WORKER_LOST, "Socket closed"),
        (ray.exceptions.NodeDiedError("node 12"), FailureKind.NODE_LOST, "node 12"),
        (ray.exceptions.GetTimeoutError("too long"), FailureKind.WORKER_LOST, "too long"),
        (ray.exceptions.RayTaskError("run", "…", KeyError("a bug")), FailureKind.CRASH, "KeyError: 'a bug'"),
    ],
)
def test_what_ray_says_of_a_pool(error: Exception, kind: FailureKind, says: str) -> None:
    failure = lost(error, "rank0.log")
    assert (failure.kind, failure.log_path) == (kind, "rank0.log")
    assert says in failure.message
    peers = failed(FailureKind.CRASH, "RuntimeError: Connection closed by peer [10.0.0.2]:1234")
    assert verdict([peers, failure]) is failure  # also where Ray speaks of sockets


@pytest.mark.parametrize(("gpus", "bundles"), [(1, [1.0]), (8, [8.0]), (16, [8.0, 8.0])])
def test_a_trial_reserves_one_bundle_a_node(gpus: int, bundles: list[float]) -> None:
    cluster = ClusterSpec(nodes=2, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
    config = TrialConfig(engine="pytorch", gpus=gpus, micro_batch_size=1, sequence_length=128)
    reserved = placement(config, cluster)
    assert [bundle["GPU"] for bundle in reserved.bundles] == bundles
    assert reserved.strategy == ("STRICT_PACK" if len(bundles) == 1 else "STRICT_SPREAD")


def test_one_process_may_hold_all_gpus_of_a_node() -> None:
    cluster = ClusterSpec(nodes=2, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
    config = TrialConfig(engine="pytorch", gpus=8, micro_batch_size=1, sequence_length=128, device_map="auto")
    assert placement(config, cluster).bundles == [{"GPU": 8.0}]
    assert (config.ranks, config.gpus_per_rank, config.data_parallel_size) == (1, 8, 1)


@pytest.mark.slow
def test_a_trial_over_two_nodes(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        space_text(
            cluster={"nodes": 2, "gpus_per_node": 1, "gpu": "cpu", "memory_bytes": "48MiB"},
            workload={"global_batch_size": 64, "sequence_length": 128},
            search={
                "engine": "pytorch",
                "precision": "fp32",
                "zero_stage": 3,
                "activation_checkpointing": "none",
                "micro_batch_size": [2, 32],
            },
            baseline=...,
        )
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert run.returncode == 0, run.stderr
    fits, too_big = json.loads(run.stdout.splitlines()[-1])
    assert fits["outcome"] == "measurement", fits
    assert [rank["rank"] for rank in fits["ranks"]] == [0, 1]
    assert too_big["kind"] == "out_of_memory", too_big
    assert too_big["requested_bytes"] > 0
