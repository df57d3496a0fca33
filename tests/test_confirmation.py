"""Confirmation: who runs again and in which order, who wins, by how much; resumed at any point; never mixed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.confirmation import (
    ROUNDS,
    Confirmation,
    Run,
    contenders,
    memory_growth,
    merge,
    screening_lower_bound,
)
from autotune.results import Result
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import FailureKind, Measurement, Outcome, outcome_from_dict
from autotune.spec.record import Turn
from autotune.store.store import SqlStore, open_store
from autotune.study import Attempt, Study
from tests.samples import MIB, confirmed, failure, measurement, sample_space
from tests.test_study import drive

STEPS = 4
MEASURE = {"confirm_top": 2, "confirm_steps": STEPS}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def a_config(size: int) -> TrialConfig:
    return TrialConfig(engine="pytorch", gpus=1, micro_batch_size=size, sequence_length=8)


def screened(*speeds: float) -> list[Result]:
    """Trials 1, 2, … of these speeds; the first one is the baseline."""
    return [Result(n, a_config(n), measurement(speed)) for n, speed in enumerate(speeds, 1)]


def confirmation(results: list[Result], runs: list[Run], top: int = 2, steps: int = STEPS) -> Confirmation:
    return Confirmation(
        results, runs, baseline=a_config(1), top=top, steps=steps, headroom=0.06, accumulation=lambda _: 2
    )


def run_all(results: list[Result], outcome: Callable[[Result, Turn], Outcome], runs: list[Run], limit: int = 99) -> str:
    """Runs what is asked for; returns the trials in order."""
    order = ""
    for _ in range(limit):
        asked = confirmation(results, runs).next
        if asked is None:
            break
        contender, turn = asked
        order += str(contender.trial)
        runs.append(Run(contender.trial, turn, outcome(contender, turn)))
    return order


def steady(contender: Result, turn: Turn) -> Outcome:
    """Two steps of the screened speed, the second round a little slower."""
    assert isinstance(contender.outcome, Measurement)
    seconds = 1000.0 / contender.outcome.tokens_per_second_per_gpu * (1 + 0.001 * turn.round)
    return confirmed([seconds, seconds * 1.002])


def test_the_baseline_and_the_finalists_run_in_turns_and_the_fastest_wins() -> None:
    results, runs = screened(100, 200, 400, 300, 50), list[Run]()
    assert run_all(results, steady, runs) == "134134"
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert verdict.winner is not None
    assert verdict.winner.trial == 3
    assert verdict.gain is not None
    assert verdict.gain.estimate == pytest.approx(4.0, rel=1e-6)
    assert verdict.gain.low < 4 < verdict.gain.high
    assert verdict.significant
    assert verdict.steps == STEPS


def test_a_gain_within_the_noise_is_none() -> None:
    noise = iter([1.0, 0.97, 1.05, 0.95, 1.04, 0.98])
    runs: list[Run] = []
    results = screened(100, 102, 101)
    run_all(results, lambda c, t: confirmed([10.0 * next(noise)] * 2), runs)
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert not verdict.significant
    if verdict.gain is not None:
        assert verdict.gain.low < 1 < verdict.gain.high


def test_a_round_that_was_slow_for_all_leaves_the_gain_as_certain() -> None:
    runs: list[Run] = []
    results = screened(100, 1000, 900)
    wobble = iter([1.0, 1.01, 0.99, 1.02, 1.0, 1.01])

    def slow_at_first(contender: Result, turn: Turn) -> Outcome:
        seconds = {1: 10.0, 2: 1.0, 3: 1.1}[contender.trial] * (3.0 if turn.round == 1 else 1.0)
        return confirmed([seconds * next(wobble)] * 2)

    run_all(results, slow_at_first, runs)
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert verdict.gain is not None
    assert verdict.gain.estimate == pytest.approx(10.0, rel=0.02)
    assert verdict.gain.high / verdict.gain.low < 1.3


def test_the_steady_one_wins_over_the_one_that_is_faster_once() -> None:
    """Lower bounds decide: within a run the second finalist's steps vary by half."""
    results, runs = screened(100, 200, 200), list[Run]()
    steps = {1: [10.0, 10.0], 2: [5.0, 5.0], 3: [2.4, 7.4]}
    run_all(results, lambda c, t: confirmed(steps[c.trial]), runs)
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert verdict.winner is not None
    assert verdict.winner.trial == 2


def test_finalists_that_fail_make_room_for_the_next_in_a_confirmation_of_its_own() -> None:
    results, runs = screened(100, 200, 400, 300), list[Run]()

    def two_and_three_do_not_fit(contender: Result, turn: Turn) -> Outcome:
        if contender.trial == 3:
            return failure()
        if contender.trial == 4:
            return confirmed([1.0, 1.0], used_bytes=59 * MIB)
        return steady(contender, turn)

    assert run_all(results, two_and_three_do_not_fit, runs) == "134" + "1212"
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert verdict.winner is not None
    assert (verdict.number, verdict.winner.trial) == (2, 2)


def test_one_finalist_that_fails_leaves_the_others() -> None:
    results, runs = screened(100, 200, 400), list[Run]()
    order = run_all(results, lambda c, t: failure() if c.trial == 3 else steady(c, t), runs)
    assert order == "13212"
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert verdict.winner is not None
    assert verdict.winner.trial == 2
    assert [trial for trial, _, _ in verdict.failed] == [3]


def test_without_a_baseline_that_runs_there_is_no_gain() -> None:
    results, runs = screened(100, 200), list[Run]()
    results[0] = Result(1, a_config(1), failure())
    assert run_all(results, steady, runs) == "22"
    verdict = confirmation(results, runs).verdict
    assert verdict is not None
    assert (verdict.baseline, verdict.gain) == (None, None)
    assert confirmation([Result(1, a_config(1), failure())], []).next is None


def test_a_lost_run_is_made_again_and_a_crash_is_believed_the_second_time() -> None:
    results, runs = screened(100, 200), list[Run]()
    kinds = iter([FailureKind.WORKER_LOST, None, FailureKind.CRASH, FailureKind.CRASH, None])

    def unlucky(contender: Result, turn: Turn) -> Outcome:
        kind = next(kinds)
        return steady(contender, turn) if kind is None else failure(kind)

    assert run_all(results, unlucky, runs, limit=5)[:4] == "1122"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 6), st.lists(st.sampled_from([100, 200, 300, 400, 500]), min_size=2, max_size=6, unique=True))
def test_cut_off_anywhere_it_ends_with_the_same_runs(cut: int, speeds: list[int]) -> None:
    results = screened(*speeds)
    whole, parts = list[Run](), list[Run]()
    run_all(results, steady, whole)
    run_all(results, steady, parts, limit=cut)
    run_all(results, steady, parts)
    assert parts == whole
    assert {run.turn.confirmation for run in whole} == {1}


def test_other_finalists_are_never_compared_with_earlier_runs() -> None:
    runs: list[Run] = []
    run_all(screened(100, 200, 300), steady, runs)
    wider = screened(100, 200, 300, 900)
    assert confirmation(wider, runs).verdict is None
    assert run_all(wider, steady, runs) == "143143"
    assert {run.turn.confirmation for run in runs} == {1, 2}
    # So are runs of another length.
    assert confirmation(wider, runs, steps=2 * STEPS).number == 3


def test_finalists_are_ranked_by_what_they_have_shown_at_least() -> None:
    steady_one, shaky = measurement(1000.0), measurement(1050.0)
    (rank,) = shaky.ranks
    shaky = replace(shaky, ranks=(replace(rank, micro_step_seconds=(0.05, 0.15), update_step_seconds=(0.1, 0.3)),))
    assert screening_lower_bound(steady_one, 4) == pytest.approx(1000.0)
    assert screening_lower_bound(shaky, 4) < 1000.0
    results = [Result(1, a_config(1), steady_one), Result(2, a_config(2), shaky)]
    assert [c.trial for c in contenders(results, None, 1, 0.06, lambda _: 4)] == [1]


@given(
    st.lists(st.floats(0.01, 10), min_size=2, max_size=6),
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.integers(2, 100),
)
def test_a_lower_bound_is_below_its_throughput(updates: list[float], micro: list[float], accumulation: int) -> None:
    found = measurement(500.0)
    (rank,) = found.ranks
    rank = replace(rank, update_step_seconds=tuple(updates), micro_step_seconds=tuple(micro))
    bound = screening_lower_bound(replace(found, ranks=(rank,)), accumulation)
    assert 0 < bound <= 500.0


def test_intervals_cover_the_truth() -> None:
    """Rounds that differ by half, their runs by 2 % and steps by 5 %: of 300 confirmations about 95 % have the true
    ratio in the interval.
    """
    random = np.random.default_rng(1)
    covered = 0
    results = screened(100, 200, 190)
    for _ in range(300):
        runs: list[Run] = []
        rounds = np.exp(random.normal(0, 0.5, 3))

        def noisy(contender: Result, turn: Turn, rounds: np.ndarray = rounds) -> Outcome:
            mean = {1: 10.0, 2: 5.0, 3: 5.3}[contender.trial] * rounds[turn.round] * math.exp(random.normal(0, 0.02))
            return confirmed(list(mean * np.exp(random.normal(0, 0.05, 15))))

        steps = 2 * 15
        while (asked := confirmation(results, runs, steps=steps).next) is not None:
            runs.append(Run(asked[0].trial, asked[1], noisy(*asked)))
        verdict = confirmation(results, runs, steps=steps).verdict
        assert verdict is not None
        assert verdict.gain is not None
        assert verdict.winner is not None
        truth = 10.0 / {2: 5.0, 3: 5.3}[verdict.winner.trial]
        covered += verdict.gain.low <= truth <= verdict.gain.high
    assert 0.9 <= covered / 300 <= 1.0


def test_memory_that_grows_is_told_from_noise() -> None:
    growing = confirmed([1.0] * 6, allocated=[10 * MIB + step * 1000 for step in range(6)])
    assert memory_growth([growing]) == pytest.approx(1000.0)
    wobbling = confirmed([1.0] * 6, allocated=[MIB, MIB + 500, MIB - 300, MIB + 400, MIB - 100, MIB + 200])
    assert memory_growth([wobbling]) == 0.0


def test_runs_together_have_the_mean_of_times_and_the_highest_peak() -> None:
    both = merge([confirmed([1.0, 1.0], used_bytes=30 * MIB), confirmed([3.0, 3.0], used_bytes=20 * MIB)])
    assert (both.step_time_seconds, both.peak_device_used_bytes) == (2.0, 30 * MIB)
    assert both.tokens_per_second_per_gpu == pytest.approx(500.0)
    assert both.confirms
    assert outcome_from_dict(both.to_dict()) == both


# In a study, on a real store


def finish(study: Study, limit: int = 99, seconds: float = 2.0) -> list[Attempt]:
    """Screens everything, then runs what confirms; the GPUs of trials are as slow as their micro-batch is small."""
    drive(study, lambda config: measurement(100.0 * config.micro_batch_size + config.zero_stage))
    attempts: list[Attempt] = []
    while len(attempts) < limit and (attempt := study.next_confirmation()) is not None:
        attempts.append(attempt)
        step = 10.0 / attempt.config.micro_batch_size
        outcome = replace(confirmed([step * 1.001, step]), elapsed_seconds=seconds)
        study.record(attempt, outcome)
    return attempts


def test_a_study_is_confirmed_after_its_screening_and_resumes(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, measure=MEASURE)
    first = finish(Study.open(space, store), limit=2)
    opened = Study.open(space, store)
    assert not opened.finished
    assert opened.verdict is None
    second = finish(opened)
    assert [a.trial for a in first + second] == 2 * [a.trial for a in (first + second)[:3]]
    assert first[0].config == space.baseline
    for study in (opened, Study.open(space, store), Study.stored(store, "sample")):
        best, verdict = study.best(), study.verdict
        assert study.finished
        assert verdict is not None
        assert best is not None
        assert best.measurement.confirms
        assert verdict.winner is not None
        assert best.trial == verdict.winner.trial
        assert study.counts.finished == 6  # a run that confirms is no trial


def test_an_interrupted_run_is_made_again(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, measure=MEASURE)
    dead = Study.open(space, store)
    finish(dead, limit=1)
    cut = dead.next_confirmation()
    assert cut is not None
    study = Study.open(space, store)
    assert study.counts.interrupted == 0
    again = study.next_confirmation()
    assert again is not None
    assert (again.trial, again.turn) == (cut.trial, cut.turn)
    assert study.next_confirmation() is None  # it runs alone


def test_a_larger_budget_finds_other_finalists_and_confirms_them(tmp_path: Path, store: SqlStore) -> None:
    finish(Study.open(sample_space(tmp_path, measure=MEASURE), store))
    study = Study.open(sample_space(tmp_path, measure=MEASURE, budget={"trials": 60}), store)
    attempts = finish(study)
    assert {a.turn.confirmation for a in attempts if a.turn} == {2}
    best = study.best()
    assert best is not None
    assert best.config.micro_batch_size == 8


@settings(deadline=None, max_examples=20)
@given(
    gpu_seconds=st.integers(1, 200),
    screening=st.floats(0.5, 20),
    confirming=st.floats(0.5, 60),
    at_once=st.integers(1, 3),
)
def test_gpu_hours_are_never_exceeded_by_more_than_what_runs(
    tmp_path_factory: Any, gpu_seconds: int, screening: float, confirming: float, at_once: int
) -> None:
    folder = tmp_path_factory.mktemp("budget")
    budget = {"trials": 50, "gpu_hours": gpu_seconds / 3600}
    with open_store(f"sqlite:///{folder}/a.db", create=True) as store:
        study = Study.open(sample_space(folder, measure=MEASURE, budget=budget), store)
        running: list[Attempt] = []
        left = iter(study.space.candidates)
        allowed = 0.0

        def took(attempt: Attempt) -> float:
            return screening if attempt.turn is None else confirming

        while True:
            while len(running) < at_once:
                before = study.spending.gpu_seconds
                attempt = study.next_attempt(lambda: next((c for c in left if not study.known(c)), None))
                attempt = attempt or study.next_confirmation()
                if attempt is None:
                    break
                assert before < gpu_seconds
                running.append(attempt)
                allowed = gpu_seconds + sum(a.config.gpus * took(a) for a in running)
            if not running:
                break
            attempt = running.pop(0)
            outcome = measurement(100.0) if attempt.turn is None else confirmed([10.0, 10.0])
            study.record(attempt, replace(outcome, elapsed_seconds=took(attempt)))
        assert study.spending.gpu_seconds <= allowed


def test_screening_leaves_what_the_confirmation_needs(tmp_path: Path, store: SqlStore) -> None:
    """Of 100 GPU-seconds a trial costs 4, and confirming three with steps of 1 s about 2·3·2·(3 + 0.6)."""
    space = sample_space(tmp_path, measure=MEASURE, budget={"trials": 200, "gpu_hours": 100 / 3600})
    study = Study.open(space, store)
    attempts = finish(study, seconds=3.6)
    assert study.verdict is not None
    assert len(attempts) == 3 * ROUNDS
    assert 10 < study.counts.finished < 25
    assert "GPU-hours" in str(study.stop_reason)
    assert Study.open(space, store).finished


def test_a_budget_that_is_spent_leaves_the_winner_unconfirmed(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path, measure=MEASURE, budget={"trials": 3, "gpu_hours": 20 / 3600}), store)
    finish(study, seconds=10.0)
    assert study.spent is not None
    assert study.finished
    best = study.best()
    assert best is not None
    assert not best.measurement.confirms
