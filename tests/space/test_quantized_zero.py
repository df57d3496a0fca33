"""ZeRO++'s quantised communication: searched only where numerics says so, refused where it would train wrong."""

from pathlib import Path
from typing import Any

import pytest

from autotune.predict.memory import structures
from autotune.space.quantized_zero import QUANTIZED_ZERO_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.samples import SPACE, sample_space

NODES = ClusterSpec(nodes=2, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
NUMERICS: dict[str, Any] = {
    **SPACE["search"],
    "numerics": {"zero_quantized_weights": [False, True], "zero_quantized_gradients": [False, True]},
}
BOTH = {"zero_quantized_weights": True, "zero_quantized_gradients": True}


def a_config(**fields: Any) -> TrialConfig:
    return TrialConfig(
        **{"engine": "deepspeed", "gpus": 16, "micro_batch_size": 1, "sequence_length": 64, "zero_stage": 3, **fields}
    )


def test_nothing_is_quantised_unless_told(tmp_path: Path) -> None:
    assert not any("zero_quantized_weights" in config.to_dict() for config in sample_space(tmp_path).candidates)


def test_on_cpus_it_is_dropped_with_the_reason(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=NUMERICS)
    assert {(item.axis, item.value) for item in space.dropped} >= {(axis, True) for axis in BOTH}
    assert any("needs a GPU" in reason for reason in space.illegal)
    assert not space.numerics


def test_on_gpus_it_is_searched_and_labelled(tmp_path: Path) -> None:
    cluster = {"nodes": 2, "gpus_per_node": 8, "gpu": "H100-80GB"}
    workload = {**SPACE["workload"], "global_batch_size": 64}
    search = {**NUMERICS, "precision": ["bf16", "fp16"], "micro_batch_size": [1]}
    space = sample_space(tmp_path, baseline=..., cluster=cluster, workload=workload, search=search)
    assert space.numerics == ("zero_quantized_weights", "zero_quantized_gradients")
    found = {
        (config.precision, config.zero_quantized_weights, config.zero_quantized_gradients)
        for config in space.candidates
        if config.engine == "deepspeed" and config.zero_stage == 3
    }
    assert found == {("bf16", False, False), ("bf16", True, False)} | {
        ("fp16", weights, gradients) for weights in (False, True) for gradients in (False, True)
    }
    for config in space.candidates:
        assert TrialConfig.from_dict(config.to_dict()) == config
        assert config.zero_quantized_weights == ("qwZ" in config.describe())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"zero_quantized_weights": True}, None),
        ({**BOTH, "precision": "fp16"}, None),
        ({**BOTH}, "reads gradients as fp16"),
        ({**BOTH, "precision": "fp16", "gpus": 8}, "does nothing inside a node"),
        ({"zero_quantized_weights": True, "zero_stage": 2}, "with zero_stage 3"),
        ({"zero_quantized_weights": True, "engine": "pytorch"}, "on engine deepspeed"),
        ({"zero_quantized_weights": True, "tensor_parallel_size": 2}, "has not been tried"),
    ],
)
def test_rules(fields: dict[str, Any], reason: str | None) -> None:
    model, workload = load_model("qwen3-tiny", Path()), Workload(global_batch_size=16)
    found = [rule(a_config(**fields), workload, model, NODES) for rule in QUANTIZED_ZERO_RULES]
    assert (found == [None, None]) if reason is None else any(reason in said for said in found if said)


def test_its_memory_is_taken_to_be_that_without() -> None:
    model = load_model("qwen3-tiny", Path())
    plain, quantised = (structures(model, a_config(**fields), accumulates=False) for fields in ({}, BOTH))
    assert plain == quantised
