"""Runs a study on Ray Tune."""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

import ray
from ray import tune

from autotune.predict.plan import Plan
from autotune.search.earlier import Earlier
from autotune.search.samplers import SamplerName, build_sampler
from autotune.search.tune_search import TuneSearch
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.request import TrialRequest
from autotune.study import Study
from autotune.trial.ray_train import RESERVATION, RayTrainTrainable, room
from autotune.trial.trainable import TrialTrainable, node_pool, placement


class LauncherName(StrEnum):
    """Who starts the processes of a trial."""

    POOL = "pool"
    RAY_TRAIN = "ray-train"


def run_study(
    study: Study,
    sampler: SamplerName,
    log_dir: Path,
    seed: int = 0,
    launcher: LauncherName = LauncherName.POOL,
    plan: Plan | None = None,
    earlier: Earlier | None = None,
) -> None:
    """Run trials until the budget is spent or no candidate is left, then confirm what leads. Ray is connected already.

    As many trials run at a time as the cluster has room for. Under Ray Train they hold no reservation while they wait
    for it, so only as many run as there would be room for if all were of the largest size.

    Raises:
        KeyboardInterrupt: the user stopped it; running attempts are stored as interrupted.
    """
    space = study.space
    if study.finished:
        return
    search = TuneSearch(study, build_sampler(sampler, seed, study, plan, earlier), seed)
    pooled = launcher is LauncherName.POOL
    pools = _start_pools(study, log_dir) if pooled else []
    sizes = [int(gpus) for gpus in space.axes["gpus"]] + ([space.baseline.gpus] if space.baseline else [])
    at_once = space.cluster.total_gpus // min(sizes) if pooled else room(space.cluster, max(sizes))
    template = TrialRequest(
        trial_id="",
        model=space.model,
        workload=space.workload,
        config=next(iter(space.candidates)),
        device=space.cluster.device,
        measure=space.measure,
        memory_limit_bytes=space.cluster.memory_bytes if space.cluster.device == "cpu" else None,
        timeout_seconds=space.file.budget.trial_seconds,
        stall_seconds=space.file.budget.trial_seconds / 2,
        nvme_path=space.cluster.nvme_path,
        script=space.script,
    )
    cluster = space.cluster
    given = {"template": template, "cluster": cluster, "log_dir": str(log_dir)}
    if pooled:
        trainable = tune.with_resources(
            tune.with_parameters(TrialTrainable, **given),
            lambda trial: placement(
                TrialConfig.from_dict(trial["config"]), cluster, _first_nodes(cluster) if "long_run" in trial else ()
            ),
        )
    else:
        trainable = tune.with_resources(tune.with_parameters(RayTrainTrainable, study=space.name, **given), RESERVATION)
    with tempfile.TemporaryDirectory(prefix="autotune-tune-") as scratch:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=-1, max_concurrent_trials=max(1, at_once), reuse_actors=pooled
            ),
            run_config=tune.RunConfig(name=space.name, storage_path=scratch, verbose=0),
        )
        try:
            tuner.fit()
        except KeyboardInterrupt:
            search.interrupt("the study was stopped while the trial ran")
            raise
        finally:
            del pools


def _first_nodes(cluster: ClusterSpec) -> list[str]:
    """Addresses of the nodes that all runs of a confirmation use; none where there is no choice."""
    if cluster.nodes == 1:
        return []
    resource = "CPU" if cluster.device == "cpu" else "GPU"
    able = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get(resource, 0) >= cluster.gpus_per_node]
    return sorted(node["NodeManagerAddress"] for node in able)


def _start_pools(study: Study, log_dir: Path) -> list[Any]:
    """Start every node's pool now and all at once, since importing the libraries takes seconds.

    A pool ends with its last handle: the caller keeps the list while trials run.
    """
    device = study.space.cluster.device
    resource = "CPU" if device == "cpu" else "GPU"
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) >= 1]
    pools = [node_pool(node["NodeID"], device, str(log_dir)) for node in nodes]
    ray.get([pool.ready.remote() for pool in pools])
    return pools
