"""What a study publishes while it runs, without Ray; `test_cluster_jobs` reads it from a real metrics port."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from autotune.metrics import USES, GpuTime, Snapshot, StudyMetrics, prediction_errors
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import FailureKind, Outcome
from autotune.spec.prediction import Prediction
from autotune.store.store import SqlStore, open_store
from autotune.study import Attempt, Study
from tests.samples import failure, measurement, sample_space


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSeries:
    """Stands for the actor: `publish.remote` keeps what it is given."""

    published: list[Snapshot] = field(default_factory=list)
    breaks: bool = False

    @property
    def publish(self) -> Any:
        return self

    def remote(self, snapshot: Snapshot) -> None:
        if self.breaks:
            raise RuntimeError("no cluster any more")
        self.published.append(snapshot)


@pytest.fixture
def study(tmp_path: Path) -> Any:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as store:
        assert isinstance(store, SqlStore)
        yield Study.open(sample_space(tmp_path), store)


def attempt(number: int, gpus: int) -> Attempt:
    config = TrialConfig(engine="pytorch", gpus=gpus, micro_batch_size=1, sequence_length=64)
    return Attempt(id=number, trial=number, config=config, source="search")


def lasted(outcome: Outcome, seconds: float, **phases: float) -> Outcome:
    return replace(outcome, elapsed_seconds=seconds, phase_seconds=phases)


def test_every_gpu_second_has_one_use() -> None:
    clock = Clock()
    time = GpuTime(8, clock)
    clock.now += 10  # nothing runs: 80
    time.started(attempt(1, 4))
    clock.now += 5  # four of eight: 20 idle
    time.started(attempt(2, 4))
    clock.now += 15
    time.finished(attempt(1, 4), lasted(measurement(), 18.0, start=1.0, build=6.0, warmup=3.0, measure=7.0))
    clock.now += 2  # four of eight: 8 idle
    time.finished(attempt(2, 4), lasted(failure(FailureKind.OUT_OF_MEMORY), 16.0))
    time.started(attempt(3, 8))
    clock.now += 4
    time.finished(attempt(3, 8), lasted(failure(FailureKind.CRASH), 4.0))
    assert time.totals == {
        "measuring": 4 * 7.0,
        "starting": 4 * 11.0,
        "out_of_memory": 4 * 16.0,
        "failed": 8 * 4.0,
        "idle": 80.0 + 20.0 + 8.0 + 4 * (20.0 - 18.0) + 4 * (17.0 - 16.0),
    }
    assert sum(time.totals.values()) == 8 * (clock.now - 100.0)


def test_uses_never_shrink_whatever_clocks_say() -> None:
    clock = Clock()
    time = GpuTime(2, clock)
    time.started(attempt(1, 2))
    clock.now += 1
    time.finished(attempt(1, 2), lasted(measurement(), 3.0, measure=5.0))  # longer than the driver saw it
    assert time.totals == {"measuring": 6.0, "starting": 0.0, "out_of_memory": 0.0, "failed": 0.0, "idle": 0.0}


def run(study: Study, outcomes: list[Outcome]) -> None:
    candidates = iter(study.space.candidates)
    for outcome in outcomes:
        begun = study.next_attempt(lambda: next(c for c in candidates if not study.known(c)))
        assert begun is not None
        study.record(begun, outcome)


def test_a_study_publishes_at_every_event(study: Study) -> None:
    run(study, [measurement(500.0)])
    series = FakeSeries()
    study.observers.append(StudyMetrics(study, start=lambda *names: series))
    run(study, [failure(), measurement(900.0)])
    states = [snapshot.trials for snapshot in series.published]
    assert [(s["complete"], s["out_of_memory"], s["running"]) for s in states] == [
        (1, 0, 0),  # a resumed study shows at once what it has
        (1, 0, 1),
        (1, 1, 0),
        (1, 1, 1),
        (2, 1, 0),
    ]
    assert [s.best_tokens_per_second_per_gpu for s in series.published] == [500.0, 500.0, 500.0, 500.0, 900.0]
    assert [s.gpus["reserved"] for s in series.published] == [0, 2, 0, 2, 0]
    assert {sum(s.gpus.values()) for s in series.published} == {2}
    assert all(s.prediction_errors == {} for s in series.published)  # nothing was predicted of these
    assert set(series.published[-1].gpu_seconds) == set(USES)
    assert series.published[-1].gpu_seconds["out_of_memory"] == 2 * 1.0
    assert series.published[0].gpu_seconds["measuring"] == 0.0  # of this driver


@dataclass
class Oracle:
    """Predicts the same of every config."""

    prediction: Prediction

    @property
    def surely_too_big(self) -> Any:
        raise AssertionError("the study here asks for nothing but predictions")

    def of(self, config: TrialConfig) -> Prediction:
        return self.prediction


def test_predictions_against_measurements(study: Study) -> None:
    measured = measurement(500.0)
    study.forecast = Oracle(
        Prediction(
            device_used_bytes=round(measured.peak_device_used_bytes * 1.1),
            deviation=0.0,
            tokens_per_second_per_gpu=400.0,
        )
    )
    run(study, [measured, failure(), measurement(1000.0)])
    errors = prediction_errors(study)
    assert errors[("speed", "median")] == pytest.approx((0.2 + 0.6) / 2)  # 400 against 500, and against 1000
    assert errors[("speed", "largest")] == pytest.approx(0.6)
    assert errors[("memory", "median")] == errors[("memory", "largest")] == pytest.approx(0.1, rel=1e-6)
    study.forecast.prediction = Prediction(device_used_bytes=1, deviation=0.0)
    assert set(prediction_errors(study)) == set(errors)  # a trial keeps what was predicted before it ran


def no_actor(*names: str) -> Any:
    raise RuntimeError("no room for an actor")


@pytest.mark.parametrize("start", [no_actor, lambda *names: FakeSeries(breaks=True)])
def test_a_failure_of_metrics_is_no_failure_of_the_study(study: Study, start: Callable[..., Any]) -> None:
    study.observers.append(StudyMetrics(study, start=start))
    run(study, [measurement(), measurement()])
    assert study.counts.complete == 2
