"""A whole space predicted: equal to its configs one by one, with reasons where nothing can be said."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.errors import NothingFeasibleError, UnknownHardwareError
from autotune.predict import plan as planning
from autotune.predict import tracing
from autotune.predict.levers import explain
from autotune.predict.machine import MachineRates
from autotune.predict.memory import predict_memory
from autotune.predict.plan import SURE, Plan, plan_memory
from autotune.predict.remedies import require_feasible
from autotune.predict.shape import read_shape
from autotune.predict.throughput import predict_trials
from autotune.predict.trials import Trials
from autotune.space.space import Space, load_space
from autotune.spec.prediction import MemoryPrediction
from tests.predict.samples import RATES
from tests.samples import sample_space, space_text

SPACES = Path(__file__).parents[2] / "search_spaces"
BUCKETS = {
    "zero_optimization.reduce_bucket_size": [20_000, 200_000],
    "zero_optimization.allgather_bucket_size": [20_000, 400_000],
}
PLAIN: dict[str, Any] = {
    "engine": "pytorch",
    "precision": "bf16",
    "zero_stage": [0, 3],
    "activation_checkpointing": ["none", "full"],
    "micro_batch_size": [1, 2, 4, 8],
}
KEYED: dict[str, Any] = PLAIN | {
    "engine": ["deepspeed", "pytorch"],
    "zero_stage": [2],
    "activation_checkpointing": ["full"],
    "micro_batch_size": [2, 4],
    "deepspeed": BUCKETS,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(planning, "machine_rates", lambda ranks, precisions, on_measure: RATES)
        yield


def predicted(space: Space) -> list[MemoryPrediction]:
    return [predict_memory(config, space.model, space.workload, space.cluster) for config in space.candidates]


def test_every_candidate_is_predicted_as_by_itself(tmp_path: Path) -> None:
    small = {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "30MiB"}
    baseline = {"precision": "fp32", "zero_stage": 0, "micro_batch_size": 8}
    space = sample_space(tmp_path, search=PLAIN, cluster=small, baseline=baseline)
    told: list[tuple[int, int]] = []
    plan = plan_memory(space, lambda done, total: told.append((done, total)))
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == len(told) - 1
    singly = predicted(space)
    assert plan.device_used_bytes.round().tolist() == [memory.device_used_bytes for memory in singly]
    usable = space.usable_bytes
    assert plan.fits.tolist() == [memory.device_used_bytes <= usable for memory in singly]
    assert plan.surely_too_big.tolist() == [memory.fit_probability(usable) < SURE for memory in singly]
    assert plan.fits.any()
    assert plan.surely_too_big.any()
    assert not plan.unpredicted
    order = [plan.device_used_bytes[at] for at in plan.smallest(5)]
    assert order == sorted(order)
    assert order[0] == plan.device_used_bytes.min()
    # What the study asks: candidates, and a baseline that is none of them.
    assert space.baseline is not None
    assert space.baseline not in space
    stated, first = plan.of(space.baseline), plan.of(space.candidates[0])
    assert stated is not None
    assert first is not None
    assert stated.device_used_bytes > first.device_used_bytes
    # All of it is on disk now.
    again = plan_memory(space, lambda done, total: pytest.fail("traced again"))
    assert (again.device_used_bytes == plan.device_used_bytes).all()


@pytest.mark.slow
def test_on_gpus_a_plan_adds_what_the_allocator_and_the_context_take(tmp_path: Path) -> None:
    cluster = {"nodes": 1, "gpus_per_node": 2, "gpu": "H100-80GB"}
    search = PLAIN | {"zero_stage": 3, "activation_checkpointing": "full", "micro_batch_size": [2, 4]}
    space = sample_space(tmp_path, search=search, cluster=cluster, baseline=...)
    plan = plan_memory(space)
    singly = predicted(space)
    assert plan.device_used_bytes == pytest.approx([memory.device_used_bytes for memory in singly], abs=4)
    assert all(memory.device_used_bytes > memory.reserved_bytes > memory.allocated_bytes for memory in singly)


@pytest.mark.slow
def test_keys_are_traced_one_by_one_and_added(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=KEYED, baseline=...)
    plan = plan_memory(space)
    for used, deviation, memory in zip(plan.device_used_bytes, plan.deviations, predicted(space), strict=True):
        assert abs(used - memory.device_used_bytes) <= 2.6 * deviation * used
    keyed = np.array([any(value != 20_000 for _, value in config.deepspeed) for config in space.candidates])
    assert plan.deviations[keyed].max() > plan.deviations[~keyed].max()


def test_what_cannot_be_traced_has_its_reason_and_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tracing._trace

    def failing(names: set[str], on_traced: Any = None, *, counted: Any = ()) -> dict[str, str]:
        bad = {name: "RuntimeError: no kernel" for name in names if '"zero_stage": 3' in name}
        return bad | {name: reason for name in names - set(bad) if (reason := real(name))}

    monkeypatch.setattr(planning, "trace_structures", failing)
    space = sample_space(tmp_path, search=PLAIN, baseline=...)
    plan = plan_memory(space)
    unknown = np.array([config.zero_stage == 3 for config in space.candidates])
    assert (np.isnan(plan.device_used_bytes) == unknown).all()
    assert plan.unpredicted == {"RuntimeError: no kernel": unknown.sum()}
    assert not (plan.fits | plan.too_big | plan.surely_too_big)[unknown].any()
    assert all(plan.of(config) is None for config in space.candidates if config.zero_stage == 3)
    assert all(space.candidates[at].zero_stage == 0 for at in plan.smallest(100))


def test_a_value_of_a_key_that_cannot_be_traced_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tracing._trace

    def failing(names: set[str], on_traced: Any = None, *, counted: Any = ()) -> dict[str, str]:
        bad = {name: "RuntimeError: no such bucket" for name in names if "777" in name}
        return bad | {name: reason for name in names - set(bad) if (reason := real(name))}

    monkeypatch.setattr(planning, "trace_structures", failing)
    buckets = {"zero_optimization.reduce_bucket_size": [20_000, 777]}
    search = KEYED | {"engine": "deepspeed", "micro_batch_size": [2], "deepspeed": buckets}
    plan = plan_memory(sample_space(tmp_path, search=search, baseline=...))
    assert plan.unpredicted == {"RuntimeError: no such bucket": 1}
    assert int(plan.fits.sum() + plan.too_big.sum()) + 1 == len(plan.device_used_bytes) == 2


def test_an_impossible_structure_is_a_reason_and_not_an_error() -> None:
    (reason,) = tracing.trace_structures({"not JSON"}).values()
    assert reason.startswith("JSONDecodeError")


def a_plan(space: Space, used: float) -> Plan:
    count = len(space.candidates)
    return Plan(space, np.full(count, used), np.full(count, 0.002), Counter(), None, None, None)


def test_a_study_without_a_chance_is_refused_before_it_starts(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=PLAIN)
    require_feasible(a_plan(space, space.usable_bytes * 1.001))  # too big, not surely
    require_feasible(a_plan(space, math.nan))
    with pytest.raises(
        NothingFeasibleError, match=r"none of the 16 candidates fits in 56.4 MiB; the smallest, pytorch"
    ):
        require_feasible(a_plan(space, space.usable_bytes * 1.1))


def test_each_lever_is_one_step_and_predicted_as_by_itself(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=PLAIN, baseline=...)
    config = next(c for c in space.candidates if c.micro_batch_size == 2 and c.zero_stage == 3)
    memory, levers = explain(space, config)
    assert memory == predict_memory(config, space.model, space.workload, space.cluster)
    assert [(lever.axis, lever.value) for lever in levers] == [
        ("zero_stage", 0),
        ("activation_checkpointing", "full"),
        ("micro_batch_size", 1),
        ("micro_batch_size", 4),
    ]
    values = space.values(config)
    for lever in levers:
        moved = space.config(values | {"selective_every": space.axes["selective_every"][0], lever.axis: lever.value})
        assert lever.memory == predict_memory(moved, space.model, space.workload, space.cluster)


def test_an_illegal_lever_says_why(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=PLAIN | {"zero_stage": [0, 1]}, baseline=...)
    _, levers = explain(space, space.candidates[0])
    (stage,) = [lever for lever in levers if lever.axis == "zero_stage"]
    assert stage.memory is None
    assert stage.reason is not None
    assert "zero_stage 1 does not exist" in stage.reason


def test_candidates_are_timed_in_columns_as_one_by_one() -> None:
    space = load_space(SPACES / "qwen3-32b-sft-8xh100.yaml")
    times, reason = planning._times(space)
    assert reason is None
    assert times is not None
    shape = read_shape(space.model.name, space.model.config)
    some = list(range(0, len(space.candidates), 37))
    singly = predict_trials(
        shape, Trials.of([space.candidates[at] for at in some], space.workload, shape), space.cluster
    )
    assert times.of(np.array(some)).step_seconds == pytest.approx(singly.step_seconds)
    assert planning._speed(space, space.candidates[5]) == pytest.approx(times.at(5).tokens_per_second_per_gpu)


def test_split_models_are_timed_in_columns_as_one_by_one(tmp_path: Path) -> None:
    search = {
        "engine": "pytorch",
        "zero_stage": [2, 3],
        "micro_batch_size": [1, 2],
        "tensor_parallel_size": [1, 2],
        "sequence_parallel_size": [1, 2],
        "pipeline_parallel_size": [1, 2],
        "pipeline_schedule": ["1f1b", "interleaved_1f1b"],
        "loss": ["full_logits", "chunked"],
    }
    cluster = {"nodes": 2, "gpus_per_node": 8, "gpu": "H100-80GB"}
    work = {"global_batch_size": 128, "sequence_length": 4096}
    path = tmp_path / "space.yaml"
    path.write_text(space_text(model="Qwen/Qwen3-32B", search=search, cluster=cluster, workload=work, baseline=...))
    space = load_space(path)
    times, reason = planning._times(space)
    assert reason is None
    assert times is not None
    shape = read_shape(space.model.name, space.model.config)
    configs = list(space.candidates)
    assert {config.model_parallel_size for config in configs} >= {1, 2, 4}
    singly = predict_trials(shape, Trials.of(configs, space.workload, shape), space.cluster)
    assert times.step_seconds == pytest.approx(singly.step_seconds)
    assert times.tokens_per_second_per_gpu == pytest.approx(singly.tokens_per_second_per_gpu)
    assert (times.model_flops_utilization < 1).all()


def test_the_fastest_are_among_those_that_fit_and_of_different_kinds() -> None:
    space = load_space(SPACES / "qwen3-32b-sft-8xh100.yaml")
    times, _ = planning._times(space)
    assert times is not None
    used = np.array([float(config.micro_batch_size) for config in space.candidates]) * space.usable_bytes / 4
    plan = Plan(space, used, np.full(len(used), 0.06), Counter(), None, times, None)
    best = [space.candidates[at] for at in plan.fastest(10)]
    assert len(best) == 10
    assert {config.micro_batch_size for config in best} <= {1, 2, 4}
    kinds = {(c.engine, c.zero_stage, c.offload, c.activation_checkpointing, c.micro_batch_size) for c in best}
    assert len(kinds) == 10
    speeds = [times.at(at).tokens_per_second_per_gpu for at in plan.fastest(10)]
    assert speeds == sorted(speeds, reverse=True)
    prediction = plan.of(best[0])
    assert prediction is not None
    assert prediction.tokens_per_second_per_gpu == speeds[0]


def test_mixtures_of_experts_are_not_timed(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    other = {"vocab_size": 128, "intermediate_size": 96, "max_position_embeddings": 128, "tie_word_embeddings": False}
    (tmp_path / "model").mkdir()
    config = {"model_type": "qwen3_moe", **layers, **experts, **other}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    cluster = {"nodes": 1, "gpus_per_node": 2, "gpu": "H100-80GB"}
    space = sample_space(tmp_path, model="./model", search=PLAIN, cluster=cluster, baseline=...)
    times, reason = planning._times(space)
    assert times is None
    assert "dense" in str(reason)


def test_processors_are_timed_by_their_operators(tmp_path: Path) -> None:
    baseline = {"precision": "bf16", "zero_stage": 3, "micro_batch_size": 4, "activation_checkpointing": "full"}
    space = sample_space(tmp_path, search=PLAIN, baseline=baseline)
    plan = plan_memory(space, rates=RATES)
    assert plan.times is not None
    step = dict(zip(map(plan.space.candidates.__getitem__, range(16)), plan.times.step_seconds, strict=True))
    for config, seconds in step.items():
        fewer = replace(config, micro_batch_size=2 * config.micro_batch_size)
        assert fewer not in step or seconds > step[fewer]  # fewer micro-steps, fewer calls
        kept = replace(config, activation_checkpointing="none")
        assert seconds >= step[kept]
        assert step[replace(config, zero_stage=3)] >= step[replace(config, zero_stage=0)]
    assert space.baseline is not None
    stated = plan.of(space.baseline)
    assert stated is not None
    tokens = space.workload.global_batch_size * space.file.workload.sequence_length / 2
    assert stated.tokens_per_second_per_gpu == pytest.approx(tokens / step[space.baseline])
    assert math.isnan(plan.times.at(0).model_flops_utilization)


def test_processors_that_cannot_be_measured_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(ranks: int, precisions: object, on_measure: object) -> MachineRates:
        raise UnknownHardwareError("no cores")

    monkeypatch.setattr(planning, "machine_rates", failing)
    plan = plan_memory(sample_space(tmp_path, search=PLAIN, baseline=...))
    assert (plan.times, plan.untimed) == (None, "no cores")
