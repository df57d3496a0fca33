"""`TrialTrainable`: one trial under Ray Tune. It holds the trial's GPUs and has each node's pool run its ranks.

The Tune trial's placement group has one bundle a node. This actor lives in bundle 0; in every further bundle a
`_Holder` keeps the GPUs that Ray gave it and reports their ids. The pools themselves reserve nothing.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, Phase
from autotune.spec.request import TrialRequest
from autotune.spec.workload import LongRunSettings
from autotune.trial.compose import conclude
from autotune.trial.failure import describe, is_collateral
from autotune.trial.pool import ENGINE, READY_SECONDS, GangResult, NodePool

POLL_SECONDS = 5.0
RESTART_POLL_SECONDS = 0.5
HOLDER_SECONDS = 60.0
"""The GPUs are reserved already when a holder is started; if it cannot be, its node has gone meanwhile."""
NODE_SHARE = 0.001
"""Of the resource `node:ADDRESS` that every node of Ray has once, to be asked for by name."""
VERDICT_SECONDS = 1.0
"""How long the node that knows why a trial failed may speak later than the others."""


def placement(config: TrialConfig, cluster: ClusterSpec, addresses: Sequence[str] = ()) -> tune.PlacementGroupFactory:
    """The trial's reservation: one bundle a node, all or nothing.

    Args:
        config: the trial's.
        cluster: where it runs.
        addresses: of nodes that it must run on, the first of them; without any, Ray chooses.
    """
    nodes = math.ceil(config.gpus / cluster.gpus_per_node)
    resource = "CPU" if cluster.device == "cpu" else "GPU"
    bundles = [{resource: float(config.gpus // nodes)} for _ in range(nodes)]
    for bundle, address in zip(bundles, addresses, strict=False):
        bundle[f"node:{address}"] = NODE_SHARE
    return tune.PlacementGroupFactory(bundles, strategy="STRICT_PACK" if nodes == 1 else "STRICT_SPREAD")


def node_pool(node_id: str, device: str, log_dir: str, engine: str = ENGINE) -> Any:
    """The node's pool actor, started if it is not there yet. It lives as long as the job."""
    return (
        ray.remote(NodePool)
        .options(
            name=f"autotune-pool-{node_id}",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=16,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(device=device, log_dir=log_dir, engine=engine)
    )


def await_pools(pools: Sequence[Any]) -> None:
    """Wait until the pools can run trials. One that died is started again by Ray and unavailable until then.

    Raises:
        ray.exceptions.RayError: a pool does not come back.
    """
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            ray.get([pool.ready.remote() for pool in pools], timeout=READY_SECONDS)
            return
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RESTART_POLL_SECONDS)


def verdict(failures: Sequence[Failure]) -> Failure:
    """The failure of one trial that counts, of what its nodes reported in this order.

    Neither a node that only saw its peers go nor one that was told to stop knows the reason.
    """
    return next((f for f in failures if f.kind is not FailureKind.INTERRUPTED and not _is_collateral(f)), failures[0])


def _is_collateral(failure: Failure) -> bool:
    # Ray, too, speaks of closed sockets, but of the pool's own.
    pool_lost = failure.kind in (FailureKind.WORKER_LOST, FailureKind.NODE_LOST) and failure.rank is None
    return not pool_lost and is_collateral(failure.message)


def lost(error: Exception, log_path: str | None = None) -> Failure:
    """The failure of a trial whose pool or holder did not answer: what Ray says of it.

    Args:
        error: a `ray.exceptions.RayError`.
        log_path: of the node's first rank.
    """
    kind = FailureKind.WORKER_LOST
    message = " ".join(f"the node's pool, which ran the ranks, was lost: {describe(error)}".split())[:500]
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        kind = FailureKind.HOST_OUT_OF_MEMORY  # Ray's memory monitor kills the pool when its ranks have the memory
    elif isinstance(error, ray.exceptions.RayTaskError):
        kind, message = FailureKind.CRASH, describe(error.cause)  # a bug of ours
    elif isinstance(error, ray.exceptions.NodeDiedError) or ("node" in message and "has died" in message):
        kind = FailureKind.NODE_LOST
    return Failure(kind=kind, phase=Phase.START, message=message, log_path=log_path)


class Place(NamedTuple):
    """A bundle of the trial, and the process that holds it."""

    node_id: str
    address: str
    gpu_ids: list[str]
    pid: int


class _Holder:
    """Occupies a further bundle of the trial; Ray tells it which GPUs those are."""

    def where(self) -> Place:
        """Where it sits."""
        return _here()


def _here() -> Place:
    context = ray.get_runtime_context()
    gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
    return Place(context.get_node_id(), ray.util.get_node_ip_address(), gpu_ids, os.getpid())


class TrialTrainable(tune.Trainable):  # type: ignore[misc] # Ray ships no types
    """Runs one attempt and reports its outcome as its only result."""

    def setup(self, config: dict[str, Any], template: TrialRequest, cluster: ClusterSpec, log_dir: str) -> None:
        """Called once per actor; `reset_config` hands over later trials."""
        self._template, self._cluster, self._log_dir = template, cluster, log_dir
        self._trial = config
        # The reservation is as old as this process, and is kept from one trial to the next.
        self._held_since = psutil.Process().create_time()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the actor and its imports are kept."""
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        """The whole trial."""
        config = TrialConfig.from_dict(self._trial["config"])
        trial_id = f"{self._trial['trial']:04d}-{self._trial['attempt']}"
        long_run = self._trial.get("long_run")
        request = dataclasses.replace(
            self._template,
            config=config,
            trial_id=trial_id,
            long_run=None if long_run is None else LongRunSettings(**long_run),
            most_step_seconds=self._trial.get("most_step_seconds"),
            timeout_seconds=self._template.timeout_seconds + self._trial.get("more_seconds", 0.0),
        )
        outcome = self._run(request)
        now = time.time()
        outcome = dataclasses.replace(outcome, elapsed_seconds=now - self._held_since)
        self._held_since = now
        speed = outcome.tokens_per_second_per_gpu if isinstance(outcome, Measurement) else 0.0
        # As text, because Tune flattens nested results before the searcher sees them.
        return {"outcome": json.dumps(outcome.to_dict()), "objective": speed, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A trial has no state to save, but a reused actor must answer."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """See `save_checkpoint`."""

    def _run(self, request: TrialRequest) -> Outcome:
        holders = self._holders(request.config)
        try:
            places = [_here(), *ray.get([holder.where.remote() for holder in holders], timeout=HOLDER_SECONDS)]
            pools = [node_pool(place.node_id, request.device, self._log_dir) for place in places]
            await_pools(pools)
            # Ranks of one node meet on loopback: it works whatever the host name resolves to.
            address = "127.0.0.1" if len(places) == 1 else places[0].address
            port = ray.get(pools[0].free_port.remote())
            per_node = request.config.ranks // len(places)
            running = {
                pool.run.remote(
                    request,
                    ranks=list(range(index * per_node, (index + 1) * per_node)),
                    world_size=request.config.ranks,
                    master_address=address,
                    master_port=port,
                    gpu_ids=place.gpu_ids,
                    owner_pid=place.pid,
                ): (pool, str(Path(self._log_dir) / request.trial_id / f"rank{index * per_node}.log"))
                for index, (pool, place) in enumerate(zip(pools, places, strict=True))
            }
            return self._collect(request, running)
        except ray.exceptions.RayError as error:
            return lost(error)
        finally:
            for holder in holders:
                ray.kill(holder)

    def _holders(self, config: TrialConfig) -> list[Any]:
        """The actors that hold the further bundles."""
        group = ray.util.get_current_placement_group()
        bundles = math.ceil(config.gpus / self._cluster.gpus_per_node)
        resources: dict[str, Any] = {"num_cpus": 0, "num_gpus": config.gpus // bundles}
        if self._cluster.device == "cpu":
            resources = {"num_cpus": config.gpus // bundles}
        return [
            ray.remote(_Holder)
            .options(
                **resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(1, bundles)
        ]

    def _collect(self, request: TrialRequest, running: dict[Any, tuple[Any, str]]) -> Outcome:
        """Wait for every node; a failure on one ends the others, and the one that came first counts.

        Args:
            request: the trial.
            running: each node's result to come, with its pool and the log of its first rank.
        """
        results: list[GangResult] = []
        failures: list[Failure] = []
        cancelled = False
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=VERDICT_SECONDS if failures else POLL_SECONDS)
            for reference in done:
                _, log_path = running.pop(reference)
                failure = self._failure_of(reference, results, log_path)
                failures += [] if failure is None else [failure]
            # A node that only saw its peers go waits a moment for the node that knows why.
            known = any(not _is_collateral(failure) for failure in failures)
            if failures and not cancelled and (known or not done):
                cancelled = True
                for pool, _ in running.values():
                    pool.cancel.remote(request.trial_id)
        if failures:
            return verdict(failures)
        ranks = tuple(sorted((rank for result in results for rank in result.ranks), key=lambda rank: rank.rank))
        measured = conclude(ranks, request, self._cluster.gpu)
        return dataclasses.replace(measured, log_path=results[0].log_path)

    def _failure_of(self, reference: Any, results: list[GangResult], log_path: str) -> Failure | None:
        try:
            result: GangResult = ray.get(reference)
        except ray.exceptions.RayError as error:
            return lost(error, log_path)
        results.append(result)
        if result.failure is None:
            return None
        failed = result.failure
        return Failure(
            kind=failed.kind,
            phase=failed.phase,
            message=failed.message,
            rank=failed.rank,
            requested_bytes=failed.requested_bytes,
            phase_seconds=result.phase_seconds,
            log_path=result.log_path,
        )
