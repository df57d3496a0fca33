import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune.engines.batches import MicroBatch
from autotune.spec.outcome import Phase
from autotune.trial.failure import NonFiniteLossError
from autotune.trial.measure import Samples, measure_plan, run_micro_steps, warmup_plan
from tests.trial.recorder import Recorder


@given(accumulation=st.integers(1, 200), micro_steps=st.integers(1, 40))
def test_a_plan_samples_both_kinds_and_no_longer_accumulation_than_real(accumulation: int, micro_steps: int) -> None:
    plan = measure_plan(accumulation, micro_steps)
    assert len(plan) == max(micro_steps, 2 if accumulation == 1 else 3)
    assert plan[-1]
    assert plan.count(True) >= 2
    assert (False in plan) == (accumulation > 1)
    runs = [len(list(group)) for boundary, group in itertools.groupby(plan) if not boundary]
    assert max(runs, default=0) < accumulation


def test_plans_as_one_would_write_them() -> None:
    assert measure_plan(1, 6) == (True,) * 6
    assert measure_plan(2, 6) == (False, True) * 3
    assert measure_plan(16, 6) == (False, False, True) * 2
    assert warmup_plan(1, 1) == (True,)
    assert warmup_plan(16, 2) == (False, True, False, True)


def run(
    engine: Recorder, plan: tuple[bool, ...], hopeless: Callable[[Samples], bool] = lambda samples: False
) -> Samples:
    return run_micro_steps(
        engine,
        plan,
        batch=lambda step, micro_step: MicroBatch(torch.tensor(10 * step + micro_step), 7),
        first_step=1,
        synchronize=lambda: engine.calls.append("synchronize"),
        barrier=lambda: engine.calls.append("barrier"),
        on_phase=lambda phase: engine.calls.append(phase.value) if phase is Phase.OPTIMIZER else None,
        after_sample=lambda: engine.calls.append("sampled"),
        hopeless=hopeless,
    )


def test_micro_steps_run_in_order_and_are_timed_between_synchronisations() -> None:
    engine = Recorder()
    samples = run(engine, (False, True, True))
    before, after = ["barrier", "synchronize"], ["synchronize", "sampled"]
    assert engine.calls == [
        *before, "forward 10 False", "backward False", *after,
        *before, "forward 11 True", "backward True", "optimizer", "update", *after,
        *before, "forward 20 True", "backward True", "optimizer", "update", *after,
    ]  # fmt: skip
    assert (len(samples.micro_step_seconds), len(samples.update_step_seconds)) == (1, 2)
    assert samples.losses == [1.0, 1.0, 1.0]


def test_what_is_hopeless_ends_after_the_sample_that_shows_it() -> None:
    engine = Recorder()
    samples = run(engine, (False, False, True, True), hopeless=lambda samples: len(samples.losses) == 2)
    assert samples.stopped_early
    assert (len(samples.micro_step_seconds), len(samples.update_step_seconds)) == (2, 0)
    # After the last one there is nothing to leave out.
    assert not run(Recorder(), (False, True), hopeless=lambda samples: len(samples.losses) == 2).stopped_early


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_measurement(bad: float) -> None:
    engine = Recorder([1.0, bad, 1.0])
    with pytest.raises(NonFiniteLossError, match="optimizer step 1, micro-step 1"):
        run(engine, (False, True, True))
