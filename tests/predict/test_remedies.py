"""What would fit where nothing does."""

from pathlib import Path

import pytest

from autotune.errors import NothingFeasibleError
from autotune.predict.memory import predict_memory
from autotune.predict.plan import plan_memory
from autotune.predict.remedies import remedies, remedies_text, require_feasible, underestimate
from autotune.results import Result
from tests.samples import MIB, failure, measurement, sample_space

SEARCH = {
    "engine": "pytorch",
    "precision": "fp32",
    "zero_stage": 0,
    "activation_checkpointing": "none",
    "micro_batch_size": 8,
}


def test_what_is_advised_fits_by_prediction_and_is_in_the_refusal(tmp_path: Path) -> None:
    cluster = {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": 16 * MIB}
    plan = plan_memory(sample_space(tmp_path, search=SEARCH, cluster=cluster, baseline=...))
    assert plan.surely_too_big.all()
    found = remedies(plan)
    assert found
    space = plan.space
    for remedy in found:
        needs = predict_memory(remedy.config, space.model, space.workload, space.cluster).device_used_bytes
        assert needs == remedy.device_used_bytes <= space.usable_bytes
    with pytest.raises(NothingFeasibleError, match="would fit: ") as caught:
        require_feasible(plan)
    assert all(remedy.words in str(caught.value) for remedy in found)
    assert "\n" not in str(caught.value)
    # What ran out of memory although it should have fitted makes advice more careful.
    assert remedies(plan, scale=100.0) == []
    assert "neither a lever nor 64 times as many GPUs would help" in remedies_text([])


def test_a_trial_that_ran_out_of_memory_shows_how_much_too_little_was_predicted(tmp_path: Path) -> None:
    plan = plan_memory(sample_space(tmp_path, search=SEARCH, baseline=...))
    config = plan.space.candidates[0]
    predicted = plan.of(config)
    assert predicted is not None
    ratio = underestimate(plan, [Result(1, config, failure())])
    assert ratio == pytest.approx(max(1.0, 60 * MIB / predicted.device_used_bytes))
    too_much = measurement(used_bytes=3 * predicted.device_used_bytes)
    assert underestimate(plan, [Result(1, config, too_much)]) == pytest.approx(3.0)
    assert underestimate(plan, []) == 1.0
