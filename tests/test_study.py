"""The loop: what is run next, what is run again, when it ends, what is best. On a real SQLite store."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import StoreError
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import FailureKind, Outcome
from autotune.spec.record import AttemptState
from autotune.store.store import SqlStore, open_store
from autotune.study import Attempt, Study
from tests.samples import MIB, failure, measurement, sample_space, simulate


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def in_order(study: Study) -> Callable[[], TrialConfig | None]:
    """The plainest sampler: the first candidate that was not run."""
    return lambda: next((config for config in study.space.candidates if not study.known(config)), None)


def drive(study: Study, outcome: Callable[[TrialConfig], Outcome] = simulate, limit: int = 1000) -> list[Attempt]:
    """The plainest runner: one attempt after the other."""
    attempts: list[Attempt] = []
    while len(attempts) < limit and (attempt := study.next_attempt(in_order(study))) is not None:
        attempts.append(attempt)
        study.record(attempt, outcome(attempt.config))
    return attempts


def test_the_baseline_runs_first_and_the_budget_ends_the_study(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path), store)
    attempts = drive(study)
    assert attempts[0].config == study.space.baseline
    assert attempts[0].source == "baseline"
    assert [attempt.trial for attempt in attempts] == [1, 2, 3, 4, 5, 6]
    assert study.stop_reason == "6 trials"
    assert study.counts.finished == 6
    assert study.baseline_outcome == simulate(attempts[0].config)


def test_a_reopened_study_goes_on_and_runs_nothing_twice(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path)
    first = drive(Study.open(space, store), limit=4)
    study = Study.open(space, store)
    assert study.counts.finished == 4
    second = drive(study)
    assert len({attempt.config for attempt in first + second}) == len(first + second) == 6


def test_the_smallest_space_ends_when_every_candidate_ran(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": 0, "activation_checkpointing": "none", "micro_batch_size": [1, 2]}
    study = Study.open(sample_space(tmp_path, baseline=..., search=search), store)
    assert len(drive(study)) == 2
    assert study.stop_reason is None
    assert study.next_attempt(in_order(study)) is None


def test_an_attempt_cut_off_by_a_dead_driver_is_interrupted_and_runs_again_first(
    tmp_path: Path, store: SqlStore
) -> None:
    space = sample_space(tmp_path)
    dead = Study.open(space, store)
    drive(dead, limit=2)
    cut = dead.next_attempt(in_order(dead))
    assert cut is not None
    study = Study.open(space, store)
    assert study.counts.interrupted == 1
    again = study.next_attempt(in_order(study))
    assert again is not None
    assert (again.trial, again.config) == (cut.trial, cut.config)
    study.record(again, simulate(again.config))
    states = [attempt.state for attempt in store.trials("sample")[cut.trial - 1].attempts]
    assert states[0] is AttemptState.INTERRUPTED
    assert states[1] in (AttemptState.COMPLETE, AttemptState.FAILED)


@pytest.mark.parametrize(
    ("kind", "attempts"),
    [
        (FailureKind.OUT_OF_MEMORY, 1),
        (FailureKind.HOST_OUT_OF_MEMORY, 2),
        (FailureKind.INVALID_CONFIG, 1),
        (FailureKind.TIMEOUT, 1),
        (FailureKind.CRASH, 2),
        (FailureKind.HANG, 2),
        (FailureKind.NON_FINITE_LOSS, 2),
        (FailureKind.WORKER_LOST, 4),
        (FailureKind.NODE_LOST, 4),
    ],
)
def test_how_often_a_failure_is_tried(tmp_path: Path, store: SqlStore, kind: FailureKind, attempts: int) -> None:
    study = Study.open(sample_space(tmp_path, budget={"trials": 1}), store)
    assert len(drive(study, lambda _: failure(kind))) == attempts
    counts = study.counts
    assert (counts.out_of_memory, counts.failed) == ((1, 0) if kind.is_memory else (0, 1))


def test_a_crash_that_does_not_happen_again_is_forgiven(tmp_path: Path, store: SqlStore) -> None:
    outcomes: Iterator[Outcome] = iter([failure(FailureKind.CRASH), measurement(500.0)])
    study = Study.open(sample_space(tmp_path, budget={"trials": 1}), store)
    drive(study, lambda _: next(outcomes))
    assert study.counts.complete == 1
    assert study.counts.failed == 0


def test_retries_are_no_trials_of_the_budget(tmp_path: Path, store: SqlStore) -> None:
    outcomes: Iterator[Any] = iter([failure(FailureKind.WORKER_LOST)] * 3)
    study = Study.open(sample_space(tmp_path), store)
    attempts = drive(study, lambda config: next(outcomes, None) or simulate(config))
    assert len(attempts) == 9
    assert study.counts.finished == 6


def test_the_best_is_the_fastest_that_left_headroom(tmp_path: Path, store: SqlStore) -> None:
    outcomes: Iterator[Outcome] = iter(
        [
            measurement(100.0, used_bytes=30 * MIB),
            measurement(900.0, used_bytes=59 * MIB),  # within 6 % of the limit
            measurement(800.0, used_bytes=30 * MIB, retries=1),
            measurement(300.0, used_bytes=56 * MIB),
            measurement(200.0, used_bytes=10 * MIB),
            failure(),
        ]
    )
    study = Study.open(sample_space(tmp_path), store)
    drive(study, lambda _: next(outcomes))
    best = study.best()
    assert best is not None
    assert (best.trial, best.measurement.tokens_per_second_per_gpu) == (4, 300.0)
    of_engine = study.best_among(result for result in study.results if result.config.engine == "pytorch")
    assert of_engine is None or of_engine.config.engine == "pytorch"


def test_gpu_hours_end_the_study(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, budget={"trials": 50, "gpu_hours": 3 * 2 * 2 / 3600})
    study = Study.open(space, store)
    attempts = drive(study, lambda _: measurement())  # 2 s on 2 workers each
    assert len(attempts) == 3
    assert study.spending.gpu_seconds == 12
    assert "GPU-hours" in str(study.stop_reason)
    assert drive(Study.open(space, store)) == []


def test_an_edited_budget_goes_on_and_changed_work_is_refused(tmp_path: Path, store: SqlStore) -> None:
    drive(Study.open(sample_space(tmp_path), store))
    grown = Study.open(sample_space(tmp_path, budget={"trials": 8}), store)
    assert len(drive(grown)) == 2
    kept = store.study("sample")
    assert kept is not None
    assert "trials: 8" in kept.space.text
    with pytest.raises(StoreError, match="another study name"):
        Study.open(sample_space(tmp_path, workload={"global_batch_size": 32, "sequence_length": 64}), store)


def test_changed_axes_are_a_new_version_that_uses_what_was_measured(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": [0, 2], "activation_checkpointing": "none", "micro_batch_size": [1, 2]}
    first = Study.open(sample_space(tmp_path, baseline=..., search=search, budget={"trials": 9}), store)
    measured = {attempt.config for attempt in drive(first, lambda c: measurement(100.0 * (4 - c.zero_stage)))}
    narrowed = {**search, "zero_stage": [2, 3]}
    study = Study.open(sample_space(tmp_path, baseline=..., search=narrowed, budget={"trials": 9}), store)
    assert study.counts.finished == len([config for config in measured if config.zero_stage == 2]) > 0
    assert study.outside == {config for config in measured if config.zero_stage == 0}
    attempts = drive(study, lambda c: measurement(100.0 * (4 - c.zero_stage)))
    assert {attempt.config.zero_stage for attempt in attempts} == {3}
    best = study.best()
    assert best is not None
    assert best.config.zero_stage == 2  # stage 0 was faster, but is not asked for any more
    record = store.study("sample")
    assert record is not None
    assert record.space_version == 2
    assert {t.config.zero_stage: t.space_version for t in store.trials("sample")} == {0: 1, 2: 1, 3: 2}
    back = Study.open(sample_space(tmp_path, baseline=..., search=search, budget={"trials": 9}), store)
    assert back.best() is not None
    assert back.best().config.zero_stage == 0  # type: ignore[union-attr]


def test_an_unfinished_trial_outside_the_axes_is_not_run_again(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": [0, 2], "activation_checkpointing": "none", "micro_batch_size": 1}
    cut = Study.open(sample_space(tmp_path, baseline=..., search=search), store)
    attempt = cut.next_attempt(in_order(cut))
    assert attempt is not None
    assert attempt.config.zero_stage == 0
    study = Study.open(sample_space(tmp_path, baseline=..., search={**search, "zero_stage": 2}), store)
    assert study.counts.interrupted == 0
    assert {attempt.config.zero_stage for attempt in drive(study)} == {2}


def test_the_store_alone_tells_all_of_a_study(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path), store)
    drive(study)
    (tmp_path / "space.yaml").unlink()
    stored = Study.stored(store, "sample")
    assert (stored.results, stored.counts, stored.best()) == (study.results, study.counts, study.best())
    assert (stored.space.model, stored.space.cluster) == (study.space.model, study.space.cluster)
    assert stored.space.identity == study.space.identity
    with pytest.raises(StoreError, match="'other' is not in"):
        Study.stored(store, "other")


def test_what_ran_out_of_host_memory_runs_again_alone(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path, baseline=...), store)
    first, second = study.next_attempt(in_order(study)), study.next_attempt(in_order(study))
    assert first is not None
    assert second is not None
    study.record(first, failure(FailureKind.HOST_OUT_OF_MEMORY))
    assert study.next_attempt(in_order(study)) is None  # the second one runs still
    study.record(second, simulate(second.config))
    again = study.next_attempt(in_order(study))
    assert again is not None
    assert again.config == first.config
    assert study.next_attempt(in_order(study)) is None  # it is alone
    study.record(again, measurement(50.0))
    assert study.counts.complete + study.counts.out_of_memory == 2
    assert study.next_attempt(in_order(study)) is not None


def test_observers_hear_of_every_attempt_in_order(tmp_path: Path, store: SqlStore) -> None:
    heard: list[tuple[str, int]] = []

    class Listener:
        def started(self, attempt: Attempt) -> None:
            heard.append(("started", attempt.trial))

        def finished(self, attempt: Attempt, outcome: Outcome) -> None:
            heard.append(("finished", attempt.trial))

    study = Study.open(sample_space(tmp_path, budget={"trials": 2}), store)
    study.observers.append(Listener())
    drive(study)
    assert heard == [("started", 1), ("finished", 1), ("started", 2), ("finished", 2)]


def test_gpu_seconds_are_told_by_what_they_went_into(tmp_path: Path, store: SqlStore) -> None:
    outcomes: Iterator[Outcome] = iter(
        [
            measurement(100.0),
            failure(),
            failure(FailureKind.CRASH),
            failure(FailureKind.CRASH),
            failure(FailureKind.STOPPED_EARLY, most_tokens_per_second_per_gpu=50.0),
        ]
    )
    space = sample_space(tmp_path, budget={"trials": 4})
    study = Study.open(space, store)
    drive(study, lambda _: next(outcomes))
    for seen in (study, Study.open(space, store)):
        spent = {use.value: seconds for use, seconds in seen.spending.gpu_seconds_by_use.items() if seconds}
        assert spent == {"screening": 4.0, "out_of_memory": 2.0, "failed": 4.0, "stopped_early": 2.0}
        assert seen.spending.gpu_seconds == 12.0
        counts = seen.counts
        assert (counts.complete, counts.out_of_memory, counts.failed, counts.stopped_early) == (1, 1, 1, 1)
        assert counts.finished == 4


def test_what_runs_counts_and_no_more_than_there_are_gpus(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path), store)
    for _ in range(3):
        study.next_attempt(in_order(study))
    time.sleep(0.05)
    assert 2 * 0.05 <= study.spending.gpu_seconds <= 2 * 5  # three trials of two GPUs, of which there are two


def test_a_trial_that_was_stopped_early_never_wins(tmp_path: Path, store: SqlStore) -> None:
    early = failure(FailureKind.STOPPED_EARLY, most_tokens_per_second_per_gpu=5000.0, peak_device_used_bytes=MIB)
    outcomes: Iterator[Outcome] = iter([early, measurement(100.0)])
    study = Study.open(sample_space(tmp_path, budget={"trials": 2}), store)
    drive(study, lambda _: next(outcomes))
    best = study.best()
    assert best is not None
    assert best.trial == 2


def test_little_to_gain_ends_the_search_once_enough_was_seen(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, budget={"trials": 50, "stop_below_gain": 0.01, "stop_after": 4})
    study = Study.open(space, store)
    drive(study, limit=3)
    assert not study.stop_at(0.0001)
    running = study.next_attempt(in_order(study))
    assert running is not None
    study.record(running, simulate(running.config))
    assert not study.stop_at(0.02)
    assert not study.stop_at(None)
    another = study.next_attempt(in_order(study))
    assert another is not None
    assert study.stop_at(0.002)
    assert study.stop_reason is None  # what runs may still change it
    study.record(another, simulate(another.config))
    assert study.stop_at(0.002)
    assert study.stop_reason == "another trial promises a gain of 0.20%, less than 1.00%"
    assert study.next_attempt(in_order(study)) is None
