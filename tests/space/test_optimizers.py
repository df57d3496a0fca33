"""`optimizer`: searched only where numerics says so, and refused where bitsandbytes or torchao cannot update."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.space.legality import applies
from autotune.space.optimizers import OPTIMIZER_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.samples import SPACE, sample_space

SHORT: dict[str, Any] = {**SPACE["search"], "numerics": {"optimizer": ["adamw", "adamw_8bit"]}}
BY_TORCHAO: dict[str, Any] = {**SPACE["search"], "numerics": {"optimizer": ["adamw", "adamw_torch_8bit"]}}
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))


def test_states_are_fp32_unless_told(tmp_path: Path) -> None:
    space = sample_space(tmp_path)
    assert {config.optimizer for config in space.candidates} == {"adamw"}
    assert "optimizer" not in space.candidates[0].to_dict()


def test_both_are_searched_and_labelled_where_numerics_says_so(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=SHORT)
    short = [config for config in space.candidates if config.optimizer == "adamw_8bit"]
    assert {(c.engine, c.zero_stage) for c in short} == {("pytorch", 0), *(("deepspeed", stage) for stage in range(4))}
    assert space.numerics == ("optimizer",)
    for config in short:
        assert config in space
        assert TrialConfig.from_dict(config.to_dict()) == config
        assert config.describe().endswith("adamw_8bit")
    assert any("the DTensors that zero_stage 3 makes on engine pytorch" in reason for reason in space.illegal)


def test_it_is_dropped_where_its_library_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    space = sample_space(tmp_path, search=SHORT)
    assert {config.optimizer for config in space.candidates} == {"adamw"}
    (dropped,) = space.dropped
    assert (dropped.axis, dropped.value) == ("optimizer", "adamw_8bit")
    assert "pip install 'autotune-llm[adamw-8bit]'" in dropped.reason


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules look for the package, and load nothing."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "torchao" else found(name))


@pytest.mark.usefixtures("torchao")
def test_torchaos_is_searched_on_the_engine_whose_tensors_it_knows(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=BY_TORCHAO)
    short = [config for config in space.candidates if config.optimizer == "adamw_torch_8bit"]
    assert {(c.engine, c.zero_stage) for c in short} == {("pytorch", stage) for stage in (0, 2, 3)}
    assert space.numerics == ("optimizer",)
    for config in short:
        assert TrialConfig.from_dict(config.to_dict()) == config in space
        assert config.describe().endswith("adamw_torch_8bit")


@pytest.mark.parametrize(
    ("missing", "words"),
    [("torchao", "pip install 'autotune-llm[adamw-torch-8bit]'"), ("compiler", "needs a C++ compiler on CPUs")],
)
def test_torchaos_is_dropped_without_torchao_or_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, words: str
) -> None:
    found = importlib.util.find_spec
    package = None if missing == "torchao" else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package if name == "torchao" else found(name))
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    (dropped,) = sample_space(tmp_path, search=BY_TORCHAO).dropped
    assert (dropped.axis, dropped.value) == ("optimizer", "adamw_torch_8bit")
    assert words in dropped.reason


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"zero_stage": 3}, None),
        ({"zero_stage": 2, "tensor_parallel_size": 2, "data_parallel_replicate_size": 2}, None),
        ({"zero_stage": 3, "sequence_parallel_size": 8}, None),
        ({"pipeline_parallel_size": 8, "pipeline_schedule": "1f1b"}, None),
        ({"engine": "deepspeed", "zero_stage": 3}, "use adamw_8bit"),
        ({"zero_stage": 3, "offload": "optimizer+parameters"}, "has not been tried with offload"),
        ({"zero_stage": 3, "precision": "fp16"}, "use bf16"),
        ({"zero_stage": 3, "torch_compile": True}, "has not been tried with torch_compile true"),
        (
            {"zero_stage": 3, "method": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"},
            "of few states",
        ),
    ],
)
def test_what_torchaos_goes_with(fields: dict[str, Any], reason: str | None) -> None:
    plain = {"engine": "pytorch", "gpus": 8, "micro_batch_size": 1, "sequence_length": 4096}
    config = TrialConfig.from_dict({**plain, "optimizer": "adamw_torch_8bit", **fields})
    model, work = load_model("Qwen/Qwen3-32B", Path()), Workload(global_batch_size=64)
    found = [said for rule in OPTIMIZER_RULES if (said := rule(config, work, model, NODE)) is not None]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"zero_stage": 3}, None),
        ({"zero_stage": 2}, "4,095,"),  # of 32.8e9 parameters over 8 ranks, more than a 32-bit number
        ({"zero_stage": 2, "gpus": 16}, None),
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization.sub_group_size": 3 * 10**9}},
            "a smaller zero_optimization",
        ),
        (
            {"zero_stage": 2, "method": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"},
            None,
        ),
        ({"zero_stage": 3, "offload": "optimizer"}, "offload optimizer updates by DeepSpeed's Adam of the host"),
        ({"engine": "pytorch", "tensor_parallel_size": 2}, "DTensors that tensor_parallel_size 2 makes"),
        ({"engine": "pytorch", "sequence_parallel_size": 2}, None),
    ],
)
def test_a_32b_model(fields: dict[str, Any], reason: str | None) -> None:
    plain = {
        "engine": "deepspeed",
        "gpus": 8,
        "micro_batch_size": 1,
        "sequence_length": 4096,
        "optimizer": "adamw_8bit",
    }
    config = TrialConfig.from_dict({**plain, **fields})
    model, work = load_model("Qwen/Qwen3-32B", Path()), Workload(global_batch_size=64)
    found = [said for rule in OPTIMIZER_RULES if (said := rule(config, work, model, NODE)) is not None]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


def test_keys_of_deepspeeds_own_optimizer_do_not_apply_to_another() -> None:
    config = TrialConfig(engine="deepspeed", gpus=2, micro_batch_size=1, sequence_length=64, optimizer="adamw_8bit")
    for key in ("optimizer.params.torch_adam", "zero_allow_untested_optimizer"):
        assert not applies(f"deepspeed.{key}", config)
    assert applies("deepspeed.communication_data_type", config)
