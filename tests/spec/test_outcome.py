import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.spec.outcome import (
    Failure,
    FailureKind,
    Measurement,
    Outcome,
    Phase,
    RankMeasurement,
    outcome_from_dict,
)

sizes = st.integers(0, 2**53)
seconds = st.floats(0, 1e9)
times = st.lists(seconds, max_size=4).map(tuple)
phases = st.dictionaries(st.text(max_size=8), seconds, max_size=3)

rank_measurements = st.builds(
    RankMeasurement,
    rank=st.integers(0, 4096),
    micro_step_seconds=times,
    update_step_seconds=times,
    losses=st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
    peak_memory_allocated_bytes=sizes,
    peak_memory_reserved_bytes=sizes,
    peak_device_used_bytes=sizes,
    device_memory_bytes=sizes,
    allocator_retries=sizes,
    phase_seconds=phases,
    environment=st.dictionaries(st.text(max_size=8), st.text(), max_size=3),
)
measurements = st.builds(
    Measurement,
    step_time_seconds=seconds,
    tokens_per_second_per_gpu=seconds,
    model_flops_utilization=st.none() | st.floats(0, 1),
    peak_memory_allocated_bytes=sizes,
    peak_memory_reserved_bytes=sizes,
    peak_device_used_bytes=sizes,
    device_memory_bytes=sizes,
    allocator_retries=sizes,
    phase_seconds=phases,
    ranks=st.lists(rank_measurements, max_size=3).map(tuple),
    elapsed_seconds=seconds,
    log_path=st.none() | st.text(),
)
failures = st.builds(
    Failure,
    kind=st.sampled_from(FailureKind),
    phase=st.sampled_from(Phase),
    message=st.text(),
    rank=st.none() | st.integers(0, 4096),
    requested_bytes=st.none() | sizes,
    phase_seconds=phases,
    elapsed_seconds=seconds,
    log_path=st.none() | st.text(),
)


@given(measurements | failures)
def test_an_outcome_survives_json(outcome: Outcome) -> None:
    fields = outcome.to_dict()
    assert outcome_from_dict(json.loads(json.dumps(fields))) == outcome
    assert outcome_from_dict(fields) == outcome, "without JSON too, and reading does not change what is read"
    assert outcome_from_dict(fields) == outcome


def test_kinds_by_name() -> None:
    memory = {kind for kind in FailureKind if kind.is_memory}
    assert memory == {FailureKind.OUT_OF_MEMORY, FailureKind.HOST_OUT_OF_MEMORY}
    assert {kind for kind in FailureKind if kind.is_infeasible} == memory | {FailureKind.INVALID_CONFIG}


def test_an_unknown_kind_is_refused() -> None:
    fields = Failure(kind=FailureKind.CRASH, phase=Phase.START, message="").to_dict()
    with pytest.raises(ValueError, match="meteor"):
        outcome_from_dict({**fields, "kind": "meteor"})
