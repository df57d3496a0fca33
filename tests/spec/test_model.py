import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.errors import InvalidModelError
from autotune.spec.model import SUPPORTED_MODEL_TYPES, ModelSpec, load_model

PUBLISHED_PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "qwen3-tiny": 1_049_984,
}

SMALL_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def model_folder(parent: Path, text: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    (parent / "config.json").write_text(text, encoding="utf-8")
    return parent


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_shipped_architectures_have_the_published_size(name: str, parameters: int) -> None:
    assert load_model(name, Path()).num_parameters == parameters


def parameters_that_transformers_counts(config: dict[str, object]) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_transformers_builds_every_shipped_architecture(name: str) -> None:
    model = load_model(name, Path())
    assert parameters_that_transformers_counts(model.config) == model.num_parameters


EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}
REFUSED = {  # by transformers: keys that the config does not have, or must not be null
    "head_dim": ("qwen2",),
    "num_key_value_heads": ("mistral", "mixtral", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
}


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True, "qkv_bias": False, "qk_layernorm": True},
        {"head_dim": 24},
        {"num_key_value_heads": None},
    ],
    ids=str,
)
def test_formula_follows_transformers_in_every_family(model_type: str, changes: dict[str, object]) -> None:
    if any(model_type in REFUSED.get(key, ()) for key in changes):
        pytest.skip("transformers refuses it")
    if model_type == "phi" and "head_dim" in changes:
        changes = {"head_dim": 32}  # its norms of queries and keys, where there are any, do not follow it
    experts = {} if model_type in ("qwen2", "qwen3", "llama", "mistral") else EXPERTS
    config = {"model_type": model_type, **SMALL_CONFIG, **experts, "pad_token_id": None, **changes}
    assert parameters_that_transformers_counts(config) == ModelSpec(name="small", config=config).num_parameters


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [True] * 4),
        ({"decoder_sparse_step": 2}, [False, True] * 2),
        ({"mlp_only_layers": [0, 3]}, [False, True, True, False]),
        ({"mlp_only_layers": [0, 1, 2, 3]}, [False] * 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_dense_layers_among_sparse_ones(model_type: str, changes: dict[str, object], sparse: list[bool]) -> None:
    config = {"model_type": model_type, **SMALL_CONFIG, **EXPERTS, "num_hidden_layers": 4, **changes}
    model = ModelSpec(name="small", config=config)
    assert [model.is_sparse(layer) for layer in range(4)] == sparse
    assert parameters_that_transformers_counts(config) == model.num_parameters


def test_flops_of_a_token_count_the_experts_it_passes_through() -> None:
    config = {"model_type": "qwen2_moe", **SMALL_CONFIG, **EXPERTS, "mlp_only_layers": [0]}
    attention = 2 * 64 * 64 + 2 * 64 * 32
    dense, sparse = 3 * 64 * 96, 2 * 3 * 64 * 48 + 8 * 64 + 3 * 64 * 80 + 64
    weights = 2 * attention + dense + sparse + 100 * 64
    assert ModelSpec(name="small", config=config).flops_per_token(128) == 6 * weights + 12 * 2 * 64 * 128


def test_published_sizes_of_a_sparse_model() -> None:
    """Qwen3-30B-A3B: 30.5 B parameters, of which 3.3 B work on a token."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }
    model = ModelSpec(name="Qwen3-30B-A3B", config=config)
    assert model.num_parameters == 30_532_122_624
    embedding = 151936 * 2048  # a lookup: counted among the active parameters, and no FLOPs
    assert model.flops_per_token(0) / 6 + embedding == pytest.approx(3.3e9, rel=0.02)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_absent_key_value_heads_and_head_dim_follow_transformers(model_type: str) -> None:
    sizes = {"num_attention_heads": 32, "hidden_size": 256, "pad_token_id": None}
    config: dict[str, object] = {"model_type": model_type, **SMALL_CONFIG, **EXPERTS, **sizes}
    del config["num_key_value_heads"]
    model = ModelSpec(name="small", config=config)
    assert parameters_that_transformers_counts(config) == model.num_parameters


def test_flops_of_one_token_term_by_term() -> None:
    model = ModelSpec(name="small", config={"model_type": "llama", **SMALL_CONFIG})
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    weights = 2 * layer + 100 * 64
    assert model.flops_per_token(128) == 6 * weights + 12 * 2 * 64 * 128


def test_tied_lm_head_costs_what_an_untied_one_does() -> None:
    config = {"model_type": "llama", **SMALL_CONFIG}
    untied, tied = (
        ModelSpec(name="a", config=config),
        ModelSpec(name="a", config={**config, "tie_word_embeddings": True}),
    )
    assert tied.flops_per_token(128) == untied.flops_per_token(128)
    assert untied.num_parameters - tied.num_parameters == 100 * 64


def test_qwen3_32b_needs_six_flops_per_weight_and_more_for_attention() -> None:
    model = load_model("Qwen/Qwen3-32B", Path())
    without_attention = model.flops_per_token(0)
    assert without_attention / model.num_parameters == pytest.approx(6, rel=0.03)
    assert model.flops_per_token(4096) - without_attention == 12 * 64 * 64 * 128 * 4096


def test_equality_hash_and_digest() -> None:
    first, second = load_model("qwen3-tiny", Path()), load_model("qwen3-tiny", Path())
    assert first == second
    assert hash(first) == hash(second)
    reordered = ModelSpec(name="mine", config=dict(reversed(first.config.items())))
    assert reordered.digest == first.digest
    assert reordered != first
    assert load_model("Qwen/Qwen3-8B", Path()).digest != first.digest
    assert len(first.digest) == 16


def test_a_loaded_config_is_the_callers_own() -> None:
    load_model("qwen3-tiny", Path()).config["architectures"].clear()
    assert load_model("qwen3-tiny", Path()).config["architectures"] == ["Qwen3ForCausalLM"]


def test_folder_relative_to_the_space_file_and_absolute(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "models" / "mine", json.dumps(load_model("qwen3-tiny", Path()).config))
    relative = load_model("models/mine", tmp_path)
    assert relative.name == "models/mine"
    assert relative.num_parameters == PUBLISHED_PARAMETERS["qwen3-tiny"]
    assert load_model(str(folder), Path("elsewhere")).digest == relative.digest


def test_hub_id_that_is_not_shipped_names_near_matches_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError) as caught:
        load_model("Qwen/Qwen3-32B-Instruct", tmp_path)
    message = str(caught.value)
    assert "did you mean Qwen/Qwen3-32B" in message
    assert "hf download Qwen/Qwen3-32B-Instruct config.json --local-dir DIR" in message
    assert "\n" not in message


@pytest.mark.parametrize("reference", ["qwen3-32b", "Qwen3-32B", "qwen/qwen3-32b"])
def test_a_name_without_owner_or_case_is_recognised(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"did you mean Qwen/Qwen3-32B"):
        load_model(reference, tmp_path)


@pytest.mark.parametrize("reference", ["zzz", "", "   ", "./nowhere"])
def test_a_name_near_to_nothing_lists_all(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"known are .*qwen3-tiny") as caught:
        load_model(reference, tmp_path)
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list"),
        ("{}", "model_type None"),
        ('{"model_type": "mamba"}', "only decoders of type qwen2, qwen3, llama, mistral, qwen2_moe"),
        ('{"model_type": ["qwen3"]}', "model_type"),
        ('{"model_type": "llama", "hidden_size": 64}', "found no num_attention_heads"),
        (json.dumps({"model_type": "llama", **SMALL_CONFIG, "vocab_size": "100"}), "found '100' as vocab_size"),
        (json.dumps({"model_type": "llama", **SMALL_CONFIG, "num_hidden_layers": 0}), "found 0 as num_hidden_layers"),
        (json.dumps({"model_type": "llama", **SMALL_CONFIG, "num_hidden_layers": True}), "found True as"),
        (" " * (1024 * 1024 + 1), "bytes, but"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_config_is_one_sentence(text: str, complaint: str, tmp_path: Path) -> None:
    model_folder(tmp_path / "bad", text)
    with pytest.raises(InvalidModelError) as caught:
        load_model("bad", tmp_path)
    assert complaint in str(caught.value)
    assert "model bad" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_binary_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidModelError, match="has no config"):
        load_model("empty", tmp_path)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    with pytest.raises(InvalidModelError, match="cannot be read"):
        load_model("folder", tmp_path)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "config.json").write_bytes(os.urandom(64) + b"\xff")
    with pytest.raises(InvalidModelError, match="is not JSON"):
        load_model("binary", tmp_path)


def test_reading_a_model_imports_no_heavy_library() -> None:
    program = (
        "import sys, pathlib; from autotune.spec.model import load_model; load_model('qwen3-tiny', pathlib.Path());"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
