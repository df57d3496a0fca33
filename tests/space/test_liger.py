"""`use_liger_kernel`: searched where stated, dropped without a GPU or the package, refused where it goes wrong."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.formats.targets import TARGETS, cannot_express, left_to_script
from autotune.formats.training_args import check_training_args, to_training_args
from autotune.space import liger
from autotune.space.liger import LIGER_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.workload import Workload
from tests.samples import SPACE, sample_space

SEARCH: dict[str, Any] = {**SPACE["search"], "use_liger_kernel": [False, True]}
GPUS = {"nodes": 1, "gpus_per_node": 2, "gpu": "H100-80GB"}
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
PLAIN = {"engine": "pytorch", "zero_stage": 3, "gpus": 8, "micro_batch_size": 1, "sequence_length": 4096}


def test_both_engines_have_it_on_gpus(tmp_path: Path) -> None:
    space = sample_space(tmp_path, cluster=GPUS, search=SEARCH, baseline=...)
    found = [config for config in space.candidates if config.use_liger_kernel]
    assert {config.engine for config in found} == {"deepspeed", "pytorch"}
    assert space.numerics == ()
    assert not [dropped for dropped in space.dropped if dropped.axis == "use_liger_kernel"]
    for config in found:
        assert TrialConfig.from_dict(config.to_dict()) == config in space
        assert config.describe().endswith("liger")
    assert {config.use_liger_kernel for config in sample_space(tmp_path).candidates} == {False}


def test_it_is_dropped_without_a_gpu(tmp_path: Path) -> None:
    (dropped,) = sample_space(tmp_path, search=SEARCH, baseline=...).dropped
    assert (dropped.axis, dropped.value) == ("use_liger_kernel", True)
    assert "needs a GPU, which Triton's kernels are for" in dropped.reason


@pytest.mark.parametrize("driver", [False, True])
def test_it_is_dropped_without_the_package_where_a_driver_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    monkeypatch.setattr(liger, "DRIVER", tmp_path if driver else tmp_path / "none")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    space = sample_space(tmp_path, cluster=GPUS, search=SEARCH, baseline=...)
    reasons = [dropped.reason for dropped in space.dropped if dropped.axis == "use_liger_kernel"]
    assert len(reasons) == driver
    assert all("pip install 'autotune-llm[liger]'" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"engine": "deepspeed", "activation_checkpointing": "full"}, None),
        ({"method": "lora"}, None),
        ({"tensor_parallel_size": 2}, "does not go with tensor_parallel_size 2"),
        ({"loss": "chunked"}, "does not go with loss chunked"),
        ({"activation_checkpointing": "selective_ops"}, "which selective_ops keeps"),
        ({"torch_compile": True}, "has not been tried with torch_compile"),
    ],
)
def test_what_it_goes_with(fields: dict[str, Any], reason: str | None) -> None:
    model, work = load_model("Qwen/Qwen3-32B", Path()), Workload(global_batch_size=64)
    config = TrialConfig.from_dict({**PLAIN, "use_liger_kernel": True, **fields})
    found = [said for rule in LIGER_RULES if (said := rule(config, work, model, NODE)) is not None]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]
    plain = TrialConfig.from_dict({**PLAIN, **fields})
    assert [rule(plain, work, model, NODE) for rule in LIGER_RULES] == [None] * len(LIGER_RULES)


def test_whose_layers_it_knows() -> None:
    other = ModelSpec(name="other", config={**load_model("Qwen/Qwen3-32B", Path()).config, "model_type": "mistral"})
    config = TrialConfig.from_dict({**PLAIN, "use_liger_kernel": True})
    (said,) = (found for rule in LIGER_RULES if (found := rule(config, Workload(global_batch_size=64), other, NODE)))
    assert said == "use_liger_kernel is for models of type qwen2, qwen3, llama, and other is mistral"


def test_who_runs_it() -> None:
    work = Workload(global_batch_size=64)
    for engine in ("deepspeed", "pytorch"):
        config = TrialConfig.from_dict({**PLAIN, "engine": engine, "use_liger_kernel": True})
        document = to_training_args(config, work, "cuda")
        assert document["use_liger_kernel"] is True
        check_training_args(document)
        for target in TARGETS:
            if cannot_express(target, config, "cuda") is None:
                said = any("AutoLigerKernelForCausalLM" in line for line in left_to_script(target, config, work))
                assert said == (target in ("accelerate", "deepspeed"))
    assert "use_liger_kernel" not in to_training_args(TrialConfig.from_dict(PLAIN), work, "cuda")
