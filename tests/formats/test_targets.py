"""Who can run a config afterwards: the same answer for the search and for the export."""

import functools
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from autotune.errors import InvalidSpaceError, NothingFeasibleError
from autotune.formats.targets import TARGETS, cannot_express, left_to_script, no_target
from autotune.spec.config import KEPT_OPERATORS, TrialConfig
from tests.formats.samples import WORKLOAD, any_config, config
from tests.samples import sample_space


@given(any_config())
def test_on_gpus_every_config_can_be_run_by_someone(config: TrialConfig) -> None:
    assert no_target(TARGETS, config) is None
    assert cannot_express("hf_trainer", config, "cuda") is None
    assert (cannot_express("deepspeed", config, "cuda") is None) == (config.engine == "deepspeed")


@pytest.mark.parametrize(
    "fields", [{"activation_checkpointing": "selective_ops"}, {"data_parallel_replicate_size": 2, "zero_stage": 3}]
)
def test_what_yaml_cannot_say_to_the_trainer_has_another_home(fields: dict[str, Any]) -> None:
    trial = config(engine="pytorch", **fields)
    assert next(iter(fields)) in (cannot_express("hf_trainer", trial, "cuda") or "")
    assert cannot_express("accelerate", trial, "cuda") is None
    assert cannot_express("autotune", trial, "cuda") is None


def test_what_is_kept_of_a_layer_is_said_so_that_python_runs_it() -> None:
    """The words of the README, evaluated: what a script gives to transformers."""
    trial = config(engine="pytorch", activation_checkpointing="selective_ops")
    (said,) = (line for line in left_to_script("accelerate", trial, WORKLOAD) if "context_fn" in line)
    arguments = said.partition("_enable(")[2].removesuffix("`")[:-1]
    names = {"torch": torch, "functools": functools, "create_selective_checkpoint_contexts": list}
    kept = eval(arguments, names)["context_fn"]()
    assert kept == [operator.attrgetter(name)(torch.ops) for name in KEPT_OPERATORS]


def test_a_script_is_told_how_ranks_share_sequences() -> None:
    trial = config(engine="deepspeed", zero_stage=3, sequence_parallel_size=2, gpus=8, attention="flash_attention_2")
    assert [cannot_express(target, trial, "cuda") is None for target in TARGETS] == [True, True, True, False]
    said = {target: "\n".join(left_to_script(target, trial, WORKLOAD)) for target in TARGETS[:3]}
    assert all("`position_ids` from 0 to" in found for found in said.values())
    assert "PARALLELISM_CONFIG_SP_SIZE=2" in said["hf_trainer"]
    assert "deepspeed_sp_compute_loss" in said["accelerate"]
    for words in ('core_attn_implementation="flash_attention_2"', "sequence_parallel_size=2", "as its `mpu`"):
        assert words in said["deepspeed"]


@pytest.mark.parametrize(
    ("fields", "trainer", "accelerate"),
    [
        ({"engine": "deepspeed", "zero_stage": 3}, None, None),
        ({"engine": "pytorch", "zero_stage": 0}, None, "one process"),
        ({"engine": "pytorch", "zero_stage": 0, "gpus": 1}, None, None),
        ({"engine": "pytorch", "zero_stage": 0, "precision": "fp16"}, "fp16", "fp16"),
        ({"engine": "pytorch", "zero_stage": 3}, "DDP", "DDP"),
    ],
)
def test_on_cpu_accelerate_can_do_less(fields: dict[str, object], trainer: str | None, accelerate: str | None) -> None:
    for target, words in (("hf_trainer", trainer), ("accelerate", accelerate)):
        reason = cannot_express(target, config(**fields), "cpu")  # type: ignore[arg-type]
        assert (reason is None) if words is None else words in (reason or "")


def test_what_no_target_can_run_is_not_searched_and_is_said(tmp_path: Path) -> None:
    everything = sample_space(tmp_path)
    assert {candidate.engine for candidate in everything.candidates} == {"deepspeed", "pytorch"}
    space = sample_space(tmp_path, targets="deepspeed")
    assert {candidate.engine for candidate in space.candidates} == {"deepspeed"}
    dropped = {(item.axis, item.value): item.reason for item in space.dropped}
    assert dropped == {("engine", "pytorch"): "no target can run it: DeepSpeed does not run engine pytorch"}
    assert space.identity == everything.identity
    assert sample_space(tmp_path, targets=["deepspeed", "accelerate"]).candidates[:] == everything.candidates[:]


def test_only_what_no_target_can_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingFeasibleError, match="no target can run it"):
        sample_space(tmp_path, targets="deepspeed", baseline=..., search={"engine": "pytorch"})
    with pytest.raises(InvalidSpaceError, match="baseline: no target can run it"):
        sample_space(tmp_path, targets="deepspeed", baseline={"engine": "pytorch", "zero_stage": 0})
    with pytest.raises(InvalidSpaceError, match=r"targets.*'megatron'.*hf_trainer"):
        sample_space(tmp_path, targets=["megatron"])


def test_what_a_file_cannot_say_is_said_to_the_script() -> None:
    trial = config(engine="pytorch", activation_checkpointing="selective", selective_every=3, attention="eager")
    trainer = "\n".join(left_to_script("hf_trainer", trial, WORKLOAD))
    accelerate = "\n".join(left_to_script("accelerate", trial, WORKLOAD))
    assert 'attn_implementation="eager"' in trainer
    assert "4096 tokens" in trainer
    assert "every_n_layers" not in trainer  # its file says it
    assert "every_n_layers=3" in accelerate
    assert "gradient_accumulation_steps=64" in accelerate


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("adamw", "`torch.optim.AdamW(…, fused=True)`"),
        ("adamw_8bit", "`bitsandbytes.optim.AdamW(…, optim_bits=8)`"),
        ("adamw_torch_8bit", "`torchao.optim.AdamW8bit(…)`"),
    ],
)
def test_a_script_on_accelerate_makes_the_optimizer(optimizer: str, words: str) -> None:
    trial = config(engine="pytorch", optimizer=optimizer)
    assert any(f"optimizes with {words} and" in line for line in left_to_script("accelerate", trial, WORKLOAD))
    assert not any(words in line for line in left_to_script("hf_trainer", trial, WORKLOAD))


@pytest.mark.parametrize(
    ("batching", "words"),
    [
        ("padded", 'padding="max_length", max_length=4096'),
        ("dynamic_padding", "pads each batch to its longest"),
        ("packed", "`DataCollatorWithFlattening()`, or TRL's `padding_free=True`"),
    ],
)
def test_how_sequences_are_batched_is_left_to_the_collator(batching: str, words: str) -> None:
    trial = config(engine="pytorch", batching=batching)
    for target in ("hf_trainer", "accelerate", "deepspeed"):
        assert words in left_to_script(target, trial, WORKLOAD)[0]
    assert cannot_express("hf_trainer", trial, "cuda") is None
    assert "sequences of one length" in (cannot_express("autotune", trial, "cuda") or "")


def test_auto_tensor_parallelism_is_a_script_that_deals_sequences_to_groups() -> None:
    trial = config(engine="deepspeed", zero_stage=2, gpus=8, tensor_parallel_size=2)
    assert cannot_express("deepspeed", trial, "cuda") is None
    for target in ("hf_trainer", "accelerate"):
        assert "tensor_parallel_size 2 as trials do" in (cannot_express(target, trial, "cuda") or "")
    assert any(
        "num_replicas=4, rank=dist.get_rank() // 2" in line for line in left_to_script("deepspeed", trial, WORKLOAD)
    )
