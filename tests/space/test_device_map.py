"""`device_map`: searched where it is stated, refused with what it does not go with, dropped on CPUs."""

from pathlib import Path
from typing import Any

import pytest

from autotune.space.device_map import DEVICE_MAP_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.samples import sample_space

NODES = ClusterSpec(nodes=2, gpus_per_node=4, gpu=find_gpu("H100-80GB"))
SEARCH: dict[str, Any] = {
    "engine": ["deepspeed", "pytorch"],
    "gpus": [2, 4, 8],
    "zero_stage": [0, 3],
    "micro_batch_size": [1, 2],
    "device_map": ["none", "auto"],
}
CHANGES = {"method": "lora", "cluster": {"nodes": 2, "gpus_per_node": 4, "gpu": "H100-80GB"}, "baseline": ...}
PLAIN = {"engine": "pytorch", "gpus": 4, "micro_batch_size": 1, "sequence_length": 64, "device_map": "auto"}
LORA = {"method": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"}


def refusal(cluster: ClusterSpec = NODES, **fields: Any) -> str | None:
    config = TrialConfig.from_dict({**PLAIN, **LORA, **fields})
    judged = (rule(config, Workload(global_batch_size=8), MODEL, cluster) for rule in DEVICE_MAP_RULES)
    return next((reason for reason in judged if reason is not None), None)


MODEL = load_model("qwen3-tiny", Path())


def test_layers_are_spread_where_it_is_searched(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=SEARCH, **CHANGES)
    found = [config for config in space.candidates if config.device_map == "auto"]
    assert {(config.engine, config.zero_stage, config.gpus) for config in found} == {
        ("pytorch", 0, 2),
        ("pytorch", 0, 4),
    }
    assert not space.dropped
    for config in found:
        assert TrialConfig.from_dict(config.to_dict()) == config in space
        assert config.describe().endswith("device_map auto")
        # One process has the whole batch.
        assert space.workload.gradient_accumulation_steps(config) == 16 // config.micro_batch_size
    assert "device_map" not in space.candidates[0].to_dict()


def test_a_host_of_cpus_is_one_device(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=SEARCH | {"gpus": 2}, method="lora", baseline=...)
    assert space.candidates
    (dropped,) = space.dropped
    assert (dropped.axis, dropped.value) == ("device_map", "auto")
    assert "to PyTorch a host's CPUs are one" in dropped.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"method": "qlora", "activation_checkpointing": "full", "batching": "padded"}, None),
        ({"device_map": "none", "method": "full", "gpus": 8, "zero_stage": 3, "optimizer": "adamw_8bit"}, None),
        ({"gpus": 1}, "gpus is 1"),
        ({"gpus": 8}, "gpus 8 are on more than one node"),
        ({"method": "full"}, "is for methods lora and qlora"),
        ({"engine": "deepspeed"}, "engine pytorch alone"),
        ({"zero_stage": 3}, "zero_stage 3 shards over several; use 0"),
        ({"tensor_parallel_size": 2}, "does not go with tensor_parallel_size 2"),
        ({"sequence_parallel_size": 2}, "does not go with sequence_parallel_size 2"),
        ({"pipeline_parallel_size": 2}, "does not go with pipeline_parallel_size 2"),
        ({"loss": "chunked"}, "does not go with loss chunked"),
        ({"data_parallel_replicate_size": 2}, "has no 2 groups"),
        ({"torch_compile": True}, "puts hooks into them"),
        ({"use_liger_kernel": True}, "has not been tried with use_liger_kernel"),
        ({"optimizer": "adamw_8bit"}, "has not been tried with optimizer adamw_8bit"),
        ({"precision": "fp16"}, "has not been tried with the loss scale"),
    ],
)
def test_what_it_does_not_go_with(fields: dict[str, Any], reason: str | None) -> None:
    found = refusal(**fields)
    assert (found is None) if reason is None else reason in (found or "")


def test_a_model_has_a_layer_for_each_gpu() -> None:
    node = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
    assert f"without one of {MODEL.num_hidden_layers} layers" in (refusal(node, gpus=8) or "")
