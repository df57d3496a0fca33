"""Requests for small real trials, and the census of what a trial may leave behind."""

import dataclasses
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import psutil

from autotune.spec.config import Engine, Offload, TrialConfig
from autotune.spec.model import load_model
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload
from autotune.trial.leftovers import GANG_VARIABLE
from autotune.trial.pool import GangResult, NodePool

FAULTY = "tests.trial.faulty_engine:build_engine"
ROOT = str(Path(__file__).parents[2])
SHARED_MEMORY = Path("/dev/shm")
LIBRARIES_NAMES = re.compile(r"nccl-|torch_|psm_|sem\.|ds_")  # browsers keep changing theirs
SMALL_BUCKETS = tuple(
    (f"zero_optimization.{key}", 1_000_000)
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
)


def a_request(
    trial_id: str, *, engine: Engine = "pytorch", zero_stage: int = 0, offload: Offload = "none", **changes: object
) -> TrialRequest:
    request = TrialRequest(
        trial_id=trial_id,
        model=load_model("qwen3-tiny", Path.cwd()),
        workload=Workload(global_batch_size=16),
        config=TrialConfig(
            engine=engine,
            gpus=2,
            micro_batch_size=2,
            sequence_length=64,
            precision="fp32",
            zero_stage=zero_stage,
            offload=offload,
            deepspeed=SMALL_BUCKETS if engine == "deepspeed" and zero_stage else (),
        ),
        device="cpu",
        memory_limit_bytes=1 << 30,
        timeout_seconds=60,
        stall_seconds=30,
    )
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


def run(pool: NodePool, request: TrialRequest, owner_pid: int | None = None) -> GangResult:
    gpus = request.config.gpus
    port = pool.free_port()
    return pool.run(
        request,
        ranks=range(gpus),
        world_size=gpus,
        master_address="127.0.0.1",
        master_port=port,
        owner_pid=owner_pid,
    )


class Census(NamedTuple):
    processes: frozenset[int]
    """Descendants of the pool's process, and what ranks started, wherever it has gone."""
    listening_ports: frozenset[int]
    """Of those and of the pool's process."""
    shared_memory: frozenset[str]
    threads: int
    file_descriptors: int


def census(pool_pid: int | None = None) -> Census:
    """What there is now around a pool's process, which is this one if none is named."""
    pool = psutil.Process(pool_pid)
    family = {process.pid: process for process in pool.children(recursive=True)}
    # Other sessions of this machine may run trials too: theirs have another folder for extensions.
    family |= {process.pid: process for process in psutil.process_iter() if _is_ours(process)}
    return Census(
        processes=frozenset(family),
        listening_ports=frozenset(port for process in (pool, *family.values()) for port in _listening_ports(process)),
        shared_memory=frozenset(path.name for path in SHARED_MEMORY.iterdir() if LIBRARIES_NAMES.match(path.name)),
        threads=pool.num_threads() if pool_pid else threading.active_count(),
        file_descriptors=pool.num_fds(),
    )


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def fork_family(pid: int) -> list[psutil.Process]:
    """The fork server of a process, and its children, whose command lines look the same."""
    children = psutil.Process(pid).children(recursive=True)
    return [process for process in children if "multiprocessing.forkserver" in command(process)]


def _is_ours(process: psutil.Process) -> bool:
    try:
        gang = process.environ().get(GANG_VARIABLE, "")
    except psutil.Error:
        return False
    return gang.startswith(f"{os.getpid()}-")


def _listening_ports(process: psutil.Process) -> list[int]:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return []
    return [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]
