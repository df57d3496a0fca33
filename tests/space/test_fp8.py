"""`fp8`: searched only where numerics says so, on GPUs that multiply in it, refused with what it was not tried with."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.formats.targets import cannot_express
from autotune.predict.kernels import peak_flops
from autotune.predict.memory import structures
from autotune.space import fp8
from autotune.space.fp8 import FP8_GPUS, FP8_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.samples import SPACE, sample_space

SEARCH: dict[str, Any] = {**SPACE["search"], "numerics": {"fp8": [False, True]}}
TARGETS = ["accelerate", "autotune"]
GPUS = {"nodes": 1, "gpus_per_node": 2, "gpu": "H100-80GB"}
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
PLAIN = {"engine": "pytorch", "zero_stage": 3, "gpus": 8, "micro_batch_size": 1, "sequence_length": 4096}


def test_it_is_searched_where_numerics_says_so(tmp_path: Path) -> None:
    space = sample_space(tmp_path, cluster=GPUS, targets=TARGETS, search=SEARCH, baseline=...)
    found = [config for config in space.candidates if config.fp8]
    assert {config.engine for config in found} == {"pytorch"}
    assert space.numerics == ("fp8",)
    for config in found:
        assert TrialConfig.from_dict(config.to_dict()) == config in space
        assert config.describe().endswith("fp8")
    without = sample_space(tmp_path, cluster=GPUS, targets=TARGETS, baseline=...)
    assert {config.fp8 for config in without.candidates} == {False}


def test_it_is_dropped_without_a_gpu(tmp_path: Path) -> None:
    (dropped,) = sample_space(tmp_path, targets=TARGETS, search=SEARCH, baseline=...).dropped
    assert (dropped.axis, dropped.value) == ("fp8", True)
    assert "fp8 needs a GPU, and on CPUs torchao only emulates it" in dropped.reason


def test_it_is_dropped_without_torchao_where_a_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "DRIVER", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    dropped = sample_space(tmp_path, cluster=GPUS, targets=TARGETS, search=SEARCH, baseline=...).dropped
    (reason,) = (value.reason for value in dropped if value.axis == "fp8")
    assert "pip install 'autotune-llm[fp8]'" in reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"activation_checkpointing": "full", "torch_compile": True}, None),
        ({"engine": "deepspeed"}, "is run by engine pytorch alone"),
        ({"tensor_parallel_size": 2}, "does not go with tensor_parallel_size 2"),
        ({"precision": "fp16"}, "has not been tried with precision fp16; use bf16"),
        ({"method": "lora"}, "has not been tried with method lora; use full"),
        ({"use_liger_kernel": True}, "has not been tried with use_liger_kernel true; use false"),
        ({"activation_checkpointing": "selective_ops"}, "selective_ops keeps"),
        ({"batching": "packed"}, "batching packed comes to any"),
        ({"sequence_length": 4090}, "a micro-batch has 4090"),
        ({"sequence_length": 4088, "micro_batch_size": 2}, None),
    ],
)
def test_what_it_goes_with(fields: dict[str, Any], reason: str | None) -> None:
    model, work = load_model("Qwen/Qwen3-32B", Path()), Workload(global_batch_size=64)
    config = TrialConfig.from_dict({**PLAIN, "fp8": True, **fields})
    found = [said for rule in FP8_RULES if (said := rule(config, work, model, NODE)) is not None]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]
    plain = TrialConfig.from_dict({**PLAIN, **fields})
    assert [rule(plain, work, model, NODE) for rule in FP8_RULES] == [None] * len(FP8_RULES)


def test_which_gpus_multiply_in_it() -> None:
    model, work = load_model("Qwen/Qwen3-32B", Path()), Workload(global_batch_size=64)
    config = TrialConfig.from_dict({**PLAIN, "fp8": True})
    old = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("A100-80GB"))
    assert any("A100-80GB is none" in (rule(config, work, model, old) or "") for rule in FP8_RULES)
    for name in FP8_GPUS:
        assert peak_flops(find_gpu(name), "fp8") > peak_flops(find_gpu(name), "bf16")


def test_who_runs_it() -> None:
    config = TrialConfig.from_dict({**PLAIN, "fp8": True})
    assert cannot_express("autotune", config, "cuda") is None
    for target in ("accelerate", "hf_trainer", "deepspeed"):
        assert cannot_express(target, config, "cuda") is not None


def test_memory_is_predicted_as_without() -> None:
    model = load_model("Qwen/Qwen3-32B", Path())
    with_fp8, without = (TrialConfig.from_dict({**PLAIN, **fields}) for fields in ({"fp8": True}, {}))
    assert structures(model, with_fp8, accumulates=True) == structures(model, without, accumulates=True)
