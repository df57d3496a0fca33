"""Shapes count what transformers builds."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.errors import InvalidModelError
from autotune.predict.roofline import flops_per_token
from autotune.predict.shape import read_shape
from autotune.spec.model import ModelSpec

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen2": {"model_type": "qwen2", **SMALL},
    "tied": {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL},
    "llama biases": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **SMALL},
    "qwen2 experts": {"model_type": "qwen2_moe", **SMALL, **EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3 experts": {"model_type": "qwen3_moe", **SMALL, **EXPERTS},
    "every other layer": {"model_type": "qwen3_moe", **SMALL, **EXPERTS, "decoder_sparse_step": 2},
    "one layer dense": {"model_type": "qwen3_moe", **SMALL, **EXPERTS, "mlp_only_layers": [1]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_built_model(config: dict[str, object]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert read_shape("m", config).num_parameters == sum(weight.numel() for weight in model.parameters())


def test_agrees_with_the_spec_on_dense_models() -> None:
    for config in CONFIGS.values():
        shape = read_shape("m", config)
        if shape.dense:
            spec = ModelSpec(name="m", config=config)
            assert shape.num_parameters == spec.num_parameters
            assert flops_per_token(shape, np.array([512]))[0] == spec.flops_per_token(512)


@pytest.mark.parametrize("change", [{"num_experts": 0}, {"num_experts": "8"}, {"moe_intermediate_size": None}])
def test_an_impossible_key_is_named(change: dict[str, object]) -> None:
    with pytest.raises(InvalidModelError, match=next(iter(change))):
        read_shape("m", CONFIGS["qwen3 experts"] | change)


@pytest.mark.parametrize("model_type", [None, "gpt2", "gemma", "mixtral", ["qwen2"]])
def test_another_family_is_refused(model_type: object) -> None:
    with pytest.raises(InvalidModelError, match="model_type"):
        read_shape("m", {**CONFIGS["qwen2"], "model_type": model_type})
