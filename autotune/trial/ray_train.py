"""`RayTrainTrainable`: the same trial under Ray Train's `TorchTrainer`, for what Ray Train's own tools show of it.

Every trial pays for the start of Ray Train's processes and for their imports, which the pool pays once a study.
"""

import math
import time
from typing import Any

from ray import tune

from autotune.spec.cluster import ClusterSpec
from autotune.spec.outcome import Outcome
from autotune.spec.request import TrialRequest
from autotune.trial.trainable import TrialTrainable

RESERVATION = tune.PlacementGroupFactory([{"memory": 1.0}])
"""Of the Tune trial, which only drives. Ray Train reserves the ranks' GPUs itself, in a placement group of its own;
Tune needs a reservation that is not empty, and a byte is the least that there is."""


def room(cluster: ClusterSpec, gpus: int) -> int:
    """How many trials of up to so many GPUs the empty cluster holds; one that fits on a node is not spread over two."""
    if gpus <= cluster.gpus_per_node:
        return cluster.nodes * (cluster.gpus_per_node // gpus)
    return cluster.nodes // math.ceil(gpus / cluster.gpus_per_node)


class RayTrainTrainable(TrialTrainable):
    """Runs one attempt and reports its outcome as its only result.

    Not to be reused: what a failed start of Ray Train may leave behind ends with this process.
    """

    def setup(
        self, config: dict[str, Any], template: TrialRequest, cluster: ClusterSpec, log_dir: str, study: str = ""
    ) -> None:
        """As `TrialTrainable.setup`; `study` names the Ray Train run."""
        super().setup(config, template, cluster, log_dir)
        self._study = study

    def _run(self, request: TrialRequest) -> Outcome:
        self._held_since = time.time()  # the GPUs are reserved from here on, not with this process
        from autotune.trial.train_run import run_trial  # imports torch, which the driver of the study does not need

        # If this process is killed, what it leaves is among Ray's own files.
        return run_trial(request, self._cluster, study=self._study, log_dir=self._log_dir, scratch=self.logdir)
