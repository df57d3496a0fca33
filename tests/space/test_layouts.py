"""What tensor, sequence and pipeline parallelism refuse, and that a config without them is what it was."""

from pathlib import Path

import pytest

from autotune.formats.targets import TARGETS
from autotune.space.legality import rules
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import REDUCE_SCATTER, SECOND_PARTITION, TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.workload import Workload
from tests.samples import sample_space

FOUR = {"gpus_per_node": 4, "gpu": "cpu", "memory_bytes": "60MiB"}
DEGREES = {
    "tensor_parallel_size": [1, 2],
    "sequence_parallel_size": [1, 2, 4],
    "pipeline_parallel_size": [1, 2, 4],
    "pipeline_schedule": ["1f1b", "interleaved_1f1b"],
}


def test_configs_of_before_are_known_by_the_same_fingerprint() -> None:
    """A store of before layouts existed must find its trials again."""
    old = TrialConfig(engine="deepspeed", gpus=8, micro_batch_size=4, sequence_length=4096)
    assert old.fingerprint == "3aa2191898e70e50"
    assert "loss" not in old.to_dict()


def test_layouts_are_candidates(tmp_path: Path) -> None:
    space = sample_space(tmp_path, baseline=..., cluster=FOUR, search={**DEGREES, "loss": ["full_logits", "chunked"]})
    assert not space.dropped
    found = {
        (c.data_parallel_size, c.tensor_parallel_size, c.sequence_parallel_size, c.pipeline_parallel_size)
        for c in space.candidates
    }
    assert {(4, 1, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2), (2, 1, 1, 2), (2, 2, 1, 1)} <= found
    assert all(c.gpus == 4 and c.data_parallel_size * c.model_parallel_size == 4 for c in space.candidates)
    for config in space.candidates:
        assert config in space
        assert (config.pipeline_schedule is None) == (config.pipeline_parallel_size == 1)
        shared = config.tensor_parallel_size, config.sequence_parallel_size
        assert config.engine == "pytorch" or config.model_parallel_size in shared
        assert TrialConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        ({"tensor_parallel_size": [1, 3]}, "gpus 4 is no multiple of tensor_parallel_size 3"),
        ({"tensor_parallel_size": [1, 4]}, "does not divide num_key_value_heads 2 of qwen3-tiny"),
        (
            {"engine": ["deepspeed", "pytorch"], "sequence_parallel_size": [1, 2]},
            "computes gradients 2 times too large",
        ),
        ({"engine": ["deepspeed", "pytorch"], "pipeline_parallel_size": [1, 2]}, "is run by engine pytorch alone"),
        ({"engine": ["deepspeed", "pytorch"], "loss": ["full_logits", "chunked"]}, "is run by engine pytorch alone"),
        ({"sequence_parallel_size": [1, 2], "attention": ["sdpa", "eager"]}, "needs attention sdpa"),
        ({"pipeline_parallel_size": [1, 2], "micro_batch_size": [4, 8]}, "more than the 1 micro-batches"),
        ({"tensor_parallel_size": [1, 2], "zero_stage": [0, 2]}, "does not know the matrices"),
        (
            {"sequence_parallel_size": [1, 2], "tensor_parallel_size": [1, 2], "precision": ["bf16", "fp16"]},
            "loss scale",
        ),
    ],
)
def test_illegal_layouts_are_refused_with_the_reason(tmp_path: Path, search: dict[str, object], reason: str) -> None:
    space = sample_space(tmp_path, baseline=..., cluster=FOUR, search={"engine": "pytorch", **search})
    assert space.candidates
    assert any(reason in found for found in space.illegal), list(space.illegal)


AUTO_TENSOR = {"engine": "deepspeed", "tensor_parallel_size": 2, "zero_stage": 2}
SHARED = {"engine": "deepspeed", "sequence_parallel_size": 2, "zero_stage": 3}
ADAPTERS = {"lora_rank": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"}
EIGHT = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))


def refusal(model: ModelSpec, **changes: object) -> str | None:
    fields = {"engine": "pytorch", "gpus": 4, "micro_batch_size": 1, "sequence_length": 64, "zero_stage": 0, **changes}
    config, workload = TrialConfig.from_dict(fields), Workload(global_batch_size=16)
    reasons = (rule(config, workload, model, EIGHT) for rule in rules(TARGETS))
    return next((reason for reason in reasons if reason is not None), None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensor_parallel_size": 2, "gpus": 2, "zero_stage": 3}, "there is only one"),
        ({"pipeline_parallel_size": 8, "pipeline_schedule": "1f1b", "gpus": 8}, "has 8 stages for"),
        ({"pipeline_parallel_size": 4, "pipeline_schedule": "zero_bubble"}, "has 8 stages for"),
        ({"sequence_parallel_size": 8, "gpus": 8}, "does not divide the 4 query and 2 key heads"),
        ({"sequence_parallel_size": 4, "sequence_length": 62}, "does not divide sequence_length 62"),
        ({"tensor_parallel_size": 2, "sequence_parallel_size": 2, "sequence_length": 62, "zero_stage": 2}, "62"),
        (
            {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved_1f1b", "gpus": 2, "micro_batch_size": 1},
            None,
        ),
        ({"pipeline_parallel_size": 2, "pipeline_schedule": "zero_bubble", "zero_stage": 3}, "wrong gradients"),
        ({"tensor_parallel_size": 2, "gpus": 2, "micro_batch_size": 16, "loss": "chunked"}, None),
        ({"data_parallel_replicate_size": 2, "zero_stage": 3}, None),
        ({"data_parallel_replicate_size": 2, "zero_stage": 0}, "by zero_stage 2 or 3"),
        ({"data_parallel_replicate_size": 4, "zero_stage": 3}, "which shards nothing"),
        ({"data_parallel_replicate_size": 3, "zero_stage": 3}, "does not divide data_parallel_size 4"),
        ({"data_parallel_replicate_size": 2, "zero_stage": 3, "engine": "deepspeed"}, "zero_hpz_partition_size"),
        (
            {
                "pipeline_parallel_size": 2,
                "pipeline_schedule": "zero_bubble",
                "gpus": 2,
                "micro_batch_size": 2,
                "activation_checkpointing": "selective_ops",
            },
            "goes back twice",
        ),
        *(({**AUTO_TENSOR, "zero_stage": stage}, None) for stage in (1, 2, 3)),
        ({**AUTO_TENSOR, "gpus": 2, "sequence_length": 63}, None),
        ({**AUTO_TENSOR, "zero_stage": 0}, "clips by the norm of a rank's share"),
        ({**AUTO_TENSOR, "activation_checkpointing": "selective_ops"}, "computes wrong gradients"),
        ({**AUTO_TENSOR, "loss": "chunked"}, "is run by engine pytorch alone"),
        (SHARED, None),
        ({**SHARED, "gpus": 8, "offload": "optimizer+parameters", "activation_checkpointing": "selective_ops"}, None),
        ({**SHARED, "sequence_parallel_size": 4, "method": "lora", **ADAPTERS}, None),
        *(({**SHARED, "zero_stage": stage}, "2 times too large") for stage in (0, 1, 2)),
        ({**SHARED, "deepspeed": {REDUCE_SCATTER: False}}, "2 times too large without"),
        ({**SHARED, "tensor_parallel_size": 2}, "takes the same neighbours in rank for both"),
        ({**SHARED, "sequence_length": 63}, "does not divide sequence_length 63"),
        ({**SHARED, "sequence_parallel_size": 8, "gpus": 8}, "neither divides the 2 key heads"),
        ({**SHARED, "attention": "eager"}, "needs attention sdpa"),
        ({**SHARED, "loss": "chunked"}, "is run by engine pytorch alone"),
        ({**SHARED, "precision": "fp16"}, "has not been tried with precision fp16"),
        ({**SHARED, "zero_quantized_weights": True}, "has not been tried with zero_quantized_weights True"),
        ({**SHARED, "deepspeed": {SECOND_PARTITION: 2}}, "has not been tried with"),
        ({**SHARED, "offload": "optimizer_nvme"}, "has not been tried with sequence_parallel_size 2"),
        ({**SHARED, "torch_compile": True}, "torch_compile"),
        ({**AUTO_TENSOR, "pipeline_parallel_size": 2, "pipeline_schedule": "1f1b"}, "is run by engine pytorch alone"),
        ({**AUTO_TENSOR, "precision": "fp16"}, "loss scale"),
        ({**AUTO_TENSOR, "optimizer": "adamw_8bit"}, "has not been tried"),
        ({**AUTO_TENSOR, "zero_stage": 3, "deepspeed": {SECOND_PARTITION: 2}}, "copies of one another"),
        (
            {
                **AUTO_TENSOR,
                "method": "lora",
                "lora_rank": 8,
                "lora_alpha": 16,
                "lora_target_modules": "all-linear",
            },
            "has frozen ones",
        ),
        ({"zero_stage": 3, "offload": "optimizer+parameters"}, None),
        ({"zero_stage": 3, "offload": "optimizer+parameters", "precision": "fp16"}, "unscales gradients on the GPU"),
        ({"zero_stage": 3, "offload": "optimizer"}, "FSDP2 takes optimizer+parameters"),
        ({"zero_stage": 0, "offload": "optimizer+parameters"}, "needs ZeRO"),
        ({"pipeline_parallel_size": 2, "pipeline_schedule": "zero_bubble", "gpus": 2, "micro_batch_size": 2}, None),
    ],
)
def test_single_configs(changes: dict[str, object], reason: str | None) -> None:
    found = refusal(load_model("qwen3-tiny", Path()), **changes)
    assert (found is None) if reason is None else (found is not None and reason in found), found


def test_an_uneven_deal_of_micro_batches_is_refused() -> None:
    model = load_model("qwen3-tiny", Path())
    changes = {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved_1f1b", "gpus": 2}
    config = TrialConfig.from_dict({"engine": "pytorch", "micro_batch_size": 1, "sequence_length": 64, **changes})
    reasons = [rule(config, Workload(global_batch_size=5), model, EIGHT) for rule in rules(TARGETS)]
    assert any("cannot deal 5 micro-batches in 2 equal rounds" in reason for reason in reasons if reason)


def test_models_that_the_plan_does_not_know_are_refused() -> None:
    tiny = load_model("qwen3-tiny", Path()).config
    mixtral = ModelSpec(name="mixtral", config={**tiny, "model_type": "mixtral"})
    tied = ModelSpec(name="tied", config={**tiny, "tie_word_embeddings": True})
    windowed = ModelSpec(name="windowed", config={**tiny, "use_sliding_window": True})
    pipeline = {"pipeline_parallel_size": 2, "pipeline_schedule": "1f1b", "gpus": 2}
    for model, words in [(mixtral, "for models of type"), (tied, "ties them"), (windowed, "sliding window")]:
        found = refusal(model, **pipeline)
        assert found is not None
        assert words in found


def test_a_layout_that_no_target_runs_is_not_searched(tmp_path: Path) -> None:
    search = {"engine": "pytorch", "zero_stage": 0, "tensor_parallel_size": [1, 2], "loss": ["full_logits", "chunked"]}
    space = sample_space(tmp_path, baseline=..., targets=["hf_trainer"], search=search)
    dropped = {(item.axis, item.value): item.reason for item in space.dropped}
    assert (
        "transformers' Trainer does not run tensor_parallel_size 2 as trials do" in dropped["tensor_parallel_size", 2]
    )
    assert "loss chunked as trials do" in dropped["loss", "chunked"]
    assert all(not config.has_own_layout for config in space.candidates)


def test_sequences_that_deepspeed_shares_have_a_home_at_every_target_of_deepspeed(tmp_path: Path) -> None:
    search = {"engine": ["deepspeed", "pytorch"], "zero_stage": 3, "sequence_parallel_size": [1, 2]}
    for target in ("hf_trainer", "accelerate", "deepspeed"):
        space = sample_space(tmp_path, baseline=..., targets=[target], search=search)
        assert {c.engine for c in space.candidates if c.sequence_parallel_size == 2} == {"deepspeed"}
