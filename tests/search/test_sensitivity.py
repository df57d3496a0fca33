"""What one step away from the winner does: every searched axis, by trials where there are any, and what limits it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from autotune.predict.plan import Plan
from autotune.predict.roofline import TimePart
from autotune.predict.step import StepTimes
from autotune.report.sensitivity import constraint_text, sensitivity_table
from autotune.search.sensitivity import find_sensitivity
from autotune.spec.outcome import Measurement
from autotune.spec.sensitivity import Basis, Constraint, Sensitivity
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from tests.samples import MIB, sample_space
from tests.search.test_plan_sampler import a_plan, a_search
from tests.search.test_tune_search import drive


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def searched(tmp_path: Path, store: SqlStore, trials: int = 10) -> tuple[Study, Plan]:
    space = sample_space(tmp_path, baseline=..., budget={"trials": trials, "stop_below_gain": 0})
    plan = a_plan(space)
    study = Study.open(space, store, plan)
    drive(a_search(study, plan))
    return study, plan


def found_in(study: Study, plan: Plan) -> Sensitivity:
    found = find_sensitivity(study, plan)
    assert found is not None
    return found


def test_every_axis_moves_once_to_either_side_and_says_how_it_is_known(tmp_path: Path, store: SqlStore) -> None:
    study, plan = searched(tmp_path, store)
    found, best = found_in(study, plan), study.best()
    assert best is not None
    assert found.trial == best.trial
    assert {step.axis for step in found.steps} >= {"micro_batch_size", "precision", "activation_checkpointing"}
    outcomes = {config: (number, outcome) for number, config, outcome in study.results}
    values = study.space.values(best.config)
    for step in found.steps:
        moved = study.space.config(values | {"selective_every": 2, "pipeline_schedule": "1f1b", step.axis: step.value})
        if study.space.refusal(moved) is not None:
            assert step.basis is Basis.ILLEGAL
            assert step.note
        elif moved in outcomes:
            number, outcome = outcomes[moved]
            assert (step.basis, step.trial) == (Basis.MEASURED, number)
            if isinstance(outcome, Measurement):
                speed = best.measurement.tokens_per_second_per_gpu
                assert step.ratio is not None
                assert step.ratio == pytest.approx(outcome.tokens_per_second_per_gpu / speed)
                assert step.low is None
                assert step.ratio <= 1
        elif study.is_worth_a_launch(moved):
            assert step.basis is Basis.EXPECTED
            assert step.ratio is not None
            assert step.low is not None
            assert step.high is not None
            assert step.low < step.ratio < step.high
        else:
            assert (step.basis, step.fits) == (Basis.PREDICTED, False)
    assert any(step.basis is Basis.MEASURED for step in found.steps)
    assert any(step.basis is Basis.EXPECTED for step in found.steps)


def with_times(plan: Plan, part: TimePart) -> Plan:
    """Steps of which nearly all is one part, faster with larger micro-batches."""
    batch = np.array([config.micro_batch_size for config in plan.space.candidates], float)
    others = {other: np.full(len(batch), 0.01) for other in TimePart}
    times = StepTimes(others | {part: 1 / batch}, np.full(len(batch), 1000.0), np.ones(len(batch)), np.ones(len(batch)))
    return replace(plan, times=times)


@pytest.mark.parametrize(
    ("part", "constraint"),
    [
        (TimePart.MATMUL, Constraint.COMPUTE),
        (TimePart.GRADIENT_REDUCTION, Constraint.COMMUNICATION),
        (TimePart.LAUNCH, Constraint.PROCESSOR),
    ],
)
def test_what_most_of_the_step_is_limits_where_memory_does_not(
    tmp_path: Path, store: SqlStore, part: TimePart, constraint: Constraint
) -> None:
    space = sample_space(
        tmp_path, baseline=..., search={"micro_batch_size": [1, 2], "zero_stage": 3, "engine": "pytorch"}
    )
    small = np.full(len(space.candidates), 0.01)
    plan = with_times(Plan(space, small, small, Counter(), None, None, None), part)
    study = Study.open(space, store, plan)
    drive(a_search(study, plan))
    found = found_in(study, plan)
    assert found.constraint is constraint
    assert "by prediction" in found.because


def test_memory_limits_where_a_step_that_it_forbids_would_be_faster(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": 3, "precision": "bf16", "micro_batch_size": [1, 2, 4, 8, 16]}
    space = sample_space(tmp_path, baseline=..., search=search | {"activation_checkpointing": "none"})
    plan = with_times(a_plan(space), TimePart.MATMUL)
    study = Study.open(space, store, plan)
    drive(a_search(study, plan))
    found, best = found_in(study, plan), study.best()
    assert best is not None
    (step,) = [step for step in found.steps if step.value == best.config.micro_batch_size * 2]
    assert not step.fits
    assert found.constraint is Constraint.MEMORY
    assert f"micro_batch_size {step.value} needs" in found.because
    assert found.device_used_bytes < 40 * MIB


def test_it_is_kept_until_another_trial_wins_and_reads_back(tmp_path: Path, store: SqlStore) -> None:
    study, plan = searched(tmp_path, store, 6)
    assert study.sensitivity is None
    study.keep_sensitivity(found_in(study, plan))
    assert Study.stored(store, "sample").sensitivity == study.sensitivity == found_in(study, plan)
    more = Study.open(sample_space(tmp_path, baseline=..., budget={"trials": 7, "stop_below_gain": 0}), store, plan)
    drive(a_search(more, plan))
    assert more.sensitivity is None


def test_its_words_name_every_step(tmp_path: Path, store: SqlStore) -> None:
    study, plan = searched(tmp_path, store)
    found = found_in(study, plan)
    console = Console(width=400)
    with console.capture() as captured:
        console.print(sensitivity_table(found))
    text = captured.get()
    assert len(text.splitlines()) == 1 + len(found.steps)
    assert all(f"{step.axis} {step.value}" in text for step in found.steps)
    assert constraint_text(found).startswith(found.constraint.value)


def test_without_a_winner_there_is_none(tmp_path: Path, store: SqlStore) -> None:
    space = sample_space(tmp_path, baseline=...)
    assert find_sensitivity(Study.open(space, store), a_plan(space)) is None
