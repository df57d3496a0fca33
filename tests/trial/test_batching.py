"""Sequences of different lengths in real trials: tokens without padding, memory at the longest, as predicted."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from autotune.predict.memory import predict_memory
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import Batching
from autotune.spec.request import TrialRequest
from autotune.spec.workload import lognormal_lengths
from autotune.trial.compose import compose
from autotune.trial.pool import NodePool
from tests.trial.gangs import a_request, run

CPU = ClusterSpec(nodes=1, gpus_per_node=2, gpu=find_gpu("cpu"), memory_bytes=1 << 30)
LENGTHS = lognormal_lengths(median=40, sigma=0.5)


def batched(batching: Batching, **fields: Any) -> TrialRequest:
    found = a_request(f"batching-{batching}-{fields.get('engine', 'pytorch')}", **fields)
    config = dataclasses.replace(found.config, batching=batching, micro_batch_size=4)
    workload = dataclasses.replace(found.workload, lengths=LENGTHS)
    return dataclasses.replace(found, config=config, workload=workload)


@pytest.mark.parametrize(
    ("batching", "fields"),
    [
        ("packed", {}),
        pytest.param("padded", {"engine": "deepspeed", "zero_stage": 2}, marks=pytest.mark.slow),
        pytest.param("dynamic_padding", {}, marks=pytest.mark.slow),
        pytest.param("packed", {"engine": "deepspeed", "zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param("padded", {"zero_stage": 3}, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_real_ones_and_memory_is_that_of_the_longest(
    pool: NodePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: Batching, fields: dict[str, Any]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request = batched(batching, **fields)
    result = run(pool, request)
    assert result.failure is None, result.failure
    config, workload = request.config, request.workload
    samples = [n for rank in result.ranks for n in (*rank.micro_step_tokens, *rank.update_step_tokens)]
    assert len(set(samples)) > 1
    assert max(samples) < 4 * 64
    measured = compose(result.ranks, request, CPU.gpu)
    counted = measured.tokens_per_second_per_gpu * measured.step_time_seconds * config.gpus
    assert counted == pytest.approx(workload.tokens_per_step(config), rel=0.3)
    predicted = predict_memory(config, request.model, workload, CPU)
    tolerance = 0.02 if config.engine == "deepspeed" else 1e-3
    assert predicted.device_used_bytes == pytest.approx(measured.peak_device_used_bytes, rel=tolerance)
