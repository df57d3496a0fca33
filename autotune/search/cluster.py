"""Connect to Ray, and compare the hardware there with what a study asks for."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray

from autotune.errors import ClusterError
from autotune.spec.cluster import ClusterSpec, GpuSpec, identify_gpu


def require_local(cluster: ClusterSpec) -> None:
    """Refuse at once, before Ray is started, a study that this machine cannot run.

    Raises:
        ClusterError: the study needs GPUs or nodes that are not here.
    """
    if cluster.device == "cpu":
        return
    here = len(_local_gpus())
    if cluster.nodes > 1 or here < cluster.gpus_per_node:
        raise _lacking(cluster, f"this machine has {_count(here, 'such GPU')}")


@contextmanager
def connected(address: str | None, cluster: ClusterSpec | None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one that ends with the context.

    `autotune.search.authentication.authenticate` comes first, before Ray is imported.

    Raises:
        ClusterError: nothing answers at the address, or it refuses us.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The study handles Ctrl-C itself, so that running trials are stored as interrupted.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints boxes to stdout even when told to be silent
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "600"
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address is None:
        cores = psutil.cpu_count() or 1
        slots = cluster.total_gpus if cluster is not None and cluster.device == "cpu" else 0
        options |= {"num_cpus": max(cores, slots), "include_dashboard": False}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises a dozen types here, most of them undocumented
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        where = address or "this machine"
        raise ClusterError(f"Ray at {where} cannot be used ({reason}); check the address and RAY_AUTH_TOKEN") from error
    try:
        yield
    finally:
        ray.shutdown()


def require(cluster: ClusterSpec) -> None:
    """Check that the connected cluster has what the study asks for.

    Raises:
        ClusterError: it has not.
    """
    resource = "CPU" if cluster.device == "cpu" else "GPU"
    enough = [node for node in _nodes() if node["Resources"].get(resource, 0) >= cluster.gpus_per_node]
    if len(enough) < cluster.nodes:
        found = ", ".join(f"{node['Resources'].get(resource, 0):g} {resource}s" for node in _nodes())
        raise _lacking(cluster, f"the Ray cluster has {_count(len(_nodes()), 'node')} with {found}")


def detect() -> ClusterSpec:
    """The hardware of the connected cluster: its nodes with GPUs, which must be alike.

    Raises:
        ClusterError: it has no GPU, nodes that differ, or a GPU that the table does not know.
    """
    nodes = [node for node in _nodes() if node["Resources"].get("GPU", 0) >= 1]
    counts = {int(node["Resources"]["GPU"]) for node in nodes}
    if not nodes:
        raise ClusterError(
            "cluster: auto found no GPU in the Ray cluster; state cluster: {gpu: cpu, ...} to run on CPUs"
        )
    if len(counts) > 1:
        raise ClusterError(f"cluster: auto found nodes with {sorted(counts)} GPUs; state nodes, gpus_per_node and gpu")
    found = {ray.get(ray.remote(_first_gpu).options(num_gpus=1, num_cpus=0).remote())}
    name, memory_bytes = found.pop()
    gpu: GpuSpec | None = identify_gpu(name, memory_bytes)
    if gpu is None:
        raise ClusterError(
            f"cluster: auto found {name!r}, which the hardware table does not know; state gpu by its nearest name"
        )
    return ClusterSpec(nodes=len(nodes), gpus_per_node=counts.pop(), gpu=gpu, memory_bytes=memory_bytes)


def _first_gpu() -> tuple[str, int]:
    """Name and total bytes of a GPU of this node, without initialising CUDA."""
    gpus = _local_gpus()
    return gpus[0] if gpus else ("unknown GPU", 0)


def _local_gpus() -> list[tuple[str, int]]:
    """(name, total bytes) of each NVIDIA GPU of this machine; empty without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: no usable GPU
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [(str(pynvml.nvmlDeviceGetName(h)), int(pynvml.nvmlDeviceGetMemoryInfo(h).total)) for h in handles]
    finally:
        pynvml.nvmlShutdown()


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _lacking(cluster: ClusterSpec, found: str) -> ClusterError:
    return ClusterError(
        f"the study needs {cluster.describe()}, but {found}; run it on that cluster with --address, or change `cluster`"
    )
