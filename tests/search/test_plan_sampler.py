"""Our sampler under `TuneSearch`: it finds the optimum of a small world in few launches, and never repeats itself."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.predict.plan import Plan
from autotune.report.terminal import why_text
from autotune.results import standing_outcome
from autotune.search.columns import candidates_of, features_of
from autotune.search.lessons import observation
from autotune.search.plan_sampler import PlanSampler
from autotune.search.tune_search import TuneSearch
from autotune.space.space import Space
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import FailureKind, Measurement, Outcome
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from tests.samples import MIB, failure, measurement, sample_space, simulate
from tests.search.test_tune_search import conditional_space, drive

NUMBERS = {
    "engine": "pytorch",
    "precision": "bf16",
    "zero_stage": 3,
    "activation_checkpointing": "none",
    "micro_batch_size": [1, 2, 8],
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def needed(space: Space) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What `simulate` will say."""
    found = []
    for config in space.candidates:
        outcome = simulate(config)
        size = outcome.peak_device_used_bytes if isinstance(outcome, Measurement) else outcome.requested_bytes
        found.append(float(size or 0) * 60 / 40)  # it refuses above 40 of 60 MiB
    return np.array(found)


def a_plan(space: Space) -> Plan:
    used = needed(space)
    return Plan(space, used, np.full(len(used), 0.05), Counter(), None, None, None)


def a_search(study: Study, plan: Plan) -> TuneSearch:
    return TuneSearch(study, PlanSampler(study, plan, 0), 0)


def best_of(space: Space) -> float:
    outcomes = [simulate(config) for config in space.candidates]
    return max(outcome.tokens_per_second_per_gpu for outcome in outcomes if isinstance(outcome, Measurement))


def test_it_comes_near_the_optimum_in_a_few_launches(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, baseline=..., budget={"trials": 12})
    plan = a_plan(space)
    study = Study.open(space, store, plan)
    drive(a_search(study, plan))
    best = study.best()
    assert best is not None
    assert best.measurement.tokens_per_second_per_gpu >= 0.95 * best_of(space)
    assert study.counts.out_of_memory <= 2


@pytest.mark.parametrize("at_once", [1, 4])
def test_every_candidate_that_may_fit_is_run_once(tmp_path: Path, store: SqlStore, at_once: int) -> None:
    space = conditional_space(tmp_path, budget={"trials": 1000, "stop_below_gain": 0})
    plan = a_plan(space)
    study = Study.open(space, store, plan)
    configs = drive(a_search(study, plan), at_once=at_once)
    assert len(configs) == len(set(configs))
    assert set(configs) == {space.candidates[int(at)] for at in study.worth_a_launch}


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_whatever_trials_find_none_is_illegal_or_launched_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    space = conditional_space(folder, budget={"trials": 14, "stop_below_gain": 0})
    plan = a_plan(space)
    kinds = [None, FailureKind.OUT_OF_MEMORY, FailureKind.INVALID_CONFIG, FailureKind.TIMEOUT]
    settled: set[TrialConfig] = set()
    with open_store(f"sqlite:///{folder}/a.db", create=True) as opened:
        for _ in range(2):  # the second is a resumed one
            study = Study.open(space, opened, plan)
            search, running, number = a_search(study, plan), dict[str, TrialConfig](), 0
            for _ in range(data.draw(st.integers(1, 12))):
                found = search.suggest(f"t{number}") if data.draw(st.booleans()) or not running else None
                if isinstance(found, dict):
                    config = TrialConfig.from_dict(found["config"])
                    assert space.refusal(config) is None
                    assert config in space
                    assert config not in settled | set(running.values())
                    running[f"t{number}"], number = config, number + 1
                elif running:
                    name, config = running.popitem()
                    kind = data.draw(st.sampled_from(kinds))
                    speed = data.draw(st.floats(1.0, 1000.0))
                    outcome = measurement(speed) if kind is None else failure(kind)
                    search.on_trial_complete(name, {"outcome": json.dumps(outcome.to_dict())})
                    settled.add(config)
            search.interrupt("the driver was stopped")
        assert len(opened.trials("sample")) <= 14


def test_it_ends_when_little_is_left_to_gain_and_says_so(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, baseline=..., budget={"trials": 1000, "stop_below_gain": 0.01, "stop_after": 6})
    plan = a_plan(space)
    study = Study.open(space, store, plan)
    launched = drive(a_search(study, plan), at_once=2)
    assert 6 <= len(launched) < len(study.worth_a_launch)
    assert "another trial promises a gain of" in str(study.stop_reason)
    best = study.best()
    assert best is not None
    assert best.measurement.tokens_per_second_per_gpu >= 0.95 * best_of(space)


def test_a_resumed_study_goes_on_from_what_is_stored(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, baseline=..., budget={"trials": 12})
    plan = a_plan(space)
    before = drive(a_search(Study.open(space, store, plan), plan), limit=5)
    after = drive(a_search(Study.open(space, store, plan), plan))
    assert not set(before) & set(after)
    assert len(before) + len(after) == 12


def test_each_stored_trial_is_looked_at_a_few_times_however_many_there_are(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = conditional_space(tmp_path, budget={"trials": 1000, "stop_below_gain": 0})
    plan = a_plan(space)
    stored = len(drive(a_search(Study.open(space, store, plan), plan), limit=20))
    looks: list[int] = []

    def counted(outcomes: Sequence[Outcome]) -> Outcome | None:
        looks.append(1)
        return standing_outcome(outcomes)

    monkeypatch.setattr("autotune.study.standing_outcome", counted)
    study = Study.open(space, store, plan)
    assert isinstance(a_search(study, plan).suggest("next"), dict)
    assert len(looks) <= 3 * stored


def test_what_outcomes_teach() -> None:
    seen = observation(3, measurement(used_bytes=50 * MIB))
    assert seen is not None
    assert (seen.candidate, seen.throughput, seen.peak_bytes) == (3, 1000.0, 50 * MIB)
    early = observation(
        3, failure(FailureKind.STOPPED_EARLY, most_tokens_per_second_per_gpu=70.0, peak_device_used_bytes=MIB)
    )
    assert early is not None
    assert (early.throughput, early.at_most, early.peak_bytes) == (None, 70.0, MIB)
    ran_out = observation(3, failure())
    assert ran_out is not None
    assert ran_out.ran_out
    for kind in (FailureKind.CRASH, FailureKind.INVALID_CONFIG, FailureKind.TIMEOUT):
        failed = observation(3, failure(kind))
        assert failed is not None
        assert failed.failed
    for kind in (FailureKind.NODE_LOST, FailureKind.WORKER_LOST, FailureKind.INTERRUPTED):
        assert observation(3, failure(kind)) is None


def test_features_tell_all_candidates_apart_and_are_in_doublings(tmp_path: Path) -> None:
    space = conditional_space(tmp_path)
    features = features_of(space)
    assert len(np.unique(features, axis=0)) == len(space.candidates)
    space = sample_space(tmp_path, baseline=..., search=NUMBERS)
    assert features_of(space)[:, 0].tolist() == [0.0, 1.0, 3.0]


def test_what_cannot_be_predicted_is_uncertain_and_not_left_out(tmp_path: Path) -> None:
    space = sample_space(tmp_path)
    plan = a_plan(space)
    plan.device_used_bytes[:3] = np.nan
    found = candidates_of(plan, np.arange(len(space.candidates)))
    assert (found.peak_deviation[:3] > found.peak_deviation[3]).all()
    assert np.isfinite(found.peak_bytes).all()


def test_the_store_keeps_why_each_trial_was_launched(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, budget={"trials": 4})
    plan = a_plan(space)
    drive(a_search(Study.open(space, store, plan), plan))
    baseline, first, *later = store.trials(space.name)
    assert why_text(baseline).endswith("is the baseline of the file.")
    assert first.prediction is not None
    assert first.prediction.proposal is not None
    assert first.prediction.proposal["best_throughput"] is not None  # the baseline's
    for trial in (first, *later):
        assert "tokens/s/GPU" in why_text(trial)
        assert "it fits with probability" in why_text(trial)
