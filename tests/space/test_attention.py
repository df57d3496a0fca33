"""`attention`: each kernel where it can run and is installed, and dropped with the reason elsewhere."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.formats.targets import TARGETS, cannot_express, left_to_script
from autotune.space import attention
from autotune.space.attention import ATTENTION_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.workload import Workload
from tests.samples import sample_space

SEARCH: dict[str, Any] = {
    "engine": "pytorch",
    "zero_stage": 3,
    "attention": ["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"],
}
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
PLAIN = {"engine": "pytorch", "zero_stage": 3, "gpus": 8, "micro_batch_size": 2, "sequence_length": 4096}
QWEN3 = load_model("Qwen/Qwen3-32B", Path())


def dropped(folder: Path, gpu: str, search: dict[str, Any] = SEARCH) -> dict[object, str]:
    memory = {"memory_bytes": "60MiB"} if gpu == "cpu" else {}
    cluster = {"nodes": 1, "gpus_per_node": 2, "gpu": gpu, **memory}
    space = sample_space(folder, cluster=cluster, search=search, baseline=...)
    return {item.value: item.reason for item in space.dropped}


@pytest.mark.parametrize(
    ("gpu", "reasons"),
    [
        ("cpu", dict.fromkeys(("flash_attention_2", "flash_attention_3", "flex_attention"), "needs a GPU")),
        ("A100-80GB", {"flash_attention_3": "is for GPUs like H100, and A100-80GB is none"}),
        ("H100-80GB", {}),
    ],
)
def test_where_a_kernel_runs(tmp_path: Path, gpu: str, reasons: dict[str, str]) -> None:
    found = dropped(tmp_path, gpu)
    assert set(found) == set(reasons)
    assert all(reasons[str(value)] in reason for value, reason in found.items())


def test_there_is_no_kernel_for_fp32(tmp_path: Path) -> None:
    found = dropped(tmp_path, "H100-80GB", {**SEARCH, "precision": "fp32"})
    assert set(found) == {"flash_attention_2", "flash_attention_3", "flex_attention"}


@pytest.mark.parametrize(
    ("here", "values"),
    [
        ((), {"flash_attention_2", "flash_attention_3", "flex_attention"}),
        (("flash_attn", "triton"), {"flash_attention_3"}),
        (("kernels", "triton"), set()),  # transformers loads either from the hub
    ],
)
def test_what_is_not_installed_where_gpus_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], values: set[str]
) -> None:
    found = importlib.util.find_spec
    packages = ("flash_attn", "flash_attn_interface", "kernels", "triton")

    def find(name: str) -> object:
        return (name in here or None) if name in packages else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert dropped(tmp_path, "H100-80GB") == {}  # planned on a machine without GPUs
    monkeypatch.setattr(attention, "DRIVER", tmp_path)
    reasons = dropped(tmp_path, "H100-80GB")
    assert set(reasons) == values
    assert all("which is not installed" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"engine": "deepspeed", "activation_checkpointing": "full", "precision": "fp16"}, None),
        ({"batching": "packed", "zero_stage": 0}, None),
        ({"batching": "dynamic_padding"}, "comes to more shapes than the 8 that torch compiles"),
        ({"tensor_parallel_size": 2}, "is causal by a mask alone, and tensor_parallel_size 2 gives layers none"),
        ({"pipeline_parallel_size": 2}, "is causal by a mask alone"),
        ({"loss": "chunked"}, "is causal by a mask alone"),
        ({"engine": "deepspeed", "sequence_parallel_size": 2}, "accelerate refuses attention flex_attention with"),
        ({"engine": "deepspeed", "tensor_parallel_size": 2}, "has not been tried with tensor_parallel_size 2"),
        ({"activation_checkpointing": "selective_ops"}, "would compute flex_attention again"),
        ({"torch_compile": True}, "has not been tried with torch_compile true"),
        ({"use_liger_kernel": True}, "has not been tried with use_liger_kernel true"),
        ({"device_map": "auto"}, "has not been tried with device_map auto"),
        ({"fp8": True}, "has not been tried with fp8 true"),
        ({"tiled_mlp": True}, "has not been tried with tiled_mlp true"),
    ],
)
def test_what_flex_attention_goes_with(fields: dict[str, Any], reason: str | None) -> None:
    config = TrialConfig.from_dict({**PLAIN, "attention": "flex_attention", **fields})
    found = reasons_of(config, QWEN3)
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]
    assert reasons_of(TrialConfig.from_dict({**PLAIN, **fields}), QWEN3) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mistral"}, "is for models of type qwen2, qwen3, llama, and other is mistral"),
        ({"head_dim": 8}, "needs head_dim 16 or more, and other has 8"),
        ({"attention_dropout": 0.1}, "has no dropout, and other has attention_dropout"),
    ],
)
def test_whose_heads_flex_attention_takes(changes: dict[str, Any], reason: str) -> None:
    other = ModelSpec(name="other", config={**QWEN3.config, **changes})
    (found,) = reasons_of(TrialConfig.from_dict({**PLAIN, "attention": "flex_attention"}), other)
    assert reason in found


def reasons_of(config: TrialConfig, model: ModelSpec) -> list[str]:
    work = Workload(global_batch_size=64)
    return [said for rule in ATTENTION_RULES if (said := rule(config, work, model, NODE)) is not None]


def test_a_script_loads_flex_attention_by_its_name() -> None:
    config = TrialConfig.from_dict({**PLAIN, "attention": "flex_attention"})
    for target in TARGETS:
        if target != "autotune" and cannot_express(target, config, "cuda") is None:
            said = left_to_script(target, config, Workload(global_batch_size=64))
            assert any('attn_implementation="flex_attention"' in line for line in said)
