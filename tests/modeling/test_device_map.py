"""Which GPU has which layers: what transformers itself decides for `device_map="auto"`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.accelerate import _get_device_map
from transformers.quantizers import AutoHfQuantizer

from autotune.errors import UsageError
from autotune.formats.bitsandbytes_json import to_quantization_config
from autotune.modeling.build import huggingface_config
from autotune.modeling.device_map import balanced_map, gpu_of, layers_of_gpus, shortened
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from tests.engines.parity import tiny


def config(gpus: int, **fields: Any) -> TrialConfig:
    adapters = {"method": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
    plain = {"engine": "pytorch", "micro_batch_size": 1, "sequence_length": 16, "device_map": "auto"}
    return TrialConfig.from_dict({**plain, **adapters, "gpus": gpus, **fields})


def by_transformers(spec: ModelSpec, trial: TrialConfig) -> dict[str, int]:
    """What `from_pretrained` does before it loads a weight, on GPUs with enough memory."""
    quantizer = None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(huggingface_config(spec), dtype=torch.bfloat16)
    model.tie_weights()
    if trial.method == "qlora":
        stated = BitsAndBytesConfig(**to_quantization_config(trial))
        quantizer = AutoHfQuantizer.from_config(stated, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map="auto")
    return dict(_get_device_map(model, "auto", dict.fromkeys(range(trial.gpus), 10**14), quantizer))


@pytest.mark.parametrize(
    ("name", "gpus", "method"),
    [
        ("Qwen/Qwen3-0.6B", 4, "lora"),  # embedding and head are one
        ("Qwen/Qwen3-8B", 4, "qlora"),
        pytest.param("Qwen/Qwen3-32B", 8, "lora", marks=pytest.mark.slow),
        pytest.param("Qwen/Qwen3-32B", 4, "qlora", marks=pytest.mark.slow),
        pytest.param("Qwen/Qwen2.5-32B", 2, "qlora", marks=pytest.mark.slow),
    ],
)
def test_it_is_the_map_of_from_pretrained(name: str, gpus: int, method: str) -> None:
    spec, trial = load_model(name, Path()), config(gpus, method=method)
    assert balanced_map(spec, trial) == by_transformers(spec, trial)


def test_layers_are_in_a_row_and_the_last_gpus_may_have_none() -> None:
    spec = load_model("Qwen/Qwen3-8B", Path())
    placed = balanced_map(spec, config(8, method="qlora"))
    homes = [gpu_of(f"model.layers.{index}.mlp", placed) for index in range(spec.num_hidden_layers)]
    assert homes == sorted(homes)
    layers = layers_of_gpus(placed, spec.num_hidden_layers, 8)
    assert sum(layers) == spec.num_hidden_layers
    assert layers[-1] == 0


def test_a_model_that_stays_on_one_gpu_is_refused() -> None:
    model = load_model("Qwen/Qwen3-0.6B", Path())
    with pytest.raises(UsageError, match=r"leaves all of Qwen/Qwen3-0.6B on one of 2 GPUs; use device_map none"):
        balanced_map(model, config(2, method="qlora"))


def test_a_shallower_model_keeps_what_a_gpu_sees() -> None:
    placed = {
        "model.embed_tokens": 0,
        **{f"model.layers.{i}": i // 4 for i in range(12)},
        "model.norm": 2,
        "lm_head": 2,
    }
    ends = {"model.embed_tokens": 0, "model.norm": 2, "lm_head": 2}

    def homes(gpu: int, layers: int, before: int) -> list[int]:
        short, whole = shortened(placed, gpu, layers, before)
        assert {name: at for name, at in short.items() if "layers" not in name} == ends
        assert [f"model.layers.{index}" for index in range(whole)] == [name for name in short if name not in ends]
        return [at for name, at in short.items() if name not in ends]

    assert homes(0, 3, 1) == [0, 0, 0, 2]
    assert homes(1, 3, 2) == [0, 0, 1, 1, 1, 2]
    assert homes(2, 2, 1) == [1, 2, 2]
    whole = {"model": 0, "lm_head": 1}
    assert shortened(whole, 0, 5, 1) == (whole, 5)


def test_modules_that_are_not_placed_are_an_error() -> None:
    with pytest.raises(KeyError):
        gpu_of("lm_head", {"model": 0})
    assert layers_of_gpus({"": 1}, tiny().num_hidden_layers, 2) == [0, 4]
