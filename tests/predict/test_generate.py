"""Generation: each term against arithmetic done by hand, and against what a real model holds."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.modeling.memory_tracker import MemoryTracker
from autotune.predict.device import CUDA_CONTEXT_BYTES, block_bytes, workspace_bytes
from autotune.predict.generate import GENERATE_PROFILES, GenerateConfig, predict_generate
from autotune.predict.shape import read_shape
from autotune.spec.prediction import MemoryPrediction, Part
from autotune.units import GIB, MIB

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
SHAPE = read_shape("m", LLAMA)
ONE = GenerateConfig(batch_size=1, prompt_tokens=1024, new_tokens=512)


def predict(config: GenerateConfig = ONE, profile: str = "transformers", gpus: int = 1) -> tuple[MemoryPrediction, ...]:
    return predict_generate(SHAPE, config, GENERATE_PROFILES[profile], "A100-80GB", gpus)


def test_one_new_token_after_one_is_weights_and_little_else() -> None:
    (tiny,) = predict(replace(ONE, prompt_tokens=1, new_tokens=1))
    weights = 2 * SHAPE.num_parameters
    assert tiny.breakdown[Part.PARAMETERS] == weights
    assert tiny.allocated_bytes - weights - workspace_bytes("A100-80GB") < MIB
    assert tiny.device_used_bytes == tiny.allocated_bytes + CUDA_CONTEXT_BYTES


def test_the_parts_add_up_to_the_peak() -> None:
    for profile in GENERATE_PROFILES:
        for gpus in (1, 3):
            for prediction in predict(profile=profile, gpus=gpus):
                assert sum(prediction.breakdown.values()) == prediction.device_used_bytes


def test_grouped_query_attention_caches_key_heads_alone() -> None:
    (long,) = predict(replace(ONE, prompt_tokens=1, new_tokens=100_000))
    cache = 2 * 8 * 100_000 * (4 * 64) * 2
    assert long.breakdown[Part.CACHE] == pytest.approx(cache * (1 + 1 / 16), rel=0.02)  # and one layer's keys twice


def test_older_transformers_hold_the_cache_twice_and_every_logit() -> None:
    (last,) = predict(replace(ONE, prompt_tokens=1, new_tokens=2048), "transformers-4.37")
    assert last.breakdown[Part.CACHE] == 2 * 2 * 8 * 2048 * 256 * 2
    (prompt,) = predict(replace(ONE, prompt_tokens=4096, new_tokens=1), "transformers-4.37")
    assert prompt.breakdown[Part.LOGITS] == 6 * 4096 * 32000
    (now,) = predict(replace(ONE, prompt_tokens=4096, new_tokens=1))
    assert now.allocated_bytes < prompt.allocated_bytes - 5 * 4096 * 32000


def test_a_static_cache_is_there_from_the_start() -> None:
    config = replace(ONE, prompt_tokens=4096, new_tokens=4096)
    (dynamic,), (static,) = predict(config), predict(replace(config, kv_cache="static"))
    assert static.breakdown[Part.CACHE] == 2 * 8 * 8192 * 256 * 2
    assert static.breakdown[Part.ACTIVATIONS] > 0  # the prompt's pass is the peak: the cache does not grow
    assert dynamic.breakdown[Part.ACTIVATIONS] > 0
    assert dynamic.breakdown[Part.CACHE] < static.breakdown[Part.CACHE]


@pytest.mark.parametrize(
    ("quantization", "bytes_per_weight"),
    [("int8", 1.0), ("fp8", 1.0), ("gptq-int8", 1.02), ("nf4", 0.56), ("gptq-int4", 0.52), ("awq", 0.52)],
)
def test_quantisation_shrinks_the_layers_and_not_the_embeddings(quantization: str, bytes_per_weight: float) -> None:
    (whole,), (small,) = predict(), predict(replace(ONE, quantization=quantization))  # type: ignore[arg-type]
    linear = sum(layer.linear_parameters for layer in SHAPE.layers)
    saved = whole.breakdown[Part.PARAMETERS] - small.breakdown[Part.PARAMETERS]
    assert saved == pytest.approx((2 - bytes_per_weight) * linear, rel=0.01)


def test_several_gpus_hold_all_weights_once_and_the_first_gets_the_logits() -> None:
    parts = predict(replace(ONE, prompt_tokens=8192, new_tokens=8), "transformers-4.37", gpus=2)
    assert len(parts) == 2
    (alone,) = predict(replace(ONE, prompt_tokens=8192, new_tokens=8), "transformers-4.37")
    weights = [part.breakdown[Part.PARAMETERS] for part in parts]
    assert sum(weights) == alone.breakdown[Part.PARAMETERS]
    assert min(weights) > 0.3 * sum(weights)
    assert parts[0].breakdown[Part.LOGITS] == 4 * 8192 * 32000
    assert parts[1].breakdown[Part.LOGITS] == 6 * 8192 * 32000


def test_blocks_are_rounded_as_the_allocator_does() -> None:
    assert block_bytes(1) == 512
    assert block_bytes(5 * MIB + 1) == 5 * MIB + 512
    assert block_bytes(43 * MIB) == 44 * MIB  # one MiB left over is not split off
    assert block_bytes(42 * MIB + MIB // 2) == 42 * MIB + MIB // 2  # one and a half is


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_peak_of_a_prompt_is_what_the_real_model_holds(model_type: str) -> None:
    """On CPU: no workspace; live bytes of the forward pass over the prompt, which is the peak of one new token."""
    config = {**LLAMA, "model_type": model_type, "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(torch.bfloat16).eval()
    tokens = 512
    with torch.inference_mode(), MemoryTracker() as tracker:
        for weight in model.parameters():
            tracker.track(weight)
        model.generate(torch.ones(1, tokens, dtype=torch.long), max_new_tokens=1, do_sample=False)
    shape = read_shape("m", config)
    (predicted,) = predict_generate(
        shape,
        GenerateConfig(batch_size=1, prompt_tokens=tokens, new_tokens=1),
        GENERATE_PROFILES["transformers"],
        "A100-80GB",
        1,
    )
    working = tracker.peak_bytes - 2 * shape.num_parameters
    ours = predicted.allocated_bytes - workspace_bytes("A100-80GB") - 2 * shape.num_parameters
    assert ours == pytest.approx(working, rel=0.15), (ours / GIB, working / GIB)
