"""What Ray Tune would do to `TuneSearch`, without Ray: every sampler proposes well, is taught right, and resumes."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from autotune.search.distributions import distributions
from autotune.search.samplers import SamplerName, build_sampler
from autotune.search.tune_search import MEMORY_CONSTRAINT, TuneSearch
from autotune.space.space import NOT_APPLICABLE, Space
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome
from autotune.spec.prediction import Prediction
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from tests.samples import MIB, confirmed, failure, measurement, sample_space, simulate

BUCKET = "zero_optimization.reduce_bucket_size"
CONDITIONAL = {
    "engine": ["deepspeed", "pytorch"],
    "zero_stage": [0, 1, 2, 3],
    "activation_checkpointing": ["none", "selective"],
    "selective_every": [2, 4],
    "micro_batch_size": [1, 3],
    "deepspeed": {BUCKET: [1000, 2000]},
}


OPTUNAS = [SamplerName.TPE, SamplerName.GP, SamplerName.RANDOM]
"""Ours needs a plan: tests/search/test_plan_sampler.py."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def search_of(study: Study, sampler: SamplerName = SamplerName.RANDOM) -> TuneSearch:
    return TuneSearch(study, build_sampler(sampler, 0), 0)


def report(search: TuneSearch, trial_id: str, outcome: Outcome) -> None:
    search.on_trial_complete(trial_id, result={"outcome": json.dumps(outcome.to_dict()), "objective": 0.0})


def drive(search: TuneSearch, limit: int = 1000, at_once: int = 1) -> list[TrialConfig]:
    """Ray Tune's part: keeps `at_once` trials running until the searcher says that it has finished."""
    configs: list[TrialConfig] = []
    running: list[tuple[str, TrialConfig]] = []
    finished = False
    while (not finished or running) and len(configs) < limit:
        while not finished and len(running) < at_once:
            suggested = search.suggest(f"t{len(configs)}")
            if suggested == Searcher.FINISHED:
                finished = True
            if not isinstance(suggested, dict):
                break
            config = TrialConfig.from_dict(suggested["config"])
            running.append((f"t{len(configs)}", config))
            configs.append(config)
        if running:
            trial_id, config = running.pop(0)
            report(search, trial_id, simulate(config))
    return configs


def finished_trials(search: TuneSearch) -> list[optuna.trial.FrozenTrial]:
    trials: list[optuna.trial.FrozenTrial] = search._ot_study.get_trials(states=[TrialState.COMPLETE])
    return trials


def conditional_space(folder: Path, **changes: Any) -> Space:
    return sample_space(folder, baseline=..., search=CONDITIONAL, **changes)


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("sampler", [SamplerName.TPE, SamplerName.RANDOM])
def test_every_candidate_is_run_once_and_none_is_illegal(
    tmp_path: Path, store: SqlStore, sampler: SamplerName, at_once: int
) -> None:
    space = conditional_space(tmp_path, budget={"trials": 1000})
    configs = drive(search_of(Study.open(space, store), sampler), at_once=at_once)
    assert len(configs) == len(set(configs))
    assert set(configs) == set(space.candidates)


class SmallOnes:
    """A forecast by which only the smallest micro-batch fits."""

    def __init__(self, space: Space) -> None:
        self.surely_too_big = np.array([config.micro_batch_size > 1 for config in space.candidates])

    def of(self, config: TrialConfig) -> Prediction:
        return Prediction(device_used_bytes=1000 * config.micro_batch_size, deviation=0.1)


@pytest.mark.parametrize("sampler", [SamplerName.TPE, SamplerName.RANDOM])
def test_what_surely_does_not_fit_is_never_proposed(tmp_path: Path, store: SqlStore, sampler: SamplerName) -> None:
    space = conditional_space(tmp_path, budget={"trials": 1000})
    study = Study.open(space, store, SmallOnes(space))
    configs = drive(search_of(study, sampler))
    assert set(configs) == {config for config in space.candidates if config.micro_batch_size == 1}
    predictions = {trial.config: trial.prediction for trial in store.trials(space.name)}
    assert set(predictions.values()) == {Prediction(device_used_bytes=1000, deviation=0.1)}
    # What was predicted then stands, whatever a later forecast says.
    again = Study.open(space, store)
    assert again.prediction(configs[0]) == predictions[configs[0]]
    assert len(again.ledger.errors) == again.counts.complete


@pytest.mark.parametrize("sampler", OPTUNAS)
def test_the_budget_holds_with_trials_running(tmp_path: Path, store: SqlStore, sampler: SamplerName) -> None:
    study = Study.open(sample_space(tmp_path, budget={"trials": 10}), store)
    assert len(drive(search_of(study, sampler), at_once=4)) == 10


@pytest.mark.parametrize("sampler", OPTUNAS)
def test_a_resumed_search_knows_what_the_store_knows(tmp_path: Path, store: SqlStore, sampler: SamplerName) -> None:
    space = sample_space(tmp_path, budget={"trials": 12})
    first = search_of(Study.open(space, store), sampler)
    before = drive(first, limit=6)
    second = search_of(Study.open(space, store), sampler)
    assert [(t.params, t.constraints) for t in finished_trials(second)] == [
        (t.params, t.constraints) for t in finished_trials(first)
    ]
    after = drive(second)
    assert not set(before) & set(after)
    assert len(before) + len(after) == 12


def test_parameters_that_do_not_apply_are_marked(tmp_path: Path, store: SqlStore) -> None:
    space = conditional_space(tmp_path, budget={"trials": 1000})
    search = search_of(Study.open(space, store))
    drive(search)
    for trial in finished_trials(search):
        keys = trial.params[f"deepspeed.{BUCKET}"]
        applies = trial.params["engine"] == "deepspeed" and trial.params["zero_stage"] >= 1
        assert (keys != NOT_APPLICABLE) == applies
        selective = trial.params["activation_checkpointing"] == "selective"
        assert (trial.params["selective_every"] != NOT_APPLICABLE) == selective
    assert NOT_APPLICABLE in distributions(space)[f"deepspeed.{BUCKET}"].choices


def test_what_each_outcome_teaches(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, baseline=..., budget={"trials": 100})
    search = search_of(Study.open(space, store))
    used, limit = 40, 60
    outcomes: list[Outcome] = [
        simulate(space.candidates[0]),
        failure(FailureKind.OUT_OF_MEMORY),
        failure(FailureKind.INVALID_CONFIG),
        failure(FailureKind.TIMEOUT),
    ]
    assert isinstance(outcomes[0], Measurement)
    assert used < limit
    for number, outcome in enumerate(outcomes):
        search.suggest(f"t{number}")
        report(search, f"t{number}", outcome)
    measured, out_of_memory, invalid, timeout = finished_trials(search)
    worst = measured.value
    assert measured.constraints[MEMORY_CONSTRAINT] <= 0
    assert (out_of_memory.value, out_of_memory.constraints[MEMORY_CONSTRAINT] > 0) == (worst, True)
    assert (invalid.value, invalid.constraints[MEMORY_CONSTRAINT] > 0) == (worst, True)
    assert (timeout.value, timeout.constraints[MEMORY_CONSTRAINT] > 0) == (worst, False)


def test_lost_workers_teach_nothing(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path, baseline=...), store)
    search = search_of(study)
    first = search.suggest("t0")
    search.on_trial_complete("t0", error=True)
    assert finished_trials(search) == []
    again = search.suggest("t1")
    assert isinstance(first, dict)
    assert isinstance(again, dict)
    assert again["config"] == first["config"]
    outcome = store.trials("sample")[0].attempts[0].outcome
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.WORKER_LOST


def test_a_crash_teaches_only_when_it_happens_again(tmp_path: Path, store: SqlStore) -> None:
    search = search_of(Study.open(sample_space(tmp_path, baseline=...), store))
    for number, told in ((0, 0), (1, 1)):
        search.suggest(f"t{number}")
        report(search, f"t{number}", failure(FailureKind.CRASH))
        assert len(finished_trials(search)) == told


def test_it_waits_for_running_trials_before_it_ends(tmp_path: Path, store: SqlStore) -> None:
    search = search_of(Study.open(sample_space(tmp_path, budget={"trials": 1}), store))
    assert isinstance(search.suggest("t0"), dict)
    assert search.suggest("t1") is None
    report(search, "t0", failure(FailureKind.CRASH))
    assert isinstance(search.suggest("t1"), dict)
    report(search, "t1", failure(FailureKind.CRASH))
    assert search.suggest("t2") == Searcher.FINISHED


def test_interrupting_stores_what_was_running(tmp_path: Path, store: SqlStore) -> None:
    study = Study.open(sample_space(tmp_path), store)
    search = search_of(study)
    search.suggest("t0")
    search.interrupt("stopped by the user")
    assert store.trials("sample")[0].attempts[0].state.value == "interrupted"
    assert study.counts.interrupted == 1


def test_a_baseline_outside_the_axes_is_run_but_not_taught(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(
        tmp_path, search={"engine": "pytorch", "precision": "bf16", "zero_stage": [0, 3], "micro_batch_size": [1, 2]}
    )
    search = search_of(Study.open(space, store))
    configs = drive(search, limit=3)
    assert configs[0] == space.baseline
    assert configs[0] not in space.candidates
    assert len(finished_trials(search)) == len(configs) - 1


def test_ray_pickles_nothing_of_it(tmp_path: Path, store: SqlStore) -> None:
    search = search_of(Study.open(sample_space(tmp_path), store))
    assert len(pickle.dumps(search)) < 1000
    search.save(str(tmp_path / "searcher"))
    assert not (tmp_path / "searcher").exists()


def test_what_leads_is_confirmed_when_nothing_is_left_to_screen(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, budget={"trials": 5}, measure={"confirm_top": 1, "confirm_steps": 10})
    study = Study.open(space, store)
    search = search_of(study)
    orders: list[dict[str, Any]] = []
    while (suggested := search.suggest(f"t{len(orders)}")) != Searcher.FINISHED:
        assert isinstance(suggested, dict)
        if "long_run" in suggested:
            assert search.suggest("another") is None  # it runs alone
        orders.append(suggested)
        config = TrialConfig.from_dict(suggested["config"])
        seconds = 8.0 / config.micro_batch_size
        report(search, f"t{len(orders) - 1}", confirmed([seconds] * 5) if "long_run" in suggested else simulate(config))
    confirming = [suggested for suggested in orders if "long_run" in suggested]
    once, plain = {"steps": 5, "evaluate": True, "save": True}, {"steps": 5, "evaluate": False, "save": False}
    assert [suggested["long_run"] for suggested in confirming] == [once, once, plain, plain]
    assert confirming[0]["trial"] == 1
    assert confirming[0]["more_seconds"] == 3 * 6 * 1.0  # whole steps of 1 s, with patience
    assert len(finished_trials(search)) == len(orders) - len(confirming)
    assert study.verdict is not None


def test_a_trial_is_told_from_when_on_it_is_hopeless_unless_it_is_the_baseline(tmp_path: Path, store: SqlStore) -> None:
    search = search_of(Study.open(sample_space(tmp_path), store))
    baseline, early = search.suggest("t0"), search.suggest("t1")
    assert isinstance(baseline, dict)
    assert isinstance(early, dict)
    assert "most_step_seconds" not in baseline | early  # nothing is measured yet
    report(search, "t0", measurement(1000.0))
    later = search.suggest("t2")
    assert isinstance(later, dict)
    # 16 sequences of 64 tokens on two GPUs are 512 tokens a GPU.
    assert later["most_step_seconds"] == pytest.approx(1.25 * 512 / 1000.0)


def test_what_was_stopped_early_teaches_its_bound(tmp_path: Path, store: SqlStore) -> None:
    search = search_of(Study.open(sample_space(tmp_path, baseline=...), store))
    search.suggest("t0")
    bound: dict[str, Any] = {"most_tokens_per_second_per_gpu": 70.0, "peak_device_used_bytes": 40 * MIB}
    report(search, "t0", failure(FailureKind.STOPPED_EARLY, **bound))
    (told,) = finished_trials(search)
    assert (told.value, told.constraints[MEMORY_CONSTRAINT] < 0) == (70.0, True)
