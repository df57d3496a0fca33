"""Memory of tensor, sequence and pipeline parallel ranks: what is traced against what real gloo ranks reach."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from autotune.predict.memory import rank_streams, structures
from autotune.predict.trace import trace_stream
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from autotune.spec.workload import MeasureSettings, Workload
from autotune.trial.pool import NodePool
from tests.engines.parity import SMALL_BUCKETS
from tests.predict.test_fake import TINY

BATCH, LENGTH = 3, 96
TOLERANCE = 0.02
"""Most cases are equal to the byte, most of the time: a thread of gloo's may let go of a message a moment late."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodePool]:
    pool = NodePool(device="cpu", log_dir=str(tmp_path_factory.mktemp("logs")))
    yield pool
    pool.shutdown()


def a_request(layers: int, steps: int, gpus: int, layout: dict[str, Any]) -> TrialRequest:
    fields = {"engine": "pytorch", "precision": "fp32", "zero_stage": 0, "gpus": gpus, **layout}
    config = TrialConfig.from_dict({**fields, "micro_batch_size": BATCH, "sequence_length": LENGTH})
    return TrialRequest(
        trial_id="layout",
        model=ModelSpec(name="layout", config={**TINY.config, "num_hidden_layers": layers}),
        workload=Workload(global_batch_size=steps * BATCH * config.data_parallel_size),
        config=config,
        device="cpu",
        measure=MeasureSettings(micro_steps=3),
    )


def measured(pool: NodePool, request: TrialRequest) -> list[int]:
    count = request.config.gpus
    result = pool.run(
        request,
        ranks=range(count),
        world_size=count,
        master_address="127.0.0.1",
        master_port=pool.free_port(),
        owner_pid=None,
    )
    assert result.failure is None
    return [rank.peak_memory_allocated_bytes for rank in result.ranks]


def predicted(request: TrialRequest, steps: int, rank: int) -> float:
    stream = trace_stream(request.model, request.config, accumulates=steps > 1, rank=rank, batches=steps)
    return float(stream.peak_bytes(np.array([BATCH]), np.array([LENGTH]), "cpu")[0])


def degrees(tensor: int = 1, sequence: int = 1, pipeline: int = 1, schedule: str | None = None) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tensor,
        "sequence_parallel_size": sequence,
        "pipeline_parallel_size": pipeline,
        "pipeline_schedule": schedule,
    }


DEEPSPEED = {"engine": "deepspeed", "zero_stage": 3, "deepspeed": dict(SMALL_BUCKETS)}
SHARDED = DEEPSPEED | {
    "deepspeed": {**dict(SMALL_BUCKETS), "zero_optimization.stage3_param_persistence_threshold": 1000}
}
"""Matrices too, which DeepSpeed leaves whole where they have less than 100,000 elements."""

CASES = [
    (False, 2, 2, 2, degrees(tensor=2) | {"loss": "chunked", "activation_checkpointing": "full"}),
    (True, 8, 2, 2, degrees(tensor=2)),
    (True, 2, 2, 2, {"loss": "chunked", "zero_stage": 3, "precision": "bf16"}),
    (True, 8, 2, 2, degrees(sequence=2) | {"zero_stage": 3}),
    (True, 8, 2, 4, {"zero_stage": 3, "data_parallel_replicate_size": 2}),
    (True, 8, 2, 8, degrees(tensor=2) | {"zero_stage": 2, "data_parallel_replicate_size": 2, "precision": "bf16"}),
    (True, 8, 2, 2, {"zero_stage": 3, "activation_checkpointing": "selective_ops", "precision": "bf16"}),
    (True, 8, 2, 2, {"zero_stage": 3, "offload": "optimizer+parameters", "activation_checkpointing": "full"}),
    (True, 8, 2, 2, degrees(tensor=2) | {"activation_checkpointing": "selective_ops", "loss": "chunked"}),
    (True, 8, 4, 2, degrees(pipeline=2, schedule="1f1b") | {"activation_checkpointing": "selective_ops"}),
    (True, 8, 2, 2, {"zero_stage": 0, "activation_checkpointing": "selective_ops"}),
    (True, 2, 1, 2, degrees(sequence=2)),
    (True, 8, 2, 4, degrees(tensor=2, sequence=2) | {"zero_stage": 3, "precision": "bf16"}),
    (False, 2, 4, 2, degrees(pipeline=2, schedule="1f1b")),
    (True, 10, 4, 2, degrees(pipeline=2, schedule="1f1b") | {"precision": "bf16"}),
    (True, 11, 4, 4, degrees(tensor=2, pipeline=2, schedule="1f1b") | {"loss": "chunked"}),
    (True, 4, 4, 4, degrees(pipeline=2, schedule="1f1b") | {"zero_stage": 3, "precision": "bf16"}),
    (True, 4, 24, 4, degrees(pipeline=4, schedule="1f1b")),
    (True, 4, 8, 2, degrees(pipeline=2, schedule="interleaved_1f1b") | {"activation_checkpointing": "full"}),
    (True, 4, 6, 2, degrees(pipeline=2, schedule="zero_bubble")),
    (False, 2, 2, 2, degrees(sequence=2) | DEEPSPEED),
    (True, 8, 2, 2, degrees(sequence=2) | DEEPSPEED | {"precision": "bf16"}),
    (True, 8, 2, 4, degrees(sequence=4) | DEEPSPEED | {"activation_checkpointing": "full"}),
    (True, 10, 2, 2, degrees(sequence=2) | SHARDED | {"activation_checkpointing": "full", "precision": "bf16"}),
    # What ZeRO-3 keeps gathered is given up during the update.
    (True, 10, 2, 2, degrees(sequence=2) | DEEPSPEED | {"activation_checkpointing": "full", "precision": "bf16"}),
    (True, 10, 1, 4, degrees(sequence=2) | DEEPSPEED | {"activation_checkpointing": "selective", "selective_every": 2}),
]


@pytest.mark.parametrize(
    ("layers", "steps", "gpus", "layout"),
    [pytest.param(*case, marks=[pytest.mark.slow] if dear else []) for dear, *case in CASES],
)
def test_every_rank_is_predicted(pool: NodePool, layers: int, steps: int, gpus: int, layout: dict[str, Any]) -> None:
    request = a_request(layers, steps, gpus, layout)
    of_a_stage = gpus // request.config.pipeline_parallel_size
    peaks = measured(pool, request)
    for rank in range(0, gpus, of_a_stage):
        found = predicted(request, steps, rank)
        assert peaks[rank : rank + of_a_stage] == [pytest.approx(found, rel=TOLERANCE)] * of_a_stage


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zero_bubble"])
def test_many_micro_batches_are_a_line_through_few(pool: NodePool, schedule: str) -> None:
    request = a_request(4, 32, 2, degrees(pipeline=2, schedule=schedule))
    streams = rank_streams(request.model, request.config, accumulates=True, batches=32)
    found = [float(stream.peak_bytes(np.array([BATCH]), np.array([LENGTH]), "cpu")[0]) for stream in streams]
    assert measured(pool, request) == pytest.approx(found, rel=TOLERANCE)


def test_more_micro_batches_than_are_traced_need_buffers_for_their_messages() -> None:
    request = a_request(4, 64, 2, degrees(pipeline=2, schedule="1f1b"))
    peaks = []
    for batches in (32, 64):
        first, _ = rank_streams(request.model, request.config, accumulates=True, batches=batches)
        peaks.append(float(first.peak_bytes(np.array([BATCH]), np.array([LENGTH]), "cpu")[0]))
        parts = first.breakdown(BATCH, LENGTH, "cpu")
        assert sum(parts.values()) == pytest.approx(peaks[-1], rel=1e-3)
    message = BATCH * LENGTH * TINY.hidden_size * 4
    tokens = 2 * BATCH * LENGTH * 8  # with the labels, of the whole step
    assert peaks[1] - peaks[0] == pytest.approx(32 * (message + tokens), rel=0.01)


def test_of_the_ranks_between_the_first_and_the_last_the_earliest_needs_most() -> None:
    request = a_request(8, 8, 4, degrees(pipeline=4, schedule="1f1b"))
    needs = [predicted(request, 8, rank) for rank in range(4)]
    assert needs[1] >= needs[2]
    asked = structures(request.model, request.config, accumulates=True, batches=8)
    assert [json.loads(name)["rank"] for name in asked] == [0, 1, 3]
    uneven = a_request(10, 8, 4, degrees(pipeline=4, schedule="1f1b"))  # 2, 3, 2, 3 layers
    asked = structures(uneven.model, uneven.config, accumulates=True, batches=8)
    assert [json.loads(name)["rank"] for name in asked] == [0, 1, 2, 3]


def test_the_loss_is_traced_on_the_last_rank_alone_and_many_micro_batches_but_twice() -> None:
    pipeline = degrees(pipeline=2, schedule="1f1b")
    plain, chunked = (a_request(4, 64, 2, pipeline | {"loss": loss}) for loss in ("full_logits", "chunked"))
    asked = [
        structures(request.model, request.config, accumulates=True, batches=batches)
        for request, batches in ((plain, 64), (chunked, 64), (plain, 512))
    ]
    assert asked[0][:2] == asked[1][:2]
    assert asked[0][2:] != asked[1][2:]
    assert asked[0] == asked[2]
