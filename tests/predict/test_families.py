"""The predicted peak of every family of models is that of the real trial, also where layers alternate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.errors import UsageError
from autotune.modeling.build import build_model, layer_kinds
from autotune.predict import memory
from autotune.predict.stream import Stream
from autotune.predict.trace import record_trace, trace_stream
from autotune.spec.config import Attention, Engine
from autotune.spec.model import SUPPORTED_MODEL_TYPES, ModelSpec
from autotune.trial.pool import NodePool
from tests.predict import test_fake
from tests.predict.test_fake import a_request, measured_peaks

pool = test_fake.pool

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
}
SLIDING = {"sliding_window": 16}
CHANGES: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in SUPPORTED_MODEL_TYPES},
    "mistral": SLIDING,
    "qwen2_moe": {**EXPERTS, "decoder_sparse_step": 2},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
}


def family(model_type: str, **changes: Any) -> ModelSpec:
    return ModelSpec(name=model_type, config={"model_type": model_type, **SIZES, **CHANGES[model_type], **changes})


def attention_of(model_type: str) -> Attention:
    return "eager" if model_type == "gemma2" else "sdpa"


DEFAULT_RUN = {("qwen3_moe", "pytorch"), ("gemma3_text", "pytorch"), ("phi", "pytorch")}


@pytest.mark.parametrize(
    ("model_type", "engine", "zero_stage"),
    [
        pytest.param(
            model_type,
            engine,
            stage,
            id=f"{model_type}-{engine}-{stage}",
            marks=[] if (model_type, engine) in DEFAULT_RUN else [pytest.mark.slow],
        )
        for model_type in SUPPORTED_MODEL_TYPES
        for engine, stage in (("pytorch", 3), ("deepspeed", 2), ("deepspeed", 3))
    ],
)
def test_predicted_peak_is_that_of_the_trial(
    pool: NodePool, model_type: str, engine: Engine, zero_stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    request = a_request(engine, zero_stage, model=family(model_type))
    request = replace(request, config=replace(request.config, attention=attention_of(model_type)))
    config = request.config
    batch, length = np.array([config.micro_batch_size]), np.array([config.sequence_length])
    streams = memory.rank_streams(request.model, config, accumulates=True)
    predicted = max(float(stream.peak_bytes(batch, length, "cpu")[0]) for stream in streams)
    assert predicted == pytest.approx(max(measured_peaks(pool, request)), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [1, 2]}),
        ("gemma3_text", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("engine", "zero_stage"), [("pytorch", 3), ("deepspeed", 2)])
def test_depth_follows_a_pattern_of_layers(
    model_type: str, changes: dict[str, Any], engine: Engine, zero_stage: int
) -> None:
    model = family(model_type, num_hidden_layers=16, **changes)
    config = a_request(engine, zero_stage, model=model).config
    stream = trace_stream(model, config, accumulates=True)
    whole = Stream.of(record_trace(model, config, 16, 13, 251, accumulates=True))
    batch, length = np.array([2, 4]), np.array([64, 1024])
    assert stream.peak_bytes(batch, length, "cpu") == pytest.approx(whole.peak_bytes(batch, length, "cpu"), rel=0.01)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_layers_alternate_where_the_family_says(model_type: str) -> None:
    kinds = layer_kinds(family(model_type, num_hidden_layers=4), attention_of(model_type))
    alternating = model_type in ("qwen2_moe", "gemma2")
    assert [kind == kinds[0] for kind in kinds] == [True, not alternating] * 2


def test_attention_that_a_family_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="gemma2 cannot be built with attention sdpa"):
        build_model(family("gemma2"), "sdpa")
