"""The JSON is accepted by the real DeepSpeed, and what DeepSpeed would ignore is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import UsageError
from autotune.formats.deepspeed_json import (
    OWNED_KEYS,
    TRAINING_KEYS,
    check_deepspeed,
    deepspeed_key_error,
    to_deepspeed,
)
from autotune.spec.config import Offload, TrialConfig
from autotune.spec.workload import Workload


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def offloads(stage: int) -> list[Offload]:
    return (
        ["none"]
        if stage == 0
        else ["none", "optimizer"]
        if stage < 3
        else ["none", "optimizer", "optimizer+parameters"]
    )


@st.composite
def configs(draw: st.DrawFn) -> TrialConfig:
    stage = draw(st.integers(0, 3))
    return TrialConfig(
        engine="deepspeed",
        gpus=draw(st.sampled_from([1, 8, 64])),
        micro_batch_size=draw(st.sampled_from([1, 2, 16])),
        sequence_length=4096,
        precision=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        zero_stage=stage,
        offload=draw(st.sampled_from(offloads(stage))),
        deepspeed=tuple(
            draw(
                st.dictionaries(
                    st.sampled_from(
                        ["zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size"]
                    ),
                    st.sampled_from([100_000, 5e7]),
                )
            ).items()
        ),
    )


def config(**fields: Any) -> TrialConfig:
    return TrialConfig(**{"engine": "deepspeed", "gpus": 8, "micro_batch_size": 2, "sequence_length": 4096, **fields})


@given(configs())
@settings(deadline=None, max_examples=60)
def test_deepspeed_accepts_every_config(config: TrialConfig) -> None:
    document = to_deepspeed(config, Workload(global_batch_size=1024))
    check_deepspeed(document)
    assert json.loads(json.dumps(document)) == document
    assert list(document) == list(to_deepspeed(config, Workload(global_batch_size=1024)))


def test_every_number_is_explicit() -> None:
    document = to_deepspeed(
        config(zero_stage=3, offload="optimizer+parameters", deepspeed=(("zero_optimization.overlap_comm", False),)),
        Workload(global_batch_size=64, learning_rate=2e-5, weight_decay=0.1, max_gradient_norm=0.5),
    )
    assert document == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": False,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.1}},
        "steps_per_print": 1_000_000_000,
    }


def test_parameters_are_offloaded_in_stage_3_only() -> None:
    with pytest.raises(UsageError, match="needs zero_stage 3, not 2"):
        to_deepspeed(config(zero_stage=2, offload="optimizer+parameters"), Workload(global_batch_size=64))


def test_states_on_a_disk_name_the_folder_that_was_given() -> None:
    states = config(zero_stage=3, offload="optimizer_nvme")
    document = to_deepspeed(states, Workload(global_batch_size=64), "/local_nvme")
    check_deepspeed(document)
    assert document["zero_optimization"]["offload_optimizer"] == {
        "device": "nvme",
        "nvme_path": "/local_nvme",
        "pin_memory": True,
    }
    with pytest.raises(UsageError, match=r"state nvme\.path"):
        to_deepspeed(states, Workload(global_batch_size=64))
    with pytest.raises(UsageError, match="needs zero_stage 3, not 2"):
        to_deepspeed(replace(states, zero_stage=2), Workload(global_batch_size=64), "/local_nvme")


def test_parameters_follow_states_to_main_memory_or_to_the_disk() -> None:
    work, keys = Workload(global_batch_size=64), {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    disk = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
    for place, parameters, more in (
        ("parameters", {"device": "cpu", "pin_memory": True}, {}),
        ("parameters_nvme", disk | {"max_in_cpu": 0}, keys),
    ):
        placed = config(zero_stage=3, offload=f"optimizer_nvme+{place}")
        document = to_deepspeed(placed, work, "/local_nvme")
        check_deepspeed(document)
        assert document["zero_optimization"] == {
            "stage": 3,
            "offload_optimizer": disk,
            "offload_param": parameters,
            **more,
        }
        with pytest.raises(UsageError, match=rf"offload optimizer_nvme\+{place} needs zero_stage 3, not 2"):
            to_deepspeed(replace(placed, zero_stage=2), work, "/local_nvme")


def test_tensor_parallel_ranks_are_auto_tp() -> None:
    document = to_deepspeed(config(tensor_parallel_size=2, zero_stage=2), Workload(global_batch_size=64))
    assert document["tensor_parallel"] == {"autotp_size": 2}
    assert document["gradient_accumulation_steps"] == 8
    check_deepspeed(document)
    with pytest.raises(UsageError, match="tensor_parallel_size 2 needs zero_stage 1, 2 or 3, not 0"):
        to_deepspeed(config(tensor_parallel_size=2), Workload(global_batch_size=64))


def test_what_zero_sends_as_small_integers_is_said() -> None:
    plain = to_deepspeed(config(zero_stage=3), Workload(global_batch_size=64))["zero_optimization"]
    document = to_deepspeed(
        config(zero_stage=3, zero_quantized_weights=True, zero_quantized_gradients=True), Workload(global_batch_size=64)
    )
    sent = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    assert document["zero_optimization"] == plain | sent
    check_deepspeed(document)


def test_a_key_of_ours_is_refused_among_the_free_ones() -> None:
    with pytest.raises(UsageError, match="use the axis zero_stage"):
        to_deepspeed(config(deepspeed=(("zero_optimization.stage", 2),)), Workload(global_batch_size=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_cliping": 1.0}, "does not know the key gradient_cliping"),
        ({"activation_checkpointing": {"enabled": True}}, r"does not know the key activation_checkpointing\.enabled"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket": 5}}, "refuses the config"),
        ({"zero_optimization": {"stage": 4}}, "refuses the config"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "refuses the config"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, r"does not know the key optimizer\.parms"),
        ({"train_micro_batch_size_per_gpu": None}, "refuses the config"),
        ({"zero_optimization": 3}, "refuses the config"),
    ],
)
def test_what_deepspeed_would_ignore_or_refuse_is_one_sentence(change: dict[str, Any], message: str) -> None:
    document = to_deepspeed(config(), Workload(global_batch_size=64))
    with pytest.raises(UsageError, match=message) as caught:
        check_deepspeed({**document, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"wall_clock_breakdown": True},
        {"activation_checkpointing": {"partition_activations": True}},
        {"zero_allow_untested_optimizer": True},
        {"zero_force_ds_cpu_optimizer": False},
        {"prescale_gradients": True},
        {"communication_data_type": "fp32"},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"flops_profiler": {"enabled": False}},
        {"comms_logger": {"enabled": False}},
        {"aio": {"block_size": 1048576}},
        {"tensorboard": {"enabled": False}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
        {"compile": {"deepcompile": False}},
        {"checkpoint": {"load_universal": False}},
        {"tensor_parallel": {"autotp_size": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_real_keys_are_known(change: dict[str, Any]) -> None:
    check_deepspeed({**to_deepspeed(config(), Workload(global_batch_size=64)), **change})


def test_the_document_is_left_as_it_was() -> None:
    document = to_deepspeed(config(zero_stage=3), Workload(global_batch_size=64))
    before = json.dumps(document)
    check_deepspeed(document)
    assert json.dumps(document) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.reduce_bucket_size", 5e7),
        ("zero_optimization.overlap_comm", True),
        ("zero_optimization.stage3_prefetch_bucket_size", 100_000),
        ("zero_optimization.stage3_param_persistence_threshold", 10_000),
        ("zero_optimization.offload_optimizer.pin_memory", False),
        ("zero_optimization.zero_hpz_partition_size", 8),
        ("prescale_gradients", True),
        ("optimizer.params.torch_adam", True),
    ],
)
def test_free_keys(key: str, value: bool | int | float | str) -> None:
    assert deepspeed_key_error(key, value) is None


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("zero_optimization.reduce_bucket_sise", 5e7, "reduce_bucket_sise"),
        ("zero_optimization.reduce_bucket_size", "large", "reduce_bucket_size"),
        ("zero_optimisation.overlap_comm", True, "does not know the key zero_optimisation"),
        ("zero_optimization.overlap_comm.deep", True, "refuses the config"),
        ("train_micro_batch_size_per_gpu.x", 1, "use the axis micro_batch_size"),
        ("zero_optimization", 1, "Autotune's own"),
        ("fp16", True, "use the axis precision"),
        ("", 1, "does not know"),
    ],
)
def test_unusable_keys(key: str, value: bool | int | float | str, reason: str) -> None:
    assert reason in (deepspeed_key_error(key, value) or "")


@pytest.mark.parametrize("key", [*OWNED_KEYS, *TRAINING_KEYS])
def test_owned_keys_are_refused_with_what_to_use(key: str) -> None:
    assert deepspeed_key_error(key, 1) is not None
