"""Memory of text generation with Hugging Face transformers, from the shape of the model.

The peak is the largest of four moments. Per sequence of the batch, with p prompt tokens, n new tokens, h hidden_size, V
vocab_size, I the MLP's inner width, 2 bytes a value in bf16:

    MLP of the prompt     weights + cache(p) + p·(4·h + 3·I)
        the model still holds its input embeddings, the layer its input and the residual, the MLP its normed input, the
        activated gate, the up projection and their product
    attention of it       weights + cache(p) + p·(3·h + 5·Q)
        q, rotated q, the keys and values repeated for the kernel and the result, Q = query heads x head_dim
    logits of it          weights + cache(p) + V·(2 + 4) for each token whose logits are kept: bf16 and an fp32 copy
    first new token       weights + caches(p) + V·4 for each of these tokens
        Python binds the second output after it is made, so the prompt's logits live through one more forward pass
    last new token        weights + caches(p + n - 1)

cache(t) is 2·t·K·layers values, K = key heads x head_dim: grouped-query attention is in K. A dynamic cache grows by
concatenation: one layer's old and new keys live together, and in older transformers all layers' do. With the layers on
several GPUs (`device_map="auto"`), each has its own moments: the last one makes the logits, the first one gets them.

Left out: sampling's copies of the last logits, the tokens themselves, padding, `assistant` and beam copies.
Sources: transformers modeling_qwen2.py, modeling_qwen3.py, cache_utils.py and generation/utils.py of the versions named
in `GENERATE_PROFILES`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from autotune.predict.device import CUDA_CONTEXT_BYTES, block_bytes, reused_block_bytes, workspace_bytes
from autotune.predict.shape import DecoderShape, LayerShape, Matrix
from autotune.spec.prediction import MemoryPrediction, Part

Quantization = Literal["none", "int8", "fp8", "nf4", "gptq-int4", "gptq-int8", "awq"]
KvCache = Literal["dynamic", "static"]

DEVIATION = 0.03
"""Judgement, not measured: what the named omissions may add."""

_GROUP_SIZE = 128
_FP8_BLOCK = 128
_NF4_BLOCK = 64
_VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """One way to generate text."""

    batch_size: int
    """Sequences at a time."""
    prompt_tokens: int
    new_tokens: int
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of activations, the cache and what is not quantised."""
    quantization: Quantization = "none"
    kv_cache: KvCache = "dynamic"
    """`static` is allocated once, for the prompt and all new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateProfile:
    """What versions of transformers do differently."""

    all_prompt_logits: bool
    """Prefill makes the logits of every prompt token and copies them to fp32; otherwise of the last one."""
    rebuilds_cache: bool
    """The cache is a tuple that each step makes anew, while the step's caller holds the old one."""
    rotary_tables: bool
    """Each layer has tables of cosines and sines for `max_position_embeddings`, in the model's precision."""
    loads_tensor_by_tensor: bool
    """Each weight has a segment of its own; otherwise all are cut from blocks that were reserved at once."""


GENERATE_PROFILES: dict[str, GenerateProfile] = {
    # 4.50 and later: `caching_allocator_warmup` reserves the weights' bytes before they are loaded.
    "transformers": GenerateProfile(
        all_prompt_logits=False, rebuilds_cache=False, rotary_tables=False, loads_tensor_by_tensor=False
    ),
    # 4.45 to 4.49: `num_logits_to_keep`, the cache object is handed through `generate`, one rotary module a model.
    "transformers-4.46": GenerateProfile(
        all_prompt_logits=False, rebuilds_cache=False, rotary_tables=False, loads_tensor_by_tensor=True
    ),
    # 4.36 to 4.41: `DynamicCache.from_legacy_cache` in each step, `cos_cached` and `sin_cached` in each layer.
    "transformers-4.37": GenerateProfile(
        all_prompt_logits=True, rebuilds_cache=True, rotary_tables=True, loads_tensor_by_tensor=True
    ),
    # The Qwen code of 2023 on the Hub: tuples of keys and values, rotary tables once a model, no fp32 copy at length 1.
    "qwen1-remote-code": GenerateProfile(
        all_prompt_logits=True, rebuilds_cache=True, rotary_tables=False, loads_tensor_by_tensor=True
    ),
}


def predict_generate(
    shape: DecoderShape, config: GenerateConfig, profile: GenerateProfile, gpu: str, gpus: int
) -> tuple[MemoryPrediction, ...]:
    """One prediction per GPU, in the order of the layers.

    Args:
        shape: the model.
        config: how it generates.
        profile: which transformers runs it.
        gpu: its name in the table.
        gpus: over how many of them the layers are spread.
    """
    stages = split_layers(shape, config.quantization, _VALUE_BYTES[config.precision], profile, gpus)
    return tuple(_device(shape, config, profile, gpu, stage, gpus) for stage in stages)


@dataclass(frozen=True, slots=True)
class Stage:
    """The consecutive layers on one GPU."""

    index: int
    weight_bytes: int
    layers: tuple[LayerShape, ...]
    last: bool


@functools.lru_cache(maxsize=4096)
def split_layers(
    shape: DecoderShape, quantization: Quantization, value_bytes: int, profile: GenerateProfile, gpus: int
) -> tuple[Stage, ...]:
    """Spread the layers as accelerate's `device_map="auto"` does when all GPUs have room.

    Each GPU but the last may hold an equal share and a quarter more than one layer, the first one a layer less than
    that. Source: accelerate/utils/modeling.py, `get_balanced_memory` and `infer_auto_device_map`.
    """
    size = block_bytes if profile.loads_tensor_by_tensor else _rounded
    embedding = size(shape.embedding.parameters * value_bytes)
    tail = size(shape.hidden_size * value_bytes) + (0 if shape.tie_word_embeddings else embedding)
    sizes = {layer: _layer_bytes(layer, quantization, value_bytes, profile) for layer in set(shape.layers)}
    largest = max(sizes.values())
    share = (embedding + sum(sizes[layer] for layer in shape.layers) + tail) // gpus + largest * 5 // 4
    held: list[list[LayerShape]] = [[]]
    used = [embedding]
    for layer in shape.layers:
        limit = share - largest if len(held) == 1 else share
        if used[-1] + sizes[layer] > limit and len(held) < gpus:
            held.append([])
            used.append(0)
        held[-1].append(layer)
        used[-1] += sizes[layer]
    used[-1] += tail
    last = len(held) - 1
    return tuple(
        Stage(i, weights, tuple(layers), i == last) for i, (weights, layers) in enumerate(zip(used, held, strict=True))
    )


def _rounded(size: int) -> int:
    return size


def _layer_bytes(layer: LayerShape, quantization: Quantization, value_bytes: int, profile: GenerateProfile) -> int:
    size = block_bytes if profile.loads_tensor_by_tensor else _rounded
    total = sum(matrix.count * size(matrix.rows * matrix.columns * value_bytes) for matrix in layer.plain)
    for matrix in layer.linear:
        total += matrix.count * sum(size(tensor) for tensor in _tensors(matrix, quantization, value_bytes))
    return total


def _tensors(matrix: Matrix, quantization: Quantization, value_bytes: int) -> Iterator[int]:
    """Bytes of each tensor that stands for one linear weight.

    none       the weight
    int8       int8 weight, an fp32 scale an output row (bitsandbytes LLM.int8, `SCB`)
    nf4        half a byte a weight, an fp32 maximum for each 64 (bitsandbytes, without double quantization)
    fp8        one byte a weight, an fp32 scale for each 128 x 128 (`weight_scale_inv`, fine-grained FP8 of Qwen3)
    gptq, awq  packed weight, an fp16 scale and a packed zero for each 128 inputs and output; gptq also an int32 group
               index an input (AutoGPTQ `qweight`, `scales`, `qzeros`, `g_idx`)
    """
    weights = matrix.rows * matrix.columns
    if quantization == "none":
        yield weights * value_bytes
    elif quantization == "int8":
        yield from (weights, 4 * matrix.rows)
    elif quantization == "nf4":
        yield from (weights // 2, 4 * weights // _NF4_BLOCK)
    elif quantization == "fp8":
        yield from (weights, 4 * -(-matrix.rows // _FP8_BLOCK) * -(-matrix.columns // _FP8_BLOCK))
    else:
        bits = 8 if quantization == "gptq-int8" else 4
        groups = -(-matrix.columns // _GROUP_SIZE) * matrix.rows
        yield from (weights * bits // 8, 2 * groups, groups * bits // 8)
        if quantization != "awq":
            yield 4 * matrix.columns


def _device(
    shape: DecoderShape, config: GenerateConfig, profile: GenerateProfile, gpu: str, stage: Stage, gpus: int
) -> MemoryPrediction:
    value = _VALUE_BYTES[config.precision]
    batch, prompt, length = config.batch_size, config.prompt_tokens, config.prompt_tokens + config.new_tokens
    tokens = batch * prompt
    layers = len(stage.layers)

    static = config.kv_cache == "static"

    def cache(positions: int) -> int:
        size = batch * positions * shape.key_value_width * value
        return 2 * layers * (block_bytes(size) if static else reused_block_bytes(size))

    held, final = cache(length if static else prompt), cache(length if static else length - 1)
    copies = 2 if profile.rebuilds_cache and not static else 1
    growth = 0 if static or profile.rebuilds_cache else final // (2 * layers)

    tables = 0
    if profile.rotary_tables:
        positions = max(shape.max_position_embeddings, length)
        tables = 2 * layers * positions * shape.head_dim * value
    fixed = stage.weight_bytes + tables
    kept = batch * shape.vocab_size * (prompt if profile.all_prompt_logits else 1)
    first = stage.index == 0
    working = max(_working_values(shape, layer) for layer in set(stage.layers)) * value * tokens
    moments: list[dict[Part, int]] = [
        {Part.CACHE: held, Part.ACTIVATIONS: working},
        {Part.CACHE: copies * held, Part.LOGITS: 4 * kept if first else 0},
        {Part.CACHE: copies * final + growth},
    ]
    if stage.last:  # several GPUs: made here, and the fp32 copy then moved to the first
        moments.append(
            {Part.CACHE: held, Part.LOGITS: (value + 4) * kept, Part.ACTIVATIONS: 2 * tokens * shape.hidden_size}
        )
    peak = max(moments, key=lambda parts: sum(parts.values()))
    workspace = workspace_bytes(gpu)
    allocated = fixed + workspace + sum(peak.values())
    breakdown = {
        Part.PARAMETERS: fixed,
        Part.ACTIVATIONS: 0,
        Part.LOGITS: 0,
        **peak,
        Part.CONTEXT: workspace + CUDA_CONTEXT_BYTES,
    }
    return MemoryPrediction(
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        device_used_bytes=allocated + CUDA_CONTEXT_BYTES,
        host_bytes=0,
        breakdown=breakdown,
        deviation=DEVIATION,
    )


def _working_values(shape: DecoderShape, layer: LayerShape) -> int:
    """Values a prompt token that a layer works in, at its fullest."""
    attention = 3 * shape.hidden_size + 5 * shape.query_width
    mlp = 4 * shape.hidden_size + 3 * layer.mlp_width
    if layer.experts:
        # Experts run one after the other: on average each holds its share of the tokens, their sum is one more hidden.
        share = layer.experts_per_token * (shape.hidden_size + 3 * layer.expert_width) // layer.experts
        mlp += shape.hidden_size + share
    return max(attention, mlp)
