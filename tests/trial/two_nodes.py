"""Runs two trials on a Ray cluster of two nodes with one worker each, and prints their outcomes as JSON."""

import json
import sys
from pathlib import Path

from autotune.search.authentication import authenticate

authenticate(None)

import ray  # noqa: E402 the authentication mode is read at import
from ray import tune  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from autotune.space.space import load_space  # noqa: E402
from autotune.spec.config import TrialConfig  # noqa: E402
from autotune.spec.request import TrialRequest  # noqa: E402
from autotune.trial.trainable import TrialTrainable, placement  # noqa: E402


def main(space_path: Path, folder: Path) -> None:
    space = load_space(space_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        template = TrialRequest(
            trial_id="",
            model=space.model,
            workload=space.workload,
            config=space.candidates[0],
            device="cpu",
            memory_limit_bytes=space.cluster.memory_bytes,
            timeout_seconds=60,
        )
        hardware = space.cluster
        trainable = tune.with_parameters(
            TrialTrainable, template=template, cluster=hardware, log_dir=str(folder / "logs")
        )
        trainable = tune.with_resources(
            trainable, lambda trial: placement(TrialConfig.from_dict(trial["config"]), hardware)
        )
        outcomes = []
        for number, config in enumerate(space.candidates, 1):
            result = tune.Tuner(
                trainable,
                param_space={"attempt": number, "trial": number, "config": config.to_dict()},
                run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
            ).fit()[0]
            assert result.metrics is not None, result.error
            outcomes.append(json.loads(result.metrics["outcome"]))
        sys.stdout.write(json.dumps(outcomes) + "\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
