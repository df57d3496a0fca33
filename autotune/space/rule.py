"""`Rule`: one reason why a config may be illegal.

A rule says which fields it reads, so that a space of millions is judged on the few combinations of those alone
(`autotune.space.grid`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

Judge = Callable[[TrialConfig, Workload, ModelSpec, ClusterSpec], str | None]

DEGREES = ("tensor_parallel_size", "sequence_parallel_size", "pipeline_parallel_size")
"""Fields that say how many ranks share a model or a sequence."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Calling it gives the reason why a config is illegal, or None."""

    reads: tuple[str, ...]
    """The fields of the config that decide, DeepSpeed's keys each by itself as `deepspeed.KEY`; whatever the others
    are, the answer is the same."""
    judge: Judge

    def __call__(self, config: TrialConfig, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> str | None:
        """Why the config is illegal, or None when this rule has nothing against it."""
        return self.judge(config, workload, model, cluster)


def reads(*fields: str) -> Callable[[Judge], Rule]:
    """Make a rule of a function that reads these fields of the config."""
    return lambda judge: Rule(fields, judge)
