"""Building on meta, checkpointing, and weights that depend on names alone."""

import gc
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from autotune.errors import UsageError
from autotune.modeling.build import (
    apply_activation_checkpointing,
    build_model,
    checkpointed_layers,
    huggingface_config,
    initial_weight,
    materialize,
)
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec

CPU = torch.device("cpu")
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}
FAMILIES = {
    "qwen3": QWEN3,
    "qwen3-tied": {**QWEN3, "tie_word_embeddings": True},
    "qwen2": {**QWEN3, "model_type": "qwen2"},
    "llama": {**QWEN3, "model_type": "llama", "attention_bias": True},
    "mistral": {**QWEN3, "model_type": "mistral"},
}


def spec(family: str = "qwen3") -> ModelSpec:
    return ModelSpec(name=family, config=FAMILIES[family])


def config(**fields: Any) -> TrialConfig:
    return TrialConfig(engine="pytorch", gpus=1, micro_batch_size=1, sequence_length=8, **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_built_on_meta_without_parameters_in_memory(family: str) -> None:
    model = build_model(spec(family), "sdpa")
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.training
    assert not model.config.use_cache
    assert model.config._attn_implementation == "sdpa"
    assert sum(parameter.numel() for parameter in model.parameters()) == spec(family).num_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_an_ordinarily_built_model_computes(family: str) -> None:
    """Buffers that no checkpoint stores are right: with equal weights, the outputs are equal."""
    model = build_model(spec(family), "eager")
    materialize(model, CPU, torch.float32, seed=1)
    ordinary = AutoModelForCausalLM.from_config(huggingface_config(spec(family)), attn_implementation="eager")
    ordinary.load_state_dict(model.state_dict())
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(model.eval()(input_ids=ids).logits, ordinary.eval()(input_ids=ids).logits)


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (build_model(spec(), "sdpa") for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        torch.manual_seed(seed + 100 * id(model) % 1000)  # the global generator plays no part
        materialize(model, CPU, torch.float32, seed)
    q, k = first.model.layers[0].self_attn.q_proj.weight, first.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(q, again.model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(q, other.model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(q, k)
    assert torch.equal(q, initial_weight("model.layers.0.self_attn.q_proj.weight", q.shape, CPU, 0.05, 1))


def test_distribution_of_the_weights() -> None:
    model = build_model(spec("llama"), "sdpa")
    materialize(model, CPU, torch.float32, seed=1)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, torch.zeros(64))
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert model.lm_head.weight.mean().item() == pytest.approx(0.0, abs=2e-3)


def test_low_precision_weights_are_the_rounded_ones_and_buffers_stay() -> None:
    exact, rounded = build_model(spec(), "sdpa"), build_model(spec(), "sdpa")
    materialize(exact, CPU, torch.float32, seed=1)
    materialize(rounded, CPU, torch.bfloat16, seed=1)
    for ours, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_embeddings_are_one_parameter() -> None:
    model = build_model(spec("qwen3-tied"), "sdpa")
    materialize(model, CPU, torch.float32, seed=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_parameter_at_a_time_exists_besides_the_model() -> None:
    model = build_model(spec(), "sdpa")
    with MemoryTracker() as tracker:
        materialize(model, CPU, torch.float32, seed=1)
        gc.collect()
        parameters = [parameter.numel() * 4 for parameter in model.parameters()]
        assert tracker.live_bytes == pytest.approx(sum(parameters), rel=1e-3)
        assert tracker.peak_bytes <= tracker.live_bytes + max(parameters)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [False] * 5),
        ({"activation_checkpointing": "full"}, [True] * 5),
        ({"activation_checkpointing": "selective", "selective_every": 2}, [True, False, True, False, True]),
        ({"activation_checkpointing": "selective", "selective_every": 3}, [True, False, False, True, False]),
    ],
)
def test_activation_checkpointing_marks_the_layers(fields: dict[str, Any], expected: list[bool]) -> None:
    model = build_model(spec(), "sdpa")
    apply_activation_checkpointing(model, config(**fields))
    assert [layer.gradient_checkpointing for layer in checkpointed_layers(model)] == expected


def test_selective_without_its_n_is_refused() -> None:
    with pytest.raises(UsageError, match="selective_every"):
        apply_activation_checkpointing(build_model(spec(), "sdpa"), config(activation_checkpointing="selective"))
