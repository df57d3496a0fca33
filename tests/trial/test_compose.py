import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.spec.cluster import find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.outcome import Failure, FailureKind, RankMeasurement, outcome_from_dict
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload
from autotune.trial.compose import compose, conclude, least_step_seconds, slowest

seconds = st.floats(1e-3, 1e3)
size = st.integers(0, 1 << 40)


@st.composite
def gangs(draw: st.DrawFn) -> tuple[TrialRequest, tuple[RankMeasurement, ...]]:
    gpus, micro_batch, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    request = TrialRequest(
        trial_id="x",
        model=load_model("qwen3-tiny", Path.cwd()),
        workload=Workload(global_batch_size=gpus * micro_batch * accumulation),
        config=TrialConfig(engine="pytorch", gpus=gpus, micro_batch_size=micro_batch, sequence_length=128),
        device="cpu",
    )
    ranks = tuple(
        RankMeasurement(
            rank=rank,
            micro_step_seconds=tuple(draw(st.lists(seconds, min_size=1, max_size=5))) if accumulation > 1 else (),
            update_step_seconds=tuple(draw(st.lists(seconds, min_size=2, max_size=5))),
            losses=(1.0,),
            peak_memory_allocated_bytes=draw(size),
            peak_memory_reserved_bytes=draw(size),
            peak_device_used_bytes=draw(size),
            device_memory_bytes=1 << 40,
            allocator_retries=draw(st.integers(0, 3)),
            phase_seconds={"start": draw(seconds), "measure": draw(seconds)},
            environment={},
        )
        for rank in range(gpus)
    )
    return request, ranks


@given(gangs())
def test_a_measurement_is_of_the_slowest_and_of_the_fullest_rank(
    gang: tuple[TrialRequest, tuple[RankMeasurement, ...]],
) -> None:
    request, ranks = gang
    accumulation = request.workload.gradient_accumulation_steps(request.config)
    measured = compose(ranks, request, find_gpu("H100-80GB"))
    for rank in ranks:
        alone = statistics.median(rank.update_step_seconds)
        if accumulation > 1:
            alone += (accumulation - 1) * statistics.median(rank.micro_step_seconds)
        assert measured.step_time_seconds >= alone
        assert measured.peak_memory_allocated_bytes >= rank.peak_memory_allocated_bytes
        assert measured.peak_memory_reserved_bytes >= rank.peak_memory_reserved_bytes
        assert measured.peak_device_used_bytes >= rank.peak_device_used_bytes
        assert measured.phase_seconds["start"] >= rank.phase_seconds["start"]
    tokens = measured.tokens_per_second_per_gpu * measured.step_time_seconds * request.config.gpus
    assert tokens == pytest.approx(request.workload.tokens_per_step(request.config))
    assert measured.model_flops_utilization == pytest.approx(
        request.model.flops_per_token(128) * measured.tokens_per_second_per_gpu / 989.4e12
    )
    assert outcome_from_dict(measured.to_dict()) == measured


@given(gangs())
def test_a_cpu_has_no_utilization(gang: tuple[TrialRequest, tuple[RankMeasurement, ...]]) -> None:
    request, ranks = gang
    assert compose(ranks, request, find_gpu("cpu")).model_flops_utilization is None


def test_slowest_takes_what_some_ranks_lack() -> None:
    assert slowest([{"start": 1.0}, {"start": 0.5, "build": 2.0}]) == {"start": 1.0, "build": 2.0}
    assert slowest([]) == {}


@given(gangs(), st.integers(0, 4))
def test_a_trial_that_was_stopped_early_is_at_most_as_fast_as_it_could_still_have_become(
    gang: tuple[TrialRequest, tuple[RankMeasurement, ...]], seen: int
) -> None:
    """Whatever the samples after the first ones would have been, none faster than the fastest less the optimism."""
    request, ranks = gang
    measured = compose(ranks, request, find_gpu("cpu"))
    cut = tuple(
        replace(
            rank,
            stopped_early=True,
            micro_step_seconds=(min(rank.micro_step_seconds),) if rank.micro_step_seconds else (),
            update_step_seconds=tuple(sorted(rank.update_step_seconds)[: min(1, seen)]),
        )
        for rank in ranks
    )
    never = (1e-9,)  # without accumulation the first sample is of an update
    cut = tuple(
        r if r.micro_step_seconds else replace(r, update_step_seconds=r.update_step_seconds or never) for r in cut
    )
    stopped = conclude(cut, request, find_gpu("cpu"))
    assert isinstance(stopped, Failure)
    assert stopped.kind is FailureKind.STOPPED_EARLY
    most = stopped.most_tokens_per_second_per_gpu
    assert most is not None
    # An update takes no less than a micro-step that accumulates.
    if seen or all(min(r.update_step_seconds) >= min(r.micro_step_seconds, default=0) for r in ranks):
        assert most >= measured.tokens_per_second_per_gpu * (1 - 1e-9)
    reached = request.measure.warmup > 1 or all(rank.update_step_seconds for rank in cut)
    assert stopped.peak_device_used_bytes == (measured.peak_device_used_bytes if reached else None)
    assert outcome_from_dict(stopped.to_dict()) == stopped
    assert conclude(ranks, request, find_gpu("cpu")) == measured


def test_what_a_step_takes_at_least() -> None:
    assert least_step_seconds([], [], 4) == 0.0
    assert least_step_seconds([1.0, 2.0], [], 4) == pytest.approx(0.9 * 4.0)
    assert least_step_seconds([1.0], [1.5], 4) == pytest.approx(0.9 * 4.5)
    assert least_step_seconds([], [1.5, 2.0], 1) == pytest.approx(0.9 * 1.5)


def test_padding_is_no_throughput() -> None:
    config = TrialConfig(
        engine="pytorch", gpus=2, micro_batch_size=2, sequence_length=100, batching="padded", tensor_parallel_size=1
    )
    request = TrialRequest(
        trial_id="x",
        model=load_model("qwen3-tiny", Path.cwd()),
        workload=Workload(global_batch_size=12, lengths=(10, 100)),
        config=config,
        device="cpu",
    )

    def rank(number: int, micro: tuple[int, ...], update: tuple[int, ...]) -> RankMeasurement:
        return RankMeasurement(
            rank=number,
            micro_step_seconds=tuple(tokens / 100 for tokens in micro),
            update_step_seconds=tuple(1 + tokens / 100 for tokens in update),
            micro_step_tokens=micro,
            update_step_tokens=update,
            losses=(1.0,),
            peak_memory_allocated_bytes=1,
            peak_memory_reserved_bytes=1,
            peak_device_used_bytes=1,
            device_memory_bytes=2,
            allocator_retries=0,
            phase_seconds={},
            environment={},
        )

    measured = compose([rank(0, (20, 20, 200), (50, 60)), rank(1, (10, 30, 20), (40, 40))], request, find_gpu("cpu"))
    # Two micro-steps that accumulate and one that updates; means of both, since they differ in what they do.
    assert measured.step_time_seconds == pytest.approx(2 * 0.8 + 1.55)
    tokens = (2 * 80 + 55) + (2 * 20 + 40)
    assert measured.tokens_per_second_per_gpu == pytest.approx(tokens / (2 * 0.8 + 1.55) / 2)
    assert outcome_from_dict(measured.to_dict()) == measured
