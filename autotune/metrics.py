"""What Prometheus sees of a running study, on the metrics port of the driver's node.

    ray_autotune_trials{study, model, state}          trials by state: complete, out_of_memory, failed, running,
                                                      interrupted; of the whole study, as its store has it
    ray_autotune_best_tokens_per_second_per_gpu{study, model}
                                                      of the fastest eligible trial; absent while there is none
    ray_autotune_gpu_seconds_total{study, model, use} GPUs x seconds since this driver started, by what they did
    ray_autotune_gpus{study, model, state}            GPUs of the cluster: `reserved` for running trials, or `free`
    ray_autotune_prediction_error_ratio{study, model, quantity, statistic}
                                                      |predicted / measured - 1| over the trials that have both:
                                                      `median` and `largest`, of `memory` and of `speed`; absent
                                                      while there is none

The uses add up to the cluster's GPUs x the seconds from the start to the last event (a trial started or finished), less
what running trials hold. An attempt counts when it is finished, for `elapsed_seconds` x its GPUs:

    measuring      the `measure` phase of trials that ran
    starting       the rest of them: processes, model, warm-up
    out_of_memory  all of an attempt that ran out of memory, on the device or the host
    failed         all of an attempt that ended in another way
    idle           GPUs without an attempt, and those of one before its GPUs were reserved or after their release

On a CPU cluster a worker counts as a GPU. The series live as long as the driver. They are read every few seconds, so
the last event of a study may be missing: the store has it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autotune.spec.outcome import FailureKind, Measurement, Outcome
from autotune.study import Attempt, Study

USES = ("measuring", "starting", "out_of_memory", "failed", "idle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All values at one moment: one that is lost, or comes twice, does no harm."""

    trials: dict[str, int]
    best_tokens_per_second_per_gpu: float | None
    gpu_seconds: dict[str, float]
    gpus: dict[str, int]
    prediction_errors: dict[tuple[str, str], float]
    """By quantity and statistic; see the module."""


def prediction_errors(study: Study) -> dict[tuple[str, str], float]:
    """How far predictions were from what trials measured, by quantity and statistic."""
    ledger = study.ledger
    found: dict[tuple[str, str], float] = {}
    for quantity, signed in (("memory", ledger.errors), ("speed", ledger.speed_errors)):
        errors = [abs(error) for error in signed]
        if errors:
            found |= {(quantity, "median"): statistics.median(errors), (quantity, "largest"): max(errors)}
    return found


@dataclass(slots=True)
class GpuTime:
    """Splits the time of a cluster's GPUs by use, see the module.

    Args:
        gpus: of the whole cluster.
        clock: seconds.
    """

    gpus: int
    clock: Callable[[], float] = time.monotonic
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))
    _running: dict[int, tuple[int, float]] = field(default_factory=dict)
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def started(self, attempt: Attempt) -> None:
        """An attempt was handed to the runner."""
        self._running[attempt.id] = (attempt.config.gpus, self._pass())

    def finished(self, attempt: Attempt, outcome: Outcome) -> None:
        """It has ended."""
        now = self._pass()
        gpus, since = self._running.pop(attempt.id, (attempt.config.gpus, now))
        used = gpus * outcome.elapsed_seconds
        self.totals["idle"] += max(0.0, gpus * (now - since) - used)
        if isinstance(outcome, Measurement):
            measuring = min(used, gpus * outcome.phase_seconds.get("measure", 0.0))
            self.totals["measuring"] += measuring
            self.totals["starting"] += used - measuring
        elif outcome.kind is FailureKind.STOPPED_EARLY:
            self.totals["measuring"] += used
        else:
            self.totals["out_of_memory" if outcome.kind.is_memory else "failed"] += used

    @property
    def reserved(self) -> int:
        """GPUs of the attempts that run."""
        return sum(gpus for gpus, _ in self._running.values())

    def _pass(self) -> float:
        """Count the GPUs that had no attempt since the last event; returns the time."""
        now = self.clock()
        self.totals["idle"] += max(0, self.gpus - self.reserved) * (now - self._since)
        self._since = now
        return now


class Series:
    """The series, in one actor: Ray tells processes apart, and two of them would show each value twice."""

    def __init__(self, study: str, model: str) -> None:
        tags = {"study": study, "model": model}
        self._trials = Gauge("autotune_trials", "Trials of a study by state", (*tags, "state"))
        self._best = Gauge("autotune_best_tokens_per_second_per_gpu", "Speed of the best trial", tuple(tags))
        self._gpu_seconds = Counter("autotune_gpu_seconds_total", "GPUs x seconds by use", (*tags, "use"))
        self._gpus = Gauge("autotune_gpus", "GPUs of the cluster by state", (*tags, "state"))
        self._errors = Gauge(
            "autotune_prediction_error_ratio",
            "Predictions against measurements: |predicted / measured - 1|",
            (*tags, "quantity", "statistic"),
        )
        for metric in (self._trials, self._best, self._gpu_seconds, self._gpus, self._errors):
            metric.set_default_tags(tags)
        self._counted = dict.fromkeys(USES, 0.0)

    def publish(self, snapshot: Snapshot) -> None:
        """Show these values."""
        for state, number in snapshot.trials.items():
            self._trials.set(number, {"state": state})
        if snapshot.best_tokens_per_second_per_gpu is not None:
            self._best.set(snapshot.best_tokens_per_second_per_gpu)
        for state, number in snapshot.gpus.items():
            self._gpus.set(number, {"state": state})
        for (quantity, statistic), error in snapshot.prediction_errors.items():
            self._errors.set(error, {"quantity": quantity, "statistic": statistic})
        for use, total in snapshot.gpu_seconds.items():
            if total > self._counted[use]:
                self._gpu_seconds.inc(total - self._counted[use], {"use": use})
                self._counted[use] = total


class StudyMetrics:
    """Publishes a study while it runs: an `Observer` of it. It waits for nothing, and no failure of it is the study's.

    Ray is connected already.
    """

    def __init__(self, study: Study, start: Callable[[str, str], Any] | None = None) -> None:
        """Start the actor and publish what the study has so far.

        Args:
            study: the study, which the caller adds this to as an observer.
            start: starts the actor that holds the series, given the names of study and model.
        """
        self._study = study
        self._time = GpuTime(study.space.cluster.total_gpus)
        self._series: Any = None
        try:
            self._series = (start or _start_series)(study.space.name, study.space.model.name)
        except Exception:  # metrics are a comfort: whatever Ray says, the study goes on without
            return
        self._publish()

    def started(self, attempt: Attempt) -> None:
        """An attempt was handed to the runner."""
        self._time.started(attempt)
        self._publish()

    def finished(self, attempt: Attempt, outcome: Outcome) -> None:
        """Its outcome is in the store."""
        self._time.finished(attempt, outcome)
        self._publish()

    def _publish(self) -> None:
        if self._series is None:
            return
        best = self._study.best()
        snapshot = Snapshot(
            trials=asdict(self._study.counts),
            best_tokens_per_second_per_gpu=None if best is None else best.measurement.tokens_per_second_per_gpu,
            gpu_seconds=dict(self._time.totals),
            gpus={"reserved": self._time.reserved, "free": max(0, self._time.gpus - self._time.reserved)},
            prediction_errors=prediction_errors(self._study),
        )
        try:
            self._series.publish.remote(snapshot)
        except Exception:
            self._series = None


def _start_series(study: str, model: str) -> Any:
    """The actor, on the driver's node. It holds nothing and lives as long as the driver."""
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Series)
        .options(
            name=f"autotune-metrics-{study}",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        .remote(study, model)
    )
