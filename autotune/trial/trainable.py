"""`TrialTrainable`: one trial under Ray Tune. It holds the trial's GPUs and has each node's pool run its ranks.

The Tune trial's placement group has one bundle a node. This actor lives in bundle 0; in every further bundle a
`_Holder` keeps the GPUs that Ray gave it and reports their ids. The pools themselves reserve nothing.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, Phase
from autotune.spec.request import TrialRequest
from autotune.trial.compose import compose
from autotune.trial.failure import is_collateral
from autotune.trial.pool import GangResult, NodePool

POLL_SECONDS = 5.0
VERDICT_SECONDS = 1.0
"""How long the node that knows why a trial failed may speak later than the others."""


def placement(config: TrialConfig, cluster: ClusterSpec) -> tune.PlacementGroupFactory:
    """The trial's reservation: one bundle a node, all or nothing."""
    nodes = math.ceil(config.gpus / cluster.gpus_per_node)
    resource = "CPU" if cluster.device == "cpu" else "GPU"
    bundles = [{resource: float(config.gpus // nodes)} for _ in range(nodes)]
    return tune.PlacementGroupFactory(bundles, strategy="STRICT_PACK" if nodes == 1 else "STRICT_SPREAD")


def node_pool(node_id: str, device: str, log_dir: str) -> Any:
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
        .remote(device=device, log_dir=log_dir)
    )


def verdict(failures: Sequence[Failure]) -> Failure:
    """The failure of one trial that counts, of what its nodes reported in this order.

    Neither a node that only saw its peers go nor one that was told to stop knows the reason.
    """
    reasons = (f for f in failures if f.kind is not FailureKind.INTERRUPTED and not is_collateral(f.message))
    return next(reasons, failures[0])


class _Holder:
    """Occupies a further bundle of the trial; Ray tells it which GPUs those are."""

    def where(self) -> tuple[str, str, list[str]]:
        """(node id, node address, GPU ids)."""
        return _here()


def _here() -> tuple[str, str, list[str]]:
    context = ray.get_runtime_context()
    return context.get_node_id(), ray.util.get_node_ip_address(), [str(gpu) for gpu in ray.get_gpu_ids()]


class TrialTrainable(tune.Trainable):  # type: ignore[misc] # Ray ships no types
    """Runs one attempt and reports its outcome as its only result."""

    def setup(self, config: dict[str, Any], template: TrialRequest, cluster: ClusterSpec, log_dir: str) -> None:
        """Called once per actor; `reset_config` hands over later trials."""
        self._template, self._cluster, self._log_dir = template, cluster, log_dir
        self._trial = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the actor and its imports are kept."""
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        """The whole trial."""
        config = TrialConfig.from_dict(self._trial["config"])
        trial_id = f"{self._trial['trial']:04d}-{self._trial['attempt']}"
        request = dataclasses.replace(self._template, config=config, trial_id=trial_id)
        started = time.monotonic()
        outcome = self._run(request)
        outcome = dataclasses.replace(outcome, elapsed_seconds=time.monotonic() - started)
        speed = outcome.tokens_per_second_per_gpu if isinstance(outcome, Measurement) else 0.0
        # As text, because Tune flattens nested results before the searcher sees them.
        return {"outcome": json.dumps(outcome.to_dict()), "objective": speed, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A trial has no state to save, but a reused actor must answer."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """See `save_checkpoint`."""

    def _run(self, request: TrialRequest) -> Outcome:
        nodes, holders = self._nodes(request.config)
        try:
            pools = [node_pool(node_id, request.device, self._log_dir) for node_id, _, _ in nodes]
            # Ranks of one node meet on loopback: it works whatever the host name resolves to.
            address = "127.0.0.1" if len(nodes) == 1 else nodes[0][1]
            port = ray.get(pools[0].free_port.remote())
            per_node = request.config.gpus // len(nodes)
            running = {
                pool.run.remote(
                    request,
                    ranks=list(range(index * per_node, (index + 1) * per_node)),
                    world_size=request.config.gpus,
                    master_address=address,
                    master_port=port,
                    gpu_ids=nodes[index][2],
                ): pool
                for index, pool in enumerate(pools)
            }
            return self._collect(request, running)
        finally:
            for holder in holders:
                ray.kill(holder)

    def _nodes(self, config: TrialConfig) -> tuple[list[tuple[str, str, list[str]]], list[Any]]:
        """(node id, address, GPU ids) of each bundle, and the actors that hold the further ones."""
        group = ray.util.get_current_placement_group()
        bundles = math.ceil(config.gpus / self._cluster.gpus_per_node)
        resources: dict[str, Any] = {"num_cpus": 0, "num_gpus": config.gpus // bundles}
        if self._cluster.device == "cpu":
            resources = {"num_cpus": config.gpus // bundles}
        holders = [
            ray.remote(_Holder)
            .options(
                **resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(1, bundles)
        ]
        return [_here(), *ray.get([holder.where.remote() for holder in holders])], holders

    def _collect(self, request: TrialRequest, running: dict[Any, Any]) -> Outcome:
        """Wait for every node; a failure on one ends the others, and the one that came first counts."""
        results: list[GangResult] = []
        failures: list[Failure] = []
        cancelled = False
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=VERDICT_SECONDS if failures else POLL_SECONDS)
            for reference in done:
                running.pop(reference)
                failure = self._failure_of(reference, results)
                failures += [] if failure is None else [failure]
            # A node that only saw its peers go waits a moment for the node that knows why.
            known = any(not is_collateral(failure.message) for failure in failures)
            if failures and not cancelled and (known or not done):
                cancelled = True
                for pool in running.values():
                    pool.cancel.remote(request.trial_id)
        if failures:
            return verdict(failures)
        ranks = tuple(sorted((rank for result in results for rank in result.ranks), key=lambda rank: rank.rank))
        measured = compose(ranks, request, self._cluster.gpu)
        return dataclasses.replace(measured, log_path=results[0].log_path)

    def _failure_of(self, reference: Any, results: list[GangResult]) -> Failure | None:
        try:
            result: GangResult = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            node = "node" in str(error) and "died" in str(error)
            kind = FailureKind.NODE_LOST if node else FailureKind.WORKER_LOST
            return Failure(kind=kind, phase=Phase.START, message=" ".join(str(error).split())[:500])
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
