"""`tiled_mlp`: searched where stated, refused with what it does not go with; who runs it, and what a script does."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

from autotune.formats.targets import cannot_express, left_to_script
from autotune.modeling.build import build_model, materialize
from autotune.predict.memory import structures
from autotune.space.tiled_mlp import TILED_MLP_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.workload import Workload
from tests.engines.parity import CPU, tiny
from tests.samples import SPACE, sample_space

SEARCH: dict[str, Any] = {**SPACE["search"], "tiled_mlp": [False, True]}
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
PLAIN = {"engine": "pytorch", "zero_stage": 3, "gpus": 8, "micro_batch_size": 1, "sequence_length": 4096}
WORK = Workload(global_batch_size=64)


def test_both_engines_have_it(tmp_path: Path) -> None:
    space = sample_space(tmp_path, targets=["accelerate", "deepspeed", "autotune"], search=SEARCH, baseline=...)
    found = [config for config in space.candidates if config.tiled_mlp]
    assert {config.engine for config in found} == {"deepspeed", "pytorch"}
    assert space.numerics == ()
    for config in found:
        assert TrialConfig.from_dict(config.to_dict()) == config in space
        assert config.describe().endswith("tiled mlp")
    assert {config.tiled_mlp for config in sample_space(tmp_path).candidates} == {False}


def test_the_trainer_has_no_word_for_it(tmp_path: Path) -> None:
    (dropped,) = sample_space(tmp_path, targets="hf_trainer", search=SEARCH, baseline=...).dropped
    assert (dropped.axis, dropped.value) == ("tiled_mlp", True)
    assert "TrainingArguments have no word for tiled_mlp" in dropped.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"activation_checkpointing": "full", "tensor_parallel_size": 2, "loss": "chunked"}, None),
        ({"engine": "deepspeed", "sequence_parallel_size": 8}, None),
        ({"method": "lora"}, None),
        ({"engine": "deepspeed", "method": "lora", "lora_target_modules": "all-linear"}, None),
        (
            {"engine": "deepspeed", "method": "lora", "lora_target_modules": "mlp"},
            "no gradient where nothing before them trains",
        ),
        ({"method": "qlora"}, "has not been tried with method qlora"),
        ({"activation_checkpointing": "selective_ops"}, "selective_ops keeps what tiled_mlp computes in pieces"),
        ({"torch_compile": True}, "has not been tried with torch_compile true; use false"),
        ({"use_liger_kernel": True}, "has not been tried with use_liger_kernel true; use false"),
        ({"fp8": True}, "one scale for all that a product reads"),
        ({"engine": "deepspeed", "offload": "optimizer_nvme"}, "has not been tried with offload optimizer_nvme"),
        ({"engine": "deepspeed", "zero_quantized_weights": True}, "tried with zero_quantized_weights true; use false"),
        ({"engine": "deepspeed", "batching": "packed"}, "has not been tried with batching packed; use padded"),
        ({"batching": "packed"}, None),
        ({"device_map": "auto"}, "has not been tried with device_map auto"),
    ],
)
def test_what_it_goes_with(fields: dict[str, Any], reason: str | None) -> None:
    model = load_model("Qwen/Qwen3-32B", Path())
    config = TrialConfig.from_dict({**PLAIN, "tiled_mlp": True, **fields})
    found = [said for rule in TILED_MLP_RULES if (said := rule(config, WORK, model, NODE)) is not None]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]
    plain = TrialConfig.from_dict({**PLAIN, **fields})
    assert [rule(plain, WORK, model, NODE) for rule in TILED_MLP_RULES] == [None] * len(TILED_MLP_RULES)


def test_whose_layers_it_knows() -> None:
    other = ModelSpec(name="other", config={**load_model("Qwen/Qwen3-32B", Path()).config, "model_type": "mistral"})
    config = TrialConfig.from_dict({**PLAIN, "tiled_mlp": True})
    (said,) = (found for rule in TILED_MLP_RULES if (found := rule(config, WORK, other, NODE)))
    assert said == "tiled_mlp is for models of type qwen2, qwen3, llama, and other is mistral"


@pytest.mark.parametrize(
    ("engine", "targets"), [("pytorch", ["accelerate", "autotune"]), ("deepspeed", ["accelerate", "deepspeed"])]
)
def test_who_runs_it(engine: str, targets: list[str]) -> None:
    config = TrialConfig.from_dict({**PLAIN, "engine": engine, "tiled_mlp": True})
    every: tuple[Any, ...] = ("hf_trainer", "accelerate", "deepspeed", "autotune")
    assert [target for target in every if cannot_express(target, config, "cuda") is None] == targets


@pytest.mark.parametrize("engine", ["pytorch", "deepspeed"])
def test_what_the_script_does_is_python(engine: str) -> None:
    """The words of the README, run: the model computes what it did."""
    config = TrialConfig.from_dict({**PLAIN, "engine": engine, "tiled_mlp": True})
    (said,) = (line for line in left_to_script("accelerate", config, WORK) if "each MLP" in line)
    code = said.rpartition(": `")[2].removesuffix("`")
    model = build_model(tiny(), "sdpa")
    materialize(model, CPU, torch.float32, 0)
    ids = torch.arange(32)[None]
    found = []
    for patch in ("", code):
        exec(patch, {"model": model, "torch": torch, "functools": functools, "TiledMLP": TiledMLP})
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, model.get_input_embeddings().weight)
        found.append((loss.item(), gradients[0].norm().item()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert "forward" in vars(model.base_model.layers[0].mlp)


def test_a_structure_of_its_own() -> None:
    model = load_model("Qwen/Qwen3-32B", Path())
    tiled, plain = (TrialConfig.from_dict({**PLAIN, "tiled_mlp": value}) for value in (True, False))
    assert structures(model, tiled, accumulates=True) != structures(model, plain, accumulates=True)
