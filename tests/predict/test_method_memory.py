"""Memory of LoRA, of optimizer states of 8 bits and of compiled layers: what is traced against what real gloo ranks
reach, on every engine, stage and layout.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from autotune.trial.pool import NodePool
from tests.engines.parity import SMALL_BUCKETS
from tests.predict.test_layout_memory import a_request, degrees, measured, predicted

PYTORCH, DEEPSPEED = 0.02, 0.05
"""Tolerances, as ratios."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodePool]:
    pool = NodePool(device="cpu", log_dir=str(tmp_path_factory.mktemp("logs")))
    yield pool
    pool.shutdown()


def lora(engine: str, stage: int, **fields: Any) -> dict[str, Any]:
    adapters = {"method": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
    keys = {"deepspeed": dict(SMALL_BUCKETS)} if engine == "deepspeed" else {}
    return {"engine": engine, "zero_stage": stage, "precision": "bf16", **adapters, **keys, **fields}


def short_states(engine: str, stage: int, **fields: Any) -> dict[str, Any]:
    keys = {"deepspeed": dict(SMALL_BUCKETS)} if engine == "deepspeed" else {}
    return {"engine": engine, "zero_stage": stage, "precision": "bf16", "optimizer": "adamw_8bit", **keys, **fields}


def by_torchao(stage: int, **fields: Any) -> dict[str, Any]:
    return {"engine": "pytorch", "zero_stage": stage, "precision": "bf16", "optimizer": "adamw_torch_8bit", **fields}


def compiled(stage: int, **fields: Any) -> dict[str, Any]:
    return {"engine": "pytorch", "zero_stage": stage, "precision": "bf16", "torch_compile": True, **fields}


FULL = {"activation_checkpointing": "full"}
PIPELINE = degrees(pipeline=2, schedule="1f1b")
CASES = [
    (False, 2, 2, 2, lora("pytorch", 3, **FULL)),
    (False, 2, 2, 2, lora("deepspeed", 3)),
    (False, 2, 2, 2, lora("pytorch", 0, **FULL, method="qlora")),
    (True, 12, 2, 2, lora("pytorch", 0, method="qlora")),
    (True, 12, 2, 2, lora("deepspeed", 0, method="qlora")),
    (True, 12, 2, 2, lora("deepspeed", 2, **FULL, method="qlora")),
    (True, 2, 1, 1, lora("pytorch", 0)),
    (True, 2, 2, 1, lora("pytorch", 0, **FULL, lora_target_modules="attention")),
    (True, 2, 2, 2, lora("pytorch", 0)),
    (True, 8, 2, 2, lora("pytorch", 2)),
    (True, 12, 2, 2, lora("pytorch", 3, lora_target_modules="mlp")),
    (True, 12, 2, 2, lora("pytorch", 3, precision="fp32")),
    (True, 12, 2, 2, lora("deepspeed", 0, precision="fp32")),
    (True, 12, 2, 2, lora("deepspeed", 0)),
    (True, 12, 2, 2, lora("deepspeed", 1)),
    (True, 12, 2, 2, lora("deepspeed", 2, **FULL)),
    (True, 12, 2, 2, lora("deepspeed", 3, **FULL)),
    (True, 4, 2, 4, lora("deepspeed", 2)),
    (True, 12, 2, 2, lora("pytorch", 0, **degrees(tensor=2), loss="chunked")),
    (True, 4, 2, 4, lora("pytorch", 3, **degrees(tensor=2))),
    (True, 4, 2, 2, lora("pytorch", 0, **degrees(tensor=2), **FULL)),
    (True, 4, 2, 4, lora("pytorch", 3, **degrees(tensor=2, sequence=2), **FULL, loss="chunked")),
    (True, 4, 2, 2, lora("pytorch", 3, **degrees(sequence=2))),
    (True, 8, 4, 2, lora("pytorch", 0, **PIPELINE)),
    (False, 2, 2, 2, short_states("deepspeed", 3)),
    (True, 12, 2, 2, short_states("pytorch", 0, precision="fp32")),
    (True, 2, 1, 1, short_states("pytorch", 0, **FULL)),
    (True, 8, 4, 2, short_states("pytorch", 0, **PIPELINE)),
    (True, 4, 2, 2, short_states("pytorch", 0, **degrees(sequence=2), loss="chunked")),
    *((True, 12, 2, 2, short_states("deepspeed", stage, **FULL)) for stage in range(4)),
    (True, 12, 2, 2, short_states("deepspeed", 0, precision="fp32")),
    (True, 12, 2, 2, short_states("deepspeed", 2, method="lora", lora_rank=4, lora_alpha=8, lora_target_modules="mlp")),
    (True, 2, 2, 2, by_torchao(3, **FULL)),
    (True, 12, 2, 2, by_torchao(3)),
    (True, 12, 2, 2, by_torchao(2, precision="fp32")),
    (True, 12, 2, 2, by_torchao(0, precision="fp32")),
    (True, 2, 1, 1, by_torchao(0, **FULL)),
    (True, 12, 2, 2, by_torchao(0, **degrees(tensor=2), loss="chunked")),
    (True, 4, 2, 4, by_torchao(3, **degrees(tensor=2))),
    (True, 4, 2, 4, by_torchao(3, data_parallel_replicate_size=2)),
    (True, 4, 2, 2, by_torchao(3, **degrees(sequence=2), **FULL)),
    (True, 8, 4, 2, by_torchao(0, **PIPELINE)),
    (True, 12, 2, 2, compiled(3)),
    (True, 12, 2, 2, compiled(0)),
    (True, 4, 2, 2, compiled(0, precision="fp32")),
    (True, 8, 2, 2, compiled(2, precision="fp32", **FULL)),
    (True, 8, 1, 2, compiled(3, activation_checkpointing="selective", selective_every=2)),
    (True, 12, 2, 2, compiled(3, **FULL, offload="optimizer+parameters")),
    (True, 12, 2, 2, compiled(3, method="lora", lora_rank=4, lora_alpha=8, lora_target_modules="all-linear")),
]


@pytest.mark.parametrize(
    ("layers", "steps", "gpus", "fields"),
    [pytest.param(*case, marks=[pytest.mark.slow] if dear else []) for dear, *case in CASES],
)
def test_every_rank_is_predicted(pool: NodePool, layers: int, steps: int, gpus: int, fields: dict[str, Any]) -> None:
    if fields.get("optimizer") == "adamw_torch_8bit" and find_spec("torchao") is None:
        pytest.skip("needs torchao: '.[adamw-torch-8bit]'")
    request = a_request(layers, steps, gpus, fields)
    of_a_stage = gpus // request.config.pipeline_parallel_size
    tolerance = PYTORCH if request.config.engine == "pytorch" else DEEPSPEED
    peaks = measured(pool, request)
    for rank in range(0, gpus, of_a_stage):
        found = predicted(request, steps, rank)
        assert peaks[rank : rank + of_a_stage] == [pytest.approx(found, rel=tolerance)] * of_a_stage
