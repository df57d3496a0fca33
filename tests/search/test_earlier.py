"""What earlier studies in the same store teach, and which of them do not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.predict.plan import Plan
from autotune.predict.roofline import TimePart
from autotune.search.candidates import Candidates, Observed
from autotune.search.columns import features_of, rows_of
from autotune.search.earlier import Earlier, earlier_trials
from autotune.search.expected_improvement import ExpectedImprovement
from autotune.search.plan_sampler import PlanSampler
from autotune.search.tune_search import TuneSearch
from autotune.spec.outcome import Measurement, Outcome
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from autotune.trial.environment import environment
from tests.samples import failure, sample_space, simulate
from tests.search.test_plan_sampler import a_plan
from tests.search.test_sensitivity import with_times


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def here(outcome: Outcome, **versions: str) -> Outcome:
    """The same, measured with the software of this machine."""
    if not isinstance(outcome, Measurement):
        return outcome
    ranks = tuple(replace(rank, environment=environment("cpu") | versions) for rank in outcome.ranks)
    return replace(outcome, ranks=ranks)


def a_study(folder: Path, store: SqlStore, name: str, trials: int = 6, **changes: Any) -> tuple[Study, Plan]:
    space = sample_space(folder, study=name, baseline=..., budget={"trials": trials, "stop_below_gain": 0}, **changes)
    plan = with_times(a_plan(space), TimePart.MATMUL)
    return Study.open(space, store, plan), plan


def run(study: Study, plan: Plan, **versions: str) -> None:
    search = TuneSearch(study, PlanSampler(study, plan, 0), 0)
    number = 0
    while isinstance(found := search.suggest(f"t{number}"), dict):
        config = next(attempt.config for attempt in study._running.values())
        study.record(search._attempts.pop(f"t{number}"), here(simulate(config), **versions))
        assert found["config"] == config.to_dict()
        number += 1


def test_trials_of_other_sizes_on_equal_hardware_teach_and_are_named(tmp_path: Path, store: SqlStore) -> None:
    run(*a_study(tmp_path, store, "first", workload={"global_batch_size": 16, "sequence_length": 32}))
    study, plan = a_study(tmp_path, store, "second")
    earlier = earlier_trials(store, plan)
    assert earlier is not None
    finished = len(store.trials("first"))
    assert earlier.trials == {"first": finished}
    assert f"what {finished} trials on equal hardware and software taught: {finished} of first" in earlier.words
    sampler = PlanSampler(study, plan, 0, earlier)
    configs = list(study.space.candidates)
    alone, taught = PlanSampler(study, plan, 0).expected(configs), sampler.expected(configs)
    spread = [np.log(found[c].throughput_high / found[c].throughput_low) for found in (alone, taught) for c in alone]
    assert sum(spread[len(alone) :]) < 0.9 * sum(spread[: len(alone)])
    search = TuneSearch(study, sampler, 0)
    first = search.suggest("t0")
    assert isinstance(first, dict)  # an earlier config is never proposed for itself
    assert sampler.proposal is not None
    assert sampler.proposal.candidate < len(study.worth_a_launch)


@pytest.mark.parametrize(
    "changes",
    [
        {"cluster": {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "61MiB"}},
        {"cluster": {"nodes": 1, "gpus_per_node": 4, "gpu": "cpu", "memory_bytes": "60MiB"}},
    ],
)
def test_other_hardware_teaches_nothing(tmp_path: Path, store: SqlStore, changes: dict[str, Any]) -> None:
    run(*a_study(tmp_path, store, "first", **changes))
    _, plan = a_study(tmp_path, store, "second")
    assert earlier_trials(store, plan) is None


def test_other_software_and_a_plan_without_times_are_taught_nothing(tmp_path: Path, store: SqlStore) -> None:
    run(*a_study(tmp_path, store, "first"), torch="1.0")
    study, plan = a_study(tmp_path, store, "second")
    assert earlier_trials(store, plan) is None
    run(study, plan)
    assert earlier_trials(store, plan) is None  # a study is no earlier one of its own
    _, third = a_study(tmp_path, store, "third")
    assert earlier_trials(store, third) is not None
    assert earlier_trials(store, replace(third, times=None)) is None


def test_rows_of_the_studys_own_configs_are_its_features(tmp_path: Path) -> None:
    space = sample_space(tmp_path)
    np.testing.assert_array_equal(rows_of(space, list(space.candidates)), features_of(space))
    other = replace(space.candidates[0], micro_batch_size=64, precision="fp16")
    (row,) = rows_of(space, [other])
    assert 6.0 in row.tolist()


def test_what_was_slow_on_another_network_is_no_slow_network_here() -> None:
    shares = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    own = Candidates(
        features=np.arange(3.0)[:, None],
        throughput=np.full(3, 100.0),
        shares=shares,
        unknowns=np.diag([0.2, 0.3]),
        peak_bytes=np.full(3, 1.0),
        peak_deviation=np.full(3, 0.01),
        capacity_bytes=2.0,
        cost=np.ones(3),
    )
    observed = [Observed(candidate=3 + row, throughput=100 / (share @ [1, 10])) for row, share in enumerate(shares)]
    speeds = {}
    for elsewhere in (False, True):
        search = ExpectedImprovement(own.before(own, [1], np.full(3, elsewhere)))
        speeds[elsewhere] = search.expect(observed, np.arange(3)).throughput
        proposal = search.propose(observed)
        assert proposal is not None
        assert proposal.candidate < 3
        assert proposal.best_throughput is None
    assert speeds[True][2] > 1.5 * speeds[False][2]


def test_what_is_measured_here_is_believed_though_all_earlier_trials_contradict_it() -> None:
    chance = np.random.default_rng(0)
    shares = chance.dirichlet([1.0, 1.0], 20)
    own = Candidates(
        features=chance.integers(0, 4, (20, 3)).astype(float),
        throughput=np.full(20, 100.0),
        shares=shares,
        unknowns=np.diag([0.2, 0.3]),
        peak_bytes=np.full(20, 1.0),
        peak_deviation=np.full(20, 0.01),
        capacity_bytes=2.0,
        cost=np.ones(20),
    )
    search = ExpectedImprovement(own.before(own, [1], np.full(20, False)))
    earlier = [Observed(candidate=20 + row, throughput=100.0) for row in range(20)]
    here = [Observed(candidate=row, throughput=100.0 / 5) for row in range(2)]
    after = search.expect(earlier + here, np.arange(2)).throughput
    assert (after < 40).all()


def test_nothing_but_out_of_memory_teaches_nothing(tmp_path: Path, store: SqlStore) -> None:
    study, _ = a_study(tmp_path, store, "first", trials=1)
    attempt = study.next_attempt(lambda: study.space.candidates[0])
    assert attempt is not None
    study.record(attempt, failure())
    _, second = a_study(tmp_path, store, "second")
    found: Earlier | None = earlier_trials(store, second)
    assert found is None
